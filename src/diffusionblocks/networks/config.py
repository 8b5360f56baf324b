"""Configurations of foreign networks, alike for transformers and diffusers: how deep, and how to make one."""

from __future__ import annotations

import copy
import importlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.errors import UserError
from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.pretrained import explained, load_config, local, without_progress

log = logging.getLogger("diffusionblocks")
MOST_LAYERS = 10_000
CONVERTED = "remove this folder, and it is converted again"
CLASSES = ".class_embedder."  # in the layers of diffusion transformers


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is made from: its class, and the config that its library reads (an object of transformers, a dict
    for diffusers). subfolder: of a Hugging Face repository, where the network is."""

    adapter: Adapter
    class_name: str
    config: Any
    attention: str = "sdpa"
    subfolder: str | None = None

    @property
    def num_layers(self) -> int:
        """Raises UserError where the config has no such number."""
        depth = self.get(self.adapter.depth_key)
        if not isinstance(depth, int) or not 1 <= depth <= MOST_LAYERS:
            raise UserError(
                f"the config of the {self.class_name} is damaged: {self.adapter.depth_key} is {depth!r}, and should be "
                f"a whole number from 1 to {MOST_LAYERS:,}"
            )
        return depth

    def get(self, key: str) -> Any:
        """An entry of the config. Raises UserError where it is missing."""
        try:
            return self.config[key] if isinstance(self.config, dict) else getattr(self.config, key)
        except (KeyError, AttributeError):
            raise UserError(f"the config of the {self.class_name} is damaged: {key} is missing") from None

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
        """The pretrained network. Weights of its readout (and of its classes, where layers see them) that are missing
        or of another shape are new; only safetensors are read.

        Raises UserError where weights are damaged, or those of its layers are missing.
        """
        place = local(name_or_path)
        try:
            network, found = self._load(place)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # transformers, diffusers, safetensors and torch raise many kinds for what is damaged
            hint = (
                "it is damaged: copy or download it again" if Path(place).is_dir() else "offline, pass a local folder"
            )
            raise explained("network", place, error, hint if place == name_or_path else CONVERTED) from None
        self._check_loaded(place, found)
        return network

    def _load(self, place: str) -> tuple[Any, dict[str, Any]]:
        model_class = network_class(self.class_name, self.adapter)
        options: dict[str, Any] = {
            "ignore_mismatched_sizes": True,
            "use_safetensors": True,
            "output_loading_info": True,
        }
        if isinstance(self.config, dict):
            changed = {key: value for key, value in self.config.items() if not key.startswith("_")}
            own = {"low_cpu_mem_usage": False, "subfolder": self.subfolder}
            network, found = model_class.from_pretrained(place, **options, **own, **changed)
            return self._with_attention(network), found
        config = copy.deepcopy(self.config)
        config._attn_implementation = self.attention
        # In fp32, whatever it was stored in: train.precision says what it trains in.
        with without_progress():
            return model_class.from_pretrained(place, config=config, dtype=torch.float32, **options)

    def _check_loaded(self, place: str, found: dict[str, Any]) -> None:
        """Raises UserError where the network would start from new weights instead of those that were asked for."""
        mismatched = [entry if isinstance(entry, str) else entry[0] for entry in found.get("mismatched_keys", ())]
        new = sorted({*found["missing_keys"], *mismatched})
        paths = tuple(f"{path}." for path in (self.adapter.layers, *self.adapter.stem))
        wrong = [name for name in new if name.startswith(paths) and CLASSES not in name]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(
                f"the weights of {place} are not those of its config: missing, or of another shape: {wrong[0]}{more}"
            )
        if new:
            log.info("new weights, which %s does not have in this shape: %s", place, ", ".join(new))

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
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name_or_path} holds a peft adapter, no network: merge it into its network (merge_and_unload of peft) "
            "and save that"
        )
    try:
        config = load_config(name_or_path, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for what is damaged
        if (found := _from_diffusers(name_or_path)) is not None:
            return found
        hint = "is its config.json damaged?" if folder.is_dir() else "offline, pass a local folder"
        raise explained("network", name_or_path, error, hint) from None
    return _class_named(config.architectures, config.model_type), config, None


def _class_named(architectures: Any, model_type: str) -> str:
    """The class that a config of transformers names, or its family where it names none."""
    return str(architectures[0]) if isinstance(architectures, list) and architectures else model_type


def _from_diffusers(name: str) -> tuple[str, Any, str | None] | None:
    """A diffusers network by its Hugging Face name: at the top of the repository, or in its folder `transformer`."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        return None
    for subfolder in (None, "transformer"):
        try:
            content = DiTTransformer2DModel.load_config(name, subfolder=subfolder)
        except Exception:  # as above
            continue
        if isinstance(content, dict) and "_class_name" in content:
            return content["_class_name"], dict(content), subfolder
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    return content if isinstance(content, dict) else {}
