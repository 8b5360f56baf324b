"""Image classification: x = image, y = embedding of its label ([DB] section 5.1).

The end-to-end network trains with plain cross-entropy; a block trains as a denoiser of the label embedding.

Shapes: N batch, V classes, D width, S sampling steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusionblocks.blocks.labels import LabelBlocks
from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.networks.parts import Batch
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, generator, normal_like
from diffusionblocks.theory import grids
from diffusionblocks.theory.categorical import ancestral
from diffusionblocks.theory.ode import euler
from diffusionblocks.theory.precondition import LOSS_WEIGHTS
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.task import Metric, StepOutput, Task, all_beside, drawn_for, mean_with_error


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

    kind: str = option("classification", choices=("classification",))
    loss_weight: str = option("none", choices=tuple(LOSS_WEIGHTS), group="objective")
    label_smoothing: float = option(0.0, least=0, below=1, group="objective")
    sampler: str = option("categorical", choices=("euler", "categorical"), group="sampling")
    sampling_steps: int = option(0, least=0, group="sampling", key="steps")
    decision: str = option("blocks", choices=("final", "blocks"), group="sampling")

    def __post_init__(self) -> None:
        check_options("task", self)

    def step(
        self, model: BlockModel, block: int, batch: Batch, *, ranges: range | None = None, draws: Draws | None = None
    ) -> StepOutput:
        labels = batch["labels"]
        if isinstance(model, EndToEndModel):
            return StepOutput(
                cross_entropy(model(batch, block).float(), labels, label_smoothing=self.label_smoothing), None
            )
        assert isinstance(model, LabelBlocks)
        partition, denoiser = model.partition, model.denoiser(block)
        source = drawn_for(batch, draws).generator
        sigma = partition.sample(block if ranges is None else ranges, len(labels), generator=source)
        noisy = add_noise(denoiser.target.clean(labels), sigma, generator=source)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = denoiser({**inputs, "noisy_target": noisy}, sigma)
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


def _logits(output: DenoiserOutput) -> Tensor:
    assert output.logits is not None
    return output.logits.float()
