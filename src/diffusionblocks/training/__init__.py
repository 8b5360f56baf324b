from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.progress import Progress
from diffusionblocks.training.trainer import Trainer

__all__ = ["Progress", "Trainer", "TrainingConfig"]
