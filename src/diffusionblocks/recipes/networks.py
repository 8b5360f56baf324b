"""The network of a recipe: a new one of the recipe's sizes, or a pretrained one."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusionblocks.adapters import find_adapter, pretrained_config
from diffusionblocks.adapters.networks import NetworkConfig, new_config
from diffusionblocks.data.latents import latent_shape
from diffusionblocks.errors import UserError
from diffusionblocks.recipes import ModelConfig, Recipe

TARGETS = {"classification": "label", "image-generation": "image"}


def network_config(recipe: Recipe, num_classes: int) -> NetworkConfig:
    """The configuration of a recipe's network. Raises UserError for sizes that cannot work together."""
    settings, (channels, size) = recipe.model, sample_shape(recipe)
    if settings.attention not in ("sdpa", "eager"):
        raise UserError(f"model.attention must be sdpa or eager, got {settings.attention!r}")
    if settings.pretrained:
        return _pretrained(recipe, num_classes, channels, size)
    adapter = find_adapter(settings.model_class)
    _check_target(recipe, adapter.target, settings.model_class)
    if size % settings.patch_size:
        what = "data.image_size" if not recipe.data.vae else "the latent size"
        raise UserError(f"{what} {size} is not divisible by model.patch_size {settings.patch_size}")
    if settings.hidden_size % settings.num_attention_heads:
        raise UserError(
            f"model.hidden_size {settings.hidden_size} is not divisible by model.num_attention_heads {settings.num_attention_heads}"
        )
    if adapter.library == "diffusers" and settings.hidden_size % 4:
        raise UserError(f"model.hidden_size {settings.hidden_size} must be divisible by 4: positions in two dimensions")
    make = _dit if adapter.library == "diffusers" else _vit
    return new_config(adapter, settings.model_class, make(settings, channels, size, num_classes), settings.attention)


def build_network(recipe: Recipe, num_classes: int) -> Any:
    """The network of a recipe, new (from torch's global generator) or pretrained."""
    config = network_config(recipe, num_classes)
    return config.load(recipe.model.pretrained) if recipe.model.pretrained else config.build()


def sample_shape(recipe: Recipe) -> tuple[int, int]:
    """Channels and size of what the network reads: images, or the latents that the recipe's autoencoder makes of them."""
    if recipe.data.vae:
        return latent_shape(recipe.data)
    return recipe.data.channels, recipe.data.image_size


def _vit(settings: ModelConfig, channels: int, size: int, num_classes: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "intermediate_size": settings.intermediate_size,
        "patch_size": settings.patch_size,
        "image_size": size,
        "num_channels": channels,
        "num_labels": num_classes,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
    }


def _dit(settings: ModelConfig, channels: int, size: int, num_classes: int) -> dict[str, Any]:
    return {
        "num_attention_heads": settings.num_attention_heads,
        "attention_head_dim": settings.hidden_size // settings.num_attention_heads,
        "num_layers": settings.num_hidden_layers,
        "patch_size": settings.patch_size,
        "sample_size": size,
        "in_channels": channels,
        "num_embeds_ada_norm": num_classes,
        "dropout": settings.dropout,
    }


def _pretrained(recipe: Recipe, num_classes: int, channels: int, size: int) -> NetworkConfig:
    name, dropout = recipe.model.pretrained, recipe.model.dropout
    config = pretrained_config(name)
    _check_target(recipe, config.adapter.target, config.class_name)
    diffusers = config.adapter.library == "diffusers"
    channels_key, size_key = ("in_channels", "sample_size") if diffusers else ("num_channels", "image_size")
    wanted = config.get(channels_key), config.get(size_key)
    if wanted != (channels, size):
        if diffusers and wanted[0] not in (1, 3) and not recipe.data.vae:
            raise UserError(f"{name} reads latents: set data.vae to the autoencoder that it was trained with")
        raise UserError(
            f"{name} reads {wanted[0]} channels of {wanted[1]} pixels; "
            f"set data.channels and data.image_size to match (got {channels} and {size})"
        )
    if diffusers:
        config = config.changed(num_embeds_ada_norm=num_classes, dropout=dropout)
    else:
        config = config.changed(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        config.config.num_labels = num_classes
    return dataclasses.replace(config, attention=recipe.model.attention)


def _check_target(recipe: Recipe, target: str, class_name: str) -> None:
    if target not in ("none", TARGETS[recipe.task.kind]):
        raise UserError(f"the task {recipe.task.kind} cannot train a {class_name}; set model.model_class or task.kind")
