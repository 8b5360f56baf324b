"""DiffusionBlocks ([DB], Shing, Koyama and Akiba): B blocks, each trained alone as a denoiser of its noise range. With
the recipe's settings, or with a preset's laid over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusionblocks.blocks.convert import convert
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.errors import UserError
from diffusionblocks.methods.base import Method, Step, layers_after, neighbours
from diffusionblocks.recipes import Recipe, build
from diffusionblocks.recipes.load import merge, preset
from diffusionblocks.theory import costs


class DiffusionBlocks(Method):
    name = "diffusionblocks"
    description = "B blocks trained alone, the recipe's settings"
    splits = by_blocks = denoises = loops = True

    def prepare(self, recipe: Recipe) -> Recipe:
        """Branching would copy block 0 over the weights that a trained run or a pretrained network brings."""
        if not (recipe.model.start or recipe.model.pretrained):
            return recipe
        if recipe.train.branch_at:
            raise UserError(
                "train.branch_at copies block 0 over all others, and with them what model.start or model.pretrained "
                "brought; set it to 0"
            )
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, branch_at=0.0, own_batch=0))

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        return convert(network, **{**dataclasses.asdict(recipe.blocks), "target": recipe.task.target})

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        if recipe.model.pretrained and recipe.task.writes:
            return (False,) if keeps_the_network(recipe) else ()
        return (False, True)

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        """A block on features is shown between two: one that hands on, and one to hand on to, for the last block may
        have another head than those before it."""
        if recipe.blocks.context == "input":
            return [Step((size,)) for size in sizes]
        return neighbours(sizes)

    def training(self, recipe: Recipe, sizes: Sequence[int], recomputed: float = 1.0) -> float:
        made_anew = recipe.blocks.context == "features" and recipe.train.order != "sweep"
        features = costs.features_made_anew(sizes) if made_anew else 0.0
        return sum(_steps_of_each(recipe, sizes)) * recomputed + features

    def inference(self, recipe: Recipe, sizes: Sequence[int]) -> float:
        task, blocks, layers = recipe.task, recipe.blocks, sum(sizes)
        if not task.splits:
            once = blocks.prelude + blocks.coda
            return costs.walked_inference(blocks.prelude, layers - once, blocks.coda, task.applied())
        if task.by_block:
            return layers / len(sizes)
        lasts = [index == len(sizes) - 1 for index in range(len(sizes))]
        if task.target != "causal":
            return layers + sum(blocks.heads(last, task.target) for last in lasts)
        if blocks.target_entry == "none":
            return layers
        # A clean token passes the layers; the noisy one passes what reads it.
        return sum(blocks.evaluations(own, last, task.target) for own, last in zip(sizes, lasts, strict=True))

    def rank(self, recipe: Recipe, tied: bool) -> int:
        """What was learned before is safest with the loss that it was learned by, and next-token blocks stay behind the
        whole network's loss, unless its embeddings would stay as they were drawn."""
        behind = recipe.model.pretrained or (recipe.task.target == "causal" and not tied)
        return 60 if behind else 30

    def reason(self, recipe: Recipe, tied: bool) -> str:
        if not recipe.task.splits:
            return "unrolling does not fit, even with recomputed activations; one pass per step does"
        return "no method that trains the whole network at once fits; blocks trained alone do"


class WithPreset(DiffusionBlocks):
    """The recipe with a preset laid over it, as a method of its own."""

    def __init__(self, preset: str, description: str, *, loops: bool = False) -> None:
        self.preset, self.loops = preset, loops
        self.name, self.description = f"{DiffusionBlocks.name}-{preset}", description

    def prepare(self, recipe: Recipe) -> Recipe:
        content = recipe.as_dict()
        if self.preset not in recipe.task.presets:
            raise UserError(f"the method {self.name} is not for the task {recipe.task.kind}")
        content = merge(content, preset(content, self.preset))
        if not content["train"]["branch_at"]:
            content = merge(content, {"train": {"own_batch": 0}})
        content = merge(content, {"task": {key: getattr(recipe.task, key) for key in recipe.task.compared_alike}})
        changed = merge(content, recipe.methods.get(self.name, {}))
        return super().prepare(build(changed, consented=recipe))

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return ()


def keeps_the_network(recipe: Recipe) -> bool:
    """Whether blocks of a pretrained language model are that model, but for their heads."""
    blocks = recipe.blocks
    return blocks.context == "features" and blocks.target_entry == "none" and blocks.shared != "trained"


def _steps_of_each(recipe: Recipe, sizes: Sequence[int]) -> list[float]:
    """Layer evaluations of a step of each block, on average over its steps: heads may learn alone first."""
    blocks, target, found = recipe.blocks, recipe.task.target, []
    for own, after in zip(sizes, layers_after(sizes), strict=True):
        passes = blocks.evaluations(own, after == 0, target, after)
        heads = blocks.heads(after == 0, target) if blocks.context == "features" else 0
        alone = recipe.train.heads_first if target == "causal" and heads else 0.0
        settling = costs.settling(own, heads, after if blocks.distill else 0)
        found.append(passes + alone * (settling - passes))
    return found


METHODS = (
    DiffusionBlocks(),
    WithPreset("paper", "B blocks with the paper's settings (preset paper)", loops=True),
    WithPreset("information", "next-token blocks on the tokens alone (preset information)"),
    WithPreset("features", "next-token blocks on features of one another (preset features)"),
)
