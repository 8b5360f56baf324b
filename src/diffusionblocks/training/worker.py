"""One step of one block: (state, batch, draws, handed) -> (state, loss, handed).

All that a step needs are its arguments, and all that others need of it is its result, so it may be made in any process
on any machine. What it draws depends on (seed, block, step, part of the batch) alone. As usual with large tensors,
what comes in is not copied: the state is updated where it is, and a passage that is handed in is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.handed import Handed, Passage
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.seeds import Draws
from diffusionblocks.system.devices import autocast
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.local import LocalObjective
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.task import StepOutput, Task


class StepResult(NamedTuple):
    """loss: mean over the batch, a detached scalar. handed: what the next step gets, for each part of the batch; empty
    where that is nothing. layers: that a sample passed. norms: of the gradients of the block and of the shared parts
    before clipping, scalars on the device (None: nothing clips)."""

    loss: Tensor
    handed: tuple[Handed, ...]
    layers: float
    norms: tuple[Tensor | None, Tensor | None]


class Worker:
    """Makes steps of the blocks of one model.

    Args:
        model, task, config: of the run. local: how far blocks follow their heads; its `recent` losses (of the block,
            and, with local.trust, of the last one) are part of the state.
    """

    def __init__(self, model: BlockModel, task: Task, config: TrainingConfig, local: LocalObjective) -> None:
        self.model, self.task, self.config, self.local = model, task, config, local
        self._modules = list(model.modules())

    def step(
        self,
        index: int,
        states: tuple[BlockState, BlockState],
        batch: Batch,
        handed: Sequence[Handed] = (),
        *,
        ranges: range | None = None,
        borrowed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> StepResult:
        """Forward, backward and update of block `index`, which is where the batch is.

        Args:
            states: of the block and of the shared parts.
            handed: by the step before, for each part of the batch (`train.accumulation`); empty = nothing.
            ranges: the blocks whose noise ranges it learns, before they part (None = its own).
            borrowed: within it, blocks that are elsewhere can be read, for a model whose steps do.
        """
        (state, shared), parts = states, self.config.accumulation
        reading = borrowed if self.model.reads_idle_blocks else nullcontext
        device = next(iter(batch.values())).device
        settling = self.local.settles(state)
        self._train_mode()
        total: Tensor | None = None
        handing, layers = list[Handed](), 0.0
        for part, piece in enumerate(_pieces(batch, parts)):
            draws = Draws(self.config.seed, device, index, state.steps, part)
            draws.seed_layers()
            given = handed[part] if handed else None
            with reading():
                with autocast(device, self.config.precision):
                    output = self._forward(index, piece, given, ranges, draws, settling)
                (output.loss / parts if parts > 1 else output.loss).backward()
            loss, leaving = output.loss.detach(), output.handed
            if isinstance(given, Passage) and leaving is not given:
                kind = type(self.task).__name__
                raise UserError(f"train.order backward needs a task that hands the gradient on, which {kind} does not")
            if isinstance(leaving, Passage):
                leaving = leaving.stepped(index, loss, parts)
            share = (loss / parts if parts > 1 else loss).float()
            total = share if total is None else total + share
            handing += [] if leaving is None else [leaving]
            layers += self.model.layer_evaluations(index) if output.layers is None else output.layers
        assert total is not None
        norms = state.step(self.local.trust(index, state, total)), shared.step()
        return StepResult(total, tuple(handing), layers / parts, norms)

    def _forward(
        self, index: int, piece: Batch, given: Handed, ranges: range | None, draws: Draws, settling: bool
    ) -> StepOutput:
        """The task's loss, or what a gradient that comes down from later blocks makes of it."""
        if isinstance(given, Passage) and given.loss is not None:
            assert isinstance(self.model, BlockCoordinateModel)
            loss, layers = self.model.going_down(index, piece, given)
            return StepOutput(loss, given, layers)
        return self.task.step(self.model, index, piece, handed=given, ranges=ranges, draws=draws, settling=settling)

    def _train_mode(self) -> None:
        """As `model.train()`, which would pass through all modules, of all blocks, in the step of each."""
        if not all(module.training for module in self._modules):
            self.model.train()


def cut(context: Tensor | None, parts: int) -> tuple[Handed, ...]:
    """Features of a whole batch as a step is handed them, for each part of it."""
    return () if context is None else context.chunk(parts)


def _pieces(batch: Mapping[str, Tensor], count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
        return
    chunks = {name: tensor.chunk(count) for name, tensor in batch.items()}
    for index in range(count):
        yield {name: chunk[index] for name, chunk in chunks.items()}
