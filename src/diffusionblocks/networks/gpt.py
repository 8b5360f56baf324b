"""Decoders of the GPT family in Hugging Face transformers: GPT-2 and GPT-NeoX (Pythia)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.attention import View, cache_argument, token_positions
from diffusionblocks.networks.llama import TokenStem, causal_view, rotary_layers, token_readout


class PositionStem(nn.Module):
    """input_ids [N, T] -> embeddings of tokens and of learned positions [N, T, D]."""

    def __init__(self, tokens: nn.Module, positions: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.place(self.tokens(batch["input_ids"]), token_positions(batch))

    def place(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [N, T, D] at `positions` [N or 1, T]."""
        return self.dropout(hidden + self.positions(positions))


class PositionLayer(nn.Module):
    """A decoder layer without positions of its own: hidden [N, T, D] -> hidden [N, T, D]. Causal unless a view says
    otherwise."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer, self._config = layer, config
        self._cache = cache_argument(type(layer).forward)

    def forward(self, hidden: Tensor, view: View | None = None) -> Tensor:
        view = causal_view(self._config, hidden) if view is None else view
        return self.layer(hidden, attention_mask=view.mask, is_causal=view.causal, **{self._cache: view.cache})


GPT2 = Adapter(
    model_classes=("GPT2LMHeadModel",),
    stem=("transformer.wte", "transformer.wpe", "transformer.drop"),
    layers="transformer.h",
    layer_norms=("layer.ln_1", "layer.ln_2"),
    readout=("transformer.ln_f", "lm_head"),
    make_stem=PositionStem,
    make_readout=token_readout,
    make_layer=lambda model, layer: PositionLayer(layer, model.config),
    tied=("lm_head.weight", "transformer.wte.weight"),
    targets=("causal", "masked", "recurrent"),
    depth_key="n_layer",
)

GPT_NEOX = Adapter(
    model_classes=("GPTNeoXForCausalLM",),
    stem=("gpt_neox.embed_in",),
    layers="gpt_neox.layers",
    layer_norms=("layer.input_layernorm", "layer.post_attention_layernorm"),
    readout=("gpt_neox.final_layer_norm", "lm_head"),
    make_stem=TokenStem,
    make_readout=token_readout,
    make_layer=rotary_layers("gpt_neox.rotary_emb"),
    tied=("lm_head.weight", "gpt_neox.embed_in.weight"),
    targets=("causal", "masked", "recurrent"),
)
