from diffusionblocks.tasks.base import Metric, StepOutput, Task
from diffusionblocks.tasks.causal_lm import CausalLM
from diffusionblocks.tasks.classification import Classification
from diffusionblocks.tasks.image_generation import ImageGeneration

__all__ = ["CausalLM", "Classification", "ImageGeneration", "Metric", "StepOutput", "Task"]
