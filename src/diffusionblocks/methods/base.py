"""What a method is: a configuration of the one trainer, never a second loop.

A method declares itself as one object, and the rest of the package asks it. Everything has a default, that of ordinary
training of the whole network, but for its name, its description and how its model is built:

    class HalfDepth(Method):
        name, description, splits = "half-depth", "the first half of the layers", False

        def build(self, recipe, network):
            parts = take_apart(network, recipe.task.target)
            return EndToEndModel(parts, len(parts.layers) // 2)

    diffusionblocks.register_method(HalfDepth())

L is the number of layers; `sizes` are the layers of each block, in order (one block = [L]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.looped import LoopedNetwork
from diffusionblocks.blocks.model import BlockModel, EndToEndModel, WholeDenoiser
from diffusionblocks.errors import UserError
from diffusionblocks.options import check_file_name
from diffusionblocks.recipes import Recipe
from diffusionblocks.system.run_folder import DEPLOYED, MODEL
from diffusionblocks.theory import costs
from diffusionblocks.theory.partition import split_layers
from diffusionblocks.training.task import Task


class Step(NamedTuple):
    """A step of one block: the layers of the blocks of a network that shows what happens in it, and which one steps.

    The network need not be the whole one: blocks that have no part in the step's memory are left out or one layer deep.
    """

    sizes: tuple[int, ...]
    block: int = 0


class Result(NamedTuple):
    """What a run leaves to be used. folder: in the run folder, or where an untrained network came from. format: in
    words. needs_diffusionblocks: whether reading it needs this package."""

    folder: str
    format: str
    needs_diffusionblocks: bool


class Method:
    """One method, and what the rest of the package asks of it. Stateless.

    name: of --method. description: one line for --help.
    adapts: it needs a pretrained network. loops: it can train a looped network. trains: False for what only uses a
    network. once: a looped network's core is applied a single time. recomputes: activations are always recomputed in
    the backward pass. adds_context: it puts text before every text that is evaluated (`scored`).
    splits: what it trains depends on blocks.num_blocks. by_blocks: it trains several blocks, in turns. denoises: each
    of these on a noise range of its own. one_pass: they can step in one backward pass (train.order backward).
    reads: groups of the recipe that no other method reads. traced_as: another method whose model `build` makes, so that
    predictions of memory can share traces ("" = none).
    """

    name: str = ""
    description: str = ""
    adapts: bool = False
    loops: bool = False
    trains: bool = True
    once: bool = False
    recomputes: bool = False
    adds_context: bool = False
    splits: bool = False
    by_blocks: bool = False
    denoises: bool = False
    one_pass: bool = False
    reads: tuple[str, ...] = ()
    traced_as: str = ""

    @property
    def as_it_came(self) -> bool:
        """Whether what is evaluated is the pretrained network alone."""
        return not (self.trains or self.adds_context)

    def prepare(self, recipe: Recipe) -> Recipe:
        """The recipe as this method runs it. Raises UserError for a task or setting that it is not for."""
        train = dataclasses.replace(
            recipe.train,
            residency="device",
            order="sweep",
            branch_at=0.0,
            own_batch=0,
            activation_checkpointing=recipe.train.activation_checkpointing or self.recomputes,
        )
        return dataclasses.replace(recipe, train=train, task=self.task(recipe.task))

    def task(self, task: Task) -> Any:
        """The task that it trains."""
        return task.once() if self.once else task

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        """The model that is trained, from a copy of a Hugging Face network."""
        raise NotImplementedError

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        """Its rows in the table of `plan` (for every number of blocks, if it splits): for each whether activations are
        recomputed; () = none. Whoever has rows can be recommended, and needs `rank` and `reason`."""
        return ()

    def steps(self, recipe: Recipe, sizes: Sequence[int]) -> list[Step]:
        """What is traced to predict memory: a step of every block."""
        return [Step((sum(sizes),))]

    def training(self, recipe: Recipe, sizes: Sequence[int], recomputed: float = 1.0) -> float:
        """Layer evaluations (theory/costs.py) of one sample in a step of every block, on average over a run, as the
        trainer counts them. recomputed: factor of activation checkpointing, which the trainer does not count."""
        made, trained = recipe.task.expected()
        once = recipe.blocks.prelude + recipe.blocks.coda
        return costs.unrolled(once, sum(sizes) - once, made, trained, recomputed)

    def inference(self, recipe: Recipe, sizes: Sequence[int]) -> float:
        """Layers of one prediction (of what is generated: of one denoising step)."""
        once = recipe.blocks.prelude + recipe.blocks.coda
        return costs.unrolled_inference(once, sum(sizes) - once, recipe.task.applied())

    def rank(self, recipe: Recipe, tied: bool) -> int:
        """Of the methods that fit, that with the lowest rank is recommended: the least departure from ordinary training
        of the whole network, which has 0. Others: checkpointing 10, lora 20, blocks 40 to 60, parts of the network 70
        and 80. tied: input and output embeddings are one."""
        raise NotImplementedError

    def reason(self, recipe: Recipe, tied: bool) -> str:
        """Why it is recommended, where what ranks before it does not fit."""
        raise NotImplementedError

    def result(self, recipe: Recipe, model: BlockModel) -> Result:
        """What a finished run leaves to be used."""
        if isinstance(model, EndToEndModel) and not isinstance(model, WholeDenoiser | LoopedNetwork):
            return Result(MODEL, "transformers", False)
        if isinstance(model, CausalBlocks) and model.is_ordinary and recipe.model.pretrained:
            return Result(DEPLOYED, "transformers", False)
        return Result(MODEL, "diffusionblocks", True)

    def check(self, recipe: Recipe, data: Any, model: BlockModel) -> None:
        """Raises UserError for what would only fail at evaluation. data: the splits."""

    def scored(self, recipe: Recipe, data: Any, split: Any) -> Any:
        """A split as the method is evaluated on it. data: all splits, of which it may use the training text."""
        return split


REQUIRED = ("build",)
OF_ROWS = ("rank", "reason")  # of a method that `plan` shows


def names(method: Any) -> tuple[str]:
    """The name of a declared method. Raises UserError, in one line, where a part is missing."""
    if not isinstance(method, Method):
        raise UserError(f"a method is an instance of diffusionblocks.Method, got {method!r}")
    kind = type(method)
    missing = [part for part in ("name", "description") if not getattr(method, part)]
    needed = REQUIRED if kind.rows is Method.rows else (*REQUIRED, *OF_ROWS)
    missing += [part for part in needed if getattr(kind, part) is getattr(Method, part)]
    if missing:
        raise UserError(f"the method {method.name or kind.__name__} misses {', '.join(missing)}")
    if not isinstance(method.name, str):
        raise UserError(f"the name of a method is a text, got {method.name!r}")
    check_file_name("the name of a method", method.name)
    return (method.name,)


def spans(recipe: Recipe, num_layers: int) -> list[range]:
    """Layers of each block."""
    return split_layers(num_layers, recipe.blocks.num_blocks, recipe.blocks.layers_per_block)


def neighbours(sizes: Sequence[int], after: Sequence[int] = ()) -> list[Step]:
    """A step of every block, between one layer before and `after` layers after it (one after, if nothing is said)."""
    if len(sizes) == 1:
        return [Step((sizes[0],))]
    after = after or [1] * len(sizes)
    middle = [Step((1, size, rest), 1) for size, rest in zip(sizes, after, strict=True)]
    return [Step((sizes[0], after[0])), *middle[1:-1], Step((1, sizes[-1]), 1)]


def layers_after(sizes: Sequence[int]) -> list[int]:
    """Of each block."""
    return [sum(sizes[index + 1 :]) for index in range(len(sizes))]
