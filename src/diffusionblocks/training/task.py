"""What a task gives the trainer and the evaluator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.errors import Failed, UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.seeds import Draws


class StepOutput(NamedTuple):
    """loss: scalar to differentiate. context: detached features for the next block, or None. layers: layers that a
    sample passed, forward and backward (forward alone counts a third), where that is not the same in every step."""

    loss: Tensor
    context: Tensor | None
    layers: float | None = None


class Metric(NamedTuple):
    """A measured value and its standard error (None where it is exact)."""

    value: float
    stderr: float | None


def check_finite(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics. Raises Failed at the first that is not a finite number: nobody should read on from there."""
    for name, metric in metrics.items():
        if not math.isfinite(metric.value) or not math.isfinite(metric.stderr or 0.0):
            raise Failed(
                f"the evaluation's {name} is {metric.value} (standard error {metric.stderr}), no finite number: the "
                "weights, or a sample of the evaluated split, hold values that are not finite or far too large"
            )
    return metrics


class Task:
    """One objective with its evaluation, and what the rest of the package asks of it. Stateless: all state lives in the
    model and the trainer.

    kind: its name in a recipe. target: what networks estimate for it (see `networks.parts.Parts`). data: class of the
    data configuration that it takes. presets: named changes that every recipe of it has; `paper` is what the paper
    describes and its released code does. splits: a network is cut into blocks of layers (a looped one is not: the same
    layers serve all iterations). writes: it trains ordinary language models, which can be used as they are. by_block:
    what it makes is made by one block at a time. compared_alike: options that all methods of a comparison share,
    whatever a preset says: how samples are drawn.
    """

    kind: str
    target: ClassVar[str]
    data: ClassVar[type]
    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}
    splits: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    by_block: ClassVar[bool] = False
    compared_alike: ClassVar[tuple[str, ...]] = ()

    def step(
        self, model: BlockModel, block: int, batch: Batch, *, ranges: range | None = None, draws: Draws | None = None
    ) -> StepOutput:
        """Loss of block `block` on a batch.

        ranges: the blocks whose noise ranges the levels are drawn from (before branching); None = its own. draws: the
        randomness of the step, on the batch's device; None = new ones (`drawn_for`).
        """
        raise NotImplementedError

    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        raise NotImplementedError

    def once(self) -> Self:
        """The task of the shallow network: of a looped one, the same with its core applied a single time."""
        return self

    def longest(self) -> Self:
        """The same task with steps that all need the most memory."""
        return self

    def lighter(self) -> dict[str, int]:
        """The option, with half its value, that makes steps need less memory and compute less; {} = there is none."""
        return {}

    def expected(self) -> tuple[float, float]:
        """How often a training step applies a looped network's core, on average, and how often with gradients."""
        return 1, 1

    def applied(self) -> int:
        """How often inference applies it."""
        return 1


def mean_with_error(values: Tensor) -> Metric:
    """Mean of independent per-sample values [N] and its standard error."""
    values = values.double()
    stderr = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Metric(values.mean().item(), stderr)


def per_token(nats: Tensor, lengths: Tensor) -> Metric:
    """Sum of nats over sum of tokens, both per text [N], with the standard error over texts (of the ratio)."""
    mean = (nats.sum() / lengths.sum()).item()
    if len(nats) < 2:
        return Metric(mean, None)
    spread = (nats - mean * lengths).std() / lengths.mean() / len(nats) ** 0.5
    return Metric(mean, spread.item())


def drawn_for(batch: Batch, draws: Draws | None) -> Draws:
    """The draws of a step: those that were handed in, else new ones on the batch's device."""
    return draws or Draws.new(next(iter(batch.values())).device)


def beside(model: BlockModel, tensor: Tensor) -> Tensor:
    """A tensor on the host goes to where the model is; one that is on a device stays (weights of idle blocks visit it
    there)."""
    return tensor if tensor.device.type != "cpu" else tensor.to(next(iter(model.parameters())).device)


def all_beside(model: BlockModel, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Batches where the model is, see `beside`. Raises UserError where there is none."""
    empty = True
    for batch in batches:
        empty = False
        yield {name: beside(model, tensor) for name, tensor in batch.items()}
    if empty:
        raise UserError("there is nothing to evaluate: the evaluation data are empty")


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
