"""Samplers walk from high to low noise levels; the levels are handed in, and the caller picks the block.

One signature: `sampler(denoise, z, levels, *, generator=None) -> Tensor`. `denoise(z, level)` gets z [N, ...] and one
level as a float. `levels` fall; the walk starts at z with noise levels[0] and returns z at levels[-1], which is 0 for a
whole chain (the last step then lands on the denoiser's estimate). Grids are in grids.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffusionblocks.network import DenoiserOutput

Denoise = Callable[[Tensor, float], DenoiserOutput]
Sampler = Callable[..., Tensor]
