"""How a token is drawn from logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.seeds import uniform

Choose = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class TokenChoice:
    """Draws tokens from logits.

    Args:
        temperature: 0 takes the likeliest. top_p: keeps the likeliest tokens that together have this probability
            (Holtzman et al. 2020, arXiv 1904.09751). top_k: keeps so many of the likeliest; 0 = all.

    Raises UserError for values that mean nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                "temperature and top_k must not be negative and top_p must be in (0, 1], got "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits [M, V] of the distribution that is drawn from, -inf for what is left out."""
        logits = logits.float()
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            last = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < last, -torch.inf)
        if self.top_p < 1:
            ordered, places = logits.softmax(-1).sort(-1, descending=True)
            dropped = ordered.cumsum(-1) - ordered >= self.top_p  # the first always stays
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, places, dropped), -torch.inf)
        return logits

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """logits [M, V] -> tokens [M]."""
        return draw(self.shaped(logits), generator)


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [M] from softmax(logits) [M, V], by the inverse distribution function."""
    below = logits.float().softmax(-1).cumsum(-1)
    places = uniform(len(logits), 1, generator=generator, device=below.device) * below[:, -1:]
    return torch.searchsorted(below, places, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
