"""Noise level as a condition: an embedding of the level and norms modulated by it (AdaLN, Peebles & Xie 2023).

Foreign layers are wrapped, never rewritten: a `ConditionedLayer` swaps the norms named by the adapter for
`ModulatedNorm`s and hands them their scale and shift. Modulation starts at zero, so wrapping changes nothing.

Shapes: N batch, T positions, D width, C width of the level embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LevelEmbedding(nn.Module):
    """c_noise [N] -> condition [N, C]: sinusoidal features and a two-layer perceptron, as in DiT."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Periods from 1/16 of a unit to far beyond the support: c_noise = ln(sigma)/4 spans about 2.6 units.
        self.register_buffer("frequencies", torch.logspace(-1, 1, 16) * math.pi, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise.float()[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class Condition(NamedTuple):
    """Of a sequence of which only a part is noisy. embedding: of the level [N, C]; None = no part is. first: from which
    position on norms are modulated; those before are as they were."""

    embedding: Tensor | None
    first: int = 0


class ModulatedNorm(nn.Module):
    """norm(x) * (1 + scale) + shift, scale and shift linear in the condition and zero at first."""

    def __init__(self, norm: nn.Module, width: int, condition_width: int) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = nn.Linear(condition_width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.condition: Condition | None = None  # set by ConditionedLayer for the length of one forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.condition is not None, "a ModulatedNorm runs inside its ConditionedLayer"
        embedding, first = self.condition
        normed = self.norm(x)
        if embedding is None:
            return normed
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=-1)  # [N, 1, D] each
        if not first:
            return normed * (1 + scale) + shift
        return torch.cat([normed[:, :first], normed[:, first:] * (1 + scale) + shift], 1)


class ConditionedLayer(nn.Module):
    """A transformer layer whose named norms see the noise level.

    Args:
        layer: the foreign layer; its norms are replaced in place, so pass a copy.
        norms: attribute paths of the norms inside the layer.
        width: D. condition_width: C.
    """

    def __init__(self, layer: nn.Module, norms: Sequence[str], width: int, condition_width: int) -> None:
        super().__init__()
        self.layer = layer
        self._modulated: list[ModulatedNorm] = []
        for path in norms:
            parent, _, name = path.rpartition(".")
            owner = layer.get_submodule(parent)
            modulated = ModulatedNorm(getattr(owner, name), width, condition_width)
            setattr(owner, name, modulated)
            self._modulated.append(modulated)

    def forward(self, hidden: Tensor, condition: Tensor | Condition, *arguments: Any) -> Tensor:
        """hidden [N, T, D], condition [N, C] -> [N, T, D]; arguments go to the layer as they are."""
        for norm in self._modulated:
            norm.condition = condition if isinstance(condition, Condition) else Condition(condition)
        try:
            output = self.layer(hidden, *arguments)
        finally:
            for norm in self._modulated:
                norm.condition = None
        return output
