"""What all language models that write token by token have in common: y = the next token, x = those before it ([DB]
section 5.4).

Whole networks train with the ordinary next-token cross-entropy. A block trains as a denoiser of the next token's
embedding. Their likelihoods compare: that of blocks is the area under their error curves (theory/likelihood.py),
or, where blocks are an ordinary language model, its cross-entropy. The logits of a batch are never in memory together
(networks/readout.py).

Shapes: N batch, T tokens, R = T - 1 rows that predict, V tokens of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.causal import CausalBlocks, following
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.stream import in_order
from diffusionblocks.data.text.chat import question
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextData
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation import text
from diffusionblocks.networks.parts import Batch
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, derive, generator, normal_like, uniform
from diffusionblocks.tasks.prompts import beginning
from diffusionblocks.tasks.readers import Reader
from diffusionblocks.tasks.writing import AT_ONCE, OPTIONS, SETTINGS, Writing, Written, check_length, told
from diffusionblocks.theory import costs
from diffusionblocks.theory.choice import TokenChoice
from diffusionblocks.theory.partition import Blocks
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.figures import Figure, Texts
from diffusionblocks.training.task import (
    Asked,
    LanguageModel,
    Made,
    Metric,
    Sampling,
    StepOutput,
    Task,
    TrainedOnText,
    all_beside,
    beside,
    drawn_for,
    on_device,
    per_token,
)

CONTROLLED = 128  # windows on which controls are measured
SHOWN = 6  # texts in the report
Measure = Callable[[Batch, torch.Generator], dict[str, Tensor]]


@dataclass(kw_only=True)
class NextToken(Task):
    """What language models of all kinds have in common: objective, evaluation and sampling, one token after the other.

    Batches hold `input_ids` [N, T] and optionally `labels` [N, T] (the same tokens, -100 where no loss is wanted),
    `attention_mask` [N, T] (0 = padding at the end, without loss) or `segments` [N, T] (documents packed into one row).

    Args:
        kind: the name of this task in a recipe.
        sampler: of blocks that draw along noise levels, `categorical` or `euler` ([DB]).
        temperature, top_p, top_k: of the distribution that a token is drawn from (see `TokenChoice`).
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

    @property
    def token_choice(self) -> TokenChoice:
        """How a token is drawn."""
        return TokenChoice(self.temperature, self.top_p, self.top_k)

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

    # ------------------------------------------------------------------ what a finished run is asked

    def check_data(self, split: Dataset) -> None:
        text.check(self.teacher, self.mauve, self.num_samples, split)

    def measure(self, trained: TrainedOnText, split: TextData, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """The likelihood in bits per character and per byte, its perplexity, that of `data.general`, what the losses
        owe to the noisy target (`scrambled`), and what samples are like (`evaluation.text.of_samples`)."""
        nats, tokenizer = metrics["nats_per_token"], trained.data.tokenizer
        controls = list(on_device(in_order(text.some(split, CONTROLLED), CONTROLLED), trained.device))
        found = {**text.in_bits(nats, split, tokenizer), **metrics, "perplexity": text.exponential(nats)}
        found |= {**self._general(trained), **self.scrambled(trained.model, controls)}
        found |= self.controlled(trained.model, controls)
        if self.num_samples:
            made = self.new_texts(trained, self.num_samples).tokens
            found |= text.of_samples(
                made, split, tokenizer, teacher=self.teacher, with_mauve=self.mauve, device=trained.device
            )
        return found

    def controlled(self, model: BlockModel, batches: Sequence[Batch]) -> dict[str, Metric]:
        """More metrics, on a part of the split."""
        return {}

    def _general(self, trained: TrainedOnText) -> dict[str, Metric]:
        """Likelihood of `data.general`."""
        if trained.data.general is None:
            return {}
        nats = trained.evaluate(trained.data.general)["nats_per_token"]
        return {"general_nats_per_token": nats, "general_perplexity": text.exponential(nats)}

    def language_model(self, trained: TrainedOnText) -> LanguageModel:
        """The window is what the positions of an ordinary network allow; denoisers read that which they were trained
        on."""
        model: Any = trained.model
        ordinary = self.writes and model.is_ordinary

        def log_p(tokens: Sequence[int], scored: int) -> tuple[float, bool]:
            ids = torch.tensor(tokens)
            labels = ids.clone()
            labels[: len(ids) - scored] = IGNORED
            batch = {"input_ids": ids[None].to(trained.device), "labels": labels[None].to(trained.device)}
            model.eval()
            with torch.no_grad():
                nats = self.measurer(model)(batch, generator(0, trained.device))["nats_per_token"].sum().item()
                if not ordinary:
                    return -nats, False
                logits = model.network(batch["input_ids"]).logits[0, -scored - 1 : -1]
                return -nats, bool((logits.argmax(-1) == batch["input_ids"][0, -scored:]).all())

        def write(start: Tensor, length: int, temperature: float, watch: Callable[[Tensor], bool]) -> Tensor:
            model.eval()
            task = replace(self, temperature=temperature, top_p=1.0, top_k=0)
            return task.sample(model, start.to(trained.device), length, watch=watch)

        window = model.network.config.max_position_embeddings if ordinary else trained.config.length
        return LanguageModel(trained.data.tokenizer, trained.config.tokenizer, int(window), log_p, write)

    def together(self, model: BlockModel, length: int) -> int:
        """Texts of `length` tokens that are written at once."""
        return AT_ONCE

    def go_on(
        self,
        trained: TrainedOnText,
        start: Tensor,
        length: int,
        *,
        seed: int = 0,
        watch: Callable[[Tensor], bool] | None = None,
    ) -> Written:
        """Continues `start` [N, P] to [N, length]. watch: as in `sample`; then all texts are written together."""
        found, began = list[Tensor](), time.perf_counter()
        passes, exits = 0, list[int]()
        together = len(start) if watch is not None else self.together(trained.model, length)
        for first in range(0, len(start), together):
            part = start[first : first + together].to(trained.device)
            reader = self.reader(trained.model)
            seeded = derive(seed, "samples", first)
            found.append(self.sample(trained.model, part, length, seed=seeded, watch=watch, reader=reader).cpu())
            passes += reader.layer_evaluations
            exits += getattr(reader, "exits", [])
        iterations = sum(exits) / len(exits) if exits else None
        return Written(torch.cat(found), passes, time.perf_counter() - began, iterations)

    def new_texts(self, trained: TrainedOnText, num: int, *, seed: int = 0) -> Written:
        """`num` texts of the length of a window, from nothing: a document begins after the end of another."""
        start = torch.full((num, 1), trained.data.tokenizer.separator)
        made = self.go_on(trained, start, trained.config.length + 1, seed=seed)
        return made._replace(tokens=made.tokens[:, 1:])

    def sampling(self, model: BlockModel) -> Sampling:
        return Sampling("text, one token after the other", (*OPTIONS, "stop", "stream"), SETTINGS)

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        return ("num_samples", "temperature", "top_p", "top_k", "teacher")

    def make(self, trained: TrainedOnText, asked: Asked) -> Made:
        """Texts that continue the prompt."""
        tokenizer, window, chat = trained.data.tokenizer, trained.config.length, asked.chat
        check_length(asked.length)
        if chat and not asked.prompt:
            raise UserError("--chat takes a question (--prompt) for a model that writes token by token")
        prompt = question(asked.prompt, tokenizer) if chat else asked.prompt
        own = beginning(prompt, tokenizer, window, asked.length)
        # A text begins after the end of another; a conversation as its template says, and ends where its turn does.
        before = [] if chat else [tokenizer.separator]
        stop = [*asked.stop, tokenizer.decode([tokenizer.separator])] if chat else list(asked.stop)
        progress = Writing(tokenizer, len(before), len(own), stop, asked.stream, answers=chat)
        made = self.go_on(
            trained,
            torch.tensor([*before, *own]).expand(asked.num, -1),
            (asked.length or window) + len(before),
            seed=asked.seed,
            watch=progress if stop or asked.stream is not None else None,
        )
        tokens = made.tokens[:, len(before) :]
        texts, written = [progress.text(tokens) for tokens in tokens.tolist()], asked.num * (tokens.shape[1] - len(own))
        progress.finish(texts[0])
        how: dict[str, Any] = {"stop": stop} if stop else {}
        if made.iterations is not None:
            how["iterations_per_token"] = made.iterations
        how |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return told(texts, made, written, tokens.shape[1], asked, how)

    def figures(self, trained: TrainedOnText) -> list[Figure]:
        made = self.make(trained, Asked(num=SHOWN))
        return [Figure("Generated texts", Texts(made.found["texts"]))]


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
