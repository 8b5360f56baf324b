"""`convert` a network into blocks, and `load` what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.kinds import BLOCKS
from diffusionblocks.blocks.looped import KIND as LOOPED
from diffusionblocks.blocks.looped import LoopedNetwork
from diffusionblocks.blocks.model import DiffusionBlocksModel
from diffusionblocks.blocks.saving import DESCRIPTION, check_weights, load_weights, read_description
from diffusionblocks.errors import UserError, first_line
from diffusionblocks.networks.registry import build_network, find_adapter, take_apart
from diffusionblocks.system.files import Damaged


def convert(model: Any, num_blocks: int = 3, **options: Any) -> DiffusionBlocksModel:
    """Splits a Hugging Face network into blocks that train alone.

    The caller's model is copied, never edited. Where the mathematics allows, the conversion preserves its function:
    conditioning and the target's entry start at zero, so every path through the blocks that the original network
    has gives the same logits as before.

    Args:
        model: `transformers.ViTForImageClassification`, `diffusers.DiTTransformer2DModel` or another supported class,
            new or pretrained.
        num_blocks: B; must divide the number of layers unless `layers_per_block` is given.
        **options: fields of `BlocksConfig` (context, readout, levels, overlap, ...).

    Raises UserError for an unsupported network, an impossible split or an unknown option.
    """
    try:
        config = BlocksConfig(num_blocks=num_blocks, **options)
    except TypeError:
        from diffusionblocks.errors import nearest

        unknown = next(name for name in options if name not in BlocksConfig.__dataclass_fields__)
        raise UserError(f"unknown option {unknown!r}{nearest(unknown, BlocksConfig.__dataclass_fields__)}") from None
    target = find_adapter(type(model).__name__).target(config.target)
    config.target = target
    parts = take_apart(model, target)
    own = model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else dict(model.config)
    source = {"class": type(model).__name__, "config": own}
    return BLOCKS[parts.target](parts, config, source)


def load(folder: str | Path) -> Any:
    """Reads what `save_pretrained` of a `DiffusionBlocksModel` or a `LoopedNetwork` wrote. Nothing is unpickled.

    Raises UserError when there is nothing, or something damaged."""
    description = read_description(folder)
    check_weights(folder, description)
    source, blocks = description["source"], description["blocks"]
    if not isinstance(source.get("class"), str) or not isinstance(source.get("config"), dict):
        raise Damaged(Path(folder) / DESCRIPTION, "it does not say what network the weights are of")
    if unknown := sorted(blocks.keys() - BlocksConfig.__dataclass_fields__.keys()):
        raise UserError(
            f"{folder} was saved by another version of this package: its option {unknown[0]} is not known here"
        )
    try:
        config = BlocksConfig(**blocks)
        network = build_network(source["class"], source["config"])
        adapter = find_adapter(source["class"])
        if description.get("kind") == LOOPED:
            model: Any = LoopedNetwork(adapter.take_apart(network, "recurrent", copied=True), config)
        else:
            parts = adapter.take_apart(network, config.target, copied=True)
            model = BLOCKS[parts.target](parts, config, source)
    except UserError as error:
        raise UserError(f"no network can be made of {folder}: {error}") from None
    except Exception as error:  # values of a wrong kind or size: transformers and diffusers raise many kinds
        reason = f"no network can be made of its options: {first_line(error)}"
        raise Damaged(Path(folder) / DESCRIPTION, reason) from None
    load_weights(model, folder, checked=True)
    return model.eval()
