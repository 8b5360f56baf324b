"""Blocks of a pretrained language model, each on its own loss and on the ordinary one at the end of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diffusionblocks.errors import UserError
from diffusionblocks.methods.base import Step, layers_after, neighbours
from diffusionblocks.methods.diffusionblocks import DiffusionBlocks, keeps_the_network
from diffusionblocks.recipes import Recipe


class Mixed(DiffusionBlocks):
    name = "mixed"
    description = "B blocks, each on its own loss and on the ordinary one at the end"
    adapts = True
    loops = False

    def prepare(self, recipe: Recipe) -> Recipe:
        if not recipe.task.writes:
            raise UserError(f"the method {self.name} is for language models that write token by token (task causal-lm)")
        recipe = super().prepare(recipe)
        weight = recipe.blocks.ordinary or 1.0
        return dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, ordinary=weight))

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return (False,) if recipe.model.pretrained and recipe.task.writes and keeps_the_network(recipe) else ()

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        """Layers after the active block keep their inputs."""
        return neighbours(sizes, layers_after(sizes))

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 50

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "it trains the whole network, one block at a time, partly on the ordinary loss"


METHODS = (Mixed(),)
