"""Language modelling with looped networks ([Huginn], arXiv 2502.05171; [DB] section 5.5). See next_token.py,
blocks/looped.py.

The ordinary training unrolls the core: iterations are drawn at random, and gradients flow through the last of them.
Blocks train with one pass per step. Both run K iterations at inference, and K is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusionblocks.blocks.causal import following
from diffusionblocks.blocks.handed import Passage
from diffusionblocks.blocks.looped import LoopedBlocks, LoopedNetwork
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.options import option
from diffusionblocks.seeds import Draws
from diffusionblocks.tasks.looped_readers import LevelsReader, UnrolledReader, grid
from diffusionblocks.tasks.next_token import Measure, NextToken, mean_weights, summed
from diffusionblocks.tasks.readers import Reader
from diffusionblocks.tasks.writing import AT_ONCE
from diffusionblocks.theory.likelihood import walk_bound
from diffusionblocks.training.task import Metric, Sampling, StepOutput, all_beside

KEPT = 1 << 28  # texts are written together as long as keys and values stay below this number
SPREAD = 0.5  # standard deviation of the log of the mean of iterations ([Huginn] section 3.3)


# What the paper describes and its released code does ([DB] sections 3 and 5.5, app. E).
PAPER: dict[str, Any] = {
    "blocks": {
        "readout": "linear",
        "target_table": "trained",
        "shared": "trained",
        "levels": "log-normal",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "condition_width": 64,
    },
    "task": {"sampler": "euler"},
}


@dataclass(kw_only=True)
class RecurrentLM(NextToken):
    """Looped language models. See `NextToken`.

    Args:
        iterations: Iterations of the core at inference, K. In evaluation and for every token that is written.
        mean_iterations: Iterations of the core in training by unrolling, on average.
        draw: How these are drawn. `log-normal-poisson` ([Huginn]: Poisson numbers whose mean is log-normal, and one)
            or `constant`.
        truncation: Last iterations that gradients flow through.
        early_exit: Divergence of two successive predictions at which a token's iterations end; 0 = never. KL, in nats.
        curve: Iterations at which the finished run is measured besides. `nats_at_<K>`, on a part of the split.
    """

    target: ClassVar = "recurrent"
    presets: ClassVar = {"paper": PAPER}
    splits: ClassVar = False
    repeats: ClassVar = ("iterations", "early_exit", "curve")

    kind: str = option("recurrent-lm", choices=("recurrent-lm",))
    iterations: int = option(16, least=1, group="sampling")
    mean_iterations: int = option(16, least=1, group="objective")
    draw: str = option("log-normal-poisson", choices=("log-normal-poisson", "constant"), group="objective")
    truncation: int = option(8, least=1, group="objective")
    early_exit: float = option(0.0, least=0, group="sampling")
    curve: list[int] = option([], least=1, group="evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation > self.mean_iterations:
            raise UserError(
                f"objective.truncation {self.truncation} is longer than objective.mean_iterations "
                f"{self.mean_iterations}: gradients cannot flow through iterations that are not made"
            )

    def once(self) -> RecurrentLM:
        """The same task for a network whose core is applied a single time."""
        return replace(self, iterations=1, mean_iterations=1, truncation=1, curve=[1] if self.curve else [])

    def longest(self) -> RecurrentLM:
        """The same task with steps that all need the most memory: as many iterations as gradients flow through."""
        return replace(self, draw="constant", mean_iterations=self.truncation)

    def lighter(self) -> dict[str, int]:
        """Gradients through half as many iterations."""
        return {"truncation": self.truncation // 2} if self.truncation > 1 else {}

    def applied(self) -> int:
        return self.iterations

    def drawn(self, seed: int) -> int:
        """Iterations of one training step, drawn on the host: r = 1 + Poisson(e^t) with t normal, so that the mean is
        `mean_iterations` ([Huginn] section 3.3)."""
        if self.draw == "constant" or self.mean_iterations == 1:
            return self.mean_iterations
        generator = np.random.default_rng(seed)
        return int(1 + generator.poisson(self._rates(generator.standard_normal())))

    def _rates(self, normal: float | np.ndarray) -> float | np.ndarray:
        return np.exp(math.log(self.mean_iterations - 1) - SPREAD**2 / 2 + SPREAD * normal)

    def expected(self) -> tuple[float, float]:
        """Iterations of a training step, and those that gradients flow through, on average."""
        if self.draw == "constant" or self.mean_iterations == 1:
            return self.mean_iterations, min(self.mean_iterations, self.truncation)
        generator = np.random.default_rng(0)
        found = 1 + generator.poisson(self._rates(generator.standard_normal(1 << 17)))
        return float(self.mean_iterations), float(np.minimum(found, self.truncation).mean())

    def check_model(self, model: BlockModel) -> None:
        if not isinstance(model, LoopedNetwork | LoopedBlocks):
            raise UserError(f"the task recurrent-lm trains looped networks; got {type(model).__name__}")

    def whole_step(
        self, model: BlockModel, block: int, batch: Batch, draws: Draws, passage: Passage | None
    ) -> StepOutput:
        """Loss after a random number of iterations."""
        assert isinstance(model, LoopedNetwork)
        iterations = self.drawn(draws.number("iterations"))
        (hidden,) = model.hidden(batch, [iterations], trained=self.truncation, generator=draws.generator)
        passed = model.loop.passed(iterations, trained=min(iterations, self.truncation))
        labels = following(batch)
        return StepOutput(model.readout(hidden, labels, weights=mean_weights(labels)), None, passed)

    def measurer(self, model: BlockModel) -> Measure:
        """With `iterations` of the core: the cross-entropy, or, of a denoiser, the bound of walks along so many
        levels."""
        return lambda batch, generator: {
            "nats_per_token": next(iter(self._after(model, batch, [self.iterations], generator)))
        }

    @torch.no_grad()
    def over_iterations(
        self, model: BlockModel, batches: Iterable[Batch], iterations: Sequence[int]
    ) -> dict[str, Metric]:
        """`nats_at_<K>`: nats per token with K iterations at inference."""

        self.check_model(model)

        def measure(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            found = self._after(model, batch, iterations, generator)
            return {f"nats_at_{count}": losses for count, losses in zip(iterations, found, strict=True)}

        return summed(measure, all_beside(model, batches))

    def _after(
        self, model: BlockModel, batch: Batch, iterations: Sequence[int], generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Nats of the rows [N, R] with each of these numbers of iterations."""
        if isinstance(model, LoopedBlocks):
            yield from (self._walk(model, batch, count, generator) for count in iterations)
            return
        assert isinstance(model, LoopedNetwork)
        for hidden in model.hidden(batch, iterations, generator=generator):
            yield model.readout(hidden, following(batch))

    def _walk(self, model: LoopedBlocks, batch: Batch, iterations: int, generator: torch.Generator) -> Tensor:
        """Bounds of the rows [N, R] of walks along so many levels, 0 where there is nothing to predict."""
        denoiser, labels = model.denoiser(0), following(batch)
        injected, view = denoiser.embedded(batch)
        wanted, clean = labels != IGNORED, denoiser.target.clean(batch["input_ids"][:, 1:])

        def told(z: Tensor, level: float, lower: Tensor | None, its_level: float) -> Tensor:
            sigma = torch.full((len(z),), level, device=z.device)
            hidden = denoiser.iterate(z, sigma, injected, view)
            each = torch.ones_like(labels[wanted], dtype=torch.float)
            more = None if lower is None else (lower[wanted], each * its_level)
            return denoiser.told(hidden[wanted], labels[wanted], (z[wanted], each * level), more)

        found = walk_bound(told, clean, grid(model, iterations), generator=generator)
        return torch.zeros(wanted.shape, dtype=torch.float64).masked_scatter(wanted.cpu(), found)

    def controlled(self, model: BlockModel, batches: Sequence[Batch]) -> dict[str, Metric]:
        """`over_iterations` of `curve`."""
        return self.over_iterations(model, batches, sorted(set(self.curve))) if self.curve else {}

    def inference_layers(self, model: BlockModel) -> float | None:
        assert isinstance(model, LoopedNetwork | LoopedBlocks)
        return model.inference_layers(self.iterations)

    def together(self, model: BlockModel, length: int) -> int:
        """A looped network keeps keys and values of every iteration."""
        assert isinstance(model, LoopedNetwork | LoopedBlocks)
        width = model.loop.injection.linear.out_features
        return max(1, min(AT_ONCE, KEPT // (2 * self.iterations * len(model.layers[0]) * length * width)))

    def sampling(self, model: BlockModel) -> Sampling:
        found, more = super().sampling(model), ["iterations", "early_exit"]
        more += ["sampler"] if isinstance(model, LoopedBlocks) else []
        return found._replace(settings={**found.settings, **{name: name for name in more}})

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        num, *others = super().sampled(model)
        sampler = ("sampler",) if isinstance(model, LoopedBlocks) else ()
        return (num, "iterations", "early_exit", *others, *sampler)

    def reader(self, model: BlockModel) -> Reader:
        if isinstance(model, LoopedBlocks):
            return LevelsReader(model, self.token_choice, self.iterations, self.early_exit, self.sampler)
        assert isinstance(model, LoopedNetwork)
        return UnrolledReader(model, self.token_choice, self.iterations, self.early_exit)
