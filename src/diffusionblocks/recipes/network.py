"""The network of a recipe: a new one of the recipe's sizes, or a pretrained one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.latents import latent_shape
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.tokenizers import Tokenizer, load_tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.networks.adapter import Adapter, ImageSizes
from diffusionblocks.networks.config import NetworkConfig, network_class, new_config
from diffusionblocks.networks.pretrained import local
from diffusionblocks.networks.registry import find_adapter, pretrained_config
from diffusionblocks.recipes import ModelConfig, Recipe
from diffusionblocks.system.files import read_json


def network_config(recipe: Recipe, num_outputs: int) -> NetworkConfig:
    """The configuration of a recipe's network. num_outputs: classes (for text the tokenizer tells).

    Raises UserError for sizes that cannot work together.
    """
    settings = recipe.model
    known = ("sdpa", "eager", *(["flex_attention"] if isinstance(recipe.data, TextConfig) else []))
    if settings.attention not in known:
        raise UserError(f"model.attention must be {' or '.join(known)}, got {settings.attention!r}")
    if settings.attention == "flex_attention" and settings.dropout:
        raise UserError("model.attention flex_attention has no dropout: set model.dropout to 0")
    if isinstance(recipe.data, TextConfig):
        return _of_tokens(recipe)
    channels, size = sample_shape(recipe.data)
    if settings.pretrained:
        return _pretrained(recipe, num_outputs, channels, size)
    adapter = find_adapter(settings.model_class)
    check_target(recipe, adapter, settings.model_class)
    if size % settings.patch_size:
        what = "data.image_size" if not recipe.data.vae else "the latent size"
        raise UserError(f"{what} {size} is not divisible by model.patch_size {settings.patch_size}")
    _check_heads(settings)
    if settings.hidden_size % adapter.width_divisor:
        raise UserError(
            f"model.hidden_size {settings.hidden_size} must be divisible by {adapter.width_divisor}: positions in two "
            "dimensions"
        )
    sizes = ImageSizes(
        width=settings.hidden_size,
        depth=settings.num_hidden_layers,
        heads=settings.num_attention_heads,
        intermediate=settings.intermediate_size,
        patch=settings.patch_size,
        channels=channels,
        size=size,
        outputs=num_outputs,
        dropout=settings.dropout,
    )
    return new_config(adapter, settings.model_class, adapter.image_config(sizes), settings.attention)


def build_network(recipe: Recipe, num_outputs: int) -> Any:
    """The network of a recipe, new (from torch's global generator) or pretrained."""
    config = network_config(recipe, num_outputs)
    if not recipe.model.pretrained:
        return config.build()
    if isinstance(recipe.data, TextConfig):
        return _load_of_tokens(config, recipe.model)
    return config.load(recipe.model.pretrained)


def sample_shape(data: DataConfig) -> tuple[int, int]:
    """Channels and size of what the network reads: images, or the latents that the recipe's autoencoder makes of
    them."""
    if data.vae:
        return latent_shape(data)
    return data.channels, data.image_size


def _pretrained(recipe: Recipe, num_classes: int, channels: int, size: int) -> NetworkConfig:
    name, dropout = recipe.model.pretrained, recipe.model.dropout
    config = pretrained_config(name, recipe.model.trust_remote_code)
    check_target(recipe, config.adapter, config.class_name)
    assert isinstance(recipe.data, DataConfig)
    diffusers = config.adapter.library == "diffusers"
    wanted = tuple(config.get(key) for key in config.adapter.image_keys)
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


def check_target(recipe: Recipe, adapter: Adapter, class_name: str) -> None:
    """Raises UserError when the task is none of what the network can be made to estimate."""
    if recipe.task.target not in adapter.targets:
        raise UserError(f"the task {recipe.task.kind} cannot train a {class_name}; set model.model_class or task.kind")


def _of_tokens(recipe: Recipe) -> NetworkConfig:
    """A network of the recipe's tokens. For masked diffusion its config says which of them is the mask."""
    settings, data = recipe.model, recipe.data
    assert isinstance(data, TextConfig)
    masked = recipe.task.target == "masked"
    tokenizer = load_tokenizer(data.tokenizer, masked, data.trust_remote_code)
    mask = {"mask_token_id": tokenizer.mask_id} if masked else {}
    if settings.pretrained:
        config = pretrained_config(settings.pretrained, settings.trust_remote_code)
        check_target(recipe, config.adapter, config.class_name)
        _check_pretrained_tokens(settings.pretrained, config, data, tokenizer)
        size = max(tokenizer.size, config.get("vocab_size"))
        return _with_dropout(config.changed(vocab_size=size, **mask), settings)
    adapter = find_adapter(settings.model_class)
    check_target(recipe, adapter, settings.model_class)
    if adapter.only_pretrained:
        raise UserError(adapter.only_pretrained)
    _check_heads(settings)
    sizes = {
        "vocab_size": tokenizer.size,
        **mask,
        "pad_token_id": None,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "intermediate_size": settings.intermediate_size,
        "max_position_embeddings": data.length,
    }
    _check_rotary(adapter, settings)
    config = new_config(adapter, settings.model_class, sizes, settings.attention)
    heads, size = settings.num_attention_heads, settings.hidden_size // settings.num_attention_heads
    same = {"num_key_value_heads": heads, "head_dim": size}  # where the family's default is its own
    config = config.changed(**{name: value for name, value in same.items() if hasattr(config.config, name)})
    return _with_dropout(config, settings)


def _check_pretrained_tokens(name: str, config: NetworkConfig, data: TextConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError when windows or token ids are not those of the pretrained network."""
    own = config.config
    longest = own.max_position_embeddings - config.adapter.first_position(own)
    if data.length > longest:
        raise UserError(f"data.length {data.length} exceeds the {longest} positions of {name}")
    ours = getattr(own, "mask_token_id", None) == tokenizer.mask_id and own.vocab_size == tokenizer.size
    if data.tokenizer in ("characters", "bytes") and not ours:
        raise UserError(
            f"{name} does not read {data.tokenizer}: set data.tokenizer to its own tokenizer (often {name} as well)"
        )
    added = tokenizer.mask_id is not None  # at most the mask
    if tokenizer.size > own.vocab_size + added:
        raise UserError(
            f"the tokenizer {data.tokenizer!r} has {tokenizer.size} tokens, {name} knows {own.vocab_size}: set "
            "data.tokenizer to its own"
        )
    use = Path(local(name)) / "denoiser.json"
    if use.is_file() and read_json(use).get("conditioned"):
        raise UserError(
            f"{name} was trained with layers that see the level (blocks.condition_width), and would lose that: only "
            "networks trained with condition_width 0 can be started from"
        )


DROPOUT = (
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
)


def _with_dropout(config: NetworkConfig, settings: ModelConfig) -> NetworkConfig:
    """In the words of the family; and its attention."""
    own = {name: settings.dropout for name in DROPOUT if hasattr(config.config, name)}
    return dataclasses.replace(config.changed(**own), attention=settings.attention)


def _load_of_tokens(config: NetworkConfig, settings: ModelConfig) -> Any:
    """The pretrained network, with rows for tokens that its tokenizer did not have."""
    wanted = config.get("vocab_size")
    own = pretrained_config(settings.pretrained, settings.trust_remote_code).get("vocab_size")
    network = config.changed(vocab_size=own).load(settings.pretrained)
    if wanted > own:
        network.resize_token_embeddings(wanted)
    return network


def _check_rotary(adapter: Adapter, settings: ModelConfig) -> None:
    """Raises UserError where a head cannot have rotary positions, in words of the recipe (transformers may raise its
    own)."""
    rotary = getattr(network_class(settings.model_class, adapter).config_class(), "rope_parameters", None)
    if rotary is None:
        return
    size = settings.hidden_size // settings.num_attention_heads
    turned = int(size * rotary.get("partial_rotary_factor", 1.0))
    if turned < 2 or turned % 2:
        raise UserError(
            f"rotary positions turn pairs of numbers: {turned} of the {size} of a head (model.hidden_size / "
            "model.num_attention_heads) must be an even number of at least 2"
        )


def _check_heads(settings: ModelConfig) -> None:
    if settings.hidden_size % settings.num_attention_heads:
        raise UserError(
            f"model.hidden_size {settings.hidden_size} is not divisible by model.num_attention_heads "
            f"{settings.num_attention_heads}"
        )
