"""Predicted against measured peak training memory, method by method.

    python benchmarks/memory.py
    python benchmarks/memory.py card     predictions for a card, made here, against what one H100 measured
                                         (results/memory-h100.json)

Every row is measured in a process of its own by torch's profiler, which is not the predictor's instrument, on the CPU:
one step of every block after every block has stepped, residency disk. Writes benchmarks/results/memory.json and
docs/memory.png. Finished rows are kept: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import diffusionblocks as dblocks
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.methods import find_method
from diffusionblocks.planning.measure import measure_peak, profiled_peak
from diffusionblocks.planning.predict import Predictor
from diffusionblocks.planning.workload import Choice, Workload, predictor
from diffusionblocks.recipes import Recipe
from diffusionblocks.tasks import CausalLM, Classification, ImageGeneration, MaskedLM, RecurrentLM
from environment import describe

TARGET = Path(__file__).parent / "results" / "memory.json"
H100 = TARGET.with_name("memory-h100.json")
COUNTS = (1, 2, 3, 4, 6)
NEXT_TOKEN = {  # the presets of next-token blocks
    "features": {"context": "features", "shared": "trained"},
    "features with heads": {"context": "features", "head_layers": 1, "shared": "trained"},
    "information": {},
    "paper": {
        "target_entry": "replace",
        "readout": "linear",
        "target_table": "trained",
        "shared": "trained",
        "condition_width": 64,
    },
}


def vit(num_layers: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=256, num_attention_heads=8, intermediate_size=1024, image_size=32, patch_size=4)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=num_layers, num_labels=10, **sizes))


def dit(num_layers: int) -> Any:
    from diffusers import DiTTransformer2DModel

    sizes = dict(num_attention_heads=8, attention_head_dim=32, in_channels=3, sample_size=32, patch_size=4)
    return DiTTransformer2DModel(num_layers=num_layers, num_embeds_ada_norm=10, **sizes)


def llama(num_layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4, vocab_size=8192)
    config = LlamaConfig(num_hidden_layers=num_layers, tie_word_embeddings=False, mask_token_id=8191, **sizes)
    return LlamaForCausalLM(config)


def images(samples: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(samples, 3, 32, 32), "labels": torch.zeros(samples, dtype=torch.long)}


def tokens(samples: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(samples, 256, dtype=torch.long)}


FAMILIES = {
    "vit": (vit, images, Classification(), 16),
    "dit": (dit, images, ImageGeneration(), 16),
    "llama": (llama, tokens, CausalLM(), 4),
    "masked text": (llama, tokens, MaskedLM(), 4),
    "looped": (llama, tokens, RecurrentLM(), 4),
}
PREFETCH = "prefetch"  # in the rows of a card: false where nothing came while another block computed
ITERATIONS = 16  # of looped networks in training


def rows() -> Iterator[dict[str, Any]]:
    """What is measured: family, method, blocks, and the settings that differ from the defaults."""
    yield from of_loops()
    for family in FAMILIES:
        if family == "looped":
            continue
        whole = {"family": family, "num_blocks": 1, "train": {}, "blocks": {}}
        for method in ("end-to-end", "checkpointing", *(["lora"] if family != "masked text" else [])):
            yield {**whole, "method": method}
        for method in ("shallow", *(["last-block"] if family != "masked text" else [])):
            yield {**whole, "method": method, "num_blocks": 3}
        for count in COUNTS:
            if family in ("vit", "llama"):
                yield {**whole, "method": "exact", "num_blocks": count}
            if family == "vit":
                yield {**whole, "method": "diffusionblocks", "num_blocks": count, "blocks": {"context": "features"}}
            if family != "llama":
                yield {**whole, "method": "diffusionblocks", "num_blocks": count}
                recomputed = {"activation_checkpointing": True}
                yield {**whole, "method": "diffusionblocks", "num_blocks": count, "train": recomputed}
    for blocks in NEXT_TOKEN.values():
        for count in (3, 4):
            whole = {"family": "llama", "method": "diffusionblocks", "num_blocks": count, "train": {}}
            yield {**whole, "blocks": blocks}
    for train in ({"precision": "bf16"}, {"precision": "bf16-true"}, {"optimizer": "sgd"}, {"accumulation": 2}):
        yield {"family": "vit", "method": "end-to-end", "num_blocks": 1, "train": train, "blocks": {}}
    settings = ({"residency": "device"}, {"optimizer": "adafactor"}, {"optimizer": "adamw-8bit"}, {"ema_decay": 0.99})
    for train in (*settings, {"precision": "bf16"}, {"precision": "bf16-true"}, {"accumulation": 4}):
        yield {"family": "vit", "method": "diffusionblocks", "num_blocks": 3, "train": train, "blocks": {}}


def of_loops() -> Iterator[dict[str, Any]]:
    """Looped networks of 1 + 2 + 1 layers. truncation: of backpropagation through the iterations."""
    blocks = {"prelude": 1, "coda": 1}
    whole = {"family": "looped", "num_blocks": 1, "train": {}, "blocks": blocks}
    for truncation in (1, 2, 4, 8, 16):
        yield {**whole, "method": "end-to-end", "truncation": truncation}
        yield {
            **whole,
            "method": "diffusionblocks",
            "truncation": truncation,
            "blocks": {**blocks, "condition_width": 64},
        }
    for truncation in (8, 16):
        yield {**whole, "method": "checkpointing", "truncation": truncation}
    yield {**whole, "method": "shallow"}
    yield {**whole, "method": "diffusionblocks", "train": {"activation_checkpointing": True}}


def planned(row: dict[str, Any], device: str = "cpu") -> Predictor:
    """What predicts one row. device cuda: residency host, and room for the next block whatever else is on the card: by
    default a run does without it where less than a tenth of the card is free, which other processes may bring about."""
    network, batch, task, samples = FAMILIES[row["family"]]
    if "truncation" in row:
        task = RecurrentLM(truncation=row["truncation"], mean_iterations=ITERATIONS, draw="constant")
    away = "disk" if device == "cpu" else "host"
    own = {key: value for key, value in row["train"].items() if key != PREFETCH}
    train = {"batch_size": samples, "residency": away, "device": device, "branch_at": 0.0, **own}
    settings = dblocks.TrainingConfig(**train)
    blocks = BlocksConfig(num_blocks=row["num_blocks"], **row["blocks"])
    data = dblocks.DataConfig() if row["family"] == "vit" else dblocks.TextConfig()
    recipe = Recipe(task=task, blocks=blocks, train=settings, data=data)
    work = Workload(
        network=network,
        batch=batch,
        num_layers=4 if row["family"] == "looped" else 12,
        recipe=recipe,
        as_run=lambda method: dataclasses.replace(recipe, task=find_method(method).task(task)),
        command="",
    )
    recomputed = row["method"] == "checkpointing" or settings.activation_checkpointing
    return predictor(work, Choice(method=row["method"], num_blocks=row["num_blocks"], checkpointing=recomputed))


def total(row: dict[str, Any], made: Predictor) -> int:
    """Predicted bytes of a row's peak, without the room for a second block where it was measured so."""
    found = made.at(made.config.batch_size, made.config.accumulation)
    return found.least if row["train"].get(PREFETCH) is False else round(found.device.total)


def run(row: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Predicts and measures one row. device cuda: measured by the caching allocator's statistics."""
    _, batch, _, samples = FAMILIES[row["family"]]
    made = planned(row, device)
    predicted = made.at(samples, made.config.accumulation)
    size = 12 // row["num_blocks"]
    whole = {
        "end-to-end": [12],
        "checkpointing": [12],
        "lora": [12],
        "shallow": [size],
        "last-block": [12 - size, size],
    }
    sizes = whole.get(row["method"], [size] * row["num_blocks"])
    data = [{name: tensor[0] for name, tensor in batch(1).items()}] * samples

    def trainer() -> dblocks.Trainer:
        trained = dblocks.Trainer(made.network.build(sizes), made.task, data, None, made.config)  # type: ignore[arg-type]
        if device != "cpu":
            trained.place.prefetch = True  # also where other processes leave little of the card
        return trained

    found: dict[str, Any]
    if device == "cpu":
        found = {"measured": profiled_peak(trainer, batch(samples))}
    else:
        peak = measure_peak(trainer())
        found = {"measured": peak.total, "reserved": peak.reserved}
    error = predicted.device.total / found["measured"] - 1
    return {**row, "predicted": predicted.device.as_dict(), **found, "error": error}


def measured_rows(target: Path, wanted: Iterable[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """All rows, each in a process of its own. Those that the file holds already are kept."""
    results = json.loads(target.read_text())["rows"] if target.is_file() else []
    for row in wanted:
        if any(all(done[key] == value for key, value in row.items()) for done in results):
            continue
        words = [sys.executable, str(Path(__file__).resolve()), json.dumps(row), device]
        out = subprocess.run(words, capture_output=True, text=True)
        if out.returncode:
            raise SystemExit(out.stderr)
        results.append(json.loads(out.stdout.splitlines()[-1]))
        target.write_text(json.dumps({"environment": describe(), "rows": results}, indent=1) + "\n")
        print(f"{row} {results[-1]['measured'] / 2**20:.1f} MiB, error {results[-1]['error']:+.2%}", flush=True)
    return results


def against_a_card() -> None:
    """Prints what is predicted here for a Hopper card beside what one measured."""
    found = json.loads(H100.read_text())
    print(f"{found['environment']}; bytes, all predicted on this machine")
    for row in found["rows"]:
        made = planned(row, "cuda")
        predicted = total(row, made)
        settings = {key: value for key, value in row.items() if key not in ("measured", "reserved") and value != {}}
        error = predicted / row["measured"] - 1
        print(f"{error:+6.1%} {predicted:12} {row['measured']:12} {row['reserved']:12}  {settings}")


def plot(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    for family, marker in (("vit", "o"), ("dit", "^"), ("llama", "s"), ("masked text", "D"), ("looped", "v")):
        for method in dict.fromkeys(row["method"] for row in results):
            own = [row for row in results if row["family"] == family and row["method"] == method]
            color = f"C{list(dict.fromkeys(row['method'] for row in results)).index(method)}"
            label = method if family == "vit" else None
            points = [[row["measured"] / 2**20 for row in own], [row["predicted"]["total"] / 2**20 for row in own]]
            axes.scatter(*points, marker=marker, s=22, color=color, label=label, alpha=0.8)
    ends = [min(row["measured"] for row in results) / 2**20, max(row["measured"] for row in results) / 2**20]
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="measured by the profiler (MiB)", ylabel="predicted (MiB)")
    worst = max(abs(row["error"]) for row in results)
    shapes = "circles ViT, triangles DiT, squares Llama, diamonds masked text, v looped"
    axes.set_title(f"peak training memory: {len(results)} runs, largest error {worst:.1%}\n{shapes}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "memory.png", dpi=130)


def main() -> None:
    if sys.argv[1:] == ["card"]:
        against_a_card()
        return
    if len(sys.argv) > 1:
        print(json.dumps(run(json.loads(sys.argv[1]), *sys.argv[2:])))
        return
    plot(measured_rows(TARGET, rows(), "cpu"))
    print(TARGET)


if __name__ == "__main__":
    main()
