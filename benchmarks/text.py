"""Masked diffusion text: quality at equal layer evaluations, sampling speed, and throughput of training.

    python benchmarks/text.py quality --jobs 2     mdlm-pydocs: every method, three seeds, with curves over compute
    python benchmarks/text.py stdlib --jobs 2 --seed 4 --seeds 6 --every 5000     the same of mdlm-stdlib
    python benchmarks/text.py lengths --jobs 2 --seed 4 --seeds 1 --every 5000    mdlm-stdlib, trainings of several
                                                                                  lengths
    python benchmarks/text.py speed                tokens per second of sampling and of training steps, alternating

Each part writes benchmarks/results/text-PART.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.cli import main as dblocks
from diffusionblocks.experiments.run import prepare
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import load_recipe
from diffusionblocks.tasks import MaskedLM
from diffusionblocks.tasks.masked_lm import blank
from environment import describe
from generation import curve
from timing import alternating, compared

RESULTS = Path(__file__).parent / "results"
METHODS = "end-to-end,shallow,diffusionblocks"
LENGTHS = (2500, 5000, 7500, 10_000)  # end-to-end steps


def compared_methods(arguments: argparse.Namespace, recipe: str, folder: Path, *more: str) -> dict[str, Any]:
    """The command, and its results."""
    words = ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--jobs", str(arguments.jobs)]
    words += ["--seed", str(arguments.seed), "--train.evaluate-every", str(arguments.every), *more]
    if code := dblocks(["compare", recipe, *words, "--output-dir", str(folder)]):
        raise SystemExit(code)
    results = json.loads((folder / "compare.json").read_text())["results"]
    return {"command": f"dblocks compare {recipe} " + " ".join(words), "results": results}


def quality(arguments: argparse.Namespace, recipe: str = "mdlm-pydocs") -> dict[str, Any]:
    folder = Path(arguments.output_dir) / arguments.part
    return {
        **compared_methods(arguments, recipe, folder),
        "runs": {
            f"{path.parts[-3]} {path.parts[-2]}": {
                "metrics": json.loads(path.read_text())["metrics"],
                "wall_seconds": json.loads(path.read_text())["wall_seconds"],
                "curve": curve(path.parent, "nats_per_token"),
            }
            for path in sorted(folder.glob("*/seed-*/summary.json"))
        },
    }


def lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quality over compute: a whole training, its schedule and branching with it, of each length; other settings the
    recipe's."""
    kept, folder = ("metrics", "layer_evaluations", "wall_seconds"), Path(arguments.output_dir) / "lengths"
    commands, found = [], {}
    for steps in LENGTHS:
        made = compared_methods(arguments, "mdlm-stdlib", folder / str(steps), "--train.steps", str(steps))
        commands.append(made["command"])
        found[steps] = {row["method"]: {name: row[name] for name in kept} for row in made["results"]}
    return {"commands": commands, "steps": found}


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios from one process, in turns, so that a slow moment hits all alike. One thread."""
    torch.set_num_threads(1)
    return {"sampling": _sampling(), "training": _training()}


def _run(method: str) -> Any:
    return prepare(load_recipe("mdlm-pydocs", [("method", method), ("train.residency", "device")]))


def _sampling() -> dict[str, Any]:
    """New networks: what a step costs does not depend on the weights."""
    runs = {name: _run(name) for name in ("end-to-end", "diffusionblocks")}
    texts = 64
    for run in runs.values():
        run.model.eval()
    seconds = alternating(
        {
            name: (lambda run=run: run.recipe.task.fill(run.trained, blank(run.trained, texts)))
            for name, run in runs.items()
        }
    )
    recipe = runs["diffusionblocks"].recipe
    return {
        "num_blocks": recipe.blocks.num_blocks,
        "sampler": f"{recipe.task.sampler}, {recipe.task.sampling_steps} steps, "
        f"{texts} texts of {recipe.data.length} tokens",
        **compared(seconds, texts * recipe.data.length, "end-to-end"),
    }


def _training() -> dict[str, Any]:
    """Forward and backward of a task's step against those of transformers' own causal model of the same layers."""
    found = {}
    for method in ("end-to-end", "diffusionblocks"):
        run = _run(method)
        blocks = run.model.num_blocks
        config = run.model.source["config"] if blocks > 1 else run.model.network.config.to_dict()
        plain = LlamaForCausalLM(LlamaConfig.from_dict({**config, "num_hidden_layers": 6 // blocks}))
        batch = next(iter(run.trainer.stream.load([0])))
        found[method] = _against_plain(run.model, run.recipe.task, plain, batch, 4)
    # Where the readout weighs most: 32,000 tokens at width 256.
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, mask_token_id=31_999, **sizes))
    model = whole_network(take_apart(plain, "masked"), BlocksConfig())
    batch = {"input_ids": torch.randint(0, 31_999, (8, 128), generator=torch.Generator().manual_seed(0))}
    found["large vocabulary"] = _against_plain(model, MaskedLM(), plain, batch, 1)
    return found


def _against_plain(model: Any, task: Any, plain: Any, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """One step of every block of `model` against as many of the plain network, which is as deep as a block."""
    tokens = batch["input_ids"]

    def ours() -> None:
        for block in list(range(model.num_blocks)) * repeats:
            task.step(model, block, batch).loss.backward()
            model.zero_grad(set_to_none=True)

    def theirs() -> None:
        for _ in range(model.num_blocks * repeats):
            plain(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            plain.zero_grad(set_to_none=True)

    return compared(alternating({"plain": theirs, "ours": ours}), repeats * tokens.numel(), "plain")


PARTS = {"quality": quality, "stdlib": partial(quality, recipe="mdlm-stdlib"), "lengths": lengths, "speed": speed}


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
