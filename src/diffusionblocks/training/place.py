"""Where a model is while it trains, and in what state others find it.

Shared parts are on the device, blocks where residency has them. An evaluation sees moving averages in the place of
weights, and every block readable. After a run everything is in one place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel
from diffusionblocks.networks.llama import RotaryLayer
from diffusionblocks.system.devices import autocast
from diffusionblocks.system.run_folder import RESIDENCY
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.residency import Residency
from diffusionblocks.training.state import BlockState


class Place:
    """Args: model, with the states of its blocks and of the shared parts; device: where it trains; folder: of the run.

    averaged: moving averages are in the place of the weights.
    """

    def __init__(
        self,
        model: BlockModel,
        states: Sequence[BlockState],
        shared: BlockState,
        config: TrainingConfig,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.model, self.states, self.shared, self.config = model, states, shared, config
        self.device, self.folder = device, folder
        self.averaged = self._here = self._roomy = False  # here: shared parts are on the device
        self.prefetch: bool | None = None  # set before the first step by those who measure it; None = see Residency
        self._residency: Residency | None = None

    @property
    def begun(self) -> bool:
        """Whether blocks are where residency has them."""
        return self._residency is not None

    @property
    def residency(self) -> Residency:
        """Set up on first use: moves the blocks to where the configuration wants them, and shared parts to the
        device."""
        if not self._here:
            self._move_shared(self.device)
        if self._residency is None:
            for layer in (module for module in self.model.modules() if isinstance(module, RotaryLayer)):
                layer.constants_to(self.device)
            folder = None if self.folder is None else self.folder / RESIDENCY / str(os.getpid())
            kind, ahead = self.config.residency, self.prefetch
            self._residency = Residency(kind, self.states, self.device, folder, prefetch=ahead)
        return self._residency

    def _move_shared(self, device: torch.device) -> None:
        away = {name: tensor for name, tensor in self.shared.tensors().items() if tensor.device != device}
        moving = {name: tensor.to(device) for name, tensor in away.items() if not self.shared.stays_on_host(name)}
        self.shared.replace(moving)
        self._here = device == self.device

    def make_room(self, trained: Iterable[int]) -> None:
        """Before the first step, on a card: for all that stays there (`BlockState.make_room`)."""
        if self._roomy:
            return
        self._roomy = True
        if self.device.type == "cpu":
            return
        stay = [] if self.residency.moves else [self.states[index] for index in trained]
        for state in (self.shared, *stay):
            state.make_room(self.device)

    def part(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies blocks, weights and optimizer state, into others."""
        for source, target in copies:
            with self.residency.active(source):
                self.residency.copy(source, target)

    def settle(self) -> None:
        """Waits until nothing is on its way."""
        if self._residency is not None:
            self._residency.settle()

    def leave(self) -> None:
        """Puts the model together again, so that others can use it: on the host where idle blocks are kept off the
        device."""
        if self._residency is None or not self._residency.moves or self.device.type == "cpu":
            return
        for index in self._residency.present():
            self._residency.park(index)
        self._residency.settle()
        self._move_shared(torch.device("cpu"))

    @contextmanager
    def evaluated(self, holders: tuple[int, ...]) -> Iterator[None]:
        """The model as it is evaluated: moving averages in place, no gradients, every block readable, and in the place
        of a block that has not parted from its network, the block that holds that (`holders`)."""
        if self.averaged:  # asked for within itself
            self.model.eval()
            yield
            return
        visiting, residency = not self._here, self.residency
        residency.settle()
        self.swap_averages()
        self.averaged = True
        self.model.eval()
        if isinstance(self.model, DiffusionBlocksModel):
            self.model.holders = holders
        try:
            with residency.borrowed(whole=True), torch.no_grad(), autocast(self.device, self.config.precision):
                yield
        finally:
            self.swap_averages()
            self.averaged = False
            if isinstance(self.model, DiffusionBlocksModel):
                self.model.holders = tuple(range(self.model.num_blocks))
            if visiting:
                self.leave()

    def swap_averages(self) -> None:
        """Moving averages in the weights' place; called again, the weights."""
        for state in (*self.states, self.shared):
            state.swap_average()
