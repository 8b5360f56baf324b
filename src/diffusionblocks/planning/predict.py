"""Peak training memory before the run: the trainer's own steps, traced on tensors without data.

Model, optimizers and batch are fake tensors (shapes and types, no storage), so a network of any size can be traced on a
laptop. MemTracker counts what every operation of `Trainer.block_step` would allocate, in the steady state: a first
update has created the optimizer state.

A residual network repeats one layer, so in every phase of a step the peak is linear in the layers of the active block
and in those around it. Numbers of layers above `FULL` are therefore traced at two small values. The peak is the maximum
over phases of what each phase comes to; it is never interpolated across phases.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint

from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.handed import Handed, tensors_of
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel, EndToEndModel, WholeDenoiser
from diffusionblocks.data.stream import Unread
from diffusionblocks.methods.base import Step
from diffusionblocks.planning.card import kernels_of_a_card, target_device, traced_device, workspaces
from diffusionblocks.planning.tracker import Bytes, PhaseTracker
from diffusionblocks.seeds import uniform
from diffusionblocks.theory.noise import MaskingSchedule
from diffusionblocks.theory.partition import Blocks, NoiseRange, Partition
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.optimizers import OneForNumbers
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.task import Task
from diffusionblocks.training.trainer import Trainer
from diffusionblocks.training.visitors import units
from diffusionblocks.training.worker import cut

SHORT = (2, 4)  # numbers of layers of the short traces
LARGEST_BATCH = 1 << 20
FULL = 4  # up to this many layers are traced as they are


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is to be trained.

    Args:
        kind: networks of one kind have the same `build`, so they share traces.
        build: layers per block -> model (called on the meta device: weights get no storage).
        batch: number of samples -> batch of that size, as the training data would give it.
        steps: one per block. masked_share: of the tokens of a text that are masked in the block where most are, on
            average.

    All layers have the same shape in every supported family, so depth can be extrapolated.
    """

    kind: str
    build: Callable[[Sequence[int]], BlockModel]
    batch: Callable[[int], dict[str, Tensor]]
    steps: Sequence[Step]
    masked_share: float = 1.0


@dataclass(frozen=True)
class BlockPrediction:
    """One block. phases: the highest point of each phase of its step, shared parts included. state: its parameters,
    averages and optimizer state, which travel when it is parked. streamed: the largest piece of weights that visits
    the device while another block is active (exact mode). border: order backward, what enters a block of one part of
    the batch. graph: order backward, what the block's graph holds beside weights and that."""

    phases: dict[str, Bytes]
    state: Bytes
    streamed: float = 0
    border: float = 0
    graph: float = 0

    def plus(self, other: BlockPrediction, origin: BlockPrediction, factor: float) -> BlockPrediction:
        """self + factor * (other - origin), phase by phase."""
        phases = {
            name: point + (other.phases[name] + origin.phases[name] * -1) * factor
            for name, point in self.phases.items()
        }
        state = self.state + (other.state + origin.state * -1) * factor
        graph = self.graph + (other.graph - origin.graph) * factor
        return BlockPrediction(phases, state, max(self.streamed, other.streamed), self.border, graph)

    def with_borders(self, index: int, accumulation: int, graphs: float) -> BlockPrediction:
        """As block `index` of a passage: what enters the blocks before it waits too, for every part of the batch, and
        so do their `graphs` where these are kept. One state and one gradient of (up to) two parts are in the trace."""
        traced = min(accumulation, 2)
        waiting = max(0, index - 1) * traced + (accumulation - traced) * (index + 1)
        extra = Bytes(activations=waiting * self.border + graphs)
        return dataclasses.replace(self, phases={name: point + extra for name, point in self.phases.items()})

    @property
    def peak(self) -> Bytes:
        return max(self.phases.values(), key=lambda point: point.total)


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of training.

    blocks: each alone. device: the peak in the worst block, with the idle blocks if they stay on the device. host,
    disk: where blocks are kept otherwise. transfer_per_step: to and from there, per optimizer step. spare: of `device`,
    the room for a second block that a run does without where memory is short (training/residency.py).
    """

    blocks: tuple[BlockPrediction, ...]
    device: Bytes
    host: int
    disk: int
    transfer_per_step: int
    spare: int = 0

    @property
    def least(self) -> int:
        """Bytes that the run needs at its peak."""
        return round(self.device.total) - self.spare

    def within(self, limit: float | None) -> Prediction:
        """The run on a device that gives `limit` bytes: without prefetching where that would not fit."""
        if limit is None or self.device.total <= limit:
            return self
        return dataclasses.replace(self, device=self.device + Bytes(activations=-self.spare), spare=0)

    @property
    def worst_block(self) -> int:
        return max(range(len(self.blocks)), key=lambda index: self.blocks[index].peak.total)


Traces = dict[tuple[Any, ...], BlockPrediction]


class Predictor:
    """Predicts one method on one network.

    Args:
        network: what is trained. task: its objective. config: how; batch size and accumulation are arguments of `at`.
        traces: made so far for this task and these batches; several predictors may share them.
    """

    def __init__(self, network: Network, task: Task, config: TrainingConfig, traces: Traces | None = None) -> None:
        self.network, self.task, self.config = network, task, config
        self.target = target_device(config.device)
        self.traced_on = traced_device(self.target)
        known = torch.cuda.get_device_capability() if self.traced_on == "cuda" else None
        self.workspaces = workspaces(self.target, known)
        self._traces: Traces = {} if traces is None else traces
        memory = ("optimizer", "precision", "activation_checkpointing", "ema_decay", "max_grad_norm")
        self._kind = (
            network.kind,
            network.masked_share,
            self.target,
            config.order == "backward",
            *(getattr(config, name) for name in memory),
        )

    def at(self, batch_size: int, accumulation: int = 1) -> Prediction:
        """For optimizer steps of `batch_size` samples in `accumulation` parts."""
        samples = batch_size // accumulation
        blocks = [self._block(step, samples, accumulation > 1) for step in self.network.steps]
        keep = dataclasses.replace(self.config, accumulation=accumulation).graphs
        lowest = max(0, len(blocks) - keep)  # whose graph is kept
        kept = [sum(block.graph for block in blocks[lowest:index]) for index in range(len(blocks))]
        blocks = [block.with_borders(index, accumulation, kept[index]) for index, block in enumerate(blocks)]
        found = self._combine(blocks, self._waiting(samples, accumulation))
        visiting = self._visiting(blocks) * accumulation if found.transfer_per_step else 0
        return dataclasses.replace(found, transfer_per_step=found.transfer_per_step + round(visiting))

    def _visiting(self, blocks: Sequence[BlockPrediction]) -> float:
        """Bytes of weights that visit the device in a step, on average: those before the active block on the way
        through, those after it there and back; in a passage, each but the last block's once for all steps."""
        if self.target == "cpu" or not any(block.streamed for block in blocks):
            return 0
        weights = [block.state.parameters for block in blocks]
        if self.config.order == "backward":
            return sum(weights[:-1]) / len(blocks)
        passed = [sum(weights[:index]) + 2 * sum(weights[index + 1 :]) for index in range(len(blocks))]
        return sum(passed) / len(blocks)

    def _waiting(self, samples: int, accumulation: int) -> Bytes:
        """Inputs of the parts of a batch beyond the two that are traced."""
        one = sum(tensor.nbytes for tensor in self.network.batch(1).values())
        return Bytes(activations=max(0, accumulation - 2) * samples * one)

    def _combine(self, blocks: Sequence[BlockPrediction], waiting: Bytes) -> Prediction:
        count = len(blocks)
        whole = sum((block.state for block in blocks), Bytes())
        parked = self.config.residency != "device" and count > 1
        peaks = [block.peak if parked else block.peak + whole + block.state * -1 for block in blocks]
        peaks = [peak + waiting + Bytes(activations=self.workspaces) for peak in peaks]
        spare = 0
        if parked:  # the device has room for the largest block, or the two largest (training/flat.py)
            largest = sorted((block.state.total for block in blocks), reverse=True)
            ahead = self.config.residency == "host" and self.target != "cpu"
            room = sum(largest[: 2 if ahead else 1])
            peaks = [peak + Bytes(activations=room - own.state.total) for peak, own in zip(peaks, blocks, strict=True)]
            spare = round(largest[1]) if ahead else 0
        if parked and self.target != "cpu":  # the CPU reads idle weights where they are
            streamed = max(block.streamed for block in blocks)
            peaks = [peak + Bytes(parameters=2 * streamed) for peak in peaks]  # one computes, one is on its way
        away = round(whole.total) if parked else 0
        return Prediction(
            blocks=tuple(blocks),
            device=max(peaks, key=lambda peak: peak.total),
            host=away if self.config.residency == "host" else 0,
            disk=away if self.config.residency == "disk" else 0,
            transfer_per_step=round(2 * away / count / self.config.visit_steps),
            spare=spare,
        )

    def largest_batch(self, limit: float, start: int = 1, accumulation: int = 1) -> int:
        """The largest batch size whose peak is at most `limit` bytes, a multiple of `accumulation`; 0 when none is.

        Every phase of a step is close to linear in the batch: the answer is read off two predictions and confirmed by
        one of its own (reduced by a twentieth until it holds).
        """
        first = max(1, start // accumulation)
        one, two = self.at(first * accumulation, accumulation), self.at(2 * first * accumulation, accumulation)

        def peak(samples: int) -> float:
            factor = samples / first - 1
            pairs = zip(one.blocks, two.blocks, strict=True)
            blocks = [a.plus(b, a, factor) for a, b in pairs]
            return self._combine(blocks, self._waiting(samples, accumulation)).least

        low, high = 0, 1
        while high < LARGEST_BATCH and peak(high) <= limit:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if peak(middle) <= limit else (low, middle)
        while low and self.at(low * accumulation, accumulation).least > limit:
            low = low * 19 // 20
        return low * accumulation

    def _block(self, step: Step, samples: int, accumulate: bool) -> BlockPrediction:
        """Linear in every number of layers that is too large to trace."""
        origin, *others = (self._trace(part, samples, accumulate) for part in self._parts(step))
        result = origin
        for other, i in zip(others, self._large(step), strict=True):
            result = result.plus(other, origin, (step.sizes[i] - SHORT[0]) / (SHORT[1] - SHORT[0]))
        return result

    def _large(self, step: Step) -> list[int]:
        return [i for i, size in enumerate(step.sizes) if size > FULL]

    def _parts(self, step: Step) -> list[Step]:
        """The steps to be traced for one: itself with small numbers of layers, and with each of them a little
        larger."""
        large = self._large(step)
        base = [SHORT[0] if i in large else size for i, size in enumerate(step.sizes)]
        grown = [[SHORT[1] if i == j else size for j, size in enumerate(base)] for i in large]
        return [Step(tuple(sizes), step.block) for sizes in (base, *grown)]

    def _trace(self, step: Step, samples: int, accumulate: bool) -> BlockPrediction:
        key = (*self._kind, step, samples, accumulate)
        if key not in self._traces:
            self._traces[key] = self._made(step, samples, accumulate)
        return self._traces[key]

    def _made(self, step: Step, samples: int, accumulate: bool) -> BlockPrediction:
        with torch.device("meta"):
            model = self.network.build(step.sizes)
        if self.config.precision == "bf16-true":
            model.to(torch.bfloat16)
        numbers = OneForNumbers() if self.config.optimizer == "adafactor" else nullcontext()
        kernels = kernels_of_a_card() if self.target == "cuda" and self.traced_on != "cuda" else nullcontext()
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), numbers, kernels, _no_states():
            warnings.simplefilter("ignore")
            return self._run(model, step.block, samples, accumulate)

    def _run(self, model: BlockModel, index: int, samples: int, accumulate: bool) -> BlockPrediction:
        parts = 2 if accumulate else 1
        config = dataclasses.replace(
            self.config,
            batch_size=samples * parts,
            accumulation=parts,
            residency="device",
            branch_at=0.0,
            own_batch=0,
            heads_first=0.0,  # steps after that need more
            trust=False,
            keep_graphs=1,
            blocks=[],
            device=self.traced_on,
            tensorboard=False,
            compile=False,
        )
        block = model.block(index)
        passes_all = isinstance(model, EndToEndModel) or (
            isinstance(model, DiffusionBlocksModel) and bool(model.config.ordinary)
        )
        _off_meta(self.traced_on, model if passes_all else block, model.shared)  # idle denoisers stay there
        if isinstance(model, DiffusionBlocksModel | WholeDenoiser):  # levels have no values here, and need none
            model.partition = _AnyLevels(MaskingSchedule(), model.num_blocks)
            model.partition.masked_share = self.network.masked_share
        trainer = Trainer(model, self.task, Unread(samples * parts), None, config)
        batch = {name: tensor.to(self.traced_on) for name, tensor in self.network.batch(samples * parts).items()}
        handed: Sequence[Handed] = ()
        if isinstance(model, DiffusionBlocksModel) and index and model.config.context == "features":
            _off_meta(self.traced_on, model.block(0))
            handed = cut(model.context(batch, 1), parts)  # every border has the same shape
        before = trainer.round[: trainer.round.index(index)] if config.order == "backward" else []
        for other in before:  # what it hands down
            handed = trainer.block_step(other, batch, handed).handed
        held = tensors_of(handed)
        owners = [trainer.states[index], trainer.shared]
        for state in owners:  # as after the first step: a cold one would miss the optimizer state
            for parameter in state.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            state.step()
        trained = [layer for layer in block.layers if any(p.requires_grad for p in layer.parameters())]
        tracker = PhaseTracker(trained[len(trained) // 2 - 1] if len(trained) > 1 else None)
        averages = [tensor for state in owners for tensor in state.average.values()]
        others = [model.block(i) for i in range(model.num_blocks) if i != index and passes_all]
        optimizers = [state.optimizer for state in owners]
        tracker.present([block, model.shared], optimizers, [*batch.values(), *averages, *held], others)
        with tracker:
            left = trainer.block_step(index, batch, handed).handed
        streams = passes_all and model.num_blocks > 1
        pieces = [sum(p.nbytes for p in unit.parameters()) for unit in units(block)] if streams else [0]
        exact = config.order == "backward"
        largest = max(held + tensors_of(left) if exact else [], key=lambda tensor: tensor.nbytes, default=None)
        border = 0.0 if largest is None else float(largest.nbytes)
        graph = 0.0
        if largest is not None and isinstance(model, BlockCoordinateModel):
            if config.activation_checkpointing:
                graph = border * len(block.layers)
            else:
                with trainer.autocast():
                    graph = float(model.graph_bytes(index, batch, largest))
        return BlockPrediction(tracker.peaks, state_bytes(trainer.states[index]), max(pieces), border, graph)


def state_bytes(state: BlockState) -> Bytes:
    """What `state` keeps between its steps."""
    sizes = {"model": 0, "average": 0, "optimizer": 0}
    for name, tensor in state.tensors().items():
        sizes[name.partition(".")[0]] += tensor.nbytes
    return Bytes(parameters=sizes["model"], optimizer=sizes["optimizer"], activations=sizes["average"])


def _off_meta(device: str, *modules: nn.Module) -> None:
    """Replaces meta parameters and buffers by fake ones on `device`, shared ones by shared ones."""
    made: dict[int, Tensor] = {}
    for module in (module for whole in modules for module in whole.modules()):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                held[name] = made[id(tensor)]  # type: ignore[assignment]


class _AnyLevels(Partition):
    """masked_share: of the tokens, on average, in the block where most are: its range ends where all are masked."""

    masked_share = 1.0

    def mean_mass(self, block: Blocks) -> float:
        return self.masked_share

    def range(self, block: Blocks, *, widened: bool = False) -> NoiseRange:
        return NoiseRange(0.0, 1.0, 2 * self.masked_share - 1, 1.0)

    def sample(self, block: Blocks, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        return uniform(count, generator=generator)

    def spread(self, block: Blocks, count: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        levels = uniform(count, generator=generator)
        return levels, torch.ones_like(levels)


@contextmanager
def _no_states() -> Iterator[None]:
    """Within it, checkpointing keeps no state of an accelerator's generator: putting it back copies it, to a tensor
    without data, which the generator cannot read. No shape depends on it."""
    plain = checkpoint.get_device_states
    checkpoint.get_device_states = lambda *inputs: ([], [])
    try:
        yield
    finally:
        checkpoint.get_device_states = plain
