"""A block's tensors as views of a few flat buffers, one per dtype, so that a block moves with one copy per dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 256  # bytes at which every tensor begins: what CUDA's allocator gives, and kernels rely on

Buffers = dict[torch.dtype, Tensor]  # flat, one per dtype


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the buffer of its dtype: elements from `start` on."""

    dtype: torch.dtype
    start: int
    shape: torch.Size


class Layout:
    """Where each of a block's tensors is in its buffers.

    Args:
        shapes: dtype and shape by name, in the order in which they shall lie.
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        self.places: dict[str, Place] = {}
        self.sizes: dict[torch.dtype, int] = {}  # elements of each buffer
        for name, (dtype, shape) in shapes.items():
            start = self.sizes.get(dtype, 0)
            self.places[name] = Place(dtype, start, shape)
            each = max(1, ALIGNED // dtype.itemsize)
            self.sizes[dtype] = start + -(-shape.numel() // each) * each

    @property
    def nbytes(self) -> int:
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    @property
    def pinned_nbytes(self) -> int:
        """On the host, where torch's allocator of pinned memory rounds each buffer up to a power of two."""
        return sum(1 << (size * dtype.itemsize - 1).bit_length() for dtype, size in self.sizes.items() if size)

    def empty(self, *, pinned: bool = False) -> Buffers:
        """New buffers on the host."""
        return {dtype: torch.empty(size, dtype=dtype, pin_memory=pinned) for dtype, size in self.sizes.items()}

    def views(self, buffers: Buffers) -> dict[str, Tensor]:
        """The tensors in buffers that begin where the layout does."""
        return {
            name: buffers[place.dtype][place.start : place.start + place.shape.numel()].view(place.shape)
            for name, place in self.places.items()
        }


class Arena:
    """Room on the device for blocks, allocated once: one block at the lower end or, with room for two, one at each end.

    So the next block arrives at one end while the other end computes, and the room is that of the two largest blocks,
    not twice that of the largest.

    Args:
        layouts: of all blocks that will be there. sides: 1 or 2.
    """

    def __init__(self, layouts: list[Layout], device: torch.device, sides: int) -> None:
        self.sides, self.sizes = sides, _room(layouts, sides)
        self._buffers = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in self.sizes.items()}

    @property
    def nbytes(self) -> int:
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    @staticmethod
    def bytes_of(layouts: list[Layout], sides: int) -> int:
        """Bytes of an arena, before it is made."""
        return sum(size * dtype.itemsize for dtype, size in _room(layouts, sides).items())

    def room(self, layout: Layout, side: int) -> Buffers:
        """Where a block is when it is at one side."""
        found = {}
        for dtype, size in layout.sizes.items():
            start = 0 if side == 0 else self.sizes[dtype] - size
            found[dtype] = self._buffers[dtype][start : start + size]
        return found


def _room(layouts: list[Layout], sides: int) -> dict[torch.dtype, int]:
    """Elements of each dtype that the `sides` largest blocks have together."""
    sizes = {}
    for dtype in dict.fromkeys(dtype for layout in layouts for dtype in layout.sizes):
        largest = sorted((layout.sizes.get(dtype, 0) for layout in layouts), reverse=True)
        sizes[dtype] = sum(largest[:sides])
    return sizes


def span(tensors: list[Tensor]) -> tuple[Tensor, list[int]] | None:
    """The flat stretch of memory that holds contiguous tensors of one dtype, and where each begins in it; None where
    they do not lie close together in one storage."""
    first = min(tensors, key=lambda tensor: tensor.storage_offset())
    base = first.untyped_storage()
    if any(tensor.untyped_storage()._cdata != base._cdata or not tensor.is_contiguous() for tensor in tensors):
        return None
    starts = [int(tensor.storage_offset() - first.storage_offset()) for tensor in tensors]
    length = max(start + tensor.numel() for start, tensor in zip(starts, tensors, strict=True))
    gaps = len(tensors) * max(1, ALIGNED // first.dtype.itemsize)
    if length > sum({int(t.storage_offset()): t.numel() for t in tensors}.values()) + gaps:
        return None
    whole = torch.empty(0, dtype=first.dtype).set_(base, int(first.storage_offset()), (length,), (1,))
    return whole, starts
