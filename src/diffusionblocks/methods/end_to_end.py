"""Ordinary training of the whole network: of a new one, of a pretrained one, and with recomputed activations."""

from __future__ import annotations

from typing import Any

from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.methods.base import Method
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import Recipe


class EndToEnd(Method):
    name = "end-to-end"
    description = "all layers at once, ordinary training"
    loops = True  # by unrolling them

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        return whole_network(take_apart(network, recipe.task.target), recipe.blocks)

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return () if recipe.model.pretrained else (False,)

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 0

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "ordinary training fits, and nothing is better understood"


class Full(EndToEnd):
    name = "full"
    description = "fine-tunes all of a pretrained network"
    adapts = True
    traced_as = EndToEnd.name

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return (False,) if recipe.model.pretrained else ()

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "full fine-tuning fits, and nothing is better understood"


class Checkpointing(EndToEnd):
    name = "checkpointing"
    description = "end to end, activations recomputed in the backward pass"
    recomputes = True
    traced_as = EndToEnd.name

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return (True,)

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 10

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "it trains the whole network exactly, for a third more computation"


METHODS = (EndToEnd(), Full(), Checkpointing())
