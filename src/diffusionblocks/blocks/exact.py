"""Exact training: the ordinary loss at the end of the network, one block's parameters at a time.

Only the active block has gradients and optimizer state on the device. Where idle blocks live elsewhere (residency host
or disk), their layers visit the device one at a time. The result is the ordinary network. There are two ways to it:

in turn   (orders sweep, cyclic, random, sequential) Every block step is a pass of its own. The blocks before the active
          one run without a graph; those after it are recomputed layer by layer in the backward pass (BAdam, Luo et al.
          2024, arXiv 2404.02827, trains so with Adam).
backward  (order backward) One batch visits all blocks, last to first, in one backward pass. The forward pass keeps what
          enters each block, and no graph but the last block's. Each block in its turn is recomputed, takes the gradient
          of what it handed on, steps, and passes the gradient of what entered it down (`Passage`). No block is read
          again after it has changed, so the updates are those of ordinary training, for a quarter more computation
          (B = 4) and one block's memory (the execution layer by layer of Pudipeddi et al. 2020, arXiv 2002.05645, by
          blocks). With keep_graphs K the last K blocks are not recomputed: their graphs wait from the forward pass on,
          without the weights (`WithoutWeights`).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffusionblocks.blocks.model import Block, BlockModel, EndToEndModel, documents_apart
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.seeds import derive
from diffusionblocks.theory import costs


@dataclass
class Passage:
    """One batch (or part of one) on its way through the network and back, between the steps of its blocks.

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

    def at(self, place: int) -> None:
        """Before block `place` runs, -1 the stem: what it draws depends on the seed and the place alone."""
        torch.manual_seed(derive(self.seed, "passage", place))

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

    def stepped(self, index: int, loss: Tensor, parts: int) -> None:
        """After the backward pass of block `index`, whose loss was divided by `parts`: what the next block down
        needs."""
        self.loss = loss if self.loss is None else self.loss
        self.reached, self.gradient = index, None
        if (entered := self.entering.pop(index, None)) is not None and entered.grad is not None:
            self.gradient = entered.grad if parts == 1 else entered.grad * parts

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


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of what tensors are stored in."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


class BlockCoordinateModel(EndToEndModel):
    """The ordinary network whose layers are grouped into blocks that are trained in turn on the ordinary loss.

    Block 0 also owns the stem and the last block the readout. Where these two share a parameter (tied embeddings), no
    block could own it alone: both are then shared parts, and frozen.

    Args:
        parts: from an adapter. layers: how the layers are split.
    """

    def __init__(self, parts: Parts, layers: Sequence[range]) -> None:
        BlockModel.__init__(self)
        if parts.target == "image":
            raise UserError(
                "exact cannot train a DiT: its readout reads the embedding of the first layer, so no block owns that "
                "alone"
            )
        if parts.target == "masked":
            raise UserError("exact trains with the next-token or label loss; masked diffusion has no exact mode")
        self._remember(parts)
        last = len(layers) - 1
        self.blocks = nn.ModuleList(
            Block(
                [parts.layers[i] for i in span],
                stem=parts.stem if index == 0 and not parts.tied else None,
                readout=parts.readout if index == last and not parts.tied else None,
            )
            for index, span in enumerate(layers)
        )
        self.shared = nn.ModuleDict({"stem": parts.stem, "readout": parts.readout} if parts.tied else {})
        self.shared.requires_grad_(False)
        self.layers = list(layers)
        self.passage: Passage | None = None  # during a step of the order backward

    def forward(self, batch: Batch, active: int | None = None) -> Tensor:
        """batch of the stem's inputs -> logits, with a graph through block `active` (None: as torch says)."""
        hidden = self.hidden(batch, active)
        if active in (None, self.num_blocks - 1):
            return self.readout(hidden)
        return checkpoint(self.readout, hidden, use_reentrant=False)

    def hidden(self, batch: Batch, active: int | None = None) -> Tensor:
        """What the last layer hands to the readout [N, T, D]. With a passage under way, what enters blocks is kept
        there."""
        passage = self.passage if active is not None else None
        if active is not None:
            self._train(active, *(passage.kept if passage is not None else ()))
        hidden = self._embedded(batch, passage)
        for index in range(self.num_blocks):
            if passage is not None:
                hidden = passage.enter(index, hidden)
            if passage is not None and active is not None and index < active and passage.keeps_graph(index):
                with passage.without_weights(self.block(index)):
                    hidden = self._through(index, hidden, batch, passage, frozen=index not in passage.trained)
            elif active is not None and index < active:
                with torch.no_grad():
                    hidden = self._through(index, hidden, batch, passage)
            else:
                hidden = self._through(index, hidden, batch, passage, frozen=active not in (None, index))
        return hidden

    def going_down(self, index: int, batch: Batch, passage: Passage) -> tuple[Tensor, float]:
        """The loss of a passage for block `index`, and the layers that a sample passed.

        Its value is the ordinary loss's, and so is its gradient in this block and in what enters it, though no later
        block is read, but those between this one and the last that stepped.
        """
        assert passage.gradient is not None and passage.loss is not None
        self._train(index)
        own, between = (
            float(len(self.layers[index])),
            sum(len(span) for span in self.layers[index + 1 : passage.reached]),
        )
        if (kept := passage.leaving.pop(index, None)) is not None:
            hidden, own = kept, own * 2 / 3
        else:
            hidden = passage.entering[index] if index else self._embedded(batch, passage)
            for place in range(index, passage.reached):
                hidden = self._through(place, hidden, batch, passage, frozen=place != index)
        product = (hidden * passage.gradient).sum()
        return passage.loss + (product - product.detach()), own + between * 2 / 3

    def _train(self, *active: int) -> None:
        for index in range(self.num_blocks):
            self.block(index).requires_grad_(index in active)

    def _embedded(self, batch: Batch, passage: Passage | None) -> Tensor:
        if passage is None:
            return self.stem(batch)
        passage.at(-1)
        with passage.without_weights(self.block(0)) if 0 in passage.kept else nullcontext():
            return self.stem(batch)

    def graph_bytes(self, index: int, batch: Batch, entering: Tensor) -> int:
        """What a kept graph of block `index` holds beside weights and what entered it."""
        self._train(index)
        counted = WithoutWeights(self.block(index).parameters())
        with counted:
            leaving = self._through(index, entering, batch, None)
        assert leaving.requires_grad
        held = counted.saved()
        return stored([*held, entering]) - stored([entering])

    def _through(
        self, index: int, hidden: Tensor, batch: Batch, passage: Passage | None, *, frozen: bool = False
    ) -> Tensor:
        """One block. frozen: it keeps nothing but what passes between its layers."""
        views = [view] if (view := documents_apart(batch, hidden)) is not None else []
        if passage is not None:
            passage.at(index)
        if not frozen:
            return self.block(index)("trunk", hidden, *views)
        for layer in self.block(index).layers:
            hidden = checkpoint(layer, hidden, *views, use_reentrant=False)
        return hidden

    @property
    def reads_idle_blocks(self) -> bool:
        return True

    def layer_evaluations(self, index: int) -> float:
        return costs.in_turn([len(span) for span in self.layers])[index]

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary Hugging Face network."""
        self.requires_grad_(True)
        (network,) = self._network
        network.save_pretrained(folder)
