"""Masked diffusion of text ([MD4]; [DB] section 5.3 and appendix D): y = the tokens, noise = masks.

Every method trains on the same bound; a whole network unmasks at all levels, a block in its own range.

Shapes: N batch, T positions, V tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.handed import Handed
from diffusionblocks.blocks.masked import MaskedBlocks, MaskedNetwork, hide
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextData
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation import text
from diffusionblocks.networks.parts import Batch
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, derive, generator, uniform
from diffusionblocks.system.devices import wide
from diffusionblocks.tasks.prompts import start_of
from diffusionblocks.tasks.writing import AT_ONCE, OPTIONS, SETTINGS, Written, check_length, told
from diffusionblocks.theory.choice import TokenChoice
from diffusionblocks.theory.partition import Blocks, Partition
from diffusionblocks.theory.unmasking import SAMPLERS, even
from diffusionblocks.training.figures import Figure, Moment, Moments, Texts
from diffusionblocks.training.task import (
    Asked,
    Made,
    Metric,
    Sampling,
    StepOutput,
    Task,
    TrainedOnText,
    all_beside,
    beside,
    drawn_for,
    per_token,
)

LOGITS = 1 << 26  # texts are made together as long as their logits stay below this number
SHOWN = 6  # texts in the report
EMPHASIS = {"bound": 0.0, "root": 0.5, "equal": 1.0}  # an answer's weight is that of the bound times n to this power


# What the paper describes and its released code does ([DB] sections 3 and 5.3, app. D and E).
PAPER: dict[str, Any] = {
    "blocks": {"shared": "trained", "schedule": "linear", "overlap": 0.1, "condition_width": 64},
    "task": {"masking": "independent", "loss_weight": "bound"},
    "train": {"order": "random", "branch_at": 0.0},
}


@dataclass(kw_only=True)
class MaskedLM(Task):
    """Objective, evaluation and sampling of a masked diffusion model.

    Args:
        kind: What is learned.
        masking: How tokens are masked in training. `exact` shares of a text are masked, or every token
            `independent`ly ([MD4], [DB]); the same bound, with less variance the first way.
        loss_weight: Weight of a sample in the loss, by its noise level. Of an answer of a text in which n tokens are
            masked: `bound` 1/n (the likelihood's, [MD4]), `equal` (MaskGIT, Chang et al. 2022, arXiv 2202.04200) or
            `root`, 1/sqrt(n), between the two. A network that can be right at all levels has the same optimum by any;
            the bound's own weight has the most variance. Evaluation is by the bound.
        levels_per_text: Masked shares at which evaluation measures every text. One in each of so many equal parts of
            [0, 1].
        sampler: How a sample goes down the noise levels. `ancestral`, or `confidence` (the likeliest tokens first).
        sampling_steps: Steps down the noise levels.
        temperature: Temperature of the distribution that a token is drawn from; 0 = the likeliest. See `TokenChoice`.
        top_p: Share of probability that a token is drawn from. See `TokenChoice`.
        top_k: Number of likeliest tokens that one is drawn from; 0 = all. See `TokenChoice`.
        num_samples: Samples that the finished run makes for its metrics; 0 = none.
        teacher: Name or folder of a causal language model that judges the samples. It gives generative_perplexity;
            empty = none.
        mauve: Compare the samples with real texts, as the teacher sees both.
    """

    target: ClassVar = "masked"
    data: ClassVar = TextConfig
    presets: ClassVar = {"paper": PAPER}
    by_block: ClassVar = True

    kind: str = option("masked-lm", choices=("masked-lm",))
    masking: str = option("exact", choices=("exact", "independent"), group="objective")
    loss_weight: str = option("bound", choices=tuple(EMPHASIS), group="objective")
    levels_per_text: int = option(8, least=1, group="evaluation")
    sampler: str = option("ancestral", choices=tuple(SAMPLERS), group="sampling")
    sampling_steps: int = option(64, least=1, group="sampling", key="steps")
    temperature: float = option(1.0, least=0, group="sampling")
    top_p: float = option(1.0, above=0, most=1, group="sampling")
    top_k: int = option(0, least=0, group="sampling")
    num_samples: int = option(256, least=0, group="evaluation")
    teacher: str = option("", group="evaluation")
    mauve: bool = option(False, group="evaluation")

    def __post_init__(self) -> None:
        check_options("task", self)

    @property
    def token_choice(self) -> TokenChoice:
        """How a token is drawn."""
        return TokenChoice(self.temperature, self.top_p, self.top_k)

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
        """Loss: the mean over the block's own range of u of the mean cross-entropy of a masked token, in nats (by
        `loss_weight` bound). A block's share of the bound is that times the length of its range, so that shares add up
        and losses compare."""
        network, tokens, own = _masked(model), batch["input_ids"], block if ranges is None else ranges
        source = drawn_for(batch, draws).generator
        level, weights = network.partition.spread(own, len(tokens), generator=source)
        real, denoiser = batch.get("attention_mask"), network.denoiser(block)
        exact = self.masking == "exact"
        hidden = hide(tokens, denoiser.shares(level), denoiser.mask_id, real=real, exact=exact, generator=source)
        share = network.partition.mean_mass(own)
        lengths = real.sum(1) if real is not None else tokens.new_full((len(tokens),), tokens.shape[1])
        masked = 1 / (hidden.weights * lengths)  # share of a text
        weights = weights * (masked / share) ** EMPHASIS[self.loss_weight]
        weights = hidden.weights * weights * lengths / lengths.sum()
        most = most_masked(network.partition, own, tokens, exact=self.masking == "exact")
        inputs = {**batch, "noisy_target": hidden.tokens}
        return StepOutput(denoiser.loss(inputs, level, hidden.labels, weights, most))

    @torch.no_grad()
    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`nats_per_token`: the bound, with its standard error over texts; with several blocks also the share of each,
        `share_block_<i>`, in nats per token. They add up.

        Shares of masked tokens are stratified and masks seeded: with equal batches, every network meets the same texts.
        """
        network = _masked(model)
        count, partition = self.levels_per_text, network.partition
        sums: list[Tensor] = []  # nats per text and block [N, B]
        lengths: list[Tensor] = []
        for index, batch in enumerate(all_beside(model, batches)):
            tokens, real = batch["input_ids"], batch.get("attention_mask")
            size = len(tokens)
            length = (torch.full((size,), tokens.shape[1]) if real is None else real.sum(1).cpu()).double()
            source = generator(index, tokens.device)
            nats = torch.zeros(size, partition.num_blocks, dtype=torch.float64)
            for part in range(count):
                share = (part + uniform(size, generator=source)) / count
                level = partition.levels.level(wide(share))
                owners = partition.block_of(level)
                masked = hide(tokens, share, network.denoiser(0).mask_id, real=real, generator=source)
                for block in owners.unique().tolist():
                    mine = owners == block
                    rows = {name: tensor[mine] for name, tensor in {**batch, "noisy_target": masked.tokens}.items()}
                    at = level.float()[mine]
                    losses = network.denoiser(block).each_loss(rows, at, masked.labels[mine])
                    nats[mine.cpu(), block] += (losses.sum(1) * masked.weights[mine]).cpu().double() / count
            sums.append(nats * length[:, None])
            lengths.append(length)
        per_text, tokens_in = torch.cat(sums), torch.cat(lengths)
        found = {"nats_per_token": per_token(per_text.sum(1), tokens_in)}
        if partition.num_blocks > 1:
            shares = {f"share_block_{i}": per_token(column, tokens_in) for i, column in enumerate(per_text.unbind(1))}
            found |= shares
        return found

    @torch.no_grad()
    def sample(
        self,
        model: MaskedBlocks | MaskedNetwork,
        tokens: Tensor,
        *,
        seed: int = 0,
        watch: Callable[[int, float, Tensor], Any] | None = None,
    ) -> Tensor:
        """Fills what is masked in `tokens` [N, T] -> [N, T]. All masks = a new text; given tokens stay as they are.

        One block runs per step, chosen by `partition.block_of`. The walk starts at the level of the mean masked share.

        Args:
            watch: called as watch(block, level, z) before every step that runs the network.
        """
        tokens, partition = beside(model, tokens), model.partition
        schedule, mask_id = partition.levels, model.mask_id
        share = (tokens == mask_id).float().mean().cpu()
        if share == 0:
            return tokens

        def denoise(z: Tensor, level: float, where: Tensor) -> Tensor:
            block = int(partition.block_of(torch.tensor(level, dtype=torch.float64)))
            if watch is not None:
                watch(block, level, z)
            at = torch.full((len(z),), level, device=z.device)
            return model.denoiser(block).logits_at({"noisy_target": z}, at, where)

        sampler = SAMPLERS[self.sampler](mask_id, schedule, self.token_choice)  # type: ignore[arg-type]
        levels = even(schedule.level(share).item(), self.sampling_steps)
        return sampler(denoise, tokens, levels, generator=generator(seed, tokens.device))

    # ------------------------------------------------------------------ what a finished run is asked

    def check_data(self, split: Dataset) -> None:
        text.check(self.teacher, self.mauve, self.num_samples, split)

    def measure(self, trained: TrainedOnText, split: TextData, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """The likelihood in bits per character and per byte, and what samples are like
        (`evaluation.text.of_samples`)."""
        tokenizer = trained.data.tokenizer
        found = {**text.in_bits(metrics["nats_per_token"], split, tokenizer), **metrics}
        if self.num_samples:
            made = self.fill(trained, blank(trained, self.num_samples)).tokens
            found |= text.of_samples(
                made, split, tokenizer, teacher=self.teacher, with_mauve=self.mauve, device=trained.device
            )
        return found

    def fill(
        self,
        trained: TrainedOnText,
        start: Tensor,
        *,
        seed: int = 0,
        watch: Callable[[int, float, Tensor], Any] | None = None,
    ) -> Written:
        """Fills the masked tokens of `start` [N, T], as many texts at once as fit. watch: as in `sample`."""
        model, passes = _masked(trained.model), 0

        def count(block: int, level: float, z: Tensor) -> None:
            nonlocal passes
            passes += len(model.block(block).layers) * len(z)
            if watch is not None:
                watch(block, level, z)

        found, began = [], time.perf_counter()
        together = max(1, min(AT_ONCE, LOGITS // (start.shape[1] * trained.data.num_outputs)))
        for first in range(0, len(start), together):
            part = start[first : first + together].to(trained.device)
            found.append(self.sample(model, part, seed=derive(seed, "samples", first), watch=count).cpu())
        return Written(torch.cat(found), passes, time.perf_counter() - began)

    def sampling(self, model: BlockModel) -> Sampling:
        return Sampling("text", OPTIONS, {**SETTINGS, "steps": "sampling_steps", "sampler": "sampler"})

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        return ("num_samples", "sampler", "sampling_steps", "temperature", "top_p", "top_k", "teacher")

    def make(self, trained: TrainedOnText, asked: Asked) -> Made:
        """Texts with the blanks of the prompt filled in."""
        tokenizer = trained.data.tokenizer
        check_length(asked.length)
        if asked.chat:
            raise UserError("--chat takes a question (--prompt) for a model that writes token by token")
        start = start_of(asked.prompt, tokenizer, trained.config.length, asked.length).expand(asked.num, -1)
        made = self.fill(trained, start, seed=asked.seed)
        texts = [tokenizer.decode(text) for text in made.tokens.tolist()]
        how = {"sampler": self.sampler, "steps": self.sampling_steps}
        how |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        written = int((start == _masked(trained.model).mask_id).sum())
        return told(texts, made, written, made.tokens.shape[1], asked, how)

    def figures(self, trained: TrainedOnText) -> list[Figure]:
        made = self.make(trained, Asked(num=SHOWN))
        title = (
            "From masks to text: at each noise level the block that runs next; every token has the colour of the block "
            "that wrote it"
        )
        moments = Moments(self.moments(trained), trained.model.num_blocks)
        return [Figure("Generated texts", Texts(made.found["texts"])), Figure(title, moments)]

    def moments(self, trained: TrainedOnText, seed: int = 0, shown: int = 8) -> list[Moment]:
        """How one text comes out of masks, at `shown` moments."""
        steps: list[tuple[int | None, float, Tensor]] = []
        made = self.fill(
            trained,
            blank(trained, 1),
            seed=seed,
            watch=lambda block, level, z: steps.append((block, level, z[0].cpu())),
        )
        steps.append((None, 0.0, made.tokens[0]))
        writers: list[int | None] = [None] * len(made.tokens[0])
        found = []
        chosen = {round(index * (len(steps) - 1) / (shown - 1)) for index in range(shown)}
        for number, (block, level, z) in enumerate(steps):
            if number:
                changed = (z != steps[number - 1][2]).tolist()
                writers = [steps[number - 1][0] if new else old for new, old in zip(changed, writers, strict=True)]
            if number in chosen:
                texts = [trained.data.tokenizer.decode([token]) for token in z.tolist()]
                found.append(Moment(level, block, list(zip(texts, writers, strict=True))))
        return found


def blank(trained: TrainedOnText, num: int, length: int = 0) -> Tensor:
    """`num` texts of masks alone [num, length]; 0 = the window."""
    return torch.full((num, length or trained.config.length), _masked(trained.model).mask_id)


def most_masked(partition: Partition, blocks: Blocks, tokens: Tensor, *, exact: bool) -> int:
    """Not more tokens of a training batch [N, T] are masked: N T times the mean share and a little, known without
    reading it.

    The shares u_i of the N texts come at even distances (`Partition.spread`), so their sum is within the length of the
    range of N times the mean u; rounding up adds less than a token to each text. exact: that is all. Independent masks
    have no bound: beyond six standard deviations, each at most sqrt(N T u (1 - u)), which a step in 10^9 exceeds, the
    last tokens of the batch teach nothing.
    """
    (texts, length), share = tokens.shape, partition.mean_mass(blocks)
    span = partition.range(blocks, widened=True)
    most = length * (texts * share + span.high_mass - span.low_mass)
    most += texts if exact else 6 * (texts * length * share * (1 - share)) ** 0.5
    return min(texts * length, math.ceil(most) + 1)


def _masked(model: BlockModel) -> MaskedBlocks | MaskedNetwork:
    if not isinstance(model, MaskedBlocks | MaskedNetwork):
        raise UserError(f"the task masked-lm needs a masked diffusion network; got {type(model).__name__}")
    return model
