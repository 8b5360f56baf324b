"""One step of one block: (state, batch, draws, handed) -> (state, loss, handed).

All that a step needs are its arguments, and all that others need of it is its result, so it may be made in any process
on any machine. What it draws depends on (seed, block, step, part of the batch) alone. As usual with large tensors,
what comes in is not copied: the state is updated where it is, and a passage that is handed in is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.handed import Handed, Passage
from diffusionblocks.blocks.model import BlockModel
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


def step(
    model: BlockModel,
    task: Task,
    index: int,
    states: tuple[BlockState, BlockState],
    batch: Batch,
    handed: Sequence[Handed] = (),
    *,
    config: TrainingConfig,
    local: LocalObjective,
    ranges: range | None = None,
    borrowed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepResult:
    """Forward, backward and update of block `index`, which is where the batch is.

    Args:
        states: of the block and of the shared parts.
        handed: by the step before, for each of `config.accumulation` parts of the batch; empty = nothing.
        local: how far the block follows its head; its `recent` losses are part of the state.
        ranges: the blocks whose noise ranges it learns, before they part (None = its own).
        borrowed: within it, blocks that are elsewhere can be read (for models whose steps do: `reads_idle_blocks`).
    """
    (state, shared), parts = states, config.accumulation
    device = next(iter(batch.values())).device
    settling = local.settles(state)
    model.train()
    total, handing, layers = torch.zeros((), device=device), list[Handed](), 0.0
    for part, piece in enumerate(_pieces(batch, parts)):
        draws = Draws(config.seed, device, index, state.steps, part)
        draws.seed_layers()
        given = handed[part] if handed else None
        with borrowed():
            with autocast(device, config.precision):
                if isinstance(given, Passage) and given.loss is not None:
                    output = _going_down(model, index, piece, given)
                else:
                    output = task.step(model, index, piece, handed=given, ranges=ranges, draws=draws, settling=settling)
            (output.loss / parts).backward()
        loss, leaving = output.loss.detach(), output.handed
        if isinstance(leaving, Passage):
            leaving = leaving.stepped(index, loss, parts)
        total += loss / parts
        handing += [] if leaving is None else [leaving]
        layers += model.layer_evaluations(index) if output.layers is None else output.layers
    norms = state.step(local.trust(index, state, total)), shared.step()
    return StepResult(total, tuple(handing), layers / parts, norms)


def cut(context: Tensor | None, parts: int) -> tuple[Handed, ...]:
    """Features of a whole batch as a step is handed them, for each part of it."""
    return () if context is None else context.chunk(parts)


def _going_down(model: BlockModel, index: int, batch: Batch, passage: Passage) -> StepOutput:
    """What the gradient that comes down from later blocks makes of the loss."""
    assert isinstance(model, BlockCoordinateModel)
    loss, layers = model.going_down(index, batch, passage)
    return StepOutput(loss, passage, layers)


def _pieces(batch: Mapping[str, Tensor], count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
        return
    chunks = {name: tensor.chunk(count) for name, tensor in batch.items()}
    for index in range(count):
        yield {name: chunk[index] for name, chunk in chunks.items()}
