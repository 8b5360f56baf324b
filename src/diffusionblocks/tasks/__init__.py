from diffusionblocks.tasks.base import Metric, StepOutput, Task
from diffusionblocks.tasks.causal_lm import CausalLM
from diffusionblocks.tasks.classification import Classification

__all__ = ["CausalLM", "Classification", "Metric", "StepOutput", "Task"]
