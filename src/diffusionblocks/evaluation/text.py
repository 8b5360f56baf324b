"""Likelihood of text in units that compare across tokenizers, and what generated texts are like, beside real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from diffusionblocks.data.stream import Unread
from diffusionblocks.data.text.splits import TextData, units
from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation.judges import (
    check_teacher,
    distinct_2,
    entropy,
    generative_perplexity,
    mauve,
    repetition,
)
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.training.task import Metric, mean_with_error


def in_bits(nats: Metric, split: TextData, tokenizer: Tokenizer) -> dict[str, Metric]:
    """`bits_per_character` and `bits_per_byte` of a split from its nats per token."""
    per_token = units(split, tokenizer)
    return {
        "bits_per_character": _scaled(nats, 1 / math.log(2) / per_token.characters),
        "bits_per_byte": _scaled(nats, 1 / math.log(2) / per_token.bytes),
    }


def _scaled(metric: Metric, factor: float) -> Metric:
    return Metric(metric.value * factor, None if metric.stderr is None else metric.stderr * factor)


def exponential(metric: Metric) -> Metric:
    """Perplexity from nats."""
    value = math.exp(min(metric.value, 700.0))
    return Metric(value, None if metric.stderr is None else value * metric.stderr)


def some(split: Dataset, count: int) -> Dataset:
    """`count` windows evenly from a whole split, or as many as there are."""
    size = len(split)  # type: ignore[arg-type]
    rows = min(count, size)
    return Subset(split, [index * size // rows for index in range(rows)])


def check(teacher: str, with_mauve: bool, num_samples: int, split: Dataset) -> None:
    """Raises UserError for what `of_samples` could not measure."""
    if isinstance(split, Unread):
        return
    if with_mauve and not teacher:
        raise UserError("evaluation.mauve compares texts as a language model sees them: set evaluation.teacher")
    if teacher and num_samples:
        check_teacher(teacher)


def of_samples(
    made: Tensor, split: TextData, tokenizer: Tokenizer, *, teacher: str, with_mauve: bool, device: torch.device
) -> dict[str, Metric]:
    """Of texts `made` [N, T], and of as many texts of a split.

    `entropy` (of the tokens of a text, in nats), `distinct_2` (share of different pairs of neighbouring tokens),
    `repetition_4` (share of runs of four tokens that a text had before), each also of the real texts (`..._real`: a
    perplexity alone rewards repetition), and, with a teacher, `generative_perplexity` and `mauve`.
    """
    rows = min(len(made), len(split))
    batch = split.__getitems__([index * len(split) // rows for index in range(rows)])
    padded = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, IGNORED)
    real = [[token for token in text if token != IGNORED] for text in padded.tolist()]
    found: dict[str, Metric] = {}
    for name, measure in (("entropy", entropy), ("distinct_2", distinct_2), ("repetition_4", repetition)):
        found[name] = mean_with_error(torch.tensor([measure(text) for text in made.tolist()]))
        found[f"{name}_real"] = mean_with_error(torch.tensor([measure(text) for text in real]))
    if teacher:
        written = [plain(text, tokenizer) for text in made.tolist()]
        found["generative_perplexity"] = generative_perplexity(teacher, written, device)
        if with_mauve:
            found["mauve"] = mauve(teacher, written, [plain(text, tokenizer) for text in real], device)
    return found


def plain(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text without the tokens that only mark the end of a document."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.separator or tokenizer.between])
