"""Samplers of masked diffusion: from a text of masks to one without.

The walk is that of the other samplers, with tokens for z: `sampler(denoise, z, levels, *, generator=None)`, levels t
fall to 0. `denoise(z, level, where)` gives logits [M, V] of the M positions of z [N, T] that `where` marks, so that the
readout works only where a token is chosen. Given tokens (not masked in the first z) stay.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusionblocks.seeds import uniform
from diffusionblocks.theory.choice import Choose
from diffusionblocks.theory.noise import MaskingSchedule
from diffusionblocks.theory.sampler import Sampler


def ancestral(mask_id: int, schedule: MaskingSchedule, choose: Choose) -> Sampler:
    """Every masked token is unmasked with probability (alpha(s) - alpha(t)) / (1 - alpha(t)) in the step from t to s
    ([MD4] eq. 6), and never changes again. choose: logits [M, V] -> tokens [M]."""

    def sample(
        denoise: Callable, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None
    ) -> Tensor:
        masses = schedule.mass(torch.tensor(levels, dtype=torch.float64)).tolist()
        for level, (mass, following) in zip(levels, pairwise(masses), strict=False):
            masked = z == mask_id
            freed = uniform(*z.shape, generator=generator, device=z.device) < (mass - following) / mass
            now = masked & freed if following > 0 else masked
            if now.any():
                z = z.masked_scatter(now, choose(denoise(z, level, now), generator))
        return z

    return sample


def by_confidence(mask_id: int, schedule: MaskingSchedule, choose: Choose) -> Sampler:
    """As many tokens per step as `ancestral` unmasks on average, the likeliest first (Chang et al. 2022,
    arXiv 2202.04200)."""

    def sample(
        denoise: Callable, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None
    ) -> Tensor:
        masses = schedule.mass(torch.tensor(levels, dtype=torch.float64)).tolist()
        all_masked = (z == mask_id).sum(1)
        for level, mass in zip(levels, masses[1:], strict=False):
            masked = z == mask_id
            left = (all_masked * (mass / masses[0])).round()  # masks after this step
            counts = (masked.sum(1) - left).clamp(min=0)
            if not counts.any():
                continue
            logits = denoise(z, level, masked)
            tokens = choose(logits, generator)
            sure = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            found = torch.full(z.shape, -torch.inf, device=z.device).masked_scatter(masked, sure)
            first = found.argsort(1, descending=True).argsort(1) < counts[:, None]
            z = torch.where(masked & first, z.masked_scatter(masked, tokens), z)
        return z

    return sample


SAMPLERS: dict[str, Callable[[int, MaskingSchedule, Choose], Sampler]] = {
    "ancestral": ancestral,
    "confidence": by_confidence,
}


def even(highest: float, steps: int) -> list[float]:
    """Levels at even distances in t, from `highest` to 0 inclusive: `steps` of them above 0."""
    return [highest * (steps - i) / steps for i in range(steps + 1)]
