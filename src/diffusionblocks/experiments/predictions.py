"""Predictions of a trained classifier, step by step."""

from __future__ import annotations

from typing import Any

import torch

from diffusionblocks.blocks.labels import LabelBlocks
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.run import Run
from diffusionblocks.seeds import generator
from diffusionblocks.tasks import Classification


def predictions(run: Run, num: int) -> list[dict[str, Any]]:
    """The first `num` test samples: label, prediction, its probability, and every step of the denoising chain.

    A chain step holds the block that ran, its noise level, and what p(v | x, z) favoured there.
    """
    task = _task(run)
    if not 1 <= num <= len(run.data.test):
        raise UserError(f"--num must be 1 to {len(run.data.test)} (the test split), got {num}")
    batch = run.data.test.__getitems__(list(range(num)))
    batch = {name: tensor.to(run.trainer.device) for name, tensor in batch.items()}
    run.model.eval()
    probabilities = task.log_probabilities(run.model, batch).exp().cpu()
    best = probabilities.max(-1)
    rows = [
        {
            "index": index,
            "label": run.data.classes[int(batch["labels"][index])],
            "predicted": run.data.classes[int(best.indices[index])],
            "probability": best.values[index].item(),
        }
        for index in range(num)
    ]
    if isinstance(run.model, LabelBlocks):
        _add_chains(run, run.model, batch, rows)
    return rows


@torch.no_grad()
def _add_chains(run: Run, model: LabelBlocks, batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
    task = _task(run)
    outputs = task.chain(model, batch, generator(0, run.trainer.device))
    for row in rows:
        row["chain"] = []
    for level, output in zip(task.levels(model), outputs, strict=True):
        block = int(model.partition.block_of(torch.tensor(level)))
        assert output.logits is not None
        favoured = output.logits.float().softmax(-1).max(-1)
        for row, value, index in zip(rows, favoured.values.tolist(), favoured.indices.tolist(), strict=True):
            step = {"block": block, "sigma": level, "predicted": run.data.classes[index], "probability": value}
            row["chain"].append(step)


def _task(run: Run) -> Classification:
    assert isinstance(run.recipe.task, Classification)
    return run.recipe.task
