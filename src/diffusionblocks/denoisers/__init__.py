"""What denoisers estimate: labels, images, masked or next tokens. The registry maps a network's target to its model."""

from __future__ import annotations

from typing import Any

from diffusionblocks.config import BlocksConfig
from diffusionblocks.denoisers.causal import CausalBlocks
from diffusionblocks.denoisers.images import ImageBlocks, ImageNetwork
from diffusionblocks.denoisers.labels import LabelBlocks
from diffusionblocks.denoisers.masked import MaskedBlocks, MaskedNetwork
from diffusionblocks.network import DiffusionBlocksModel, EndToEndModel, Parts

BLOCKS: dict[str, type[DiffusionBlocksModel]] = {
    "label": LabelBlocks,
    "image": ImageBlocks,
    "masked": MaskedBlocks,
    "causal": CausalBlocks,
}


def whole_network(parts: Parts, config: BlocksConfig, num_layers: int | None = None, **options: Any) -> EndToEndModel:
    """The network as one block, trained as networks of its kind are: a diffusion network as one denoiser of all levels.

    config: supplies the distribution of noise levels, where there is one.
    """
    if parts.target == "image":
        config.check("image")
        return ImageNetwork(parts, num_layers, levels=config.distribution(), **options)
    if parts.target == "masked":
        config.check("masked")
        return MaskedNetwork(
            parts, num_layers, condition_width=config.condition_width, levels=config.masking(), **options
        )
    return EndToEndModel(parts, num_layers, **options)
