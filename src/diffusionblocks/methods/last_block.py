"""The last L/B layers and the readout of a pretrained network, on the ordinary loss; the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.methods.base import Method, Step, spans
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import Recipe
from diffusionblocks.theory import costs


class LastBlock(Method):
    name = "last-block"
    description = "trains the last L/B layers of a pretrained network"
    adapts = splits = True

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        parts = take_apart(network, recipe.task.target)
        return whole_network(parts, recipe.blocks, trained_layers=len(spans(recipe, len(parts.layers))[-1]))

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return (False,) if recipe.model.pretrained else ()

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        before = sum(sizes[:-1])
        return [Step((before, sizes[-1]) if before else (sizes[-1],))]

    def training(self, recipe: Recipe, sizes: Sequence[int], recomputed: float = 1.0) -> float:
        return costs.partly_frozen(sum(sizes), sizes[-1])

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 70

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "nothing that trains all layers fits; training the last ones does"


METHODS = (LastBlock(),)
