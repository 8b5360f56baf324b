from diffusionblocks.tasks.base import Metric, StepOutput, Task
from diffusionblocks.tasks.classification import Classification

__all__ = ["Classification", "Metric", "StepOutput", "Task"]
