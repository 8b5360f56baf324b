"""Configurations of foreign networks, alike for transformers and diffusers: how deep, and how to make one."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.adapters.base import Adapter
from diffusionblocks.errors import UserError
from diffusionblocks.pretrained import explained, load_config, local, without_progress


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is made from: its class, and the config that its library reads (an object of transformers, a dict for
    diffusers). subfolder: of a Hugging Face repository, where the network is."""

    adapter: Adapter
    class_name: str
    config: Any
    attention: str = "sdpa"
    subfolder: str | None = None

    @property
    def num_layers(self) -> int:
        return int(self.get(self.adapter.depth_key))

    def get(self, key: str) -> Any:
        return self.config[key] if isinstance(self.config, dict) else getattr(self.config, key)

    def changed(self, **changes: Any) -> NetworkConfig:
        """A copy with other entries."""
        config = copy.deepcopy(self.config)
        config.update(changes)
        return replace(self, config=config)

    def cut(self, num_layers: int) -> NetworkConfig:
        """A copy with another number of layers."""
        changes: dict[str, Any] = {self.adapter.depth_key: num_layers}
        if kinds := getattr(self.config, "layer_types", None):
            changes["layer_types"] = kinds[:num_layers]
        return self.changed(**changes)

    def build(self) -> Any:
        """A new network, its weights from torch's global generator."""
        model_class = network_class(self.class_name, self.adapter)
        if isinstance(self.config, dict):
            return self._with_attention(model_class.from_config(self.config))
        config = copy.deepcopy(self.config)
        config._attn_implementation = self.attention
        return model_class(config)

    def load(self, name_or_path: str) -> Any:
        """The pretrained network; weights whose shapes do not fit this configuration (a new readout) are new."""
        model_class = network_class(self.class_name, self.adapter)
        if isinstance(self.config, dict):
            changed = {key: value for key, value in self.config.items() if not key.startswith("_")}
            own = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False, "subfolder": self.subfolder}
            return self._with_attention(model_class.from_pretrained(name_or_path, **own, **changed))
        config = copy.deepcopy(self.config)
        config._attn_implementation = self.attention
        # In fp32, whatever it was stored in: train.precision says what it trains in.
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "dtype": torch.float32}
        with without_progress():
            return model_class.from_pretrained(local(name_or_path), config=config, **options)

    def _with_attention(self, network: Any) -> Any:
        from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

        processor: Any = AttnProcessor() if self.attention == "eager" else AttnProcessor2_0()
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)
        return network


def network_class(class_name: str, adapter: Adapter) -> Any:
    """The class of a supported network. Raises UserError when its library is not installed."""
    try:
        return getattr(importlib.import_module(adapter.library), class_name)
    except ImportError:
        raise UserError(f"{class_name} needs {adapter.library}: pip install 'diffusionblocks[images]'") from None


def new_config(adapter: Adapter, class_name: str, settings: dict[str, Any], attention: str) -> NetworkConfig:
    """The configuration of a new network from what its class takes."""
    if adapter.library == "diffusers":
        return NetworkConfig(adapter, class_name, dict(settings), attention)
    config = network_class(class_name, adapter).config_class(architectures=[class_name], **settings)
    return NetworkConfig(adapter, class_name, config, attention)


def read_config(name_or_path: str, trust_remote_code: bool = False) -> tuple[str, Any, str | None]:
    """Class name and config of a pretrained network, as its library reads it (no weights), and its sub-folder.

    Raises UserError when there is none.
    """
    for subfolder in (None, "transformer"):
        local = Path(name_or_path, subfolder or "", "config.json")
        if local.is_file() and "_class_name" in (content := _json(local)):
            return content["_class_name"], content, subfolder
    try:
        config = load_config(name_or_path, trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if (found := _from_diffusers(name_or_path)) is not None:
            return found
        raise explained("network", name_or_path, error, "offline, pass a local folder") from None
    return (config.architectures or [config.model_type])[0], config, None


def _from_diffusers(name: str) -> tuple[str, Any, str | None] | None:
    """A diffusers network by its Hugging Face name: at the top of the repository, or in its folder `transformer`."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        return None
    for subfolder in (None, "transformer"):
        try:
            content = DiTTransformer2DModel.load_config(name, subfolder=subfolder)
        except (OSError, ValueError):
            continue
        if "_class_name" in content:
            return content["_class_name"], dict(content), subfolder
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    return content if isinstance(content, dict) else {}
