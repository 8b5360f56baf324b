"""A task of another package, in one file: how large is the number on the picture?

Numbers that are close to the right one are half right: labels are soft (Diaz and Marathe, 2019, "Soft Labels for
Ordinal Regression"), and the answer is the mean of p(v | x).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffusionblocks as dblocks
from diffusionblocks.blocks.handed import Passage, with_context
from diffusionblocks.options import check_options, option
from diffusionblocks.tasks import Asked, Figure, Made, Metric, Sampling, StepOutput, Task, Trained
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.figures import Pictures
from diffusionblocks.training.task import all_beside, drawn_for, mean_with_error


@dataclass(kw_only=True)
class Magnitude(Task):
    """width: of the soft labels, in classes. decimals: of an answer that is shown."""

    target: ClassVar = "label"
    data: ClassVar = dblocks.DataConfig
    presets: ClassVar = {"sharp": {"task": {"width": 0.1}}}

    kind: str = option("magnitude", choices=("magnitude",))
    width: float = option(1.0, above=0)
    decimals: int = option(2, least=0)

    def __post_init__(self) -> None:
        check_options("task", self)

    def step(
        self, model: Any, block: int, batch: Any, *, handed: Any = None, ranges: Any = None, draws: Any = None, **_: Any
    ) -> StepOutput:
        labels = batch["labels"]
        if isinstance(model, dblocks.EndToEndModel):
            passage = handed if isinstance(handed, Passage) else None
            logits = model(batch, block, passage).float()
            return StepOutput(cross_entropy(logits, self._soft(labels, logits.shape[1])), passage)
        source, denoiser = drawn_for(batch, draws).generator, model.denoiser(block)
        sigma = model.partition.sample(block if ranges is None else ranges, len(labels), generator=source)
        noisy = add_noise(denoiser.target.clean(labels), sigma, generator=source)
        inputs = {"pixel_values": batch["pixel_values"], "noisy_target": noisy}
        output = denoiser(with_context(inputs, handed), sigma)
        context = None if output.context is None else output.context.detach()
        return StepOutput(cross_entropy(output.logits.float(), self._soft(labels, output.logits.shape[1])), context)

    def _soft(self, labels: Tensor, classes: int) -> Tensor:
        distance = (torch.arange(classes, device=labels.device) - labels[:, None]).abs()
        return (-distance / self.width).softmax(-1)

    @torch.no_grad()
    def answers(self, model: Any, batch: Any, seed: int = 0) -> Tensor:
        """Mean of p(v | x) [N]."""
        p = dblocks.Classification().log_probabilities(model, batch, seed=seed).exp()
        return p @ torch.arange(p.shape[1], dtype=p.dtype, device=p.device)

    def evaluate(self, model: Any, batches: Iterable[Any]) -> dict[str, Metric]:
        """`absolute_error`, in classes."""
        found = [
            (self.answers(model, batch, seed) - batch["labels"]).abs().cpu()
            for seed, batch in enumerate(all_beside(model, batches))
        ]
        return {"absolute_error": mean_with_error(torch.cat(found))}

    def measure(self, trained: Trained, split: Any, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Beside it the error of always answering the mean label."""
        labels = split.labels.float()
        return {**metrics, "error_of_the_mean": mean_with_error((labels - labels.mean()).abs())}

    def sampling(self, model: Any) -> Sampling:
        return Sampling("numbers", settings={"steps": "decimals"}, needs_data=True)

    def make(self, trained: Trained, asked: Asked) -> Made:
        answers = [round(value, self.decimals) for value in self._first(trained, asked.num).tolist()]
        lines = "\n".join(map(str, answers))
        return Made({"numbers": answers}, lines, lines + "\n")

    def _first(self, trained: Trained, num: int) -> Tensor:
        batch = trained.data.test.__getitems__(list(range(num)))
        return self.answers(trained.model, {name: tensor.to(trained.device) for name, tensor in batch.items()}).cpu()

    def figures(self, trained: Trained) -> list[Figure]:
        answers, test = self._first(trained, 8), trained.data.test
        right = ((answers - test.labels[:8]).abs() < 0.5).tolist()
        images = test.images[:8, 0].numpy()
        return [Figure("How large they look", Pictures(images, [f"{answer:.1f}" for answer in answers], right))]
