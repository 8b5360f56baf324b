"""Losses and gradients that are not finite: found a few steps late, and before anything of them is saved.

To look at a loss waits for the device, so it is done at log intervals and before checkpoints alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from diffusionblocks.data.stream import BatchStream
from diffusionblocks.errors import UserError
from diffusionblocks.training import checkpoint
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.order import Visit

MOST_UNCHECKED = 4096  # norms that nobody has looked at


class Divergence:
    """Watches the steps of a run.

    Args:
        config: of the run. device: of its steps. streams: of its batches, by their size. folder: of its checkpoints.
    """

    def __init__(
        self, config: TrainingConfig, device: torch.device, streams: Mapping[int, BatchStream], folder: Path | None
    ) -> None:
        self.config, self.device, self.streams, self.folder = config, device, streams, folder
        self._visits: list[tuple[Visit, int, list[Tensor]]] = []  # a visit, its block's steps before, losses
        self._norms: list[tuple[str, int, Tensor]] = []  # whose gradients, in which of its steps, their norm

    @property
    def full(self) -> bool:
        """Whether it is time to look."""
        return len(self._norms) > MOST_UNCHECKED

    def watch(
        self,
        visit: Visit,
        losses: list[Tensor],
        norms: list[tuple[Tensor | None, Tensor | None]],
        made: tuple[int, int],
    ) -> None:
        """Remembers the steps of a visit. norms: of the gradients of the block and of the shared parts. made: how many
        steps these two had made before."""
        self._visits.append((visit, made[0], losses))
        owners = f"block {visit.block}", "the shared parts"
        for place, pair in enumerate(norms):
            for name, before, norm in zip(owners, made, pair, strict=True):
                if norm is not None:
                    self._norms.append((name, before + place + 1, norm))

    def check(self) -> None:
        """Looks at everything since it last looked. Raises UserError at the first that is not finite."""
        visits, self._visits = self._visits, []
        norms, self._norms = self._norms, []
        values = [loss.float() for _, _, losses in visits for loss in losses]
        values += [norm.float().to(self.device) for _, _, norm in norms]
        if not values or (read := torch.stack(values)).isfinite().all():
            return
        found = read.tolist()
        steps = [(visit, made, place) for visit, made, losses in visits for place in range(len(losses))]
        for (visit, made, place), value in zip(steps, found, strict=False):
            if not math.isfinite(value):
                what = f"the loss of block {visit.block} became {value} at its step {made + place + 1}"
                self.stop(what, self._bad_batch(visit, place))
        for (name, step, _), value in zip(norms, found[len(steps) :], strict=True):
            if not math.isfinite(value):
                self.stop(f"the gradient of {name} became {value} at its step {step}")

    def stop(self, what: str, fault: str | None = None) -> NoReturn:
        """Raises UserError for what is not finite: the data's `fault` where there is one, else probably the learning
        rate's."""
        kept = checkpoint.existing(self.folder) if self.folder else []
        left = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        if fault is not None:
            raise UserError(f"{what}; training stopped, {left}. {fault}")
        again = " --resume never, which starts over" if self.folder else ""
        rate = f"{min(self.config.learning_rate / 4, TrainingConfig.learning_rate):.2g}"
        raise UserError(f"{what}; training stopped, {left}. Try --train.learning-rate {rate}{again}")

    def _bad_batch(self, visit: Visit, place: int) -> str | None:
        """Names the samples of a step's batch that are not finite; None where all are. The batch is loaded once more
        for it."""
        stream, number = self.streams[visit.samples], visit.batches[place]
        for index, sample in zip(stream.indices(number), _samples(next(stream.load([number]))), strict=True):
            for name, tensor in sample.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return (
                        f"Sample {index} of the training data (batch {number}) holds {name} that are not finite: mend "
                        "or remove it"
                    )
        return None


def _samples(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for index in range(len(next(iter(batch.values())))):
        yield {name: tensor[index] for name, tensor in batch.items()}
