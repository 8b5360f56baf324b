"""Weights of idle blocks that visit the device, a module at a time, for the length of the module's own call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffusionblocks.training.flat import ALIGNED, Buffers, span
from diffusionblocks.training.lanes import Event, Lanes, Pair


def units(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that are called on their own: its parts, and each layer of its lists, in the order of the
    network."""
    parts = sorted(block.named_children(), key=lambda named: named[0] == "readout")  # which comes last
    for _, part in parts:
        yield from part if isinstance(part, nn.ModuleList) else [part]


class Slots:
    """Room on the device for the weights of two modules: one computes, the next is on its way. Kept from one visit to
    the next."""

    def __init__(self, device: torch.device, lanes: Lanes) -> None:
        self.device, self.lanes = device, lanes
        self._buffers: list[Buffers] = [{}, {}]
        self.read: list[Event] = [None, None]  # when what is in a slot has been read for the last time ...
        self.written: list[Event] = [None, None]  # ... and when it has arrived

    def room(self, slot: int, sizes: dict[torch.dtype, int]) -> Buffers:
        """The flat buffers of a slot, enlarged where they are too small for `sizes` elements of each dtype."""
        for dtype, size in sizes.items():
            known = self._buffers[slot].get(dtype)
            if known is None or len(known) < size:
                for event in (self.read[slot], self.written[slot]):  # nobody may use the old room any more
                    self.lanes.finish(event)
                self._buffers[slot][dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return self._buffers[slot]


class Visitors(AbstractContextManager[None]):
    """While it is open, modules whose weights are elsewhere get them for the length of their own calls.

    While one computes, the next is copied: the one behind it on the way through the network, and the one before it on
    the way back, where activations are recomputed. A graph made meanwhile may hold what was copied only until the next
    module but one is called: layers whose activations are recomputed, one by one, do not need it longer (of others
    autograd refuses to read what was overwritten). Weights that want gradients of such a graph get the copied values
    instead: it must not save them (`blocks.handed.WithoutWeights`), and they must be there in its backward pass.

    Args:
        modules: in the order of the network. slots: where they visit. after: what must have happened before weights are
            read on the host. whole: parts of these modules are also called alone, by a network that knows nothing of
            them.
    """

    def __init__(
        self, modules: Iterable[nn.Module], slots: Slots, after: Iterable[Event] = (), *, whole: bool = False
    ) -> None:
        self.modules, self.slots, self.after, self.whole = list(modules), slots, list(after), whole
        self._last = -1
        self._in: list[int | None] = [None, None]  # the module that a slot holds, or gets
        self._tensors: list[list[Tensor]] = [[], []]
        self._depth = 0
        self._home: list[Callable[[], None]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for number, module in enumerate(self.modules):
            for called in (module, *(module.children() if self.whole else ())):
                self._handles.append(called.register_forward_pre_hook(partial(self._bring, number)))
                self._handles.append(called.register_forward_hook(self._send, always_call=True))

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._put_back()  # after an interrupt hooks do not run
        for slot in (0, 1):
            self.slots.read[slot] = self.slots.lanes.mark()

    def _bring(self, number: int, module: nn.Module, arguments: object) -> None:
        self._depth += 1
        if self._depth > 1:  # a part of a module that is there
            return
        if number not in self._in:
            self._load(number)
        slot = self._in.index(number)
        self.slots.lanes.wait(self.slots.written[slot])
        step = 1 if number >= self._last else -1
        self._last = number
        if 0 <= number + step < len(self.modules) and number + step not in self._in:
            self._load(number + step, keep=slot)
        for (holder, name, own), tensor in zip(_held(self.modules[number]), self._tensors[slot], strict=True):
            if own.requires_grad and torch.is_grad_enabled():
                self._home.append(partial(setattr, own, "data", own.data))
                own.data = tensor
            else:
                self._home.append(partial(holder.__setitem__, name, own))
                holder[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor

    def _send(self, module: nn.Module, arguments: object, output: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._put_back()

    def _put_back(self) -> None:
        for put_back in reversed(self._home):
            put_back()
        self._home.clear()
        self._depth = 0

    def _load(self, number: int, keep: int | None = None) -> None:
        """Asks for a module's weights, into the slot that is not `keep`."""
        slot = 1 - keep if keep is not None else 1 - self._in.index(self._last) if self._last in self._in else 0
        lanes = self.slots.lanes
        pairs, self._tensors[slot] = self._pairs(number, slot)
        after = [lanes.mark(), self.slots.read[slot], *self.after]  # what is in the slot has then been read
        self.slots.written[slot] = lanes.copy("up", pairs, after)
        self._in[slot], self.slots.read[slot] = number, None

    def _pairs(self, number: int, slot: int) -> tuple[list[Pair], list[Tensor]]:
        """What is copied where, and the views that the module gets: one copy where its weights lie side by side."""
        own = [tensor.detach() for _, _, tensor in _held(self.modules[number])]
        together: dict[torch.dtype, list[Tensor]] = {}
        for tensor in own:
            together.setdefault(tensor.dtype, []).append(tensor)
        stretches = {dtype: _stretches(tensors) for dtype, tensors in together.items()}
        sizes = {dtype: sum(_aligned(source) for source, _ in found) for dtype, found in stretches.items()}
        room, pairs = self.slots.room(slot, sizes), list[Pair]()
        views: dict[int, Tensor] = {}
        for dtype, found in stretches.items():
            place = 0
            for source, inside in found:
                into = room[dtype][place : place + len(source)]
                pairs.append((into, source))
                place += _aligned(source)
                for tensor, start in inside:
                    views[id(tensor)] = into[start : start + tensor.numel()].view(tensor.shape)
        return pairs, [views[id(tensor)] for tensor in own]


Stretch = tuple[Tensor, list[tuple[Tensor, int]]]  # flat memory on the host, and the tensors in it


def _stretches(tensors: list[Tensor]) -> list[Stretch]:
    """One stretch of memory for all where they lie side by side, else one for each."""
    if (found := span(tensors)) is not None:
        return [(found[0], list(zip(tensors, found[1], strict=True)))]
    return [(tensor.reshape(-1), [(tensor, 0)]) for tensor in tensors]


def _aligned(stretch: Tensor) -> int:
    each = max(1, ALIGNED // stretch.element_size())
    return -(-len(stretch) // each) * each


def _held(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where a module and its parts hold weights and buffers: dict, name and tensor."""
    places = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    return [(held, name, tensor) for held in places for name, tensor in held.items() if tensor is not None]
