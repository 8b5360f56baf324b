"""Language modelling, token by token: y = the next token, x = those before it ([DB] section 5.4).

Whole networks (`end-to-end` and its kin, `exact`) train with the ordinary next-token cross-entropy. A block trains as a
denoiser of the next token's embedding. Their likelihoods compare: that of blocks is the area under their error curves
(likelihood.py), or, where blocks are an ordinary language model, its cross-entropy. The logits of a batch are never in
memory together (readout.py).

Shapes: N batch, T tokens, R = T - 1 rows that predict, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionblocks.denoisers.causal import CausalBlocks, following
from diffusionblocks.errors import UserError, check_choices
from diffusionblocks.likelihood import TokenShares, token_bound
from diffusionblocks.network import Batch, BlockModel, EndToEndModel
from diffusionblocks.readout import IGNORED, TokenReadout
from diffusionblocks.samplers.choice import Choice
from diffusionblocks.samplers.next_token import BlocksReader, OrdinaryReader
from diffusionblocks.targets import add_noise
from diffusionblocks.tasks.base import Metric, StepOutput, per_token


@dataclass(kw_only=True)
class CausalLM:
    """Objective, evaluation and sampling of a language model that writes one token after the other.

    Batches hold `input_ids` [N, T] and optionally `labels` [N, T] (the same tokens, -100 where no loss is wanted),
    `attention_mask` [N, T] (0 = padding at the end, without loss) or `segments` [N, T] (documents packed into one row).

    Args:
        kind: the name of this task in a recipe.
        levels_per_block: strata of every block's noise range in which evaluation measures the likelihood.
        sampler: of blocks that draw along noise levels, `categorical` or `euler` ([DB]). sampling_steps: levels per token, 0 =
            one per block.
        temperature, top_p, top_k: of the distribution that a token is drawn from (see `Choice`).
        num_samples: texts that the finished run makes for its metrics; 0 = none are made.
        teacher: name or folder of a causal language model that judges the samples (generative_perplexity); empty = none. mauve:
            also compare them with real texts, as the teacher sees both.
    """

    kind: str = "causal-lm"
    levels_per_block: int = 8
    sampler: str = "categorical"
    sampling_steps: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 64
    teacher: str = ""
    mauve: bool = False

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"kind": ("causal-lm",), "sampler": ("categorical", "euler")}

    def __post_init__(self) -> None:
        check_choices("task", self, self.CHOICES)
        self._choice()
        if self.num_samples < 0 or self.sampling_steps < 0 or self.levels_per_block < 1:
            raise UserError(
                "task.num_samples and task.sampling_steps must be at least 0 and task.levels_per_block at least 1, got "
                f"{self.num_samples}, {self.sampling_steps} and {self.levels_per_block}"
            )

    def _choice(self) -> Choice:
        return Choice(self.temperature, self.top_p, self.top_k)

    def step(self, model: BlockModel, block: int, batch: Batch, *, whole_range: bool = False) -> StepOutput:
        """Loss: mean cross-entropy of the rows, in nats; for blocks at levels of their own range."""
        wanted, context = following(batch) != IGNORED, None
        if isinstance(model, CausalBlocks):
            denoiser, size = model.denoiser(block), tuple(wanted.shape)
            size = size[:1] if denoiser.reads_noise else size
            sigma = self._levels(model, None if whole_range else block, size).to(wanted.device)
            noisy = add_noise(denoiser.target.clean(batch["input_ids"][:, 1:]), sigma)
            losses, context = denoiser.losses(batch, noisy, sigma)
        else:
            losses = self._whole_losses(model, batch, block)
        detached = None if context is None else context.detach()
        return StepOutput(losses.sum() / wanted.sum().clamp(min=1), detached)

    def _levels(self, model: CausalBlocks, block: int | None, size: tuple[int, ...]) -> Tensor:
        """Levels of the given shape: one per text where layers see them, else one per token."""
        count = torch.Size(size).numel()
        partition = model.partition
        return (partition.sample_all(count) if block is None else partition.sample(block, count)).reshape(size)

    @torch.no_grad()
    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`nats_per_token`, with its standard error over texts. Of blocks:

        Where they are an ordinary language model (features context), its cross-entropy, and that of every block with its
        own head, `nats_block_<i>`: the last is the model. Else the bound, and the share of each block, `share_block_<i>`:
        they add up. Noise is seeded: the same batches give the same numbers.
        """
        sums: list[dict[str, Tensor]] = []
        counts: list[Tensor] = []
        lowest = 0.0
        if isinstance(model, CausalBlocks) and not model.is_ordinary:
            lowest = model.revealing_level()  # once: it is estimated by sampling
        for index, batch in enumerate(batches):
            wanted = following(batch) != IGNORED
            if not isinstance(model, CausalBlocks):
                found = {"nats_per_token": self._whole_losses(model, batch, None)}
            elif model.is_ordinary:
                found = self._each_block(model, batch)
            else:
                found = self._bound(model, batch, lowest, torch.Generator().manual_seed(index))
            sums.append({name: losses.double().sum(1).cpu() for name, losses in found.items()})
            counts.append(wanted.sum(1).cpu().double())
        tokens = torch.cat(counts)
        return {name: per_token(torch.cat([part[name] for part in sums]), tokens) for name in sums[0]}

    def _each_block(self, model: CausalBlocks, batch: Batch) -> dict[str, Tensor]:
        """Next-token cross-entropies [N, R] of every block alone, without noise."""
        found, entering = {}, dict(batch)
        labels = following(batch)
        for index in range(model.num_blocks):
            denoiser = model.denoiser(index)
            hidden, context = denoiser.rows(entering, None, None)
            found[f"nats_block_{index}"] = denoiser.head()(hidden, labels)
            if context is not None:
                entering["context"] = context
        return {"nats_per_token": found[f"nats_block_{model.num_blocks - 1}"], **found}

    def _bound(self, model: CausalBlocks, batch: Batch, lowest: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Shares of the bound of every row [N, R], 0 where there is nothing to predict."""
        wanted = following(batch) != IGNORED
        shares = self.bound(model, batch, lowest=lowest, generator=generator)
        found = {f"share_block_{i}": column for i, column in enumerate(shares.blocks.unbind(1))}
        # The ends belong to the blocks beside them.
        found["share_block_0"] = found["share_block_0"] + shares.prior
        last = f"share_block_{model.num_blocks - 1}"
        found[last] = found[last] + shares.hidden
        rows = {"nats_per_token": shares.total, **found}
        empty = torch.zeros(wanted.shape, dtype=torch.float64)
        return {name: empty.masked_scatter(wanted.cpu(), values) for name, values in rows.items()}

    @torch.no_grad()
    def bound(
        self, model: CausalBlocks, batch: Batch, *, lowest: float = 0.0, generator: torch.Generator | None = None
    ) -> TokenShares:
        """-log p of the tokens that rows predict, those with nothing to predict left out: M rows.

        lowest: level at which the integral ends (`CausalBlocks.revealing_level` has the least variance).
        """
        labels = following(batch)
        wanted, clean = labels != IGNORED, batch["input_ids"][:, 1:]
        reads = model.denoiser(0).reads_noise
        hidden: dict[int, Tensor] = {}  # of the blocks whose layers do not see the noise
        inputs = {index: self._with_context(model, batch, index) for index in range(model.num_blocks)}

        def measure(block: int, sigma: Tensor) -> tuple[Tensor, Tensor]:
            denoiser = model.denoiser(block)
            sigma = sigma.to(clean.device)
            noisy = add_noise(denoiser.target.clean(clean), sigma, generator=generator)
            if reads or block not in hidden:
                hidden[block], _ = denoiser.rows(inputs[block], noisy, sigma)
            each = sigma.reshape(*sigma.shape, *[1] * (clean.dim() - sigma.dim())).expand(clean.shape)
            return denoiser.measure(hidden[block][wanted], noisy[wanted], each[wanted], labels[wanted])

        count = (len(clean),) if reads else tuple(clean.shape)
        return token_bound(
            measure,
            count,
            model.partition,
            levels_per_block=self.levels_per_block,
            lowest=lowest,
            generator=generator,
        )

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
        for number, batch in enumerate(batches):
            wanted, clean = following(batch) != IGNORED, batch["input_ids"][:, 1:]
            generator = torch.Generator().manual_seed(number)
            order = torch.randperm(clean.numel(), generator=generator).to(clean.device)
            counts.append(wanted.sum(1).cpu().double())
            for block in range(model.num_blocks):
                denoiser, partition = model.denoiser(block), model.partition
                own = partition.range(block)
                size = clean.shape[:1] if denoiser.reads_noise else clean.shape
                masses = own.low_mass + (own.high_mass - own.low_mass) * torch.rand(size, generator=generator)
                sigma = partition.levels.level(masses).to(clean.device)
                noise = torch.randn(*clean.shape, denoiser.target.rows.shape[1], generator=generator).to(sigma)
                noise = noise * sigma.reshape(*sigma.shape, *[1] * (noise.dim() - sigma.dim()))
                inputs = self._with_context(model, batch, block)
                for name, hidden in (("loss", clean), ("scrambled", clean.flatten()[order].reshape(clean.shape))):
                    losses, _ = denoiser.losses(inputs, denoiser.target.clean(hidden) + noise, sigma)
                    sums.setdefault(f"{name}_block_{block}", []).append(losses.double().sum(1).cpu())
        return {name: per_token(torch.cat(parts), torch.cat(counts)) for name, parts in sums.items()}

    def _whole_losses(self, model: BlockModel, batch: Batch, block: int | None) -> Tensor:
        """Cross-entropies [N, T] of the tokens that follow, 0 where there is none. The last position predicts nothing."""
        whole = _whole(model)
        return whole.readout(whole.hidden(batch, block), pad(following(batch), (0, 1), value=IGNORED))

    def reader(self, model: BlockModel) -> OrdinaryReader | BlocksReader:
        """What writes with `model`."""
        if isinstance(model, CausalBlocks) and not model.is_ordinary:
            return BlocksReader(model, self._choice(), self.sampler, self.sampling_steps)
        return OrdinaryReader(
            model.network if isinstance(model, CausalBlocks) else _whole(model).network, self._choice()
        )

    @torch.no_grad()
    def sample(
        self,
        model: BlockModel,
        tokens: Tensor,
        length: int,
        *,
        seed: int = 0,
        watch: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        """Continues `tokens` [N, P] to [N, length]. Every clean token passes the network once.

        watch: called with all tokens [N, t] after every new one; True ends the texts there.
        """
        reader, generator = self.reader(model), torch.Generator().manual_seed(seed)
        reader.read(tokens)
        while tokens.shape[1] < length:
            new = reader.next(generator)[:, None]
            tokens = torch.cat([tokens, new], 1)
            if (watch is not None and watch(tokens)) or tokens.shape[1] == length:
                break
            reader.read(new)
        return tokens


def _whole(model: BlockModel) -> Any:
    if not isinstance(model, EndToEndModel) or not isinstance(model.readout, TokenReadout):
        raise UserError(f"the task causal-lm trains language models; got {type(model).__name__}")
    return model
