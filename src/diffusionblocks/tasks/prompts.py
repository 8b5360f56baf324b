"""From what a user types to the tokens that sampling starts with."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import UserError

_BLANKS = re.compile(r"\{([0-9]+)\}")


def start_of(prompt: str, tokenizer: Tokenizer, window: int, length: int = 0) -> Tensor:
    """A text with blanks -> tokens [T], masked where they are to be filled in.

    Args:
        prompt: `{n}` stands for n masked tokens. window: T of the trained network. length: of the result, what follows
            the prompt is masked; 0 = the window, or just the prompt where it has blanks.

    Raises UserError when the prompt is longer than the window, or leaves nothing to fill in.
    """
    assert tokenizer.mask_id is not None
    parts: list[int] = []
    blanks, total = False, 0
    for index, piece in enumerate(_BLANKS.split(prompt)):
        if index % 2:
            digits = piece.lstrip("0")
            if len(digits) > len(str(window)) or int(digits or 0) > window:
                shown = piece if len(piece) < 20 else f"{piece[:9]}..."
                raise UserError(f"the blank {{{shown}}} of the prompt exceeds the network's window of {window} tokens")
            count = int(digits or 0)
            parts += [tokenizer.mask_id] * count
            blanks, total = blanks or count > 0, total + count
        elif piece:
            more = _with_edges(piece, tokenizer)
            if not more:
                raise UserError(f"the tokenizer makes no token of {piece!r} in the prompt")
            parts, total = parts + more, total + len(more)
    if length > window or total > window:
        what = f"--length {length}" if length > window else f"the prompt has {total} tokens and"
        raise UserError(f"{what} exceeds the network's window of {window} tokens")
    length = length or (len(parts) if blanks else window)
    if length < len(parts):
        raise UserError(f"--length {length} is less than the {len(parts)} tokens of the prompt")
    parts += [tokenizer.mask_id] * (length - len(parts))
    if tokenizer.mask_id not in parts:
        raise UserError(
            f"the prompt fills the window of {window} tokens and leaves nothing to write; shorten it, or put blanks in "
            "it: {5} stands for 5 tokens"
        )
    return torch.tensor(parts)


def _with_edges(piece: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a piece of a prompt; characters keep the white space at its edges, which encoding strips."""
    ids = tokenizer.encode(piece).tolist()
    if tokenizer.between:
        edge = list(tokenizer.between)
        ids = (edge if piece[0].isspace() else []) + ids + (edge if piece[-1].isspace() and piece.strip() else [])
    return ids


def beginning(prompt: str, tokenizer: Tokenizer, window: int, length: int) -> list[int]:
    """Tokens of a prompt that a causal model goes on from. Raises UserError where it cannot."""
    if _BLANKS.search(prompt):
        raise UserError("blanks such as {5} are for masked diffusion; this run's model only continues a text")
    tokens = _with_edges(prompt, tokenizer) if prompt else []
    if prompt and not tokens:
        raise UserError(f"the tokenizer makes no token of {prompt!r} in the prompt")
    if max(length, len(tokens)) > window:
        raise UserError(f"{max(length, len(tokens))} tokens exceed the network's window of {window}")
    if len(tokens) >= (length or window):
        raise UserError(f"the prompt fills the {length or window} tokens and leaves nothing to write")
    return tokens
