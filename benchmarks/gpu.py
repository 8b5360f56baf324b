"""What only a CUDA card can show, for the day one is at hand. Not run yet: no card was.

    python benchmarks/gpu.py memory       predicted against torch.cuda.max_memory_allocated: the rows of benchmarks/memory.py, and reserved memory
    python benchmarks/gpu.py residency    wall time of residency host over residency device, order sweep, visits of 1, 4 and 8 steps
    python benchmarks/gpu.py card         a smaller card (the allocator's fraction): end-to-end runs out of memory with exit 1, and its
                                           checkpoint still loads; blocks train there

Each part writes benchmarks/results/gpu-PART.json. Finished rows of `memory` are kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import diffusionblocks as dblocks
from diffusionblocks.memory.card import RESERVED
from environment import describe
from memory import measured_rows, rows

RESULTS = Path(__file__).parent / "results"
PAIRS = 6  # of timed runs; the first warms up
NETWORK = ["--model.hidden-size", "1024", "--model.num-attention-heads", "16", "--model.intermediate-size", "4096"]
TRAIN = [
    "digits",
    *NETWORK,
    "--batch-size",
    "256",
    "--steps",
    "400",
    "--device",
    "cuda",
    "--train.checkpoint-every",
    "20",
]
SMALLER = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from diffusionblocks.cli import main
sys.exit(main(sys.argv[2:]))
"""


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows but those whose optimizer needs a package of its own."""
    wanted = [row for row in rows() if row["train"].get("optimizer") != "adamw-8bit"]  # needs bitsandbytes
    found = measured_rows(RESULTS / "gpu-memory.json", wanted, "cuda")
    return {"largest_error": max(abs(row["error"]) for row in found), "rows": found}


def fitted(residency: str, visit_steps: int, steps: int) -> float:
    """Seconds of a run over 4 blocks of a 24-layer Llama of width 1024, with its features handed on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=32000)
    network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, tie_word_embeddings=False, **sizes))
    blocks = dblocks.convert(network, num_blocks=4, context="features", shared="trained", least_hidden=0.97)
    settings = dblocks.TrainingConfig(
        **dict(steps=steps, batch_size=8, precision="bf16", device="cuda", order="sweep"),
        **dict(residency=residency, visit_steps=visit_steps, prefetch=residency == "host"),
    )
    tokens = torch.randint(0, 32000, (64, 512), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": text} for text in tokens]
    trainer = dblocks.Trainer(blocks, dblocks.CausalLM(), data, None, settings)  # type: ignore[arg-type]
    trainer.fit()
    torch.cuda.synchronize()
    return trainer.progress.wall_seconds


def residency(arguments: argparse.Namespace) -> dict[str, Any]:
    found = []
    for visit_steps in (1, 4, 8):
        ratios = []
        for pair in range(PAIRS):
            device, host = (fitted(where, visit_steps, 8 * visit_steps) for where in ("device", "host"))
            torch.cuda.empty_cache()
            if pair:
                ratios.append(host / device)
        stderr = statistics.stdev(ratios) / len(ratios) ** 0.5
        found.append({"visit_steps": visit_steps, "host_over_device": statistics.fmean(ratios), "stderr": stderr})
        print(found[-1], flush=True)
    return {"rows": found}


def dblocks_run(fraction: float, words: list[str], stop_after: Path | None = None) -> tuple[int, str]:
    """Exit code and last lines of a command on a card of that share. stop_after: Ctrl-C as soon as this folder has something."""
    command = [sys.executable, "-c", SMALLER, str(fraction), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while stop_after is not None and process.poll() is None:
        if stop_after.is_dir() and os.listdir(stop_after):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    out, _ = process.communicate()
    return process.returncode, "\n".join(out.strip().splitlines()[-6:])


def card(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fraction lies half way between what the two methods need by plan."""
    asked = [sys.executable, "-m", "diffusionblocks.cli", "plan", *TRAIN, "--num-blocks", "4", "--json"]
    planned = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)["rows"]
    peaks = {row["method"]: row["predicted"]["total"] for row in planned}
    limit = (peaks["end-to-end"] + peaks["diffusionblocks"]) / 2 * RESERVED
    fraction = limit / torch.cuda.get_device_properties(0).total_memory
    folder = Path(arguments.output_dir)
    whole = ["train", *TRAIN, "--method", "end-to-end", "--output-dir", str(folder / "end-to-end")]
    blocks = ["train", *TRAIN, "--num-blocks", "4", "--output-dir", str(folder / "blocks")]
    found = {
        "end-to-end, whole card, stopped by Ctrl-C": dblocks_run(1.0, whole, folder / "end-to-end" / "checkpoints"),
        "end-to-end, small card": dblocks_run(fraction, whole),
        "end-to-end, whole card again": dblocks_run(1.0, whole),
        "diffusionblocks, small card": dblocks_run(fraction, blocks),
    }
    for name, (code, text) in found.items():
        print(f"{name}: exit {code}\n{text}\n", flush=True)
    wanted = [130, 1, 0, 0]
    if [code for code, _ in found.values()] != wanted:
        raise SystemExit(f"wanted the exit codes {wanted}")
    return {
        "limit_bytes": limit,
        "predicted": peaks,
        "runs": {name: dict(zip(("exit", "text"), run, strict=True)) for name, run in found.items()},
    }


PARTS = {"memory": memory, "residency": residency, "card": card}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output-dir", default="runs/gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available here")
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"gpu-{arguments.part}.json"
    target.write_text(
        json.dumps({"environment": {**describe(), "device": torch.cuda.get_device_name()}, **found}, indent=1) + "\n"
    )
    print(target)


if __name__ == "__main__":
    main()
