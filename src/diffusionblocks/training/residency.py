"""Where idle blocks keep their weights, averages and optimizer state.

device  everything stays on the device (no saving, no transfers).
host    idle blocks live in host memory, pinned when there is a GPU; the buffers are allocated once and reused.
disk    idle blocks live in one safetensors file each, memory-mapped: they cost no memory until they are read.

Gradients of idle blocks do not exist under any residency: a step frees them. `prefetch` brings the next block in while
the active one computes: on a thread of its own and, on CUDA, a stream of its own. It needs room for the state of both.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffusionblocks.training.state import BlockState

MAPPING = "map the file of an idle block"
_Arrival = tuple[dict[str, Tensor], torch.cuda.Event | None]
_Fetched = tuple[list[Tensor], torch.cuda.Event | None]


class Residency:
    """Brings blocks to the device and puts them away again.

    Args:
        kind: `device`, `host` or `disk`. states: one per block. device: where training happens.
        folder: where `disk` keeps its files; a temporary folder when None.
    """

    def __init__(
        self, kind: str, states: Sequence[BlockState], device: torch.device, folder: Path | None = None
    ) -> None:
        self.kind, self.states, self.device = kind, states, device
        self._present = set(range(len(states)))
        self._coming: dict[int, Future[_Arrival]] = {}
        self._loader: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: dict[tuple[int, str], Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory | None = None
        if kind == "disk":
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="dblocks-")
                folder = Path(self._temporary.name)
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for index in range(len(states)):
            self.states[index].replace(self._load(index, None)[0])
            self.park(index)

    def present(self) -> list[int]:
        """Blocks whose state occupies the device now."""
        return sorted(self._present)

    @contextmanager
    def active(self, index: int) -> Iterator[BlockState]:
        """Block `index` on the device; every other block is put away first."""
        if self.kind != "device":
            for other in self.present():
                if other != index:
                    self.park(other)
        self.fetch(index)
        yield self.states[index]

    def fetch(self, index: int) -> None:
        """Brings a block to the device, or waits for it if it is on its way."""
        if index in self._present:
            return
        coming = self._coming.pop(index, None)
        tensors, arrived = self._load(index, None) if coming is None else coming.result()
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(current)  # so that its memory is not reused too early
        self.states[index].replace(tensors)
        self._present.add(index)

    def prefetch(self, index: int) -> None:
        """Starts to bring an idle block to the device; `fetch` takes it over."""
        if self.kind == "device" or index in self._present or index in self._coming:
            return
        if self._loader is None:
            self._loader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming[index] = self._loader.submit(self._load, index, self._stream)

    def settle(self) -> None:
        """Waits until nothing is being read, before tensors are exchanged."""
        for coming in self._coming.values():
            coming.result()

    def _load(self, index: int, stream: torch.cuda.Stream | None) -> _Arrival:
        """Copies of a block's tensors on the device, and the event after which they are there."""
        copy = self.kind == "disk"  # off the mapped file
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            tensors = {
                name: tensor.to(self.device, copy=copy, non_blocking=True)
                for name, tensor in self.states[index].tensors().items()
                if copy or tensor.device != self.device
            }
            return tensors, None if stream is None else stream.record_event()

    def copy(self, source: int, target: int) -> None:
        """Makes block `target` a copy of `source`, which must be present, at the place where it is kept.

        A parked copy is never on the device, so copying needs no memory there.
        """
        tensors, state = self.states[source].tensors(), self.states[target]
        state.steps = self.states[source].steps
        if self.kind == "disk":
            state.replace(self._to_disk(target, tensors))
            self._present.discard(target)
        elif self.kind == "host" and self.device.type != "cpu":
            state.replace(self._to_host(target, tensors))
            self._present.discard(target)
        else:
            state.replace({name: tensor.clone() for name, tensor in tensors.items()})

    def park(self, index: int) -> None:
        """Puts a block away; its tensors stay readable in place (host memory, or mapped from its file)."""
        if self.kind == "device" or index not in self._present:
            return
        state = self.states[index]
        if self.kind == "disk":
            state.replace(self._to_disk(index, state.tensors()))
        elif self.device.type != "cpu":  # else it is in host memory already
            state.replace(self._to_host(index, state.tensors()))
        self._present.discard(index)

    def _to_host(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        away = {}
        for name, tensor in tensors.items():
            buffer = self._host.get((index, name))
            if buffer is None:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")
                self._host[index, name] = buffer
            buffer.copy_(tensor, non_blocking=True)
            away[name] = buffer
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return away

    def _to_disk(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.folder is not None
        path = self.folder / f"resident-{index:02d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path.with_suffix(".new")))
        os.replace(path.with_suffix(".new"), path)  # maps of the old file stay valid until they are dropped
        with torch.profiler.record_function(MAPPING):  # a profiler counts it as memory
            return load_file(str(path))

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Lets absent blocks run forward: each of their modules visits the device for the length of its own call (`Visitors`).

        For evaluation, and for steps that pass layers of other blocks. Only weights travel, one layer at a time and the next one
        ahead.
        """
        if self.device.type == "cpu":  # it reads host memory and mapped files where they are
            yield
            return
        absent = [state.module for index, state in enumerate(self.states) if index not in self._present]
        modules = [unit for block in absent for unit in units(block)]
        visitors = Visitors(modules, lambda tensor: tensor.to(self.device, non_blocking=True), self._stream)
        try:
            yield
        finally:
            visitors.close()


def units(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that are called on their own: its parts, and each layer of its lists, in the order of the network."""
    parts = sorted(block.named_children(), key=lambda named: named[0] == "readout")  # which comes last
    for _, part in parts:
        yield from part if isinstance(part, nn.ModuleList) else [part]


class Visitors:
    """Modules whose weights are elsewhere, each of which gets them for the length of its own calls.

    While one computes, the next is fetched: the one behind it on the way through the network, and the one before it on the way
    back, where activations are recomputed. So two modules' weights are on the device at once. A graph made meanwhile keeps the
    fetched tensors, not the weights, so its backward pass does not need these. Weights that want gradients of such a graph get the
    fetched values instead: it must not save them (`coordinate.WithoutWeights`), and they must be there in its backward pass.

    Args:
        modules: in the order of the network. fetch: a weight -> a copy of it where it is needed. stream: CUDA stream of the fetches.
    """

    def __init__(
        self, modules: Iterable[nn.Module], fetch: Callable[[Tensor], Tensor], stream: torch.cuda.Stream | None = None
    ) -> None:
        self.modules, self.fetch, self.stream = list(modules), fetch, stream
        self._last, self._coming = -1, dict[int, Future[_Fetched]]()
        self._home: list[Callable[[], None]] = []
        self._done: torch.cuda.Event | None = None  # when the module before had computed
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="visitors")
        self._handles: list[RemovableHandle] = []
        for number, module in enumerate(self.modules):
            self._handles.append(module.register_forward_pre_hook(partial(self._bring, number)))
            self._handles.append(module.register_forward_hook(self._send, always_call=True))

    def close(self) -> None:
        """Leaves the modules as they were."""
        for handle in self._handles:
            handle.remove()
        self._loader.shutdown()
        self._coming.clear()

    def _load(self, number: int, after: torch.cuda.Event | None = None) -> _Fetched:
        """after: what must have been computed before; else the processor would run ahead and fetch everything at once."""
        if after is not None:
            after.synchronize()
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            tensors = [self.fetch(tensor.detach()) for _, _, tensor in _held(self.modules[number])]
            return tensors, None if self.stream is None else self.stream.record_event()

    def _bring(self, number: int, module: nn.Module, arguments: object) -> None:
        coming = self._coming.pop(number, None)
        tensors, arrived = self._load(number) if coming is None else coming.result()
        if arrived is not None:
            current = torch.cuda.current_stream()
            current.wait_event(arrived)
            for tensor in tensors:
                tensor.record_stream(current)  # so that its memory is not reused too early
        following = number + (1 if number > self._last else -1)
        self._last = number
        for other in [other for other in self._coming if other != following]:
            self._coming.pop(other).cancel()
        if 0 <= following < len(self.modules) and following not in self._coming:
            self._coming[following] = self._loader.submit(self._load, following, self._done)
        for (holder, name, own), tensor in zip(_held(module), tensors, strict=True):
            if own.requires_grad and torch.is_grad_enabled():
                self._home.append(partial(setattr, own, "data", own.data))
                own.data = tensor
            else:
                self._home.append(partial(holder.__setitem__, name, own))
                holder[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor

    def _send(self, module: nn.Module, arguments: object, output: object) -> None:
        for put_back in self._home:
            put_back()
        self._home.clear()
        if self.stream is not None:
            self._done = torch.cuda.current_stream().record_event()


def _held(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where a module and its parts hold weights and buffers: dict, name and tensor."""
    places = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    return [(held, name, tensor) for held in places for name, tensor in held.items() if tensor is not None]
