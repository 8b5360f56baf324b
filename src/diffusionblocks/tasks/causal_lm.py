"""Language modelling with the ordinary loss at the end of the network: next-token cross-entropy.

For the methods that train a whole network (`end-to-end` and its kin, `exact`). The logits of a batch are never in memory
together (readout.py).

Shapes: N batch, T positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionblocks.errors import UserError, check_choices
from diffusionblocks.network import Batch, BlockModel, EndToEndModel
from diffusionblocks.readout import IGNORED, TokenReadout
from diffusionblocks.samplers.unmasking import chooser
from diffusionblocks.tasks.base import Metric, StepOutput, per_token


@dataclass(kw_only=True)
class CausalLM:
    """Objective, evaluation and sampling of an ordinary language model.

    Batches hold `input_ids` [N, T] and optionally `labels` [N, T] (the same tokens, -100 where no loss is wanted) or
    `attention_mask` [N, T] (0 = padding at the end, without loss).

    Args:
        kind: the name of this task in a recipe.
        temperature, top_p: of the distribution that a token is drawn from.
        num_samples: texts that the finished run makes for its metrics; 0 = none are made.
        teacher: name or folder of a causal language model that judges the samples (generative_perplexity); empty = none.
    """

    kind: str = "causal-lm"
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 64
    teacher: str = ""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"kind": ("causal-lm",)}

    def __post_init__(self) -> None:
        check_choices("task", self, self.CHOICES)
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"task.temperature must not be negative and task.top_p in (0, 1], got {self.temperature} and {self.top_p}"
            )
        if self.num_samples < 0:
            raise UserError(f"task.num_samples must be at least 0, got {self.num_samples}")

    def step(self, model: BlockModel, block: int, batch: Batch, *, whole_range: bool = False) -> StepOutput:
        losses, wanted = self._losses(model, batch, block)
        return StepOutput(losses.sum() / wanted.sum().clamp(min=1), None)

    @torch.no_grad()
    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`nats_per_token`, with its standard error over texts."""
        sums, counts = [], []
        for batch in batches:
            losses, wanted = self._losses(model, batch, None)
            sums.append(losses.sum(1).cpu())
            counts.append(wanted.sum(1).cpu())
        return {"nats_per_token": per_token(torch.cat(sums).double(), torch.cat(counts).double())}

    def _losses(self, model: BlockModel, batch: Batch, block: int | None) -> tuple[Tensor, Tensor]:
        """Cross-entropies [N, T] of the tokens that follow, and where there is one."""
        whole = _whole(model)
        labels = batch.get("labels", batch["input_ids"])
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
        following = pad(labels[:, 1:], (0, 1), value=IGNORED)  # position i predicts token i + 1
        return whole.readout(whole.hidden(batch, block), following), following != IGNORED

    @torch.no_grad()
    def sample(self, model: BlockModel, tokens: Tensor, length: int, *, seed: int = 0) -> Tensor:
        """Continues `tokens` [N, P] to [N, length]. The network runs once per token, on keys and values that it keeps."""
        network = _whole(model).network
        choose, generator = chooser(self.temperature, self.top_p), torch.Generator().manual_seed(seed)
        read, kept = tokens, None
        while tokens.shape[1] < length:
            output = network(input_ids=read, past_key_values=kept, use_cache=True)
            kept = output.past_key_values
            read = choose(output.logits[:, -1].float(), generator)[:, None]
            tokens = torch.cat([tokens, read], 1)
        return tokens


def _whole(model: BlockModel) -> Any:
    if not isinstance(model, EndToEndModel) or not isinstance(model.readout, TokenReadout):
        raise UserError(f"the task causal-lm trains whole language models; got {type(model).__name__}")
    return model
