"""The first L/B layers, end to end: an ordinary network with the memory of one block. Of a looped network: all layers,
once, which is what DiffusionBlocks trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.methods.base import Method, Step, spans
from diffusionblocks.methods.end_to_end import EndToEnd
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import Recipe


class Shallow(Method):
    name = "shallow"
    description = "the first L/B layers end to end (looped networks: all layers, once): the same memory as a block"
    splits = loops = once = True
    traced_as = EndToEnd.name

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        parts = take_apart(network, recipe.task.target)
        return whole_network(parts, recipe.blocks, len(spans(recipe, len(parts.layers))[0]))

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return () if recipe.model.pretrained else (False,)

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        return super().steps(recipe, sizes[:1])

    def training(self, recipe: Recipe, sizes: Sequence[int], recomputed: float = 1.0) -> float:
        return super().training(recipe, sizes[:1], recomputed)

    def inference(self, recipe: Recipe, sizes: Sequence[int]) -> float:
        return float(sizes[0]) if recipe.task.splits else super().inference(recipe, sizes)

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 80

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "nothing that trains all layers fits; a network of the first block's layers alone does"


METHODS = (Shallow(),)
