"""What all language models that write token by token have in common: y = the next token, x = those before it ([DB]
section 5.4).

Whole networks train with the ordinary next-token cross-entropy. A block trains as a denoiser of the next token's
embedding. Their likelihoods compare: that of blocks is the area under their error curves (theory/likelihood.py),
or, where blocks are an ordinary language model, its cross-entropy. The logits of a batch are never in memory together
(networks/readout.py).

Shapes: N batch, T tokens, R = T - 1 rows that predict, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusionblocks.blocks.causal import CausalBlocks, following
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.networks.parts import Batch
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, generator, normal_like, uniform
from diffusionblocks.tasks.readers import Reader
from diffusionblocks.theory import costs
from diffusionblocks.theory.choice import Choice
from diffusionblocks.theory.partition import Blocks
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.task import Metric, StepOutput, Task, all_beside, beside, drawn_for, per_token

Measure = Callable[[Batch, torch.Generator], dict[str, Tensor]]


@dataclass(kw_only=True)
class NextToken(Task):
    """What language models of all kinds have in common: objective, evaluation and sampling, one token after the other.

    Batches hold `input_ids` [N, T] and optionally `labels` [N, T] (the same tokens, -100 where no loss is wanted),
    `attention_mask` [N, T] (0 = padding at the end, without loss) or `segments` [N, T] (documents packed into one row).

    Args:
        kind: the name of this task in a recipe.
        sampler: of blocks that draw along noise levels, `categorical` or `euler` ([DB]).
        temperature, top_p, top_k: of the distribution that a token is drawn from (see `Choice`).
        num_samples: texts that the finished run makes for its metrics; 0 = none are made.
        teacher: name or folder of a causal language model that judges the samples (generative_perplexity);
            empty = none. mauve: also compare them with real texts, as the teacher sees both.
    """

    data: ClassVar = TextConfig

    kind: str = ""
    sampler: str = option("categorical", choices=("categorical", "euler"))
    temperature: float = option(1.0, least=0)
    top_p: float = option(1.0, above=0, most=1)
    top_k: int = option(0, least=0)
    num_samples: int = option(64, least=0)
    teacher: str = ""
    mauve: bool = False

    def __post_init__(self) -> None:
        check_options("task", self)

    def _choice(self) -> Choice:
        return Choice(self.temperature, self.top_p, self.top_k)

    def step(
        self, model: BlockModel, block: int, batch: Batch, *, ranges: range | None = None, draws: Draws | None = None
    ) -> StepOutput:
        """Loss: mean cross-entropy of the rows, in nats; for blocks at levels of their own range."""
        self.check_model(model)
        draws = drawn_for(batch, draws)
        if not isinstance(model, CausalBlocks):
            return self.whole_step(model, block, batch, draws)
        model.learning(block)
        if model.block(block).settling and model.config.distill:
            return self._distilled(model, block, batch)
        labels, denoiser = following(batch), model.denoiser(block)
        size = tuple(labels.shape[:1]) if denoiser.reads_noise else tuple(labels.shape)
        sigma = self._levels(model, block if ranges is None else ranges, size, draws.generator)
        noisy = add_noise(denoiser.target.clean(batch["input_ids"][:, 1:]), sigma, generator=draws.generator)
        loss, context = denoiser.losses(batch, noisy, sigma, weights=mean_weights(labels))
        if model.config.ordinary and not model.block(block).settling and block < model.num_blocks - 1:
            assert context is not None
            end = denoiser.head()(model.answer(block, context, batch), labels, weights=mean_weights(labels))
            trust = (end - loss).detach().clamp(max=0).exp()  # as TrainingConfig.trust
            loss = trust * loss + model.config.ordinary * end
        layers = None
        if model.block(block).settling:  # the trunk runs forward alone
            layers = costs.settling(len(model.layers[block]), model.config.heads(False, "causal"), 0)
        return StepOutput(loss, None if context is None else context.detach(), layers)

    def _distilled(self, model: CausalBlocks, block: int, batch: Batch) -> StepOutput:
        """A head learns what the whole network answers to the features that it reads: mean divergence in nats."""
        denoiser = model.denoiser(block)
        hidden, context = denoiser.rows(batch, None, None)
        assert context is not None
        with torch.no_grad():
            teacher = model.answer(block, context, batch)
        weights = mean_weights(following(batch))
        loss = (denoiser.head()(hidden, teacher=teacher) * weights).sum()
        after = model.layers[-1].stop - model.layers[block].stop
        layers = costs.settling(len(model.layers[block]), model.config.heads(False, "causal"), after)
        return StepOutput(loss, context.detach(), layers)

    def check_model(self, model: BlockModel) -> None:
        """Raises UserError for a model that the task is not for."""
        raise NotImplementedError

    def whole_step(self, model: BlockModel, block: int, batch: Batch, draws: Draws) -> StepOutput:
        """Of a network that is no denoiser."""
        raise NotImplementedError

    def _levels(self, model: CausalBlocks, block: Blocks, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Levels of the given shape: one per text where layers see them, else one per token."""
        count = torch.Size(size).numel()
        return model.partition.sample(block, count, generator=generator).reshape(size)

    @torch.no_grad()
    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`nats_per_token`, with its standard error over texts, and whatever else the task measures of every row. Noise
        is seeded: the same batches give the same numbers."""
        self.check_model(model)
        return summed(self.measurer(model), all_beside(model, batches))

    def measurer(self, model: BlockModel) -> Measure:
        """(batch, generator) -> nats of the rows [N, R or T] by name, 0 where there is nothing to predict."""
        raise NotImplementedError

    def _with_context(self, model: CausalBlocks, batch: Batch, block: int) -> Batch:
        context = model.context(batch, block)
        return batch if context is None else {**batch, "context": context}

    @torch.no_grad()
    def scrambled(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """How much of a block's loss comes from z: `loss_block_<i>`, the cross-entropy at levels of its own range, and
        `scrambled_block_<i>`, the same where z hides another token of the batch. Nothing for whole networks."""
        if not isinstance(model, CausalBlocks):
            return {}
        sums: dict[str, list[Tensor]] = {}
        counts = []
        for number, batch in enumerate(all_beside(model, batches)):
            wanted, clean = following(batch) != IGNORED, batch["input_ids"][:, 1:]
            source = generator(number, clean.device)
            order = torch.randperm(clean.numel(), generator=source, device=clean.device)
            counts.append(wanted.sum(1).cpu().double())
            for block in range(model.num_blocks):
                denoiser, partition = model.denoiser(block), model.partition
                own = partition.range(block)
                size = clean.shape[:1] if denoiser.reads_noise else clean.shape
                masses = own.low_mass + (own.high_mass - own.low_mass) * uniform(*size, generator=source)
                sigma = partition.levels.level(masses)
                noise = normal_like(sigma.new_empty(*clean.shape, denoiser.target.rows.shape[1]), source)
                noise = noise * sigma.reshape(*sigma.shape, *[1] * (noise.dim() - sigma.dim()))
                inputs = self._with_context(model, batch, block)
                for name, hidden in (("loss", clean), ("scrambled", clean.flatten()[order].reshape(clean.shape))):
                    losses, _ = denoiser.losses(inputs, denoiser.target.clean(hidden) + noise, sigma)
                    sums.setdefault(f"{name}_block_{block}", []).append(losses.cpu().double().sum(1))
        return {name: per_token(torch.cat(parts), torch.cat(counts)) for name, parts in sums.items()}

    def reader(self, model: BlockModel) -> Reader:
        """What writes with `model`."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        model: BlockModel,
        tokens: Tensor,
        length: int,
        *,
        seed: int = 0,
        watch: Callable[[Tensor], bool] | None = None,
        reader: Reader | None = None,
    ) -> Tensor:
        """Continues `tokens` [N, P] to [N, length].

        watch: called with all tokens [N, t] after every new one; True ends the texts there. reader: a new one of
        `model`, for callers that want to know what it did.
        """
        self.check_model(model)
        tokens = beside(model, tokens)
        reader, source = reader or self.reader(model), generator(seed, tokens.device)
        reader.read(tokens)
        while tokens.shape[1] < length:
            new = reader.next(source)[:, None]
            tokens = torch.cat([tokens, new], 1)
            if (watch is not None and watch(tokens)) or tokens.shape[1] == length:
                break
            reader.read(new)
        return tokens


def mean_weights(labels: Tensor) -> Tensor:
    """Labels of the rows [N, R or T] -> the weights of the same shape that make a sum of losses their mean: 0 where
    there is nothing to predict."""
    wanted = labels != IGNORED
    return wanted / wanted.sum().clamp(min=1)


def summed(measure: Measure, batches: Iterable[Batch]) -> dict[str, Metric]:
    """Nats per token of what `measure` finds in every row, by name; the noise of every batch is seeded by its
    number."""
    sums: list[dict[str, Tensor]] = []
    counts: list[Tensor] = []
    for index, batch in enumerate(batches):
        found = measure(batch, generator(index, batch["input_ids"].device))
        sums.append({name: losses.cpu().double().sum(1) for name, losses in found.items()})
        counts.append((following(batch) != IGNORED).sum(1).cpu().double())
    tokens = torch.cat(counts)
    return {name: per_token(torch.cat([part[name] for part in sums]), tokens) for name in sums[0]}
