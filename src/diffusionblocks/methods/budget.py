"""Equal budgets: how many steps each method of a comparison gets."""

from __future__ import annotations

from diffusionblocks.errors import UserError
from diffusionblocks.methods import METHODS, find_method, for_method
from diffusionblocks.methods.base import Method, spans
from diffusionblocks.networks.registry import pretrained_config
from diffusionblocks.recipes import Recipe
from diffusionblocks.training.order import branch_steps, resolve_branch

BUDGETS = ("layer-evaluations", "samples")
REFERENCE = "end-to-end"  # whose steps a recipe of a comparison says


def steps_for_budget(recipe: Recipe, method: str, budget: str) -> int:
    """`train.steps` that gives `method` the budget of `recipe.train.steps` end-to-end steps.

    Args:
        recipe: the recipe as given (its steps are the end-to-end network's).
        budget: `layer-evaluations` (forward and backward passes of layers) or `samples` (loaded for training).
    """
    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}")
    declared, prepared, steps = find_method(method), for_method(recipe, method), recipe.train.steps
    if not declared.trains:
        return steps
    if budget == "samples":
        return _for_samples(declared, prepared, steps) if declared.by_blocks and recipe.task.splits else steps
    num_layers = _num_layers(recipe)
    reference = METHODS[REFERENCE].training(for_method(recipe, REFERENCE), [num_layers])
    return round(steps * reference / declared.training(prepared, _sizes(declared, prepared, num_layers)))


def _num_layers(recipe: Recipe) -> int:
    if recipe.model.pretrained:
        return pretrained_config(recipe.model.pretrained, recipe.model.trust_remote_code).num_layers
    return recipe.model.num_hidden_layers


def _sizes(method: Method, recipe: Recipe, num_layers: int) -> list[int]:
    """Layers of each block."""
    return [len(span) for span in spans(recipe, num_layers)] if method.splits else [num_layers]


def _for_samples(method: Method, recipe: Recipe, steps: int) -> int:
    """Of each block. In the orders `sweep` and `backward` blocks share batches, once they have branched."""
    layers = spans(recipe, _num_layers(recipe))
    if recipe.train.order not in ("sweep", "backward"):
        return max(1, round(steps / len(layers))) if recipe.train.order in ("random", "cyclic") else steps
    train = resolve_branch(recipe.train, method.denoises and recipe.blocks.may_branch(layers))
    common = branch_steps(train, len(layers))
    loaded_per_step = (common + train.steps - common // len(layers)) / train.steps
    return max(1, round(steps / loaded_per_step))
