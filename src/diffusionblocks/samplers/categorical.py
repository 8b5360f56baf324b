"""Ancestral sampling for discrete targets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusionblocks.samplers import Denoise, Sampler
from diffusionblocks.targets import CategoricalTarget, add_noise


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
                probabilities = output.logits.float().softmax(-1).cpu()
                drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(z.device)
            else:
                drawn = choose(output.logits, generator)
            z = add_noise(target.clean(drawn), z.new_full((len(z),), following), generator=generator)
        return z

    return sample
