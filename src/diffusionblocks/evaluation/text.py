"""Texts from a trained run, a masked diffusion or a causal model: samples, what they are like, and likelihood in units that compare across tokenizers."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusionblocks.data.stream import Unread
from diffusionblocks.data.text import bits, units
from diffusionblocks.data.tokenizers import Tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.readout import IGNORED, chunked_cross_entropy
from diffusionblocks.seeds import derive
from diffusionblocks.tasks import CausalLM, MaskedLM
from diffusionblocks.tasks.base import Metric, mean_with_error

AT_ONCE = 64  # texts made together, or fewer ...
LOGITS = 1 << 26  # ... so that their logits stay below this number


class Texts(NamedTuple):
    """tokens [N, T]. layer_evaluations: forward passes of a layer, in all."""

    tokens: Tensor
    layer_evaluations: int
    seconds: float


Task = MaskedLM | CausalLM


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


def go_on(run: Any, start: Tensor, length: int, *, seed: int = 0, task: CausalLM | None = None) -> Texts:
    """Causal models: continues `start` [N, P] to [N, length]. Every token passes every layer once."""
    task, model, found, began = task or run.recipe.task, run.model, list[Tensor](), time.perf_counter()
    for first in range(0, len(start), AT_ONCE):
        part = start[first : first + AT_ONCE].to(run.trainer.device)
        found.append(task.sample(model, part, length, seed=derive(seed, "samples", first)).cpu())
    layers = sum(len(span) for span in model.layers)
    return Texts(torch.cat(found), len(start) * (length - 1) * layers, time.perf_counter() - began)


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

    `entropy` (of the tokens of a text, in nats), `distinct_2` (share of different pairs of neighbouring tokens) and, with a
    teacher, `generative_perplexity`; the first two also of as many real texts (`..._real`): a perplexity alone rewards
    repetition.
    """
    task, tokenizer = run.recipe.task, run.data.tokenizer
    per_token = units(split, tokenizer)
    nats = measured["nats_per_token"]
    found = {
        "bits_per_character": _scaled(nats, bits(1.0, per_token.characters)),
        "bits_per_byte": _scaled(nats, bits(1.0, per_token.bytes)),
        **measured,
    }
    if task.num_samples:
        run.model.eval()
        made = new_texts(run, task.num_samples).tokens
        rows = min(task.num_samples, len(split))
        batch = split.__getitems__([index * len(split) // rows for index in range(rows)])
        real = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, IGNORED)
        for name, measure in (("entropy", entropy), ("distinct_2", distinct_2)):
            found[name] = mean_with_error(torch.tensor([measure(text) for text in made.tolist()]))
            texts = [[token for token in text if token != IGNORED] for text in real.tolist()]
            found[f"{name}_real"] = mean_with_error(torch.tensor([measure(text) for text in texts]))
        if task.teacher:
            written = [plain(text, tokenizer) for text in made.tolist()]
            found["generative_perplexity"] = generative_perplexity(task.teacher, written, run.trainer.device)
    return found


def plain(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text without the tokens that only mark the end of a document."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.separator or tokenizer.between])


def _scaled(metric: Metric, factor: float) -> Metric:
    return Metric(metric.value * factor, None if metric.stderr is None else metric.stderr * factor)


def entropy(tokens: Sequence[int]) -> float:
    """Of the distribution of tokens inside one text, nats."""
    counts = torch.tensor(list(Counter(tokens).values()), dtype=torch.float64)
    shares = counts / counts.sum()
    return -(shares * shares.log()).sum().item()


def distinct_2(tokens: Sequence[int]) -> float:
    """Share of pairs of neighbours that are different pairs (Li et al. 2016, arXiv 1510.03055)."""
    pairs = list(pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def check_teacher(name: str) -> None:
    """Raises UserError unless `name` is a causal language model of transformers (by its config) with a tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        classes = AutoConfig.from_pretrained(name).architectures or []
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the teacher {name!r}: {str(error).splitlines()[0]}") from None
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in classes):
        raise UserError(
            f"the teacher {name!r} is a {', '.join(classes) or 'network without a class'}, no causal language model"
        )


@torch.no_grad()
def generative_perplexity(name: str, texts: Sequence[str], device: torch.device) -> Metric:
    """exp of the mean nats per token of the teacher `name` on texts, its own tokens; standard error over texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_teacher(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name).eval().to(device)
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    longest = getattr(model.config, "max_position_embeddings", None) or 1024
    sums, counts = [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:longest], device=device)[None]
        if ids.shape[1] < 2:
            continue
        hidden = model.base_model(ids).last_hidden_state[0, :-1]
        losses = chunked_cross_entropy(hidden, model.get_output_embeddings(), ids[0, 1:])
        sums.append(losses.double().sum().cpu())
        counts.append(len(losses))
    if not counts:
        raise UserError("the samples are too short for the teacher: none has two of its tokens")
    nats, tokens = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    mean = nats.sum() / tokens.sum()
    spread = mean_with_error((nats - mean * tokens) / tokens.mean()).stderr
    value = mean.exp().item()
    return Metric(value, None if spread is None else value * spread)


# ---------------------------------------------------------------- prompts

_BLANKS = re.compile(r"\{(\d+)\}")


def start_of(prompt: str, tokenizer: Tokenizer, window: int, length: int = 0) -> Tensor:
    """A text with blanks -> tokens [T], masked where they are to be filled in.

    Args:
        prompt: `{n}` stands for n masked tokens. window: T of the trained network. length: of the result, what follows the
            prompt is masked; 0 = the window, or just the prompt where it has blanks.

    Raises UserError when the prompt is longer than the window, or leaves nothing to fill in.
    """
    assert tokenizer.mask_id is not None
    parts: list[int] = []
    blanks, total = False, 0
    for index, piece in enumerate(_BLANKS.split(prompt)):
        if index % 2:
            parts += [tokenizer.mask_id] * min(int(piece), window)
            blanks, total = blanks or int(piece) > 0, total + int(piece)
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
            f"the prompt fills the window of {window} tokens and leaves nothing to write; shorten it, or put blanks in it: {{5}} "
            "stands for 5 tokens"
        )
    return torch.tensor(parts)


def _with_edges(piece: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a piece of a prompt; characters keep the white space at its edges, which encoding strips."""
    ids = tokenizer.encode(piece).tolist()
    if tokenizer.between:
        edge = list(tokenizer.between)
        ids = (edge if piece[0].isspace() else []) + ids + (edge if piece[-1].isspace() and piece.strip() else [])
    return ids


def _beginning(prompt: str, tokenizer: Tokenizer, window: int, length: int) -> list[int]:
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


def sample_texts(
    run: Any, num: int, *, prompt: str = "", length: int = 0, seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Makes `num` texts from a prompt (see `start_of`; empty = from nothing).

    settings: fields of the task that differ from the run's. Returns texts, settings, cost and tokens per second.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    task = dataclasses.replace(run.recipe.task, **settings)
    tokenizer, window = run.data.tokenizer, run.recipe.data.length
    if length < 0 or length == 1:
        raise UserError(f"--length must be at least 2 tokens, got {length}")
    run.model.eval()
    how: dict[str, Any] = {}
    if isinstance(task, MaskedLM):
        start = start_of(prompt, tokenizer, window, length).expand(num, -1)
        with run.trainer.averaged():
            made = generate(run, start, seed=seed, task=task)
        tokens, written = made.tokens, int((start == run.model.mask_id).sum())
        how = {"sampler": task.sampler, "steps": task.sampling_steps}
    else:
        own = _beginning(prompt, tokenizer, window, length)
        start = torch.tensor([tokenizer.separator, *own]).expand(num, -1)
        with run.trainer.averaged():
            made = go_on(run, start, (length or window) + 1, seed=seed, task=task)
        tokens, written = made.tokens[:, 1:], num * ((length or window) - len(own))
    return {
        "texts": [tokenizer.decode(text) for text in tokens.tolist()],
        "num": num,
        "length": tokens.shape[1],
        **how,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "seed": seed,
        "layer_evaluations_per_text": made.layer_evaluations / num,
        "seconds": round(made.seconds, 3),
        "tokens_per_second": round(written / made.seconds, 1),
    }


def path(run: Any, seed: int = 0, shown: int = 8) -> list[dict[str, Any]]:
    """How one text comes out of masks, at `shown` moments.

    Each has the `level`, the `block` that runs next (None at the end) and `tokens`: text and the block that wrote it (None
    while it is masked).
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
    if task.teacher and task.num_samples and not isinstance(split, Unread):
        check_teacher(task.teacher)
