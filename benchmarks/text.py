"""Masked diffusion text on mdlm-pydocs: quality at equal layer evaluations, sampling speed, and throughput of training.

    python benchmarks/text.py quality --jobs 2     every method, three seeds, with curves over compute
    python benchmarks/text.py speed                tokens per second of sampling and of training steps, alternating

Each part writes benchmarks/results/text-PART.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffusionblocks.adapters import take_apart
from diffusionblocks.cli import main as dblocks
from diffusionblocks.config import BlocksConfig
from diffusionblocks.denoisers import whole_network
from diffusionblocks.evaluation.run import prepare
from diffusionblocks.evaluation.text import blank, generate
from diffusionblocks.recipes import load_recipe
from diffusionblocks.tasks import MaskedLM
from environment import describe
from generation import curve

RESULTS = Path(__file__).parent / "results"
METHODS = "end-to-end,shallow,diffusionblocks"
TURNS = 8


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(arguments.output_dir) / "quality"
    words = ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--jobs", str(arguments.jobs)]
    words += ["--seed", str(arguments.seed)]
    words += ["--train.evaluate-every", str(arguments.every)]
    if code := dblocks(["compare", "mdlm-pydocs", *words, "--output-dir", str(folder)]):
        raise SystemExit(code)
    return {
        "command": "dblocks compare mdlm-pydocs " + " ".join(words),
        "results": json.loads((folder / "compare.json").read_text())["results"],
        "runs": {
            f"{path.parts[-3]} {path.parts[-2]}": {
                "metrics": json.loads(path.read_text())["metrics"],
                "wall_seconds": json.loads(path.read_text())["wall_seconds"],
                "curve": curve(path.parent, "nats_per_token"),
            }
            for path in sorted(folder.glob("*/seed-*/summary.json"))
        },
    }


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios from one process, in turns, so that a slow moment hits all alike. One thread."""
    torch.set_num_threads(1)
    return {"sampling": _sampling(), "training": _training()}


def _alternating(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _ratio(over: list[float], under: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"value": statistics.fmean(ratios), "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5}


def _run(method: str) -> Any:
    return prepare(load_recipe("mdlm-pydocs", [("method", method), ("train.residency", "device")]))


def _sampling() -> dict[str, Any]:
    """New networks: what a step costs does not depend on the weights."""
    runs = {name: _run(name) for name in ("end-to-end", "diffusionblocks")}
    texts = 64
    for run in runs.values():
        run.model.eval()
    seconds = _alternating({name: (lambda run=run: generate(run, blank(run, texts))) for name, run in runs.items()})
    recipe = runs["diffusionblocks"].recipe
    tokens = texts * recipe.data.length
    return {
        "num_blocks": recipe.blocks.num_blocks,
        "sampler": f"{recipe.task.sampler}, {recipe.task.sampling_steps} steps, {texts} texts of {recipe.data.length} tokens",
        "tokens_per_second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "of_end_to_end": _ratio(seconds["end-to-end"], seconds["diffusionblocks"]),
    }


def _training() -> dict[str, Any]:
    """Forward and backward of a task's step against those of transformers' own causal model of the same layers."""
    found = {}
    for method in ("end-to-end", "diffusionblocks"):
        run = _run(method)
        batch = next(iter(run.trainer.stream.load([0])))
        blocks = run.model.num_blocks
        config = run.model.source["config"] if blocks > 1 else run.model._network[0].config.to_dict()
        config = LlamaForCausalLM.config_class.from_dict({**config, "num_hidden_layers": 6 // blocks})
        plain = LlamaForCausalLM(config)
        plain.config._attn_implementation = "sdpa"

        def ours(run: Any = run, batch: Any = batch, blocks: int = blocks) -> None:
            for block in range(blocks):
                run.recipe.task.step(run.model, block, batch).loss.backward()
                run.model.zero_grad(set_to_none=True)

        def theirs(plain: Any = plain, batch: Any = batch, blocks: int = blocks) -> None:
            for _ in range(blocks):
                plain(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss.backward()
                plain.zero_grad(set_to_none=True)

        calls = {
            "ours": lambda ours=ours: [ours() for _ in range(4)],
            "plain": lambda theirs=theirs: [theirs() for _ in range(4)],
        }
        seconds = _alternating(calls)
        tokens = 4 * batch["input_ids"].numel()
        found[method] = {
            "tokens_per_second": {name: tokens / statistics.median(own) for name, own in seconds.items()},
            "of_plain_transformers": _ratio(seconds["plain"], seconds["ours"]),
        }
    found["large vocabulary"] = _large_vocabulary()
    return found


def _large_vocabulary() -> dict[str, Any]:
    """The same where the readout weighs most: 32,000 tokens at width 256."""
    config = LlamaConfig(
        vocab_size=32_000,
        mask_token_id=31_999,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    plain = LlamaForCausalLM(config)
    model, task = whole_network(take_apart(plain, "masked"), BlocksConfig()), MaskedLM()
    batch = {"input_ids": torch.randint(0, 31_999, (8, 128), generator=torch.Generator().manual_seed(0))}

    def ours() -> None:
        task.step(model, 0, batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def theirs() -> None:
        plain(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss.backward()
        plain.zero_grad(set_to_none=True)

    seconds = _alternating({"ours": ours, "plain": theirs})
    tokens = batch["input_ids"].numel()
    return {
        "tokens_per_second": {name: tokens / statistics.median(own) for name, own in seconds.items()},
        "of_plain_transformers": _ratio(seconds["plain"], seconds["ours"]),
    }


PARTS = {"quality": quality, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=3, help="the first (0 to 2 were used while settings were chosen)")
    parser.add_argument(
        "--every", type=int, default=500, help="block steps between evaluations on the validation split"
    )
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--output-dir", default="runs/text")
    arguments = parser.parse_args()
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"text-{arguments.part}.json"
    target.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
