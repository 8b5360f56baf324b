"""Peak training memory and wall time of block steps against end-to-end steps of the same network.

    python benchmarks/memory_and_time.py

Two regimes: activations dominate (width 256, 64 patches, batch 64) and parameters dominate (width 1024, batch 1).
Memory: residency disk, after every block has stepped. Time: residency device, one end-to-end step and one step of each
block in turn, over and over; the ratio is taken pair by pair and its median is reported. Writes
benchmarks/results/memory-and-time.json.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import diffusionblocks as dblocks
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.planning.measure import measure_peak
from environment import describe

REGIMES = {
    "activations dominate": {"hidden_size": 256, "num_attention_heads": 8, "batch_size": 64},
    "parameters dominate": {"hidden_size": 1024, "num_attention_heads": 16, "batch_size": 1},
}
PAPER = dict(dblocks.Classification.presets["paper"]["blocks"])
ROUNDS = 7


def network(hidden_size: int, num_attention_heads: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=12,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * hidden_size,
            image_size=32,
            patch_size=4,
            num_labels=10,
        )
    )


def methods(vit: ViTForImageClassification) -> dict[str, tuple[Callable[[], BlockModel], dict[str, Any]]]:
    found: dict[str, tuple[Callable[[], BlockModel], dict[str, Any]]] = {
        "end-to-end": (lambda: dblocks.EndToEndModel(take_apart(vit)), {}),
        "checkpointing": (lambda: dblocks.EndToEndModel(take_apart(vit)), {"activation_checkpointing": True}),
    }
    found["shallow L/3"] = (lambda: dblocks.EndToEndModel(take_apart(vit), 4), {})
    for count in (2, 3, 4, 6):
        found[f"diffusionblocks B={count}"] = (lambda n=count: dblocks.convert(vit, n), {"residency": "disk"})
    own = {"residency": "disk"}
    for count in (3, 4):
        found[f"diffusionblocks features B={count}"] = (
            lambda n=count: dblocks.convert(vit, n, context="features"),
            own,
        )
        found[f"diffusionblocks-paper B={count}"] = (lambda n=count: dblocks.convert(vit, n, **PAPER), own)
    found["diffusionblocks B=3 + checkpointing"] = (
        lambda: dblocks.convert(vit, 3),
        {"residency": "disk", "activation_checkpointing": True},
    )
    found["diffusionblocks B=3, all resident"] = (lambda: dblocks.convert(vit, 3), {})
    return found


def trainer(model: BlockModel, data: ImageData, batch_size: int, **options: Any) -> dblocks.Trainer:
    settings = dblocks.TrainingConfig(batch_size=batch_size, device="cpu", **options)
    return dblocks.Trainer(model, dblocks.Classification(), data, None, settings)


def block_step_ratio(
    vit: ViTForImageClassification, data: ImageData, batch_size: int, options: dict[str, Any]
) -> list[float]:
    """B block steps over one end-to-end step, alternating, per round."""
    whole = trainer(dblocks.EndToEndModel(take_apart(vit)), data, batch_size)
    blocks = trainer(dblocks.convert(vit, 3, **options), data, batch_size)
    batch = data.__getitems__(list(range(batch_size)))
    ratios = []
    for round_ in range(ROUNDS + 2):  # two rounds to warm up
        end_to_end = seconds(whole, batch)
        ours = seconds(blocks, batch)
        if round_ >= 2:
            ratios.append(ours / end_to_end)
    return ratios


def seconds(trained: dblocks.Trainer, batch: dict[str, torch.Tensor]) -> float:
    _ = trained.residency
    started, handed = time.perf_counter(), ()
    for block in range(trained.model.num_blocks):
        handed = trained.block_step(block, batch, handed).handed
    return time.perf_counter() - started


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (192, 3, 32, 32), generator=generator).to(torch.uint8)
    data = ImageData(images, torch.arange(192) % 10)
    memory, wall = [], []
    for regime, sizes in REGIMES.items():
        vit = network(sizes["hidden_size"], sizes["num_attention_heads"])
        reference = None
        for name, (build, options) in methods(vit).items():
            peak = measure_peak(trainer(build(), data, sizes["batch_size"], **options))
            reference = reference or peak.total
            row = {"regime": regime, "method": name, "ratio": peak.total / reference, **dataclasses.asdict(peak)}
            memory.append(row)
            print(f"{regime}  {name:36s} {peak.total / 2**20:8.1f} MiB  {row['ratio']:.3f}x", flush=True)
        for name, options in (("default", {}), ("features", {"context": "features"}), ("paper", PAPER)):
            ratios = block_step_ratio(vit, data, sizes["batch_size"], options)
            row = {
                "regime": regime,
                "method": name,
                "num_blocks": 3,
                "ratios": ratios,
                "median": statistics.median(ratios),
            }
            wall.append(row)
            print(f"{regime}  3 block steps / 1 end-to-end step, {name}: {row['median']:.3f}x", flush=True)
    target = Path(__file__).parent / "results" / "memory-and-time.json"
    result = {"environment": describe(), "threads": torch.get_num_threads(), "memory": memory, "wall_time": wall}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
