"""A network of 6.7 billion parameters: the part `large` of benchmarks/gpu.py, which needs the card for itself.

Run as a program it prints what is planned for every row: tracing takes the processor 20 seconds, while the card works.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffusionblocks as dblocks
from diffusionblocks.planning.workload import Choice, Workload, predictor
from diffusionblocks.recipes import Recipe
from gpu_speed import Batch, exact_model, peaks, reset_peaks, rounds, synchronized, texts, tidy, trainer, whole
from timing import alternating


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """shapes: texts of a batch and their length. warm, timed: rounds; every batch has one more that is not timed."""

    device: str = "cuda"
    layers: int = 32
    blocks: int = 8
    width: int = 4096
    heads: int = 32
    intermediate: int = 11_008
    vocabulary: int = 32_000
    shapes: tuple[tuple[int, int], ...] = ((4, 512), (8, 1024), (16, 2048))
    warm: int = 2
    timed: int = 2


DRY = Sizes(
    **dict(device="cpu", layers=2, blocks=2, width=32, heads=2, intermediate=64, vocabulary=64),
    **dict(shapes=((1, 16), (2, 16)), warm=1, timed=1),
)


def network_of(sizes: Sizes, num_layers: int, device: str) -> nn.Module:
    """In bf16, drawn where it is: on the processor that would take minutes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **dict(vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_hidden_layers=num_layers),
        **dict(num_attention_heads=sizes.heads, intermediate_size=sizes.intermediate),
        tie_word_embeddings=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def settings_of(sizes: Sizes, method: str, samples: int) -> dict[str, Any]:
    common = {"precision": "bf16-true", "device": sizes.device, "batch_size": samples}
    if method == "full":
        return {**common, "activation_checkpointing": True}
    return {**common, "order": "backward", "residency": "host"}


def name_of(method: str, samples: int, length: int) -> str:
    return f"{method}, {samples} x {length} tokens"


def large(results: Any, dry_run: bool) -> None:
    """`full` first: its rounds take seconds, while `exact` begins with half a minute of pinning host memory."""
    sizes = DRY if dry_run else Sizes()
    command = [sys.executable, str(Path(__file__).resolve()), *(["--dry-run"] if dry_run else [])]
    planning = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for method in ("full", "exact"):
        names = {name_of(method, *shape): shape for shape in sizes.shapes}
        missing = {name: shape for name, shape in names.items() if not results.has(name)}
        if missing:
            measure(results, sizes, method, missing)
        tidy(sizes.device)
    out, error = planning.communicate()
    if planning.returncode:
        results.fail("plan", error)
        return
    planned = json.loads(out.splitlines()[-1])
    for row in results.rows:
        row["planned"] = planned[row["row"]]
        if row["peak_allocated"]:
            row["error"] = row["planned"] / row["peak_allocated"] - 1
    results.write()


def measure(results: Any, sizes: Sizes, method: str, shapes: dict[str, tuple[int, int]]) -> None:
    """All batches by one trainer, the smallest first, so that host memory is pinned once."""
    try:
        tidy(sizes.device)
        network = network_of(sizes, sizes.layers, sizes.device)
        parameters = sum(p.numel() for p in network.parameters())
        model = whole(network, "causal") if method == "full" else exact_model(network, sizes.blocks)
        del network  # a model is a copy
        tidy(sizes.device)
        largest = max(samples for samples, _ in sizes.shapes)
        settings = settings_of(sizes, method, largest)
        trained = trainer(model, dblocks.CausalLM(), largest, prefetch=True, **settings)
    except Exception:
        for name in shapes:
            results.fail(name, traceback.format_exc())
        return
    numbers = count()
    for turn, (name, (samples, length)) in enumerate(shapes.items()):
        try:
            batch = texts(sizes.device, sizes.vocabulary, samples, length)
            call = partial(one_round, trained, batch, numbers, sizes)
            for _ in range(0 if turn else sizes.warm):
                call()
            tidy(sizes.device)
            reset_peaks(sizes.device)
            seconds = alternating({name: call}, sizes.timed)[name]
        except torch.OutOfMemoryError:
            unknown = dict.fromkeys(("planned", *peaks(sizes.device)))  # of a step that was not made
            results.add({"row": name, "fits": False, "parameters": parameters, **unknown})
            continue
        except Exception:
            results.fail(name, traceback.format_exc())
            return
        each = statistics.median(seconds)
        row = {"row": name, "fits": True, "parameters": parameters, "seconds_per_round": each}
        row |= {"tokens_per_second": samples * length / each, "planned": None}
        results.add({**row, **peaks(sizes.device)})


def one_round(trained: dblocks.Trainer, batch: Batch, numbers: Any, sizes: Sizes) -> None:
    synchronized(partial(rounds, trained, [batch], next(numbers)), sizes.device)


def planned(sizes: Sizes) -> dict[str, int]:
    """Predicted peak of every row of `large`, by name."""
    found = {}
    for method in ("full", "exact"):
        for samples, length in sizes.shapes:
            settings = dblocks.TrainingConfig(**{"branch_at": 0.0, **settings_of(sizes, method, samples)})
            num_blocks = 1 if method == "full" else sizes.blocks
            recipe = Recipe(task=dblocks.CausalLM(), blocks=dblocks.BlocksConfig(num_blocks=num_blocks), train=settings)
            work = Workload(
                network=lambda layers: network_of(sizes, layers, "meta"),
                batch=lambda count, length=length: {"input_ids": torch.zeros(count, length, dtype=torch.long)},
                num_layers=sizes.layers,
                recipe=recipe,
                as_run=lambda _, recipe=recipe: recipe,
                command="",
            )
            choice = Choice(method=method, num_blocks=num_blocks, checkpointing=method == "full")
            found[name_of(method, samples, length)] = round(predictor(work, choice).at(samples).device.total)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # what is timed meanwhile needs the processor
    print(json.dumps(planned(DRY if "--dry-run" in sys.argv else Sizes())))
