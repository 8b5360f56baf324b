from diffusionblocks.tasks.causal_lm import CausalLM
from diffusionblocks.tasks.classification import Classification
from diffusionblocks.tasks.image_generation import ImageGeneration
from diffusionblocks.tasks.masked_lm import MaskedLM
from diffusionblocks.tasks.next_token import NextToken
from diffusionblocks.tasks.recurrent_lm import RecurrentLM
from diffusionblocks.training.task import Metric, StepOutput, Task

__all__ = [
    "CausalLM",
    "Classification",
    "ImageGeneration",
    "MaskedLM",
    "Metric",
    "NextToken",
    "RecurrentLM",
    "StepOutput",
    "Task",
]
