"""Decoders of the Llama family in Hugging Face transformers: Llama (and SmolLM2), Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.attention import View, cache_argument
from diffusionblocks.networks.readout import TokenReadout


class TokenStem(nn.Module):
    """input_ids [N, T] -> embeddings [N, T, D]."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.embedding(batch["input_ids"])

    def place(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """What embeddings [N, T, D] from elsewhere become at `positions`: as they are, layers turn by position
        themselves."""
        return hidden


class RotaryLayer(nn.Module):
    """A decoder layer with rotary positions: hidden [N, T, D] -> hidden [N, T, D]. Causal unless a view says otherwise.

    Rotations are computed where they are used: they have no parameters and cost less than keeping them for all layers.

    Args:
        layer: of transformers. rotary: the network's module that computes rotations.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer, self._rotary, self._config = layer, (rotary,), config
        self._cache = cache_argument(type(layer).forward)

    def forward(self, hidden: Tensor, view: View | None = None) -> Tensor:
        (rotary,) = self._rotary
        self.constants_to(hidden.device)
        window = _window(self.layer, self._config)
        if view is None:
            view = causal_view(self._config, hidden, window)
        elif view.causal:
            view = view.within(window)
        return self.layer(
            hidden,
            attention_mask=view.mask,
            position_ids=view.positions,
            position_embeddings=rotary(hidden, view.positions),
            is_causal=view.causal,
            **{self._cache: view.cache},
        )

    def constants_to(self, device: torch.device) -> None:
        """Moves the table of frequencies, which belongs to no block, so that nobody else does: once, not in every
        call."""
        (rotary,) = self._rotary
        if next(rotary.buffers()).device != device:
            rotary.to(device)


def causal_view(config: Any, hidden: Tensor, window: int | None = None) -> View:
    """Positions 0 to T-1 of hidden [N, T, D], each attending to itself and those before it (at most `window` of them).

    The mask is transformers' own for the network `config`; None where plain causal attention needs none.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    slides = window is not None and hidden.shape[1] > window
    if config._attn_implementation == "sdpa" and not slides:
        return View(positions, causal=True)
    make = create_sliding_window_causal_mask if slides else create_causal_mask
    nothing = {cache_argument(make): None}
    mask: Any = make(config=config, inputs_embeds=hidden, attention_mask=None, position_ids=positions, **nothing)
    return View(positions, mask, causal=True)


def _window(layer: Any, config: Any) -> int | None:
    """How far a layer looks back: Qwen's layers know, for Mistral's the config says; None = without end."""
    attention = getattr(layer, "self_attn", None)
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def token_readout(model: Any, norm: nn.Module, head: nn.Linear) -> TokenReadout:
    return TokenReadout(norm, head)


def rotary_layers(rotary: str) -> Callable[[Any, nn.Module], RotaryLayer]:
    """make_layer of a family whose module `rotary` turns by position."""
    return lambda model, layer: RotaryLayer(layer, model.get_submodule(rotary), model.config)


LLAMA = Adapter(
    model_classes=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    stem=("model.embed_tokens",),
    layers="model.layers",
    layer_norms=("layer.input_layernorm", "layer.post_attention_layernorm"),
    readout=("model.norm", "lm_head"),
    make_stem=TokenStem,
    make_readout=token_readout,
    make_layer=rotary_layers("model.rotary_emb"),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    targets=("causal", "masked", "recurrent"),
)
