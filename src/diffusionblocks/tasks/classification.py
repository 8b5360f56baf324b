"""Image classification: x = image, y = embedding of its label ([DB] section 5.1).

The end-to-end network trains with plain cross-entropy; a block trains as a denoiser of the label embedding.

Shapes: N batch, V classes, D width, S sampling steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusionblocks.blocks.handed import Handed, Passage, with_context
from diffusionblocks.blocks.labels import LabelBlocks
from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, generator, normal_like
from diffusionblocks.system.files import to_json
from diffusionblocks.theory import grids
from diffusionblocks.theory.categorical import ancestral
from diffusionblocks.theory.ode import euler
from diffusionblocks.theory.precondition import LOSS_WEIGHTS
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.figures import Figure, Pictures
from diffusionblocks.training.task import (
    Asked,
    Made,
    Metric,
    Sampling,
    StepOutput,
    Task,
    TrainedOnImages,
    all_beside,
    drawn_for,
    mean_with_error,
)

PREDICTED = 16  # test samples in the report


# What the paper describes and its released code does ([DB] sections 3 and 5.1, app. E).
PAPER: dict[str, Any] = {
    "blocks": {
        "context": "input",
        "target_entry": "replace",
        "readout": "linear",
        "target_table": "trained",
        "shared": "trained",
        "levels": "log-normal",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "overlap": 0.05,
        "head_layers": 0,
        "condition_width": 64,
    },
    "task": {"sampler": "euler", "decision": "final"},
    "train": {"order": "random", "branch_at": 0.0},
}


@dataclass(kw_only=True)
class Classification(Task):
    """Objective and inference of a classifier.

    Args:
        kind: What is learned.
        loss_weight: Weight of a sample in the loss, by its noise level. `none` is right for cross-entropy, `edm` is the
            printed formula, for comparison.
        label_smoothing: Label smoothing, for every method alike.
        sampler: How a sample goes down the noise levels. `euler` ([DB]) or `categorical` ancestral sampling.
        sampling_steps: Steps down the noise levels. S; 0 = one per block.
        decision: Which logits classify. `final`: those of the last step ([DB]). `blocks`: the mean over the steps of
            log p(v | x), which a Bayes readout separates from the evidence in z: every block votes with what it
            learned about x, none with what the chain told it.
    """

    target: ClassVar = "label"
    data: ClassVar = DataConfig
    presets: ClassVar = {"paper": PAPER}

    kind: str = option("classification", choices=("classification",))
    loss_weight: str = option("none", choices=tuple(LOSS_WEIGHTS), group="objective")
    label_smoothing: float = option(0.0, least=0, below=1, group="objective")
    sampler: str = option("categorical", choices=("euler", "categorical"), group="sampling")
    sampling_steps: int = option(0, least=0, group="sampling", key="steps")
    decision: str = option("blocks", choices=("final", "blocks"), group="sampling")

    def __post_init__(self) -> None:
        check_options("task", self)

    def step(
        self,
        model: BlockModel,
        block: int,
        batch: Batch,
        *,
        handed: Handed = None,
        ranges: range | None = None,
        draws: Draws | None = None,
        settling: bool = False,
    ) -> StepOutput:
        labels = batch["labels"]
        if isinstance(model, EndToEndModel):
            passage = handed if isinstance(handed, Passage) else None
            logits = model(batch, block, passage).float()
            return StepOutput(cross_entropy(logits, labels, label_smoothing=self.label_smoothing), passage)
        assert isinstance(model, LabelBlocks) and not isinstance(handed, Passage)
        partition, denoiser = model.partition, model.denoiser(block)
        source = drawn_for(batch, draws).generator
        sigma = partition.sample(block if ranges is None else ranges, len(labels), generator=source)
        noisy = add_noise(denoiser.target.clean(labels), sigma, generator=source)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = denoiser({**with_context(inputs, handed), "noisy_target": noisy}, sigma)
        losses = denoiser.target.losses(_logits(output), labels, self.label_smoothing)
        context = None if output.context is None else output.context.detach()
        return StepOutput(LOSS_WEIGHTS[self.loss_weight](losses, sigma), context)

    @torch.no_grad()
    def log_probabilities(self, model: BlockModel, batch: Batch, *, seed: int = 0) -> Tensor:
        """log p(v | x) [N, V] of a batch. The chain's noise depends on `seed` alone."""
        if isinstance(model, EndToEndModel):
            return model(batch).float().log_softmax(-1)
        assert isinstance(model, LabelBlocks)
        outputs = self.chain(model, batch, generator(seed, next(iter(batch.values())).device))
        if self.decision == "final" or model.config.readout == "linear":
            return _logits(outputs[-1]).log_softmax(-1)
        votes = [output.raw.float().log_softmax(-1) for output in outputs]
        return torch.stack(votes).mean(0).log_softmax(-1)

    def levels(self, model: LabelBlocks) -> list[float]:
        """Noise levels of the chain, highest first."""
        grid = grids.equal_mass if model.config.readout == "linear" else grids.equal_mass_tops
        return grid(model.partition.levels, self.sampling_steps or model.num_blocks)

    def chain(self, model: LabelBlocks, batch: Batch, generator: torch.Generator) -> list[DenoiserOutput]:
        """The whole denoising chain, one output per level; in features context the clean stream is computed once."""
        target = model.denoiser(0).target
        levels = self.levels(model)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        count, device = len(next(iter(inputs.values()))), target.rows.device
        entering: dict[int, Tensor] = {}  # features context: the clean stream that enters each block
        outputs: list[DenoiserOutput] = []

        def denoise(z: Tensor, level: float) -> DenoiserOutput:
            block = int(model.partition.block_of(torch.tensor(level)))
            sigma = torch.full((count,), level, device=device)
            if block not in entering and (context := model.context(inputs, block)) is not None:
                entering[block] = context
            extra = {"context": entering[block]} if block in entering else {}
            output = model.denoiser(block)({**inputs, **extra, "noisy_target": z}, sigma)
            if output.context is not None:
                entering[block + 1] = output.context
            outputs.append(output)
            return output

        z = normal_like(target.rows.new_empty(count, target.rows.shape[1]), generator) * levels[0]
        sampler = euler if self.sampler == "euler" else ancestral(target)
        sampler(denoise, z, [*levels, 0.0], generator=generator)
        return outputs

    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`accuracy` in percent and `validation_loss` in nats per sample, with standard errors over samples."""
        correct, losses = [], []
        for index, batch in enumerate(all_beside(model, batches)):
            log_p, labels = self.log_probabilities(model, batch, seed=index), batch["labels"]
            correct.append((log_p.argmax(-1) == labels).cpu())
            losses.append(cross_entropy(log_p, labels, reduction="none").cpu())
        return {
            "accuracy": mean_with_error(100.0 * torch.cat(correct)),
            "validation_loss": mean_with_error(torch.cat(losses)),
        }

    # ------------------------------------------------------------------ what a finished run is asked

    def sampling(self, model: BlockModel) -> Sampling:
        return Sampling("classes", needs_data=True)

    def make(self, trained: TrainedOnImages, asked: Asked) -> Made:
        """The first test samples with their label, the prediction, its probability, and every step of the denoising
        chain."""
        rows = self.predictions(trained, asked.num)
        found = {"predictions": rows}
        lines = [
            f"{row['index']:5d}  label {row['label']}  predicted {row['predicted']} ({row['probability']:.1%})"
            + ("" if row["predicted"] == row["label"] else "  wrong")
            for row in rows
        ]
        return Made(found, "\n".join(lines), to_json(found, indent=2) + "\n")

    @torch.no_grad()
    def predictions(self, trained: TrainedOnImages, num: int) -> list[dict[str, Any]]:
        """Of the first `num` test samples. A step of a chain holds the block that ran, its noise level, and what
        p(v | x, z) favoured there."""
        model, data = trained.model, trained.data
        if not 1 <= num <= len(data.test):
            raise UserError(f"--num must be 1 to {len(data.test)} (the test split), got {num}")
        batch = {name: tensor.to(trained.device) for name, tensor in data.test.__getitems__(list(range(num))).items()}
        best = self.log_probabilities(model, batch).exp().cpu().max(-1)
        rows: list[dict[str, Any]] = [
            {
                "index": index,
                "label": data.classes[int(batch["labels"][index])],
                "predicted": data.classes[int(best.indices[index])],
                "probability": best.values[index].item(),
            }
            for index in range(num)
        ]
        if not isinstance(model, LabelBlocks):
            return rows
        outputs = self.chain(model, batch, generator(0, trained.device))
        for row in rows:
            row["chain"] = []
        for level, output in zip(self.levels(model), outputs, strict=True):
            block = int(model.partition.block_of(torch.tensor(level)))
            favoured = _logits(output).softmax(-1).max(-1)
            for row, value, index in zip(rows, favoured.values.tolist(), favoured.indices.tolist(), strict=True):
                step = {"block": block, "sigma": level, "predicted": data.classes[index], "probability": value}
                row["chain"].append(step)
        return rows

    def figures(self, trained: TrainedOnImages) -> list[Figure]:
        test = trained.data.test
        rows = self.predictions(trained, min(PREDICTED, len(test)))
        images = test.images[: len(rows)]
        array = images[:, 0].numpy() if images.shape[1] == 1 else torch.movedim(images, 1, -1).numpy()
        right = [row["predicted"] == row["label"] for row in rows]
        captions = [
            row["predicted"] if good else f"{row['predicted']}, not {row['label']}"
            for row, good in zip(rows, right, strict=True)
        ]
        title = "Test samples with their predictions (in red: wrong ones, with the true label)"
        return [Figure(title, Pictures(array, captions, right))]


def _logits(output: DenoiserOutput) -> Tensor:
    assert output.logits is not None
    return output.logits.float()
