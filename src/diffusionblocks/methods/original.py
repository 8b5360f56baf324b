"""The pretrained language model as it is: what every way to adapt it is compared with."""

from __future__ import annotations

from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.errors import UserError
from diffusionblocks.methods.base import Result
from diffusionblocks.methods.end_to_end import EndToEnd
from diffusionblocks.recipes import Recipe


class Original(EndToEnd):
    name = "original"
    description = "the pretrained network as it is"
    adapts = True
    trains = loops = False
    traced_as = EndToEnd.name

    def prepare(self, recipe: Recipe) -> Recipe:
        if not recipe.task.writes:
            raise UserError(f"the method {self.name} is for language models that write token by token (task causal-lm)")
        return super().prepare(recipe)

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return ()

    def result(self, recipe: Recipe, model: BlockModel) -> Result:
        return Result(recipe.model.pretrained, "as it came", False)


METHODS = (Original(),)
