"""What denoisers estimate: labels, images, masked or next tokens (in looped networks too). The registry maps a
network's target to its model."""

from __future__ import annotations

from typing import Any

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.images import ImageBlocks, ImageNetwork
from diffusionblocks.blocks.labels import LabelBlocks
from diffusionblocks.blocks.looped import LoopedBlocks, LoopedNetwork
from diffusionblocks.blocks.masked import MaskedBlocks, MaskedNetwork
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel, EndToEndModel
from diffusionblocks.networks.parts import Parts

BLOCKS: dict[str, type[DiffusionBlocksModel]] = {
    "label": LabelBlocks,
    "image": ImageBlocks,
    "masked": MaskedBlocks,
    "causal": CausalBlocks,
    "recurrent": LoopedBlocks,
}


def whole_network(parts: Parts, config: BlocksConfig, num_layers: int | None = None, **options: Any) -> BlockModel:
    """The network as one block, trained as networks of its kind are: a diffusion network as one denoiser of all levels,
    a looped one by unrolling it.

    config: supplies the distribution of noise levels, where there is one.
    """
    if parts.target == "recurrent":
        return LoopedNetwork(parts, config, **options)
    if parts.target == "image":
        config.check("image")
        return ImageNetwork(parts, num_layers, levels=config.distribution(), **options)
    if parts.target == "masked":
        config.check("masked")
        return MaskedNetwork(
            parts, num_layers, condition_width=config.condition_width, levels=config.masking(), **options
        )
    return EndToEndModel(parts, num_layers, **options)
