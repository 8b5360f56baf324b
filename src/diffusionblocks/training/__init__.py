from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.trainer import Progress, Trainer

__all__ = ["Progress", "Trainer", "TrainingConfig"]
