"""Trained runs in EleutherAI's lm-evaluation-harness: any next-token model of this package, denoisers too.

An ordinary result needs no adapter: `lm_eval --model hf --model_args pretrained=RUN/model`. What is not one (blocks
that read the noisy target, looped networks) is scored by its own likelihood here, which is a bound for denoisers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.errors import UserError, nearest
from diffusionblocks.evaluation.adaptation import is_ordinary
from diffusionblocks.methods import find_method
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.seeds import generator
from diffusionblocks.tasks import NextToken


def evaluate_tasks(
    run: Any, tasks: Sequence[str], folder: str | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of lm-evaluation-harness by task.

    Args:
        tasks: names that the harness knows; most download their data. folder: with more of them, as YAML. limit:
            examples per task.

    Raises UserError without the harness, for an unknown task, or for a run that does not write token by token.
    """
    if not isinstance(run.recipe.task, NextToken):
        raise UserError("lm-evaluation-harness scores language models that write token by token")
    if find_method(run.recipe.method).adds_context:
        raise UserError(f"a run of the method {run.recipe.method} has no model of its own: score the method original")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--harness needs lm-eval: pip install 'diffusionblocks[harness]'") from None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--harness-path must be a folder with tasks; {folder!r} is not one")
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"unknown task of lm-evaluation-harness: {name!r}{nearest(name, manager.all_tasks)}")
    try:
        with run.trainer.averaged():
            found = simple_evaluate(
                model=_model(run),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"a task's data could not be read: {reason} (offline, take tasks on local files: --harness-path)"
        ) from None
    assert found is not None
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def _model(run: Any) -> Any:
    """The run as the harness calls models."""
    from lm_eval.api.model import TemplateLM

    class Adapted(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = run.data.tokenizer
            self.tokenizer = getattr(self.tokens, "own", None)

        @property
        def tokenizer_name(self) -> str:
            return str(run.recipe.data.tokenizer).replace("/", "__")

        @property
        def eot_token_id(self) -> int:
            return int(self.tokens.separator)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return [int(token) for token in self.tokens.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return [score(run, before, after) for _, before, after in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [rolling(run, self.tok_encode(request.args[0])) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [write(run, *request.args) for request in requests]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            from diffusionblocks.data.text.chat import template_of

            own = template_of(self.tokens)
            return str(
                own.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)
            )

    return Adapted()


def score(run: Any, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
    """log p(after | before) in nats, and whether `after` is what the model finds likeliest at every place.

    Contexts longer than the window lose their beginning. Denoisers that are no ordinary network have a bound in place
    of the first, and False in place of the second.
    """
    model, window = run.model, window_of(run)
    ids = [*before, *after][-window:]
    scored = min(len(after), len(ids) - 1)
    if scored == 0:
        return 0.0, True
    batch = {name: tensor[None].to(run.trainer.device) for name, tensor in _labelled(ids, scored).items()}
    model.eval()
    with torch.no_grad():
        nats = run.recipe.task.measurer(model)(batch, generator(0, run.trainer.device))["nats_per_token"].sum().item()
        if not is_ordinary(run):
            return -nats, False
        logits = model.network(batch["input_ids"]).logits[0, -scored - 1 : -1]
        return -nats, bool((logits.argmax(-1) == batch["input_ids"][0, -scored:]).all())


def window_of(run: Any) -> int:
    """Tokens that the model reads at most: what its positions allow, for denoisers the window that they were trained
    on."""
    return int(run.model.network.config.max_position_embeddings) if is_ordinary(run) else int(run.recipe.data.length)


def _labelled(ids: Sequence[int], scored: int) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(ids)
    labels = tokens.clone()
    labels[: len(ids) - scored] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def rolling(run: Any, tokens: Sequence[int]) -> float:
    """log p of a whole text in nats, window by window, every token once and with as much before it as fits."""
    size, total, place = window_of(run) - 1, 0.0, 0
    whole = [run.data.tokenizer.separator, *tokens]
    while place < len(tokens):
        end = min(place + size, len(tokens))
        start = max(0, end - size)  # the last window reaches back
        total += score(run, whole[start : place + 1], whole[place + 1 : end + 1])[0]
        place = end
    return total


def write(run: Any, context: str, settings: dict[str, Any]) -> str:
    """Greedy, or as `settings` say, until one of their strings `until`."""
    tokenizer, window = run.data.tokenizer, window_of(run)
    longest = min(int(settings.get("max_gen_toks", 256)), window // 2)
    before = [int(token) for token in tokenizer.encode(context)][-(window - longest) :] or [tokenizer.separator]
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0

    def text_of(tokens: torch.Tensor) -> str:
        written = tokens[0, len(before) :].tolist()
        if tokenizer.separator in written:
            written = written[: written.index(tokenizer.separator)]
        text = str(tokenizer.decode(written))
        return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=None)]

    def ended(tokens: torch.Tensor) -> bool:
        written = tokens[0, len(before) :].tolist()
        text = tokenizer.decode(written)
        return written[-1] == tokenizer.separator or any(word in text for word in stop)

    task = dataclasses.replace(run.recipe.task, temperature=temperature, top_p=1.0, top_k=0)
    start = torch.tensor([before], device=run.trainer.device)
    run.model.eval()
    return text_of(task.sample(run.model, start, len(before) + longest, watch=ended))
