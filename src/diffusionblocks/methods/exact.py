"""Block-coordinate training: the ordinary loss, one block's parameters at a time (blocks/exact.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.methods.base import Method, Step, layers_after, neighbours, spans
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import Recipe
from diffusionblocks.theory import costs


class Exact(Method):
    name = "exact"
    description = "block-coordinate: the ordinary loss, one block's parameters at a time"
    splits = by_blocks = one_pass = True

    def prepare(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, branch_at=0.0, own_batch=0))

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        parts = take_apart(network, recipe.task.target)
        return BlockCoordinateModel(parts, spans(recipe, len(parts.layers)))

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return () if recipe.task.by_block else (False,)

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        """Layers after the active block keep their inputs, layers before it keep nothing. In one backward pass there is
        no more of either than it takes to hand a gradient down."""
        return neighbours(sizes, () if recipe.train.order == "backward" else layers_after(sizes))

    def training(self, recipe: Recipe, sizes: Sequence[int], recomputed: float = 1.0) -> float:
        train = recipe.train
        return sum(costs.in_one_pass(sizes, train.graphs) if train.order == "backward" else costs.in_turn(sizes))

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 40

    def reason(self, recipe: Recipe, tied: bool) -> str:
        said = (
            "it makes the updates of ordinary training with the gradients and optimizer state of one block on the "
            "device at a time, for the transfers and, where activations are recomputed, up to a third more computation"
        )
        if tied:
            said += "; input and output embeddings are tied here, belong to no block and stay as they are"
        if (graphs := recipe.train.graphs) > 1:
            said += f"; the activations of {graphs} blocks fit beside it, which saves recomputing them"
        return said


METHODS = (Exact(),)
