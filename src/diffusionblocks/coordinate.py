"""Exact block-coordinate training: the ordinary loss at the end of the network, one block's parameters at a time.

Only the active block has gradients and optimizer state. The blocks before it run without a graph; those after it are
recomputed layer by layer in the backward pass, so of their activations only what passes between layers is kept. Where
idle blocks live elsewhere (residency host or disk), their layers visit the device one at a time. The result is the
ordinary network (BAdam, Luo et al. 2024, arXiv 2404.02827, trains so with Adam).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusionblocks.errors import UserError
from diffusionblocks.network import Batch, Block, BlockModel, EndToEndModel, Parts, documents_apart


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
                "exact cannot train a DiT: its readout reads the embedding of the first layer, so no block owns that alone"
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

    def forward(self, batch: Batch, active: int | None = None) -> Tensor:
        """batch of the stem's inputs -> logits, with a graph through block `active` (None: as torch says)."""
        hidden = self.hidden(batch, active)
        if active in (None, self.num_blocks - 1):
            return self.readout(hidden)
        return checkpoint(self.readout, hidden, use_reentrant=False)

    def hidden(self, batch: Batch, active: int | None = None) -> Tensor:
        if active is not None:
            for index in range(self.num_blocks):
                self.block(index).requires_grad_(index == active)
        hidden = self.stem(batch)
        views = [view] if (view := documents_apart(batch, hidden)) is not None else []
        for index in range(self.num_blocks):
            block = self.block(index)
            if active is None or index == active:
                hidden = block("trunk", hidden, *views)
            elif index < active:
                with torch.no_grad():
                    hidden = block("trunk", hidden, *views)
            else:
                for layer in block.layers:
                    hidden = checkpoint(layer, hidden, *views, use_reentrant=False)
        return hidden

    @property
    def reads_idle_blocks(self) -> bool:
        return True

    def layer_evaluations(self, index: int) -> float:
        """Forward through all layers (a third each), backward with weights in the active ones (two thirds), and
        recomputation and backward without weights after them (a third each)."""
        own, after = len(self.layers[index]), sum(len(span) for span in self.layers[index + 1 :])
        return sum(map(len, self.layers)) / 3 + own * 2 / 3 + after * 2 / 3

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary Hugging Face network."""
        self.requires_grad_(True)
        (network,) = self._network
        network.save_pretrained(folder)
