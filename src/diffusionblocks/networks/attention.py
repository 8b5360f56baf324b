"""What the layers of a network of tokens see beside the hidden states: positions, and who attends to whom.

Shapes: N batch, T positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusionblocks.errors import UserError


class View(NamedTuple):
    """positions: [N or 1, T], what rotary or learned positions are taken at. mask: additive, [N or 1, 1, T or 1, T], 0
    where a row may look and very negative where not (or a BlockMask of FlexAttention); None = everywhere. causal: only
    at earlier positions, besides. cache: keys and values of transformers, which the layers read and add their own
    to."""

    positions: Tensor
    mask: Any = None
    causal: bool = False
    cache: Any = None

    def within(self, window: int | None) -> View:
        """Of a layer that looks back at most `window` positions. Raises UserError where that cannot be said."""
        if window is None:
            return self
        if self.cache is not None:
            if int(self.positions.max()) >= window:
                raise UserError(f"the network's layers look back {window} tokens: no text can be longer than that here")
            return self
        if self.mask is None or int(self.positions.shape[1]) <= window:
            return self
        if not isinstance(self.mask, Tensor):
            raise UserError("flex_attention does not know sliding windows here: set model.attention to sdpa")
        far = self.positions[:, None, :, None] - self.positions[:, None, None, :] >= window
        return self._replace(mask=self.mask.masked_fill(far, torch.finfo(self.mask.dtype).min))


def cache_argument(function: Callable[..., Any]) -> str:
    """What a function of transformers calls its cache of keys and values: `cache` since 5.24, other names before."""
    names = inspect.signature(function).parameters
    return next((name for name in ("cache", "past_key_values", "layer_past") if name in names), "past_key_values")


def token_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Where in its document every token of `input_ids` [N, T] is: [N or 1, T]. What `positions` says; else counted from
    0, anew in each of the `segments`."""
    if "positions" in batch:
        return batch["positions"]
    tokens, segments = batch["input_ids"], batch.get("segments")
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return positions if segments is None else positions - _starts(segments)


def both_ways(batch: Mapping[str, Tensor], like: Tensor) -> View:
    """Attention in both directions over the tokens of a batch.

    Args:
        batch: `input_ids` [N, T]; may hold `attention_mask` [N, T] (0 = padding, which nobody attends to) and, for
            several documents packed into one row, `segments` [N, T]: tokens attend inside their own segment, where
            positions start at 0.
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
    return View(positions, _additive(allowed, like))


def causally(batch: Mapping[str, Tensor], like: Tensor) -> View:
    """Attention to earlier tokens, of the same document where `segments` [N, T] are told apart. Padding at the end
    needs no mask. like: hidden states [N, T, D]; the mask gets their type."""
    allowed = _earlier(like.shape[1], like.device) & _same(batch.get("segments"), batch.get("segments"))
    return View(token_positions(batch), _additive(allowed, like), causal=True)


def side_by_side(batch: Mapping[str, Tensor], like: Tensor, *, flex: bool = False) -> View:
    """Clean tokens 0 to T-2 beside noisy targets of the tokens 1 to T-1: [N, 2 (T - 1), D] ([DB] section 5.4, [BD3]).

    A clean token attends to clean ones up to itself. A noisy target attends to itself and to the clean tokens before
    it.

    Args:
        batch: `input_ids` [N, T], and optionally `segments`. like: hidden states; the mask gets their type.
        flex: a BlockMask of FlexAttention in place of a dense mask.
    """
    positions, segments = token_positions(batch), batch.get("segments")
    clean, noisy = (None, None) if segments is None else (segments[:, :-1], segments[:, 1:])
    both = torch.cat([positions[:, :-1], positions[:, 1:]], 1)
    rows = positions.shape[1] - 1
    if flex:
        return View(both, _block_mask(rows, clean, noisy, like.device), causal=True)
    earlier = _earlier(rows, like.device)
    above, below = torch.broadcast_tensors(earlier & _same(clean, clean), earlier & _same(noisy, clean))
    own = torch.eye(rows, dtype=torch.bool, device=like.device).expand_as(above)
    allowed = torch.cat([torch.cat([above, torch.zeros_like(above)], -1), torch.cat([below, own], -1)], -2)
    return View(both, _additive(allowed, like), causal=True)


def _block_mask(rows: int, clean: Tensor | None, noisy: Tensor | None, device: torch.device) -> Any:
    """The mask of `side_by_side` as a function of places, which FlexAttention needs no table for."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments = None if clean is None or noisy is None else torch.cat([clean, noisy], 1)

    def allowed(text: Any, head: Any, query: Any, key: Any) -> Any:
        before = (key < rows) & (key <= query % rows)
        if segments is not None:
            before = before & (segments[text, query] == segments[text, key])
        return before | (query == key)

    texts = None if segments is None else len(segments)
    return create_block_mask(allowed, texts, None, 2 * rows, 2 * rows, device=str(device))


def _earlier(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None]


def _same(rows: Tensor | None, columns: Tensor | None) -> Tensor | bool:
    """Whether row and column are of one document [N, 1, T, T]."""
    if rows is None or columns is None:
        return True
    return rows[:, None, :, None] == columns[:, None, None, :]


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~allowed, torch.finfo(like.dtype).min)


def _starts(segments: Tensor) -> Tensor:
    """segments [N, T], equal inside a document -> position where each token's document starts [N, T]."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(new, places, 0).cummax(1).values
