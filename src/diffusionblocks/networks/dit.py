"""Diffusion transformers: DiTTransformer2DModel of Hugging Face diffusers (Peebles & Xie 2023, arXiv 2212.09748)."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffusionblocks.networks.adapter import Adapter, ImageSizes


class ImageCondition(NamedTuple):
    """What layers and readout see beside the image: timestep [N] (0 to 1000) and class_labels [N]."""

    timestep: Tensor
    class_labels: Tensor


class PatchStem(nn.Module):
    """image [N, channels, height, width] -> patches with positions [N, T, D]."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, image: Tensor) -> Tensor:
        return self.embedding(image.to(next(self.embedding.parameters()).dtype))


class DiTLayer(nn.Module):
    """A layer with its own embedding of timestep and class: hidden [N, T, D], condition -> hidden [N, T, D].

    Every layer of diffusers' DiT would drop labels on its own while training; the task drops them once for all layers.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        embedder: Any = embedder_of(layer)
        embedder.class_embedder.dropout_prob = 0.0

    def forward(self, hidden: Tensor, condition: ImageCondition) -> Tensor:
        return self.layer(hidden, timestep=condition.timestep, class_labels=condition.class_labels)


class PatchReadout(nn.Module):
    """Modulated norm, projection and unpatchify: hidden [N, T, D], condition -> image [N, channels, height, width].

    The modulation reads the embedding of the network's first layer, which that layer owns; `alone` makes a readout that
    reads another one. A network that also predicts variances has more channels; only the first ones are kept.
    """

    def __init__(self, model: Any, norm: nn.Module, modulation: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.modulation, self.projection = norm, modulation, projection
        self.embedder: nn.Module | None = None
        self._first: tuple[nn.Module, ...] = (
            embedder_of(model.transformer_blocks[0]),
        )  # in a tuple: not a parameter of the readout
        self.patch_size, self.out_channels, self.channels = (
            model.patch_size,
            model.out_channels,
            model.config.in_channels,
        )

    def alone(self, layer: DiTLayer | None = None) -> PatchReadout:
        """A copy that reads the embedding of timestep and class of `layer`, as the network's reads that of the first
        one, or has one of its own."""
        alone = copy.deepcopy(self)
        alone.embedder, alone._first = alone._first[0] if layer is None else embedder_of(layer.layer), ()
        return alone

    def forward(self, hidden: Tensor, condition: ImageCondition) -> Tensor:
        embedder = self._first[0] if self.embedder is None else self.embedder
        embedding = embedder(condition.timestep, condition.class_labels, hidden_dtype=hidden.dtype)
        shift, scale = self.modulation(silu(embedding)).chunk(2, dim=1)
        patches = self.projection(self.norm(hidden) * (1 + scale[:, None]) + shift[:, None])
        side, patch = round(patches.shape[1] ** 0.5), self.patch_size
        patches = patches.reshape(-1, side, side, patch, patch, self.out_channels)
        image = torch.einsum("nhwpqc->nchpwq", patches)
        return image.reshape(-1, self.out_channels, side * patch, side * patch)[:, : self.channels]


def embedder_of(layer: nn.Module) -> nn.Module:
    """The embedding of timestep and class inside a layer of diffusers' DiT."""
    return layer.get_submodule("norm1.emb")


def _shape(config: Any) -> tuple[int, int, int]:
    return config.in_channels, config.sample_size, config.sample_size


def _config(sizes: ImageSizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.width // sizes.heads,
        "num_layers": sizes.depth,
        "patch_size": sizes.patch,
        "sample_size": sizes.size,
        "in_channels": sizes.channels,
        "num_embeds_ada_norm": sizes.outputs,
        "dropout": sizes.dropout,
    }


DIT = Adapter(
    library="diffusers",
    model_classes=("DiTTransformer2DModel",),
    targets=("image",),
    stem=("pos_embed",),
    layers="transformer_blocks",
    layer_norms=(),
    readout=("norm_out", "proj_out_1", "proj_out_2"),
    make_stem=PatchStem,
    make_readout=PatchReadout,
    make_layer=lambda model, layer: DiTLayer(layer),
    width=lambda config: config.num_attention_heads * config.attention_head_dim,
    num_classes=lambda config: config.num_embeds_ada_norm,
    sample_shape=_shape,
    depth_key="num_layers",
    image_keys=("in_channels", "sample_size"),
    image_config=_config,
    width_divisor=4,  # positions in two dimensions, a sine and a cosine of each
)
