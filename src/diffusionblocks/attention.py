"""What the layers of a network of tokens see beside the hidden states: positions, and who attends to whom.

Shapes: N batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """positions: [N or 1, T], what rotary or learned positions are taken at. mask: additive, [N or 1, 1, T or 1, T], 0 where
    a row may look and very negative where not; None = everywhere. causal: only at earlier positions, besides."""

    positions: Tensor
    mask: Tensor | None = None
    causal: bool = False


def token_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Where in its document every token of `input_ids` [N, T] is: [N or 1, T], 0 at the start of each of the `segments`."""
    tokens, segments = batch["input_ids"], batch.get("segments")
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return positions if segments is None else positions - _starts(segments)


def both_ways(batch: Mapping[str, Tensor], like: Tensor) -> View:
    """Attention in both directions over the tokens of a batch.

    Args:
        batch: `input_ids` [N, T]; may hold `attention_mask` [N, T] (0 = padding, which nobody attends to) and, for several documents packed
            into one row, `segments` [N, T]: tokens attend inside their own segment, where positions start at 0.
        like: hidden states [N, T, D]; the mask gets their type.
    """
    real, segments = batch.get("attention_mask"), batch.get("segments")
    positions = token_positions(batch)
    if real is None and segments is None:
        return View(positions)
    allowed = torch.ones(1, 1, 1, like.shape[1], dtype=torch.bool, device=like.device)
    if real is not None:
        allowed = allowed & real.bool()[:, None, None]
    if segments is not None:
        # A padded row of a segment of its own keeps its self edge: a row with nothing to attend to would be NaN.
        own = torch.eye(like.shape[1], dtype=torch.bool, device=like.device)
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :]) | own
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return View(positions, mask.masked_fill(~allowed, torch.finfo(like.dtype).min))


def _starts(segments: Tensor) -> Tensor:
    """segments [N, T], equal inside a document -> position where each token's document starts [N, T]."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(new, places, 0).cummax(1).values
