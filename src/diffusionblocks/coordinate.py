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

from diffusionblocks.network import Batch, Block, BlockModel, EndToEndModel, Parts


class BlockCoordinateModel(EndToEndModel):
    """The ordinary network whose layers are grouped into blocks that are trained in turn on the ordinary loss.

    Args:
        parts: from an adapter. layers: how the layers are split; block 0 also owns the stem, the last one the readout.
    """

    def __init__(self, parts: Parts, layers: Sequence[range]) -> None:
        BlockModel.__init__(self)
        self._remember(parts)
        last = len(layers) - 1
        self.blocks = nn.ModuleList(
            Block(
                [parts.layers[i] for i in span],
                stem=parts.stem if index == 0 else None,
                readout=parts.readout if index == last else None,
            )
            for index, span in enumerate(layers)
        )
        self.shared = nn.ModuleDict()
        self.layers = list(layers)

    def forward(self, batch: Batch, active: int | None = None) -> Tensor:
        """batch of the stem's inputs -> logits [N, V], with a graph through block `active` (None: as torch says)."""
        if active is not None:
            for index in range(self.num_blocks):
                self.block(index).requires_grad_(index == active)
        first, last = self.block(0), self.block(self.num_blocks - 1)
        assert first.stem is not None and last.readout is not None
        hidden = first.stem(batch)
        for index in range(self.num_blocks):
            block = self.block(index)
            if active is None or index == active:
                hidden = block("trunk", hidden)
            elif index < active:
                with torch.no_grad():
                    hidden = block("trunk", hidden)
            else:
                for layer in block.layers:
                    hidden = checkpoint(layer, hidden, use_reentrant=False)
        if active in (None, self.num_blocks - 1):
            return last.readout(hidden)
        return checkpoint(last.readout, hidden, use_reentrant=False)

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
