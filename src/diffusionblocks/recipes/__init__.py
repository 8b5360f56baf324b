"""Recipes: everything a run needs, as one YAML file that can be copied and edited."""

from diffusionblocks.recipes.load import build, built_in, changed, load_recipe
from diffusionblocks.recipes.schema import ModelConfig, Recipe

__all__ = ["ModelConfig", "Recipe", "build", "built_in", "changed", "load_recipe"]
