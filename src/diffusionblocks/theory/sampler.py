"""Samplers walk from high to low noise levels; the levels are handed in, and the caller picks the block.

One signature: `sampler(denoise, z, levels, *, generator=None) -> Tensor`. `denoise(z, level)` gets z [N, ...] and one
level as a float. `levels` fall; the walk starts at z with noise levels[0] and returns z at levels[-1], which is 0 for a
whole chain (the last step then lands on the denoiser's estimate). Grids are in grids.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class DenoiserOutput(NamedTuple):
    """What a block makes of a noisy target.

    estimate: D(z), shaped like z. raw: the network's own output: logits [N, V] for labels (with a Bayes readout these
    are log p(v | x) up to a constant) or [N, T, V] for tokens, F of [EDM] eq. 7 for images. logits: of p(v | x, z), for
    discrete targets. context: clean stream for the next block [N, T, D] (features context). loss: mean loss when the
    batch has the clean target.
    """

    estimate: Tensor
    raw: Tensor
    logits: Tensor | None = None
    context: Tensor | None = None
    loss: Tensor | None = None


Denoise = Callable[[Tensor, float], DenoiserOutput]
Sampler = Callable[..., Tensor]
