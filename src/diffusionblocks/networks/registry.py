"""Supported network families, and what is read of a network before it is split."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusionblocks.errors import UserError
from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.bert import BERT, ROBERTA
from diffusionblocks.networks.config import NetworkConfig, network_class, read_config
from diffusionblocks.networks.dit import DIT
from diffusionblocks.networks.gpt import GPT2, GPT_NEOX
from diffusionblocks.networks.llama import LLAMA
from diffusionblocks.networks.parts import Parts
from diffusionblocks.networks.vit import DEIT, VIT

ADAPTERS: tuple[Adapter, ...] = (VIT, DEIT, DIT, BERT, ROBERTA, LLAMA, GPT2, GPT_NEOX)


def find_adapter(class_name: str) -> Adapter:
    """The adapter for networks of a class, or a UserError that lists what is supported."""
    for adapter in ADAPTERS:
        if class_name in adapter.model_classes:
            return adapter
    supported = ", ".join(name for adapter in ADAPTERS for name in adapter.model_classes)
    raise UserError(f"networks of class {class_name} are not supported; supported: {supported}")


def pretrained_config(name_or_path: str, trust_remote_code: bool = False) -> NetworkConfig:
    """The configuration of a pretrained network of a supported class (no weights).

    Raises UserError when it cannot be read or its class is not supported.
    """
    class_name, config, subfolder = read_config(name_or_path, trust_remote_code)
    found = NetworkConfig(find_adapter(class_name), class_name, config, subfolder=subfolder)
    _ = found.num_layers  # checks
    return found


def take_apart(model: nn.Module, target: str = "auto") -> Parts:
    """Stem, layers and readout of a copy of `model`, which is to estimate `target`."""
    return find_adapter(type(model).__name__).take_apart(model, target)


def build_network(class_name: str, config: dict[str, Any]) -> nn.Module:
    """A new network of a supported class from its config as a dict."""
    adapter = find_adapter(class_name)
    own = (
        config if adapter.library == "diffusers" else network_class(class_name, adapter).config_class.from_dict(config)
    )
    return NetworkConfig(adapter, class_name, own).build()
