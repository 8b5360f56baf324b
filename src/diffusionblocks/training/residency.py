"""Where idle blocks keep their weights, averages and optimizer state.

device  everything stays on the device (no saving, no transfers).
host    idle blocks live in host memory, in flat buffers that are pinned when there is a CUDA card.
disk    idle blocks live in one file each, memory-mapped: they cost no memory until they are read.

A block's tensors are views of flat buffers, one per dtype (flat.py): on the host, or in the room that the device has
for the blocks that are there, allocated once. So a block moves with one copy per dtype, in lanes of their own
(lanes.py). `prefetch` brings the next block in while the active one computes and the one before goes out; it needs room
for two blocks. Gradients of idle blocks do not exist under any residency: a step frees them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.system.files import replacing
from diffusionblocks.training.flat import Arena, Buffers, Layout
from diffusionblocks.training.lanes import Event, Lanes, lanes_of
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.visitors import Slots, Visitors, units

MAPPING = "map the file of an idle block"
SPARE = 0.1  # share of a card that prefetching leaves free
AWAY = -1  # in place of a side of the room on the device: on the host


class Residency:
    """Brings blocks to the device and puts them away again.

    Args:
        kind: `device`, `host` or `disk`. states: one per block. device: where training happens.
        folder: where `disk` keeps its files; a temporary folder when None.
        prefetch: None = once every block has been there, if the device then has room for a second one.
        lanes: of the device; None = those that its kind has.

    Raises UserError where the host has too little memory for idle blocks.
    """

    def __init__(
        self,
        kind: str,
        states: Sequence[BlockState],
        device: torch.device,
        folder: Path | None = None,
        *,
        prefetch: bool | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        kind = kind if len(states) > 1 else "device"  # a block alone is never idle
        self.kind, self.states, self.device = kind, states, device
        self.lanes = lanes or lanes_of(device)
        self._present = set(range(len(states)))
        self._temporary: tempfile.TemporaryDirectory | None = None
        if kind == "disk":
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="dblocks-")
                folder = Path(self._temporary.name)
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Idle blocks in host memory are where a CPU computes.
        self.moves = kind == "disk" or (kind == "host" and device.type != "cpu")
        self._layouts: list[Layout] = []
        self._away: list[Buffers] = []  # of every block, on the host (host) or mapped from its file (disk)
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}  # of block and side, or AWAY
        self._arena: Arena | None = None
        self._prefetch, self._seen = prefetch, set[int]()
        self._side: dict[int, int] = {}  # of the blocks that are on the device, or on their way
        self._coming: dict[int, Event] = {}
        self._left: dict[int, Event] = {}  # when a block's buffers on the host are complete
        self._freed: dict[int, Event] = {}  # when a side has been read for the last time
        self._slots: Slots | None = None
        if self.moves:
            self._put_all_away()
        else:
            self._gather()

    # ------------------------------------------------------------------ which block is where

    def present(self) -> list[int]:
        """Blocks whose state occupies the device now."""
        return sorted(self._present)

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` brings anything in."""
        return self.moves and bool(self._prefetch)

    @contextmanager
    def active(self, index: int) -> Iterator[BlockState]:
        """Block `index` on the device; every other block is put away first."""
        if self.kind != "device":
            for other in self.present():
                if other != index:
                    self.park(other)
        if self._prefetch is None and len(self._seen) == len(self.states):
            self._decide(index)
        self.fetch(index)
        yield self.states[index]

    def fetch(self, index: int) -> None:
        """Brings a block to the device, or waits (on the device) for it if it is on its way."""
        if index in self._present:
            return
        if self.moves:
            if index not in self._coming:
                self._bring(index)
            try:
                self.lanes.wait(self._coming.pop(index))
            except BaseException:  # a disk that cannot be read
                self._side.pop(index)
                raise
            self.states[index].replace(self._views_at(index, self._side[index]))
        self._present.add(index)
        self._seen.add(index)

    def prefetch(self, index: int) -> None:
        """Starts to bring an idle block to the device, where that is wanted and there is room; `fetch` takes it
        over."""
        if self.prefetches and index not in self._present and index not in self._coming:
            self._bring(index)

    def park(self, index: int) -> None:
        """Puts a block away; its tensors are then those of the host (`settle` waits until they are complete)."""
        if self.kind == "device" or index not in self._present:
            return
        if self.moves:
            self._send(index, index)
            side = self._side.pop(index)
            self._freed[side] = self._left[index]
            self.states[index].replace(self._views_away(index))
        self._present.discard(index)

    def settle(self) -> None:
        """Waits until nothing is on its way: for those who read or exchange tensors of idle blocks on the host."""
        for event in (*self._coming.values(), *self._left.values()):
            self.lanes.finish(event)
        self._left.clear()

    def copy(self, source: int, target: int) -> None:
        """Makes block `target` a copy of `source`, which must be present, at the place where it is kept.

        A parked copy is never on the device, so copying needs no memory there.
        """
        state = self.states[target]
        state.steps = self.states[source].steps
        if not self.moves:
            state.replace({name: tensor.clone() for name, tensor in self.states[source].tensors().items()})
            return
        assert target not in self._present, "a block that is to become a copy is away"
        if (side := self._side.pop(target, None)) is not None:  # it was on its way
            self._freed[side] = self._coming.pop(target)
        self._send(source, target)
        self.lanes.wait(self._left[target])  # the source goes on learning where it is
        state.replace(self._views_away(target))
        numbers = {name: t.clone() for name, t in self.states[source].tensors().items() if state.stays_on_host(name)}
        state.replace(numbers)

    # ------------------------------------------------------------------ copies

    def _bring(self, index: int) -> None:
        """Asks for a block to be copied to a side where none is. One that is on its way, and not wanted yet, makes
        room."""
        if self._arena is None:
            self._arena = Arena(self._layouts, self.device, 2 if self._prefetch else 1)
            # Its memory may have been another's, whose last kernels are still to run.
            self._freed = {side: self.lanes.mark() for side in range(self._arena.sides)}
        taken = {self._side[block] for block in self._present}
        for other in list(self._coming):
            if len(taken) + len(self._coming) >= self._arena.sides:
                self._freed[self._side.pop(other)] = self._coming.pop(other)
        taken = set(self._side.values())
        side = next(side for side in range(self._arena.sides) if side not in taken)
        room, away = self._arena.room(self._layouts[index], side), self._away[index]
        after = [self._freed.pop(side, None), self._left.get(index)]
        pairs = [(room[dtype], away[dtype]) for dtype in room]
        self._side[index] = side
        self._coming[index] = self.lanes.copy("up", pairs, after, slow=self.kind == "disk")

    def _send(self, source: int, target: int) -> None:
        """Copies block `source`, on the device, to where block `target` is kept."""
        assert self._arena is not None
        room, away = self._arena.room(self._layouts[source], self._side[source]), self._away[target]
        if self.kind == "disk":
            self._to_disk(target, {dtype: buffer.cpu() for dtype, buffer in room.items()})
            self._left[target] = None
            return
        pairs = [(away[dtype], room[dtype]) for dtype in room]
        after = [self.lanes.mark(), self._left.get(target)]
        self._left[target] = self.lanes.copy("down", pairs, after)

    def _views_at(self, index: int, side: int) -> dict[str, Tensor]:
        assert self._arena is not None
        if (index, side) not in self._views:
            self._views[index, side] = self._layouts[index].views(self._arena.room(self._layouts[index], side))
        return self._views[index, side]

    def _views_away(self, index: int) -> dict[str, Tensor]:
        """Made once where the buffers stay; a block's file is mapped anew whenever it is written."""
        if self.kind == "disk":
            return self._layouts[index].views(self._away[index])
        if (index, AWAY) not in self._views:
            self._views[index, AWAY] = self._layouts[index].views(self._away[index])
        return self._views[index, AWAY]

    def _decide(self, index: int) -> None:
        """Prefetching, if nobody said: every block has shown what a step of it needs, so it is known whether a second
        one fits. From disk it is for those who ask: on a CPU the second block is memory that was to be saved."""
        self._prefetch = self.kind == "host" and self.moves and self._has_room()
        if self._prefetch:  # the room is made anew
            self.park(index)
            self.settle()
            self._arena, self._views, self._freed = None, {}, {}

    def _has_room(self) -> bool:
        assert self._arena is not None
        if self.device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info(self.device)
        return free - (Arena.bytes_of(self._layouts, 2) - self._arena.nbytes) > SPARE * total

    # ------------------------------------------------------------------ at the beginning

    def _gather(self) -> None:
        """Everything to the device, for good."""
        for state in self.states:
            away = {name: t for name, t in state.tensors().items() if t.device != self.device}
            state.replace({name: t.to(self.device) for name, t in away.items() if not state.stays_on_host(name)})
        if self.kind != "device":
            self._present.clear()

    def _put_all_away(self) -> None:
        """Every block into its buffers on the host or its file, with room for what its first step will add."""
        for state in self.states:
            shapes = state.shapes()
            numbers = {name: shape for name, shape in shapes.items() if state.stays_on_host(name)}
            self._layouts.append(Layout({name: shape for name, shape in shapes.items() if name not in numbers}))
            known = state.tensors()
            new = {name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in numbers.items() if name not in known}
            state.replace(new)
        if self.kind == "host":
            pinned = self.device.type == "cuda"
            self._check_host_memory(sum(layout.pinned_nbytes if pinned else layout.nbytes for layout in self._layouts))
        for index, state in enumerate(self.states):
            layout = self._layouts[index]
            away = _empty(layout, pinned=self.kind == "host" and self.device.type == "cuda")
            views = layout.views(away)
            for name, tensor in state.tensors().items():
                if name in views:
                    views[name].copy_(tensor)
            for name in views.keys() - state.tensors().keys():
                kind, _, parameter = name.partition(".")
                if kind == "average":  # of a block that has not stepped, or never does: its weights
                    views[name].copy_(views[f"model.{parameter}"])
                else:
                    views[name].zero_()
            if self.kind == "disk":
                self._away.append({})
                away = self._to_disk(index, away)
            else:
                self._away.append(away)
            state.replace(layout.views(away))
        self._present.clear()

    def _check_host_memory(self, needed: int) -> None:
        free = _free_host_memory()
        held = sum(t.nbytes for state in self.states for t in state.tensors().values() if t.device.type == "cpu")
        if free is not None and needed > free + held:
            raise UserError(
                f"train.residency host keeps {needed / 2**30:.1f} GiB of idle blocks in host memory, of which "
                f"{(free + held) / 2**30:.1f} GiB are free here; use --residency disk, or a smaller optimizer state "
                "(--train.precision bf16-true, --train.optimizer adafactor)"
            )

    def _to_disk(self, index: int, buffers: Buffers) -> Buffers:
        assert self.folder is not None
        path = self.folder / f"resident-{index:02d}.safetensors"
        with replacing(path) as partial:  # maps of the old file stay valid until they are dropped
            save_file({str(dtype): buffer for dtype, buffer in buffers.items()}, str(partial))
        with torch.profiler.record_function(MAPPING):  # a profiler counts it as memory
            self._away[index] = {buffer.dtype: buffer for buffer in load_file(str(path)).values()}
        return self._away[index]

    # ------------------------------------------------------------------ blocks that are read where they are not

    def borrowed(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """Lets absent blocks run forward: each of their modules visits the device for the length of its own call
        (`Visitors`).

        For evaluation, and for steps that pass layers of other blocks. Only weights travel, one layer at a time and the
        next one ahead. whole: also when the network that the blocks are made of is called itself, as transformers calls
        it.
        """
        absent = [state.module for index, state in enumerate(self.states) if index not in self._present]
        if not self.moves or self.device.type == "cpu" or not absent:  # a CPU reads host memory and mapped files
            return nullcontext()
        if self._slots is None:
            self._slots = Slots(self.device, self.lanes)
        modules = [unit for block in absent for unit in units(block)]
        return Visitors(modules, self._slots, after=list(self._left.values()), whole=whole)


def _empty(layout: Layout, *, pinned: bool) -> Buffers:
    try:
        return layout.empty(pinned=pinned)
    except RuntimeError as error:
        raise UserError(
            f"cannot pin {layout.nbytes / 2**30:.1f} GiB of host memory ({str(error).splitlines()[0]}); use "
            "--residency disk"
        ) from None


def _free_host_memory() -> int | None:
    """Bytes that processes can still get, as Linux counts them; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
