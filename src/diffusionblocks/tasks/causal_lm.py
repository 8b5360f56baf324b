"""Language modelling with ordinary causal networks, whole or in blocks ([DB] section 5.4). See next_token.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionblocks.blocks.causal import CausalBlocks, following
from diffusionblocks.blocks.handed import Passage
from diffusionblocks.blocks.looped import LoopedBlocks
from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.data.text.splits import TextData
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation.text import exponential
from diffusionblocks.networks.parts import Batch
from diffusionblocks.networks.readout import IGNORED, TokenReadout
from diffusionblocks.options import option
from diffusionblocks.seeds import Draws
from diffusionblocks.tasks.next_token import Measure, NextToken, mean_weights
from diffusionblocks.tasks.readers import BlocksReader, OrdinaryReader, Reader
from diffusionblocks.theory.likelihood import TokenShares, token_bound
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.task import Metric, Sampling, StepOutput, TrainedOnText

_OF_PRETRAINED = {"head_start": "fresh", "distill": False, "ordinary": 0.0}  # what only blocks of pretrained ones have
# What the paper describes and its released code does ([DB] sections 3 and 5.4, app. E).
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
        "overlap": 0.1,
        "head_layers": 0,
        "condition_width": 64,
        **_OF_PRETRAINED,
    },
    "task": {"sampler": "euler"},
    "train": {"order": "random", "branch_at": 0.0},
}
# Every block reads the tokens; levels by information, exact evidence in the readout, ancestral sampling.
INFORMATION: dict[str, Any] = {
    "blocks": {
        "context": "input",
        "target_entry": "none",
        "readout": "bayes",
        "target_table": "fixed",
        "shared": "copies",
        "levels": "information",
        "least_hidden": 0.65,
        "overlap": 0.05,
        "head_layers": 0,
        "condition_width": 0,
        **_OF_PRETRAINED,
    },
    "task": {"sampler": "categorical"},
}
# Blocks on features of one another; the last one answers, and all of them are an ordinary language model. Hardly any
# evidence (each is a complete predictor) and one readout for all measure best. A head layer (local.head_layers 1)
# helps at equal samples and costs memory and a third more computation (docs/LOG.md).
FEATURES: dict[str, Any] = {
    "blocks": {
        "context": "features",
        "target_entry": "none",
        "readout": "bayes",
        "target_table": "fixed",
        "shared": "trained",
        "levels": "information",
        "least_hidden": 0.97,
        "overlap": 0.05,
        "head_layers": 0,
        "condition_width": 0,
        **_OF_PRETRAINED,
    },
    "train": {"order": "sweep", "branch_at": 0.0},
}


@dataclass(kw_only=True)
class CausalLM(NextToken):
    """Language models, and their blocks. See `NextToken`.

    Args:
        levels_per_block: Noise levels of every block at which evaluation measures the likelihood. One in each of so
            many strata of its range.
        sampling_steps: Steps down the noise levels. Of blocks that draw along them, per token; 0 = one per block.
        before: Evaluate a pretrained network before the first step, too.
        continuations: Held-out texts that the network continues before and after adapting. They are in samples.json.
        continued: Tokens of a continuation.
    """

    target: ClassVar = "causal"
    presets: ClassVar = {"paper": PAPER, "information": INFORMATION, "features": FEATURES}
    writes: ClassVar = True

    kind: str = option("causal-lm", choices=("causal-lm",))
    levels_per_block: int = option(8, least=1, group="evaluation")
    sampling_steps: int = option(0, least=0, group="sampling", key="steps")
    before: bool = option(True, group="evaluation")
    continuations: int = option(0, least=0, group="evaluation")
    continued: int = option(64, least=1, group="evaluation")

    def check_model(self, model: BlockModel) -> None:
        ordinary = isinstance(model, CausalBlocks) and not isinstance(model, LoopedBlocks)
        if not ordinary and not (isinstance(model, EndToEndModel) and isinstance(model.readout, TokenReadout)):
            raise UserError(f"the task causal-lm trains language models; got {type(model).__name__}")

    def whole_step(
        self, model: BlockModel, block: int, batch: Batch, draws: Draws, passage: Passage | None
    ) -> StepOutput:
        whole, labels = _whole(model), _padded(batch)
        loss = whole.readout(whole.hidden(batch, block, passage), labels, weights=mean_weights(labels))
        return StepOutput(loss, passage)

    def whole_losses(self, model: BlockModel, batch: Batch) -> Tensor:
        """Cross-entropies [N, T] of the tokens that follow, 0 where there is none."""
        whole = _whole(model)
        return whole.readout(whole.hidden(batch), _padded(batch))

    def measurer(self, model: BlockModel) -> Measure:
        """Cross-entropies. Of blocks:

        Where they are an ordinary language model (features context), its cross-entropy, and that of every block with
        its own head, `nats_block_<i>`: the last is the model. Else the bound, and the share of each block,
        `share_block_<i>`: they add up.
        """
        if not isinstance(model, CausalBlocks):
            return lambda batch, generator: {"nats_per_token": self.whole_losses(model, batch)}
        if model.is_ordinary:
            return lambda batch, generator: self._each_block(model, batch)
        lowest = model.revealing_level()  # once: it is estimated by sampling
        return lambda batch, generator: self._bound(model, batch, lowest, generator)

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
            device=clean.device,
            generator=generator,
        )

    def measure_before(self, trained: TrainedOnText, split: TextData) -> dict[str, Metric]:
        nats = trained.evaluate(split)["nats_per_token"]
        return {"nats_per_token": nats, "perplexity": exponential(nats), **self._general(trained)}

    def compares_before(self) -> bool:
        return self.before

    def without_before(self) -> CausalLM:
        return replace(self, before=False)

    def continuations_of(
        self, trained: TrainedOnText, split: TextData, context: Callable[[Tensor], Tensor]
    ) -> list[dict[str, str]]:
        """`continuations` texts, each cut in the middle (conversations: where the first answer begins), and the
        likeliest `continued` tokens after the cut."""
        tokenizer, count = trained.data.tokenizer, min(self.continuations, len(split))
        greedy, model = replace(self, temperature=0.0, top_p=1.0, top_k=0), ordinary_network(trained.model)
        longest = int(model.config.max_position_embeddings)

        def ended(tokens: Tensor) -> bool:
            return bool(tokens[0, -1] == tokenizer.separator)

        found = []
        for index in range(count):
            batch = split[index * len(split) // count]
            real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["input_ids"])
            ids, cut = batch["input_ids"][:real], max(1, real // 2)
            if "labels" in batch:
                answers = torch.nonzero(batch["labels"][1:real] != IGNORED)
                cut = int(answers[0]) + 1 if len(answers) else cut
            prompt = torch.cat([context(ids[:cut]), ids[:cut]])[-max(1, longest - self.continued) :]
            start = prompt[None].to(trained.device)
            made = greedy.sample(trained.model, start, len(prompt) + self.continued, watch=ended)[0, len(prompt) :]
            texts = [tokenizer.decode(part.tolist()) for part in (ids[:cut], ids[cut : cut + self.continued], made)]
            found.append(dict(zip(("prompt", "real", "written"), texts, strict=True)))
        return found

    def sampling(self, model: BlockModel) -> Sampling:
        of_walks = {"steps": "sampling_steps", "sampler": "sampler"} if self._walks(model) else {}
        found = super().sampling(model)
        return found._replace(settings={**found.settings, **of_walks})

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        return super().sampled(model) + (("sampler", "sampling_steps") if self._walks(model) else ())

    def _walks(self, model: BlockModel) -> bool:
        """Whether a token is drawn along noise levels."""
        return isinstance(model, CausalBlocks) and not model.is_ordinary

    def reader(self, model: BlockModel) -> Reader:
        """What writes with `model`."""
        if isinstance(model, CausalBlocks) and not model.is_ordinary:
            return BlocksReader(model, self.token_choice, self.sampler, self.sampling_steps)
        return OrdinaryReader(ordinary_network(model), self.token_choice)


def ordinary_network(model: BlockModel) -> Any:
    """The ordinary language model of transformers that a model is."""
    return model.network if isinstance(model, CausalBlocks) else _whole(model).network


def _padded(batch: Batch) -> Tensor:
    """What the positions of a batch predict [N, T]; the last predicts nothing."""
    return pad(following(batch), (0, 1), value=IGNORED)


def _whole(model: BlockModel) -> EndToEndModel:
    if not isinstance(model, EndToEndModel) or not isinstance(model.readout, TokenReadout):
        raise UserError(f"the task causal-lm trains language models; got {type(model).__name__}")
    return model
