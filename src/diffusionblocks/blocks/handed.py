"""What the step of one block hands to that of the next: features, a gradient, or nothing.

Features are the clean stream that leaves a block, detached, one tensor [N, T, D]: the next block goes on from it. A
gradient goes the other way, in the order backward (exact.py); with it goes what the blocks that have not stepped need
of the forward pass, and together they are a `Passage`. Both are all that one step must know of another, so the next one
may be made wherever it and the block's state are.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffusionblocks.networks.parts import Batch
from diffusionblocks.seeds import derive, seed_own


def with_context(batch: Batch, context: Tensor | None) -> Batch:
    """The batch as the denoiser of a block reads it that goes on from features; without features, the batch."""
    return batch if context is None else {**batch, "context": context}


@dataclass
class Passage:
    """One batch (or part of one) on its way through the network and back, between the steps of its blocks.

    The first step gets one that is new, runs forward and fills it. Every step takes over the one that it is handed,
    changes it, and hands it on: what a block has used is freed at once, so whoever handed it does not read it again.

    Args:
        trained: the blocks that will step. seed: of everything random in the layers (dropout): a block that is
            recomputed must draw what it drew. kept: those of the trained blocks, the last aside, whose graphs are kept.
        entering: block -> what entered it [N, T, D], as a leaf, until the block has stepped. Block 0 reads the batch
            itself.
        leaving: kept block -> what the next trained block got of it, with the graph between the two. graphs: what they
            hold.
        reached: the block that stepped last. gradient: of the loss with respect to what entered that block. loss: the
            ordinary one.
    """

    trained: Sequence[int]
    seed: int = 0
    kept: Collection[int] = ()
    graphs: list[WithoutWeights] = field(default_factory=list)
    entering: dict[int, Tensor] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    reached: int = 0
    gradient: Tensor | None = None
    loss: Tensor | None = None

    def at(self, place: int, device: torch.device) -> None:
        """Before block `place` runs there, -1 the stem: what it draws depends on the seed and the place alone."""
        seed_own(derive(self.seed, "passage", place), device)

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Keeps what enters a block that will step."""
        if index not in self.trained:
            return hidden
        if hidden.requires_grad and (below := self.below(index)) is not None:
            self.leaving[below] = hidden
        if index == 0:
            return hidden
        wanted = index > min(self.trained)  # else nobody below needs its gradient
        self.entering[index] = hidden.detach().requires_grad_(wanted)
        return self.entering[index]

    def below(self, index: int) -> int | None:
        """The next trained block on the way down."""
        return max((block for block in self.trained if block < index), default=None)

    def keeps_graph(self, index: int) -> bool:
        """Whether block `index` belongs to a graph that is kept: is a kept block, or (recomputed) between one and the
        next trained block."""
        owner = index if index in self.trained else self.below(index)
        return owner in self.kept

    def stepped(self, index: int, loss: Tensor, parts: int) -> Passage:
        """After the backward pass of block `index`, whose loss was divided by `parts`: what the next block down
        gets."""
        self.loss = loss if self.loss is None else self.loss
        self.reached, self.gradient = index, None
        if (entered := self.entering.pop(index, None)) is not None and entered.grad is not None:
            self.gradient = entered.grad if parts == 1 else entered.grad * parts
        return self

    def without_weights(self, block: nn.Module) -> WithoutWeights:
        """For a part of a graph that is kept."""
        self.graphs.append(WithoutWeights(block.parameters()))
        return self.graphs[-1]

    def tensors(self) -> list[Tensor]:
        """What waits for blocks that have not stepped."""
        graphs = [tensor for graph in self.graphs for tensor in graph.saved()]
        return [*self.entering.values(), *([] if self.gradient is None else [self.gradient]), *graphs]


class _Named(NamedTuple):
    """A weight, or a view of it, perhaps cast to another type by autocast, as a graph remembers it."""

    weight: nn.Parameter
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WithoutWeights(saved_tensors_hooks):
    """Graphs made within save the given weights (views of them, and what autocast makes of them) by name alone: what a
    weight is when the backward pass comes is what it was, wherever its values have been meanwhile. Weights may thus
    leave the device between the two passes."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = {id(weight): weight for weight in weights}
        self._saved: list[weakref.ref[Tensor]] = []
        super().__init__(self._pack, self._unpack)

    def saved(self) -> list[Tensor]:
        """Everything else that such graphs hold, as long as they do."""
        return [tensor for reference in self._saved if (tensor := reference()) is not None]

    def _pack(self, tensor: Tensor) -> Tensor | _Named:
        weight = self._weight(tensor)
        if weight is not None:
            # From where the weight begins: it may be a view itself, of another buffer when the backward pass comes.
            base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
            start = int(tensor.storage_offset() - base.storage_offset())
            return _Named(weight, tensor.dtype, tuple(tensor.shape), tensor.stride(), start)
        self._saved.append(weakref.ref(tensor))
        return tensor

    def _weight(self, tensor: Tensor) -> nn.Parameter | None:
        base = tensor._base if tensor._is_view() else tensor
        if base is None or (known := self.weights.get(id(base))) is not None:
            return known if base is not None else None
        if type(base.grad_fn).__name__ != "ToCopyBackward0":  # autocast's copy of a weight
            return None
        source = base.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        return self.weights.get(id(getattr(source, "variable", None)))

    def _unpack(self, packed: Tensor | _Named) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        weight = packed.weight.detach().to(packed.dtype)
        return weight.as_strided(packed.shape, packed.stride, weight.storage_offset() + packed.offset)


Handed = Tensor | Passage | None


def tensors_of(handed: Iterable[Handed]) -> list[Tensor]:
    """The tensors that wait with what was handed on."""
    found: list[Tensor] = []
    for one in handed:
        found += one.tensors() if isinstance(one, Passage) else [] if one is None else [one]
    return found
