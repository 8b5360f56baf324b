"""Ancestral sampling for discrete targets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusionblocks.theory.sampler import Denoise, Sampler
from diffusionblocks.theory.targets import CategoricalTarget, add_noise


def ancestral(target: CategoricalTarget, choose: Callable[..., Tensor] | None = None) -> Sampler:
    """A sampler that draws v from p(v | x, z) and puts fresh noise on its row: z' = e_v + sigma' eps.

    choose: (logits [N, V], generator) -> v [N], for a draw that somebody watches; None = `torch.multinomial`.

    Exact at any number of steps when the posterior is exact, unlike Euler steps along the posterior mean, which
    are biased for discrete targets.
    """

    def sample(denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None) -> Tensor:
        for level, following in pairwise(levels):
            output = denoise(z, level)
            assert output.logits is not None
            if choose is None:
                drawn = torch.multinomial(output.logits.float().softmax(-1), 1, generator=generator)[:, 0]
            else:
                drawn = choose(output.logits, generator)
            z = add_noise(target.clean(drawn), z.new_full((len(z),), following), generator=generator)
        return z

    return sample


def bridge(
    z: Tensor, clean: Tensor, level: float, following: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """z' at the level `following` < `level`, given z and the clean target: what lies between the two.

    z [..., D] is z' with more noise, so z' ~ N(y + r (z - y), following^2 (1 - r)) with r = following^2 / level^2.
    Unlike fresh noise on y it keeps what z knew: decisions are taken step by step.
    """
    ratio = (following / level) ** 2
    mean = clean + ratio * (z - clean)
    return add_noise(mean, z.new_full((len(z),), following * (1 - ratio) ** 0.5), generator=generator)
