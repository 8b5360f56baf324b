"""Peak training memory before the run: the trainer's own steps, traced on tensors without data.

Model, optimizers and batch are fake tensors (shapes and types, no storage), so a network of any size can be traced on a
laptop. MemTracker counts what every operation of `Trainer.block_step` would allocate, in the steady state: a first update
has created the optimizer state.

A residual network repeats one layer, so in every phase of a step the peak is c0 + c1 n in the layers n of a block. Deep
blocks are therefore traced at two small depths. The peak is the maximum over phases of what each phase comes to; it is
never interpolated across phases.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from diffusionblocks.memory.tracker import Bytes, PhaseTracker
from diffusionblocks.network import BlockModel, DiffusionBlocksModel, EndToEndModel
from diffusionblocks.noise import MaskingSchedule
from diffusionblocks.partition import Partition
from diffusionblocks.tasks.base import Task
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.trainer import Trainer

SHORT = (2, 4)  # layers per block of the two short traces
FULL = 6  # blocks of up to this many layers are traced as they are


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is to be trained.

    Args:
        build: layers per block -> model (called on the meta device: weights get no storage).
        batch: number of samples -> batch of that size, as the training data would give it.
        layers: how the layers are split; one range = an end-to-end method.
        like: per block, the block that is traced in its place (itself where nothing is said).
        alike: all layers have the same shape, so that depth can be extrapolated.
        multiple: depths of short traces are multiples of this (where the build divides the layers once more).
    """

    build: Callable[[Sequence[int]], BlockModel]
    batch: Callable[[int], dict[str, Tensor]]
    layers: Sequence[range]
    like: Sequence[int] = ()
    alike: bool = True
    multiple: int = 1


@dataclass(frozen=True)
class BlockPrediction:
    """One block. phases: the highest point of each phase of its step, shared parts included. state: its parameters,
    averages and optimizer state, which travel when it is parked."""

    phases: dict[str, Bytes]
    state: Bytes

    @property
    def peak(self) -> Bytes:
        return max(self.phases.values(), key=lambda point: point.total)


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of training.

    blocks: each alone. device: the peak in the worst block, with the idle blocks if they stay on the device. host, disk:
    where blocks are kept otherwise. transfer_per_step: to and from there, per optimizer step.
    """

    blocks: tuple[BlockPrediction, ...]
    device: Bytes
    host: int
    disk: int
    transfer_per_step: int

    @property
    def worst_block(self) -> int:
        return max(range(len(self.blocks)), key=lambda index: self.blocks[index].peak.total)


class Predictor:
    """Predicts one method on one network. Traces are kept, so asking again is cheap.

    Args:
        network: what is trained. task: its objective. config: how; batch size and accumulation are arguments of `at`.
    """

    def __init__(self, network: Network, task: Task, config: TrainingConfig) -> None:
        self.network, self.task, self.config = network, task, config
        depths = {len(span) for span in network.layers}
        self._depths = [depth * network.multiple for depth in SHORT]
        self._short = network.alike and len(depths) == 1 and depths.pop() > FULL * network.multiple
        self._traces: dict[tuple[int, int, int, bool], BlockPrediction] = {}

    def at(self, batch_size: int, accumulation: int = 1) -> Prediction:
        """For optimizer steps of `batch_size` samples in `accumulation` parts."""
        count, samples = len(self.network.layers), batch_size // accumulation
        blocks = tuple(self._block(index, samples, accumulation > 1) for index in range(count))
        whole = sum((block.state for block in blocks), Bytes())
        parked = self.config.residency != "device" and count > 1
        peaks = [block.peak if parked else block.peak + whole + block.state * -1 for block in blocks]
        away = round(whole.total) if parked else 0
        return Prediction(
            blocks=blocks,
            device=max(peaks, key=lambda peak: peak.total),
            host=away if self.config.residency == "host" else 0,
            disk=away if self.config.residency == "disk" else 0,
            transfer_per_step=round(2 * away / count / self.config.visit_steps),
        )

    def largest_batch(self, limit: float, start: int = 1, accumulation: int = 1) -> int:
        """The largest batch size whose peak is at most `limit` bytes, to within 5 %; 0 when none is.

        Args:
            start: where to look first. accumulation: the result is a multiple of it.
        """

        def peak(parts: int) -> float:
            return self.at(parts * accumulation, accumulation).device.total

        low, high = 0, max(1, start // accumulation)
        while peak(high) <= limit and high < 1 << 20:
            low, high = high, high * 2
        while low == 0 and high > 1:
            half = high // 2
            low, high = (half, high) if peak(half) <= limit else (0, half)
        while low and high - low > max(1, low // 20):
            # The peak is nearly linear in the batch, so a chord points close to the border; each trace moves one end.
            chord = low + (high - low) * (limit - peak(low)) / (peak(high) - peak(low))
            guess = min(max(int(chord), low + 1), high - 1)
            if peak(guess) <= limit:
                low = guess
                step = min(low + max(1, low // 20), high)
                low, high = (low, step) if peak(step) > limit else (step, high)
            else:
                high = guess
        return low * accumulation

    def _block(self, index: int, samples: int, accumulate: bool) -> BlockPrediction:
        like = self.network.like[index] if self.network.like else index
        if not self._short:
            return self._trace(like, 0, samples, accumulate)
        first, second = (self._trace(like, depth, samples, accumulate) for depth in self._depths)
        low, high = self._depths
        share = (len(self.network.layers[index]) - low) / (high - low)

        def extend(a: Bytes, b: Bytes) -> Bytes:
            return a * (1 - share) + b * share

        phases = {name: extend(point, second.phases[name]) for name, point in first.phases.items()}
        return BlockPrediction(phases, extend(first.state, second.state))

    def _trace(self, index: int, depth: int, samples: int, accumulate: bool) -> BlockPrediction:
        key = (index, depth, samples, accumulate)
        if key not in self._traces:
            with torch.device("meta"):
                model = self.network.build([depth or len(span) for span in self.network.layers])
            if self.config.precision == "bf16-true":
                model.to(torch.bfloat16)
            numbers = _OneForNumbers() if self.config.optimizer == "adafactor" else nullcontext()
            with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), numbers:
                warnings.simplefilter("ignore")
                self._traces[key] = self._run(model, index, samples, accumulate)
        return self._traces[key]

    def _run(self, model: BlockModel, index: int, samples: int, accumulate: bool) -> BlockPrediction:
        parts = 2 if accumulate else 1
        config = dataclasses.replace(
            self.config,
            batch_size=samples * parts,
            accumulation=parts,
            residency="device",
            branch_at=0.0,
            device="cpu",
            tensorboard=False,
            compile=False,
        )
        block = model.block(index)
        for part in (model if isinstance(model, EndToEndModel) else block, model.shared):
            part.to_empty(device="cpu")  # fake tensors, as everything that is made from here on; idle blocks stay meta
        if isinstance(model, DiffusionBlocksModel):  # levels have no values here, and need none
            model.partition = _AnyLevels(MaskingSchedule(), model.num_blocks)
        trainer = Trainer(model, self.task, _Empty(samples * parts), None, config)
        batch = self.network.batch(samples * parts)
        if isinstance(model, DiffusionBlocksModel) and index and model.config.context == "features":
            model.block(0).to_empty(device="cpu")
            entering = model.context(batch, 1)  # every border has the same shape
            assert entering is not None
            batch["context"] = entering
        owners = [trainer.states[index], trainer.shared]
        for state in owners:  # as after the first step: a cold one would miss the optimizer state
            for parameter in state.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            state.step()
        tracker = PhaseTracker(block.layers[len(block.layers) // 2 - 1] if len(block.layers) > 1 else None)
        averages = [tensor for state in owners for tensor in state.average.values()]
        others = [model.block(i) for i in range(model.num_blocks) if i != index and isinstance(model, EndToEndModel)]
        optimizers = [state.optimizer for state in owners]
        tracker.present([block, model.shared], optimizers, [*batch.values(), *averages], others)
        with tracker:
            trainer.block_step(index, batch)
        return BlockPrediction(tracker.peaks, state_bytes(trainer.states[index]))


def state_bytes(state: BlockState) -> Bytes:
    """What `state` keeps between its steps."""
    sizes = {"model": 0, "average": 0, "optimizer": 0}
    for name, tensor in state.tensors().items():
        sizes[name.partition(".")[0]] += tensor.nbytes
    return Bytes(parameters=sizes["model"], optimizer=sizes["optimizer"], activations=sizes["average"])


class _AnyLevels(Partition):
    def sample(self, block: int, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(count)


class _OneForNumbers(TorchDispatchMode):
    """A number read off a tensor without data is 1. Adafactor reads some; no shape depends on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class _Empty(Dataset):
    """A dataset with a length and nothing in it: batches come from the network's description."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)
