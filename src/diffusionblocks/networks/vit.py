"""Vision transformers for image classification: ViT and DeiT of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.networks.adapter import Adapter


class ImageStem(nn.Module):
    """pixel_values [N, channels, height, width] -> class token(s) and patches with positions [N, T, D]."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings

    @property
    def first_position(self) -> Tensor:
        """Position embedding of the class token [1, 1, D]."""
        return self.embeddings.position_embeddings[:, :1]

    def drop_first_token(self) -> None:
        """The class token's place is taken by the noisy target: the token is no longer a parameter."""
        token = self.embeddings.cls_token
        del self.embeddings.cls_token
        self.embeddings.register_buffer("cls_token", torch.zeros_like(token))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        weight = self.embeddings.patch_embeddings.projection.weight
        return self.embeddings(batch["pixel_values"].to(weight.dtype))


class FirstTokenReadout(nn.Module):
    """Final norm and classifier on the first token: hidden [N, T, D] -> logits [N, V]."""

    def __init__(self, norm: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.norm, self.classifier = norm, classifier

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.norm(hidden[:, 0]))


def _declare(prefix: str, model_class: str) -> Adapter:
    return Adapter(
        model_classes=(model_class,),
        stem=(f"{prefix}.embeddings",),
        layers=f"{prefix}.layers",
        layer_norms=("layernorm_before", "layernorm_after"),
        readout=(f"{prefix}.layernorm", "classifier"),
        make_stem=ImageStem,
        make_readout=lambda model, *modules: FirstTokenReadout(*modules),
    )


VIT = _declare("vit", "ViTForImageClassification")
DEIT = _declare("deit", "DeiTForImageClassification")
