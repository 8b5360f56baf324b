"""Language modelling with the ordinary loss at the end of the network: next-token cross-entropy.

For the methods that train a whole network (`end-to-end` and its kin, `exact`). The logits of a batch are never in memory
together (readout.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionblocks.errors import UserError
from diffusionblocks.network import Batch, BlockModel, EndToEndModel
from diffusionblocks.readout import IGNORED, TokenReadout
from diffusionblocks.tasks.base import Metric, StepOutput, mean_with_error


@dataclass(kw_only=True)
class CausalLM:
    """Batches hold `input_ids` [N, T] and optionally `labels` [N, T] (the same tokens, -100 where no loss is wanted)."""

    def step(self, model: BlockModel, block: int, batch: Batch, *, whole_range: bool = False) -> StepOutput:
        total, count = self._losses(model, batch, block)
        return StepOutput(total / count.clamp(min=1), None)

    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`nats_per_token`, with its standard error over batches of one sequence each."""
        sums, counts = [], []
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                total, count = self._losses(model, one, None)
                sums.append(total.cpu())
                counts.append(count.cpu())
        per_sequence, tokens = torch.stack(sums), torch.stack(counts)
        spread = mean_with_error(per_sequence * len(tokens) / tokens.sum())
        return {"nats_per_token": Metric((per_sequence.sum() / tokens.sum()).item(), spread.stderr)}

    def _losses(self, model: BlockModel, batch: Batch, block: int | None) -> tuple[Tensor, Tensor]:
        if not isinstance(model, EndToEndModel) or not isinstance(model.readout, TokenReadout):
            raise UserError(f"the task causal_lm trains whole language models; got {type(model).__name__}")
        labels = batch.get("labels", batch["input_ids"])
        following = pad(labels[:, 1:], (0, 1), value=IGNORED)  # position i predicts token i + 1
        losses = model.readout(model.hidden(batch, block), following)
        return losses.sum(), (following != IGNORED).sum()
