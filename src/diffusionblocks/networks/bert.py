"""Encoders of the BERT family in Hugging Face transformers: BERT and RoBERTa with their masked-language-model heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu

from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.attention import View, token_positions
from diffusionblocks.networks.readout import TokenReadout


class EmbeddingStem(nn.Module):
    """input_ids [N, T] -> embeddings with learned positions [N, T, D]. first: number of the first position."""

    def __init__(self, embeddings: Any, first: int = 0) -> None:
        super().__init__()
        self.embeddings, self.first = embeddings, first

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.embeddings(input_ids=batch["input_ids"], position_ids=token_positions(batch) + self.first)


class EncoderLayer(nn.Module):
    """A layer of an encoder: hidden [N, T, D] -> hidden [N, T, D], attending everywhere unless a view says
    otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, view: View | None = None) -> Tensor:
        return self.layer(hidden, None if view is None else view.mask)


class _RobertaTransform(nn.Module):
    def __init__(self, dense: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.dense, self.norm = dense, norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(gelu(self.dense(hidden)))


def _roberta_stem(embeddings: Any) -> EmbeddingStem:
    return EmbeddingStem(embeddings, first=embeddings.padding_idx + 1)


BERT = Adapter(
    model_classes=("BertForMaskedLM",),
    stem=("bert.embeddings",),
    layers="bert.encoder.layer",
    layer_norms=("layer.attention.output.LayerNorm", "layer.output.LayerNorm"),
    readout=("cls.predictions.transform", "cls.predictions.decoder"),
    make_stem=EmbeddingStem,
    make_readout=lambda model, *modules: TokenReadout(*modules),
    make_layer=lambda model, layer: EncoderLayer(layer),
    tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    targets=("masked",),
)

ROBERTA = Adapter(
    model_classes=("RobertaForMaskedLM",),
    stem=("roberta.embeddings",),
    layers="roberta.encoder.layer",
    layer_norms=("layer.attention.output.LayerNorm", "layer.output.LayerNorm"),
    readout=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    make_stem=_roberta_stem,
    make_readout=lambda model, dense, norm, head: TokenReadout(_RobertaTransform(dense, norm), head),
    make_layer=lambda model, layer: EncoderLayer(layer),
    tied=("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    targets=("masked",),
    first_position=lambda config: config.pad_token_id + 1,
    only_pretrained="a new RobertaForMaskedLM would count positions from a padding token: take BertForMaskedLM",
)
