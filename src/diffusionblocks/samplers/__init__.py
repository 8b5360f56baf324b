"""Samplers walk from high to low noise levels; the levels are handed in, and the caller picks the block.

One signature: `sampler(denoise, z, levels, *, generator=None) -> list[DenoiserOutput]`, one output per level.
`denoise(z, level)` gets z [N, ...] and one level as a float.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffusionblocks.network import DenoiserOutput

Denoise = Callable[[Tensor, float], DenoiserOutput]
