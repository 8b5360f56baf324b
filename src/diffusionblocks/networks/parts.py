"""What a foreign network consists of: the one thing that adapters make and blocks are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(kw_only=True)
class Parts:
    """What an adapter finds in a foreign network. All modules are copies that the blocks may keep.

    Args:
        target: what denoisers made of the network estimate: `label`, `image`, `masked` (tokens that a mask hides), or
            `causal` (the next token).
        stem: forward(batch) -> hidden [N, T, D].
        layers: the residual layers, each forward(hidden) -> hidden, or forward(hidden, condition) where the network has
            conditions of its own (`image`: timestep and class; tokens: a `View`).
        layer_norms: attribute paths, inside a layer, of the norms that see the noise level; empty where layers see it
            by themselves.
        readout: forward(hidden) -> logits [N, V], or forward(hidden, condition) -> image [N, channels, height, width].
        width: D. num_classes: V. tied: stem and readout share a parameter.
        sample_shape: of a denoised image (channels, height, width).
        network: the copied network whose submodules the parts are; training the parts trains it. layers_path: where
            its layers are. depth_key: the entry of its config that counts them.
    """

    target: str
    stem: Any
    layers: list[nn.Module]
    layer_norms: tuple[str, ...]
    readout: Any
    width: int
    num_classes: int
    network: Any
    layers_path: str
    depth_key: str
    tied: bool = False
    sample_shape: tuple[int, int, int] = (0, 0, 0)
