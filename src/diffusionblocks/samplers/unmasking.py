"""Samplers of masked diffusion: from a text of masks to one without.

The walk is that of the other samplers, with tokens for z: `sampler(denoise, z, levels, *, generator=None)`, levels t fall to
0. `denoise(z, level, where)` gives logits [M, V] of the M positions of z [N, T] that `where` marks, so that the readout works
only where a token is chosen. Given tokens (not masked in the first z) stay.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusionblocks.noise import MaskingSchedule
from diffusionblocks.samplers import Sampler

Choose = Callable[[Tensor, torch.Generator | None], Tensor]


def ancestral(mask_id: int, schedule: MaskingSchedule, choose: Choose) -> Sampler:
    """Every masked token is unmasked with probability (alpha(s) - alpha(t)) / (1 - alpha(t)) in the step from t to s ([MD4]
    eq. 6), and never changes again. choose: logits [M, V] -> tokens [M]."""

    def sample(
        denoise: Callable, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None
    ) -> Tensor:
        for level, following in pairwise(levels):
            masked = z == mask_id
            freed = torch.rand(z.shape, generator=generator).to(z.device) < _freed_share(schedule, level, following)
            now = masked & freed if following > 0 else masked
            if now.any():
                z = z.masked_scatter(now, choose(denoise(z, level, now), generator))
        return z

    return sample


def by_confidence(mask_id: int, schedule: MaskingSchedule, choose: Choose) -> Sampler:
    """As many tokens per step as `ancestral` unmasks on average, the likeliest first (Chang et al. 2022, arXiv 2202.04200)."""

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


def chooser(temperature: float = 1.0, top_p: float = 1.0) -> Choose:
    """Draws tokens from logits [M, V]: temperature 0 takes the likeliest; top_p keeps the likeliest tokens that together have
    this probability (Holtzman et al. 2020, arXiv 1904.09751)."""

    def choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / temperature).softmax(-1)
        if top_p < 1:
            ordered, places = probabilities.sort(-1, descending=True)
            dropped = ordered.cumsum(-1) - ordered >= top_p  # the first always stays
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(dropped, 0))
        # By the inverse distribution function, with uniform numbers from the CPU, so that devices agree on them.
        below = probabilities.cumsum(-1)
        places = torch.rand(len(logits), 1, generator=generator).to(below) * below[:, -1:]
        return torch.searchsorted(below, places, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    return choose


def even(highest: float, steps: int) -> list[float]:
    """Levels at even distances in t, from `highest` to 0 inclusive: `steps` of them above 0."""
    return [highest * (steps - i) / steps for i in range(steps + 1)]


def _freed_share(schedule: MaskingSchedule, level: float, following: float) -> float:
    masses = schedule.mass(torch.tensor([level, following], dtype=torch.float64)).tolist()
    return (masses[0] - masses[1]) / masses[0]
