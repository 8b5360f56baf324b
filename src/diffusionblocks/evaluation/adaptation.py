"""What adapting a pretrained language model changed: likelihood before and after, of the domain's text and of general
text, and what the model writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.model import EndToEndModel
from diffusionblocks.methods import find_method
from diffusionblocks.methods.in_context import InContext
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.system import files
from diffusionblocks.system.run_folder import BEFORE, SAMPLES
from diffusionblocks.tasks import CausalLM
from diffusionblocks.training import checkpoint
from diffusionblocks.training.task import Metric

log = logging.getLogger("diffusionblocks")


def adapts(run: Any) -> bool:
    """Whether a run adapts a pretrained language model whose function its model has from the start."""
    return bool(run.recipe.model.pretrained) and is_ordinary(run)


def is_ordinary(run: Any) -> bool:
    """Whether a run's model is an ordinary language model of transformers (its `network`)."""
    model = run.model
    ordinary = isinstance(model, EndToEndModel) or (isinstance(model, CausalBlocks) and model.is_ordinary)
    return isinstance(run.recipe.task, CausalLM) and ordinary


def as_scored(run: Any, split: Any) -> Any:
    """The split as the run's method is scored on it: some put a context before every text."""
    return find_method(run.recipe.method).scored(run.recipe, run.data, split)


def general(run: Any) -> dict[str, Metric]:
    """Likelihood of `data.general`."""
    if getattr(run.data, "general", None) is None:
        return {}
    nats = run.trainer.evaluate(as_scored(run, run.data.general))["nats_per_token"]
    return {"general_nats_per_token": nats, "general_perplexity": exponential(nats)}


def before(run: Any, split: Any, folder: Path) -> dict[str, Metric]:
    """Likelihoods of the model as it came, measured once per run: `nats_per_token_before` and the like. Call it before
    the first step and before a checkpoint is restored."""
    if not (adapts(run) and run.recipe.task.before and find_method(run.recipe.method).trains):
        return {}
    path = folder / BEFORE
    measured = files.there(path, _FIX)
    if not measured and checkpoint.existing(folder):
        log.info("%s has begun to train: what the network was before is not measured", folder)
        return {}
    if not measured:
        nats = run.trainer.evaluate(split)["nats_per_token"]
        found = {"nats_per_token": nats, "perplexity": exponential(nats), **general(run)}
        written = [one["written"] for one in continuations(run, split)]
        content = {"metrics": {name: metric._asdict() for name, metric in found.items()}, "written": written}
        files.write_json(path, content)
    metrics = _read_before(path)["metrics"]
    return {f"{name}_before": Metric(**metric) for name, metric in metrics.items()}


_FIX = "remove it: the run goes on without what the network was before"


def _read_before(path: Path) -> dict[str, Any]:
    found = files.read_json(path, {"metrics": dict, "written": list}, _FIX)
    if not all(isinstance(one, dict) and one.keys() == {"value", "stderr"} for one in found["metrics"].values()):
        raise files.Damaged(path, "its metrics have no value and standard error", _FIX)
    return found


def write_samples(run: Any, split: Any, folder: Path) -> None:
    """samples.json: how the adapted model goes on from held-out texts, beside the real text and what the model wrote
    before."""
    made = continuations(run, split)
    if not made:
        return
    if files.there(folder / BEFORE, _FIX):
        for one, text in zip(made, _read_before(folder / BEFORE)["written"], strict=False):
            one["before"] = text
    files.write_json(folder / SAMPLES, {"continuations": made})


def read_samples(folder: Path) -> list[dict[str, str]]:
    """What `write_samples` wrote; nothing where a run has none. Raises Damaged (a UserError)."""
    path, fix = folder / SAMPLES, "remove it, and the report has no continuations"
    if not files.there(path, fix):
        return []
    texts = None
    if path.read_bytes().lstrip()[:1] == b"[":  # of an earlier version, without a seal
        with contextlib.suppress(ValueError, RecursionError):
            texts = json.loads(files.read_text(path))
    else:
        texts = files.read_json(path, fix=fix).get("continuations")
    if not isinstance(texts, list) or not all(isinstance(one, dict) and _is_text(one) for one in texts):
        raise files.Damaged(path, "its texts are not what was written", fix)
    return texts


def _is_text(one: dict[str, Any]) -> bool:
    return {"prompt", "real", "written"} <= one.keys() and all(isinstance(text, str) for text in one.values())


def continuations(run: Any, split: Any) -> list[dict[str, str]]:
    """`task.continuations` held-out texts, each cut in the middle (conversations: where the first answer begins), and
    the likeliest `task.continued` tokens after the cut. Each has `prompt`, `real` and `written`."""
    if not adapts(run) or not run.recipe.task.continuations:
        return []
    task, tokenizer = run.recipe.task, run.data.tokenizer
    count = min(task.continuations, len(split))
    scored = as_scored(run, split)
    greedy = dataclasses.replace(task, temperature=0.0, top_p=1.0, top_k=0)
    longest = int(run.model.network.config.max_position_embeddings)
    run.model.eval()
    found = []
    with run.trainer.averaged():
        for index in range(count):
            batch = split[index * len(split) // count]
            real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["input_ids"])
            ids, cut = batch["input_ids"][:real], max(1, real // 2)
            if "labels" in batch:
                answers = torch.nonzero(batch["labels"][1:real] != IGNORED)
                cut = int(answers[0]) + 1 if len(answers) else cut
            prompt = ids[:cut]
            if isinstance(scored, InContext):
                prompt = torch.cat([torch.from_numpy(scored.context(prompt.numpy())), prompt])
            prompt = prompt[-max(1, longest - task.continued) :]
            start = prompt[None].to(run.trainer.device)

            def ended(tokens: torch.Tensor) -> bool:
                return bool(tokens[0, -1] == tokenizer.separator)

            made = greedy.sample(run.model, start, len(prompt) + task.continued, watch=ended)[0, len(prompt) :]
            texts = [_text(tokens, tokenizer) for tokens in (ids[:cut], ids[cut : cut + task.continued], made.cpu())]
            found.append(dict(zip(("prompt", "real", "written"), texts, strict=True)))
    return found


def _text(tokens: torch.Tensor, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens.tolist()))


def exponential(metric: Metric) -> Metric:
    """Perplexity from nats."""
    value = math.exp(min(metric.value, 700.0))
    return Metric(value, None if metric.stderr is None else value * metric.stderr)
