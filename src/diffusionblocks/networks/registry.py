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
from diffusionblocks.registry import Registry

OWN = (VIT, DEIT, DIT, BERT, ROBERTA, LLAMA, GPT2, GPT_NEOX)


def _classes(declaration: object) -> tuple[str, ...]:
    """The classes that a declaration is for. Raises UserError where it is none."""
    if not isinstance(declaration, Adapter):
        raise UserError(f"a network family is declared by an Adapter (networks/adapter.py), got {declaration!r}")
    if not declaration.model_classes:
        raise UserError("an Adapter must name the classes that it is for: its model_classes are empty")
    return declaration.model_classes


# By class name.
ADAPTERS: Registry[Adapter] = Registry("network class", "diffusionblocks.networks", lambda: OWN, _classes)


def register_network(adapter: Adapter) -> Adapter:
    """Makes a network family known, for this process. (An installed package does so by an entry point of the group
    `diffusionblocks.networks`.) Raises UserError where one of its classes is known already."""
    return ADAPTERS.register(adapter)


def find_adapter(class_name: str) -> Adapter:
    """The adapter for networks of a class, or a UserError that lists what is supported."""
    if class_name not in ADAPTERS:
        raise UserError(f"networks of class {class_name} are not supported; supported: {', '.join(ADAPTERS)}")
    return ADAPTERS[class_name]


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
