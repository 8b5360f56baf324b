"""Language modelling with ordinary causal networks, whole or in blocks ([DB] section 5.4). See next_token.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionblocks.blocks.causal import CausalBlocks, following
from diffusionblocks.blocks.looped import LoopedBlocks
from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.networks.readout import IGNORED, TokenReadout
from diffusionblocks.options import option
from diffusionblocks.seeds import Draws
from diffusionblocks.tasks.next_token import Measure, NextToken, mean_weights
from diffusionblocks.tasks.readers import BlocksReader, OrdinaryReader, Reader
from diffusionblocks.theory.likelihood import TokenShares, token_bound
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.task import StepOutput


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

    def whole_step(self, model: BlockModel, block: int, batch: Batch, draws: Draws) -> StepOutput:
        whole, labels = _whole(model), _padded(batch)
        loss = whole.readout(whole.hidden(batch, block), labels, weights=mean_weights(labels))
        return StepOutput(loss, None)

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

    def reader(self, model: BlockModel) -> Reader:
        """What writes with `model`."""
        if isinstance(model, CausalBlocks) and not model.is_ordinary:
            return BlocksReader(model, self._choice(), self.sampler, self.sampling_steps)
        return OrdinaryReader(
            model.network if isinstance(model, CausalBlocks) else _whole(model).network, self._choice()
        )


def _padded(batch: Batch) -> Tensor:
    """What the positions of a batch predict [N, T]; the last predicts nothing."""
    return pad(following(batch), (0, 1), value=IGNORED)


def _whole(model: BlockModel) -> Any:
    if not isinstance(model, EndToEndModel) or not isinstance(model.readout, TokenReadout):
        raise UserError(f"the task causal-lm trains language models; got {type(model).__name__}")
    return model
