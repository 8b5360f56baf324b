"""Ancestral sampling for discrete targets."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionblocks.network import DenoiserOutput
from diffusionblocks.samplers import Denoise
from diffusionblocks.targets import CategoricalTarget, add_noise


def ancestral(target: CategoricalTarget):
    """A sampler that draws v from p(v | x, z) and puts fresh noise on its row: z' = e_v + sigma' eps.

    Exact at any number of steps when the posterior is exact, unlike Euler steps along the posterior mean, which
    are biased for discrete targets.
    """

    def sample(
        denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None
    ) -> list[DenoiserOutput]:
        outputs = []
        for index, level in enumerate(levels):
            outputs.append(denoise(z, level))
            if index + 1 < len(levels):
                probabilities = outputs[-1].logits.float().softmax(-1).cpu()
                drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(z.device)
                there = z.new_full((len(z),), levels[index + 1])
                z = add_noise(target.clean(drawn), there, generator=generator)
        return outputs

    return sample
