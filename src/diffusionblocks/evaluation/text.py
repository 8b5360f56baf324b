"""Texts from a trained run, a masked diffusion or a causal model: samples, and likelihood in units that compare across
tokenizers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusionblocks.data.stream import Unread, in_order
from diffusionblocks.data.text.chat import question
from diffusionblocks.data.text.splits import units
from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation import adaptation
from diffusionblocks.evaluation.adaptation import exponential
from diffusionblocks.evaluation.judges import (
    check_teacher,
    distinct_2,
    entropy,
    generative_perplexity,
    mauve,
    repetition,
)
from diffusionblocks.evaluation.prompts import beginning, start_of
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.seeds import derive
from diffusionblocks.tasks import MaskedLM, NextToken, RecurrentLM
from diffusionblocks.training.task import Metric, mean_with_error, on_device

AT_ONCE = 64  # texts made together, or fewer ...
LOGITS = 1 << 26  # ... so that their logits stay below this number
KEPT = 1 << 28  # and keys and values of looped networks below this one
CONTROLLED = 128  # windows on which the scrambled-target control is measured


class Texts(NamedTuple):
    """tokens [N, T]. layer_evaluations: forward passes of a layer, in all. iterations: of a looped network, per
    token."""

    tokens: Tensor
    layer_evaluations: int
    seconds: float
    iterations: float | None = None


Task = MaskedLM | NextToken


def generate(
    run: Any, start: Tensor, *, seed: int = 0, task: MaskedLM | None = None, watch: Callable[..., Any] | None = None
) -> Texts:
    """Masked diffusion: fills the masked tokens of `start` [N, T]. task: other settings of sampling than the run's."""
    task, model = task or run.recipe.task, run.model
    passes = 0

    def count(block: int, level: float, z: Tensor) -> None:
        nonlocal passes
        passes += len(model.block(block).layers) * len(z)
        if watch is not None:
            watch(block, level, z)

    found, began = [], time.perf_counter()
    together = max(1, min(AT_ONCE, LOGITS // (start.shape[1] * run.data.num_outputs)))
    for first in range(0, len(start), together):
        part = start[first : first + together].to(run.trainer.device)
        found.append(task.sample(model, part, seed=derive(seed, "samples", first), watch=count).cpu())
    return Texts(torch.cat(found), passes, time.perf_counter() - began)


def go_on(
    run: Any, start: Tensor, length: int, *, seed: int = 0, task: NextToken | None = None, watch: Any = None
) -> Texts:
    """Causal models: continues `start` [N, P] to [N, length]. watch: as in `NextToken.sample`; then all texts are
    written together."""
    task, model, found, began = task or run.recipe.task, run.model, list[Tensor](), time.perf_counter()
    passes, exits = 0, list[int]()
    together = len(start) if watch is not None else _together(run, task, length)
    for first in range(0, len(start), together):
        part = start[first : first + together].to(run.trainer.device)
        reader = task.reader(model)
        made = task.sample(model, part, length, seed=derive(seed, "samples", first), watch=watch, reader=reader)
        found.append(made.cpu())
        passes += reader.layer_evaluations
        exits += getattr(reader, "exits", [])
    iterations = sum(exits) / len(exits) if exits else None
    return Texts(torch.cat(found), passes, time.perf_counter() - began, iterations)


def _together(run: Any, task: NextToken, length: int) -> int:
    """Texts that are written at once. A looped network keeps keys and values of every iteration."""
    if not isinstance(task, RecurrentLM):
        return AT_ONCE
    width = run.model.loop.injection.linear.out_features
    return max(1, min(AT_ONCE, KEPT // (2 * task.iterations * len(run.model.layers[0]) * length * width)))


def new_texts(run: Any, num: int, *, seed: int = 0) -> Texts:
    """`num` texts of the length of a window, from nothing."""
    if isinstance(run.recipe.task, MaskedLM):
        return generate(run, blank(run, num), seed=seed)
    # A document begins after the end of another.
    start = torch.full((num, 1), run.data.tokenizer.separator)
    made = go_on(run, start, run.recipe.data.length + 1, seed=seed)
    return made._replace(tokens=made.tokens[:, 1:])


def blank(run: Any, num: int, length: int = 0) -> Tensor:
    """`num` texts of masks alone [num, length]."""
    return torch.full((num, length or run.recipe.data.length), run.model.mask_id)


def metrics(run: Any, split: Any, measured: dict[str, Metric]) -> dict[str, Metric]:
    """What the task measured, in bits per character and per byte, and what samples are like.

    `entropy` (of the tokens of a text, in nats), `distinct_2` (share of different pairs of neighbouring tokens),
    `repetition_4` (share of runs of four tokens that a text had before) and, with a teacher, `generative_perplexity`
    and `mauve`; the first three also of as many real texts (`..._real`): a perplexity alone rewards repetition. Of
    next-token denoisers also what their losses owe to the noisy target (`NextToken.scrambled`), and of looped networks
    what other numbers of iterations give.
    """
    task, tokenizer = run.recipe.task, run.data.tokenizer
    per_token = units(split, tokenizer)
    nats = measured["nats_per_token"]
    found = {
        "bits_per_character": _scaled(nats, 1 / math.log(2) / per_token.characters),
        "bits_per_byte": _scaled(nats, 1 / math.log(2) / per_token.bytes),
        **measured,
    }
    if isinstance(task, NextToken):
        found["perplexity"] = exponential(nats)
        found |= adaptation.general(run)
        some = list(on_device(in_order(_some(split), CONTROLLED), run.trainer.device))
        found |= task.scrambled(run.model, some)
        if isinstance(task, RecurrentLM) and task.curve:
            found |= task.over_iterations(run.model, some, sorted(set(task.curve)))
    if task.num_samples:
        run.model.eval()
        made = new_texts(run, task.num_samples).tokens
        rows = min(task.num_samples, len(split))
        batch = split.__getitems__([index * len(split) // rows for index in range(rows)])
        real = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, IGNORED)
        for name, measure in (("entropy", entropy), ("distinct_2", distinct_2), ("repetition_4", repetition)):
            found[name] = mean_with_error(torch.tensor([measure(text) for text in made.tolist()]))
            texts = [[token for token in text if token != IGNORED] for text in real.tolist()]
            found[f"{name}_real"] = mean_with_error(torch.tensor([measure(text) for text in texts]))
        if task.teacher:
            written = [plain(text, tokenizer) for text in made.tolist()]
            found["generative_perplexity"] = generative_perplexity(task.teacher, written, run.trainer.device)
            if task.mauve:
                own = [plain([token for token in text if token != IGNORED], tokenizer) for text in real.tolist()]
                found["mauve"] = mauve(task.teacher, written, own, run.trainer.device)
    return found


def _some(split: Any) -> Any:
    """Windows evenly from the whole split, enough for a control."""
    rows = min(CONTROLLED, len(split))
    return torch.utils.data.Subset(split, [index * len(split) // rows for index in range(rows)])


def plain(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text without the tokens that only mark the end of a document."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.separator or tokenizer.between])


def _scaled(metric: Metric, factor: float) -> Metric:
    return Metric(metric.value * factor, None if metric.stderr is None else metric.stderr * factor)


def sample_texts(
    run: Any,
    num: int,
    *,
    prompt: str = "",
    chat: bool = False,
    length: int = 0,
    seed: int = 0,
    stop: Sequence[str] = (),
    stream: Callable[[str], Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Makes `num` texts from a prompt (see `start_of`; empty = from nothing).

    Args:
        chat: the prompt is a question; put it in the tokenizer's chat template and show only the answer.
        stop: causal models: texts end before the first of these strings.
        stream: causal models, one text: called with every piece of it as it is written.
        settings: fields of the task that differ from the run's.

    Returns texts, settings, cost and tokens per second.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    if stream is not None and num > 1:
        raise UserError(f"--stream writes one text; got --num {num}")
    task = dataclasses.replace(run.recipe.task, **settings)
    tokenizer, window = run.data.tokenizer, run.recipe.data.length
    if length < 0 or length == 1:
        raise UserError(f"--length must be at least 2 tokens, got {length}")
    if chat and (not prompt or isinstance(task, MaskedLM)):
        raise UserError("--chat takes a question (--prompt) for a model that writes token by token")
    run.model.eval()
    how: dict[str, Any] = {}
    if isinstance(task, MaskedLM):
        start = start_of(prompt, tokenizer, window, length).expand(num, -1)
        with run.trainer.averaged():
            made = generate(run, start, seed=seed, task=task)
        tokens, written = made.tokens, int((start == run.model.mask_id).sum())
        texts = [tokenizer.decode(text) for text in tokens.tolist()]
        how = {"sampler": task.sampler, "steps": task.sampling_steps}
    else:
        own = beginning(question(prompt, tokenizer) if chat else prompt, tokenizer, window, length)
        # A text begins after the end of another; a conversation as its template says, and ends where its turn does.
        before = [] if chat else [tokenizer.separator]
        stop = [*stop, tokenizer.decode([tokenizer.separator])] if chat else stop
        start = torch.tensor([*before, *own]).expand(num, -1)
        progress = _Writing(tokenizer, len(before), len(own), stop, stream, answers=chat)
        with run.trainer.averaged():
            made = go_on(
                run,
                start,
                (length or window) + len(before),
                seed=seed,
                task=task,
                watch=progress if stop or stream is not None else None,
            )
        tokens = made.tokens[:, len(before) :]
        texts, written = [progress.text(text) for text in tokens.tolist()], num * (tokens.shape[1] - len(own))
        progress.finish(texts[0])
        how = {"stop": list(stop)} if stop else {}
        if made.iterations is not None:
            how["iterations_per_token"] = made.iterations
    return {
        "texts": texts,
        "num": num,
        "length": tokens.shape[1],
        **how,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "top_k": task.top_k,
        "seed": seed,
        "layer_evaluations_per_text": made.layer_evaluations / num,
        "seconds": round(made.seconds, 3),
        "tokens_per_second": round(written / made.seconds, 1),
    }


class _Writing:
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
        stream: Callable[[str], Any] | None,
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


def path(run: Any, seed: int = 0, shown: int = 8) -> list[dict[str, Any]]:
    """How one text comes out of masks, at `shown` moments.

    Each has the `level`, the `block` that runs next (None at the end) and `tokens`: text and the block that wrote it
    (None while it is masked).
    """
    steps: list[tuple[int | None, float, Tensor]] = []
    made = generate(
        run, blank(run, 1), seed=seed, watch=lambda block, level, z: steps.append((block, level, z[0].cpu()))
    )
    steps.append((None, 0.0, made.tokens[0]))
    writers: list[int | None] = [None] * len(made.tokens[0])
    moments = []
    chosen = {round(index * (len(steps) - 1) / (shown - 1)) for index in range(shown)}
    for number, (block, level, z) in enumerate(steps):
        if number:
            changed = (z != steps[number - 1][2]).tolist()
            writers = [steps[number - 1][0] if new else old for new, old in zip(changed, writers, strict=True)]
        if number in chosen:
            texts = [run.data.tokenizer.decode([token]) for token in z.tolist()]
            moments.append({"block": block, "level": level, "tokens": list(zip(texts, writers, strict=True))})
    return moments


def check(task: Task, split: Any) -> None:
    """Raises UserError for what would only fail when the trained run is evaluated."""
    if isinstance(split, Unread):
        return
    if task.mauve and not task.teacher:
        raise UserError("evaluation.mauve compares texts as a language model sees them: set evaluation.teacher")
    if task.teacher and task.num_samples:
        check_teacher(task.teacher)
