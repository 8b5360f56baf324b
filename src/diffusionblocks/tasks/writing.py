"""Texts of tasks that write: what they cost, when they end, and what a person sees of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.training.task import Asked, Made

AT_ONCE = 64  # texts made together, at most
OPTIONS = ("prompt", "chat", "length", "seed")  # of `dblocks sample`
SETTINGS = {name: name for name in ("temperature", "top_p", "top_k")}


class Written(NamedTuple):
    """tokens [N, T]. layer_evaluations: forward passes of a layer, in all. iterations: of a looped network, per
    token."""

    tokens: Tensor
    layer_evaluations: int
    seconds: float
    iterations: float | None = None


def check_length(length: int) -> None:
    if length < 0 or length == 1:
        raise UserError(f"--length must be at least 2 tokens, got {length}")


def told(texts: Sequence[str], made: Written, written: int, length: int, asked: Asked, how: dict[str, Any]) -> Made:
    """What `dblocks sample` says of texts. written: tokens, in all. length: of a text. how: they were made."""
    speed = written / made.seconds
    found = {
        "texts": list(texts),
        "num": asked.num,
        "length": length,
        **how,
        "seed": asked.seed,
        "layer_evaluations_per_text": made.layer_evaluations / asked.num,
        "seconds": round(made.seconds, 3),
        "tokens_per_second": round(speed, 1),
    }
    between = "\n---\n" if any("\n" in text for text in texts) else "\n"
    steps = f", {how['steps']} steps" if "steps" in how else ""
    steps += f", {made.iterations:.3g} iterations per token" if made.iterations is not None else ""
    shown = "" if asked.stream is not None else between.join(texts)
    return Made(found, shown, "\n".join(texts) + "\n", f"{found['tokens_per_second']:.0f} tokens/s{steps}")


class Writing:
    """Watches texts being written: ends them at stop strings, and shows the first as it grows.

    Args:
        before: tokens that are no part of the text. prompted: tokens of the prompt, in which no stop string is looked
            for. answers: show only what comes after the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: int,
        prompted: int,
        stop: Sequence[str],
        stream: Callable[[str], object] | None,
        *,
        answers: bool = False,
    ) -> None:
        self.tokenizer, self.prompted, self.stop, self.stream = tokenizer, prompted, stop, stream
        self.before, self.answers = before, answers
        self.shown = 0
        self._done: set[int] = set()

    def __call__(self, tokens: Tensor) -> bool:
        """tokens [N, t], the first being the separator -> whether all texts have ended."""
        for row, text in enumerate(tokens[:, self.before :].tolist()):
            if self.stop and row not in self._done and self._end(self.tokenizer.decode(text), text) is not None:
                self._done.add(row)
        if self.stream is not None:
            held = max(map(len, self.stop), default=1) - 1  # it may be the beginning of a stop string
            text = self.text(tokens[0, self.before :].tolist())
            text = text if 0 in self._done else text[: max(0, len(text) - held)]
            self._show(text.rstrip("\ufffd"))  # it may be the beginning of a character
        return len(self._done) == len(tokens)

    def text(self, tokens: list[int]) -> str:
        """Up to its stop string."""
        text = self.tokenizer.decode(tokens)
        first = len(self.tokenizer.decode(tokens[: self.prompted])) if self.answers else 0
        return text[first : self._end(text, tokens)]

    def finish(self, text: str) -> None:
        if self.stream is not None:
            self._show(text)

    def _show(self, text: str) -> None:
        """What is new."""
        assert self.stream is not None
        if len(text) > self.shown:
            self.stream(text[self.shown :])
            self.shown = len(text)

    def _end(self, text: str, tokens: list[int]) -> int | None:
        first = len(self.tokenizer.decode(tokens[: self.prompted]))
        places = [place for stop in self.stop if (place := text.find(stop, first)) >= 0]
        return min(places, default=None)
