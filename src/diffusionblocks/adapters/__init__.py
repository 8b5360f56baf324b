"""Supported network families, and `convert`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from diffusionblocks.adapters.base import Adapter
from diffusionblocks.adapters.llama import LLAMA
from diffusionblocks.adapters.vit import DEIT, VIT
from diffusionblocks.config import BlocksConfig
from diffusionblocks.errors import UserError
from diffusionblocks.network import DiffusionBlocksModel, Parts

ADAPTERS: tuple[Adapter, ...] = (VIT, DEIT, LLAMA)


def find_adapter(class_name: str) -> Adapter:
    """The adapter for networks of a class, or a UserError that lists what is supported."""
    for adapter in ADAPTERS:
        if class_name in adapter.model_classes:
            return adapter
    supported = ", ".join(name for adapter in ADAPTERS for name in adapter.model_classes)
    raise UserError(f"networks of class {class_name} are not supported; supported: {supported}")


def pretrained_config(name_or_path: str) -> Any:
    """The configuration of a pretrained network of a supported class, as transformers reads it (no weights).

    Raises UserError when it cannot be read or its class is not supported.
    """
    from transformers import AutoConfig

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it announces every retry; the error below says it once
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load the network {name_or_path!r}: {reason} (offline, pass a local folder)") from None
    find_adapter((config.architectures or [config.model_type])[0])
    return config


def take_apart(model: nn.Module) -> Parts:
    """Stem, layers and readout of a copy of `model`."""
    return find_adapter(type(model).__name__).take_apart(model)


def convert(model: Any, num_blocks: int = 3, **options: Any) -> DiffusionBlocksModel:
    """Splits a Hugging Face network into blocks that train alone.

    The caller's model is copied, never edited. Where the mathematics allows, the conversion preserves its function:
    conditioning and the target's entry start at zero, so every path through the blocks that the original network
    has gives the same logits as before.

    Args:
        model: `transformers.ViTForImageClassification` or another supported class, new or pretrained.
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
    if not find_adapter(type(model).__name__).denoisers:
        raise UserError(
            f"{type(model).__name__} cannot be split into denoisers yet; it trains whole: end-to-end, lora, exact, last-block"
        )
    parts = take_apart(model)
    source = {"class": type(model).__name__, "config": model.config.to_diff_dict()}
    return DiffusionBlocksModel(parts, config, source)


def load(folder: str | Path) -> DiffusionBlocksModel:
    """Reads what `DiffusionBlocksModel.save_pretrained` wrote. Nothing is unpickled."""
    from safetensors.torch import load_model

    folder = Path(folder)
    try:
        description = json.loads((folder / "diffusionblocks.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no saved DiffusionBlocks model (diffusionblocks.json is missing)") from None
    source = description["source"]
    model = build_network(source["class"], source["config"])
    blocks = DiffusionBlocksModel(take_apart(model), BlocksConfig(**description["blocks"]), source)
    load_model(blocks, str(folder / "model.safetensors"))
    return blocks.eval()


def build_network(class_name: str, config: dict[str, Any]) -> nn.Module:
    """A new transformers network of a supported class from its config as a dict."""
    import transformers

    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class.from_dict(config))
