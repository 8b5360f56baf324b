"""Peak training memory, measured on real steps after every block has stepped.

CPU: torch's MemTracker sees every storage that an operation allocates and says what it is for. GPU: the caching
allocator's own statistics. A measurement after one step would miss the optimizer states of the other blocks, so every
block steps first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.blocks.handed import Handed, tensors_of
from diffusionblocks.data.stream import BatchStream
from diffusionblocks.training.order import Visit, one_round
from diffusionblocks.training.residency import MAPPING
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.task import on_device
from diffusionblocks.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes on the device at the moment of the peak, in the worst block.

    activations: everything that is not a parameter, gradient or optimizer state: saved activations, gradients of
    activations, temporaries, buffers, inputs. reserved: what the CUDA allocator holds from the card (CUDA only).
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    how_measured: str
    device: str
    reserved: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_peak(trainer: Trainer) -> PeakMemory:
    """Peak memory of `trainer`'s steps. Trains its model for a few steps: pass a trainer made for measuring.

    Two rounds over all blocks: the first creates every optimizer state, the second is measured. The result is the
    block with the largest total.
    """
    for visit, batches, handed in _round(trainer, 0):
        handed[:] = trainer.visit(visit, batches, handed).handed
    measure = _measure_cuda if trainer.device.type == "cuda" else _measure_cpu
    peaks = [measure(trainer, *made) for made in _round(trainer, 1)]
    return max(peaks, key=lambda peak: peak.total)


def profiled_peak(build: Callable[[], Trainer], batch: dict[str, Tensor]) -> int:
    """Peak bytes of one step of every block, after every block has stepped, by another instrument: torch's profiler.

    It sees every allocation and release of the CPU allocator from before `build` on, whatever made it. Memory-mapped
    files of idle blocks, which it reports as allocations when they are opened, are left out: they are not read.

    Args:
        build: makes the trainer (a CPU one). batch: of its batch size; what it holds is counted.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        trainer = build()
        for name in ("first steps", "measured steps"):
            with record_function(name):
                piece, handed = {key: tensor.clone() for key, tensor in batch.items()}, tuple[Handed, ...]()
                for block in trainer.round:
                    with trainer.residency.active(block):
                        handed = trainer.block_step(block, piece, handed).handed
                del piece, handed
    results = found.profiler.kineto_results
    window = next(event for event in results.events() if event.name() == "measured steps")
    start, end = window.start_ns(), window.start_ns() + window.duration_ns()
    current = peak = 0
    # By address: what was allocated before (garbage of an earlier run, collected now) is released here as well, and
    # does not count.
    live: dict[int, int] = {}
    for time, pointer, size, in_file in sorted(_allocations(results.experimental_event_tree())):
        if size > 0:
            live[pointer] = 0 if in_file else size
            current += live[pointer]
        else:
            current -= live.pop(pointer, 0)
        if start <= time <= end:
            peak = max(peak, current)
    return peak


def _allocations(events: Iterable[Any], in_file: bool = False) -> Iterator[tuple[int, int, int, bool]]:
    """Time, address, size (negative: released), and whether a file was being mapped."""
    from torch._C._profiler import _EventType

    for event in events:
        inside = in_file or event.name == MAPPING
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, inside
        yield from _allocations(event.children, inside)


_Round = Iterator[tuple[Visit, list[dict[str, Tensor]], list[Sequence[Handed]]]]


def _round(trainer: Trainer, number: int) -> _Round:
    """One visit of batch `number` to every block, in order; and a list for what is handed on."""
    stream: BatchStream = trainer.stream
    batches, handed = list(islice(on_device(stream.load([number]), trainer.device), 1)), list[Sequence[Handed]]()
    visits = range(number, number + 1)
    for visit in one_round(trainer.config.order, trainer.trained, visits, trainer.config.batch_size):
        if not visit.handed:
            handed.clear()
        yield visit, batches, handed


def _measure_cpu(
    trainer: Trainer, visit: Visit, batches: list[dict[str, Tensor]], handed: list[Sequence[Handed]]
) -> PeakMemory:
    from diffusionblocks.planning.tracker import PhaseTracker

    residency, model = trainer.residency, trainer.model
    with residency.active(visit.block):
        tracker, owners = PhaseTracker(), [trainer.shared, *(trainer.states[i] for i in residency.present())]
        tensors = [tensor for batch in batches for tensor in batch.values()]
        tensors += [tensor for state in owners for tensor in state.average.values()]
        tensors += [tensor for parts in handed for tensor in tensors_of(parts)]
        here, blocks = residency.present(), range(model.num_blocks)
        modules = [model.shared, *(model.block(index) for index in here)]
        elsewhere = [model.block(index) for index in blocks if index not in here]
        tracker.present(modules, [state.optimizer for state in owners], tensors, elsewhere)
        with tracker:
            handed[:] = trainer.visit(visit, batches, handed).handed
    peak, kept = tracker.peak, _kept(owners)  # the tracker sees one buffer for all that a block keeps
    return PeakMemory(
        **kept,
        gradients=round(peak.gradients),
        activations=round(peak.total) - round(peak.gradients) - sum(kept.values()),
        total=round(peak.total),
        how_measured="torch MemTracker",
        device="cpu",
    )


def _kept(states: Iterable[BlockState]) -> dict[str, int]:
    """Bytes that owners keep between their steps, averages aside."""
    found = {"parameters": 0, "optimizer": 0}
    for name, tensor in (named for state in states for named in state.tensors().items()):
        kind = {"model": "parameters", "optimizer": "optimizer"}.get(name.partition(".")[0])
        if kind is not None:
            found[kind] += tensor.nbytes
    return found


def _measure_cuda(
    trainer: Trainer, visit: Visit, batches: list[dict[str, Tensor]], handed: list[Sequence[Handed]]
) -> PeakMemory:
    residency = trainer.residency
    with residency.active(visit.block):
        present = residency.present()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        handed[:] = trainer.visit(visit, batches, handed).handed
        torch.cuda.synchronize()
        total, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    kept = _kept([trainer.shared, *(trainer.states[index] for index in present)])
    gradients = sum(
        p.nbytes for state in (trainer.shared, trainer.states[visit.block]) for p in state.parameters.values()
    )
    return PeakMemory(
        **kept,
        gradients=gradients,
        activations=total - gradients - sum(kept.values()),
        total=total,
        how_measured="torch.cuda.max_memory_allocated",
        device=torch.cuda.get_device_name(),
        reserved=reserved,
    )
