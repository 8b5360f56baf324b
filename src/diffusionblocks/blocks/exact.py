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

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusionblocks.blocks.handed import Passage, WithoutWeights
from diffusionblocks.blocks.model import Block, BlockModel, EndToEndModel, documents_apart
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.theory import costs


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

    def forward(self, batch: Batch, active: int | None = None, passage: Passage | None = None) -> Tensor:
        """batch of the stem's inputs -> logits, with a graph through block `active` (None: as torch says)."""
        hidden = self.hidden(batch, active, passage)
        if active in (None, self.num_blocks - 1):
            return self.readout(hidden)
        return checkpoint(self.readout, hidden, use_reentrant=False)

    def hidden(self, batch: Batch, active: int | None = None, passage: Passage | None = None) -> Tensor:
        """What the last layer hands to the readout [N, T, D]. passage: of a step of `active` in the order backward;
        what enters blocks is kept there."""
        if active is not None:
            self._train(active, *(passage.kept if passage is not None else ()))
        hidden = self._embedded(batch, passage)
        for index in range(self.num_blocks):
            if passage is not None:
                hidden = passage.enter(index, hidden)
            if passage is not None and active is not None and index < active and passage.keeps_graph(index):
                with passage.without_weights(self.block(index)):
                    hidden = self.through(index, hidden, batch, passage, frozen=index not in passage.trained)
            elif active is not None and index < active:
                with torch.no_grad():
                    hidden = self.through(index, hidden, batch, passage)
            else:
                hidden = self.through(index, hidden, batch, passage, frozen=active not in (None, index))
        return hidden

    def going_down(self, index: int, batch: Batch, passage: Passage) -> tuple[Tensor, float]:
        """The loss of a passage for block `index`, and the layers that a sample passed.

        Its value is the ordinary loss's, and so is its gradient in this block and in what enters it, though no later
        block is read, but those between this one and the last that stepped.
        """
        assert passage.gradient is not None and passage.loss is not None
        self._train(index)
        hidden = passage.leaving.pop(index, None)
        between = sum(len(span) for span in self.layers[index + 1 : passage.reached])
        layers = costs.passed_down(len(self.layers[index]), between, kept=hidden is not None)
        if hidden is None:
            hidden = passage.entering[index] if index else self._embedded(batch, passage)
            for place in range(index, passage.reached):
                hidden = self.through(place, hidden, batch, passage, frozen=place != index)
        product = (hidden * passage.gradient).sum()
        return passage.loss + (product - product.detach()), layers

    def _train(self, *active: int) -> None:
        for index in range(self.num_blocks):
            self.block(index).requires_grad_(index in active)

    def _embedded(self, batch: Batch, passage: Passage | None) -> Tensor:
        if passage is None:
            return self.stem(batch)
        passage.at(-1, next(iter(batch.values())).device)
        with passage.without_weights(self.block(0)) if 0 in passage.kept else nullcontext():
            return self.stem(batch)

    def graph_bytes(self, index: int, batch: Batch, entering: Tensor) -> int:
        """What a kept graph of block `index` holds beside weights and what entered it."""
        self._train(index)
        counted = WithoutWeights(self.block(index).parameters())
        with counted:
            leaving = self.through(index, entering, batch, None)
        assert leaving.requires_grad
        held = counted.saved()
        return stored([*held, entering]) - stored([entering])

    def through(
        self, index: int, hidden: Tensor, batch: Batch, passage: Passage | None, *, frozen: bool = False
    ) -> Tensor:
        """One block. frozen: it keeps nothing but what passes between its layers."""
        views = [view] if (view := documents_apart(batch, hidden)) is not None else []
        if passage is not None:
            passage.at(index, hidden.device)
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
