"""From the last hidden states to a loss, without the logits of a whole batch in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of positions without a target, as in transformers
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once (32 MiB in fp32) ...
KEPT_ELEMENTS = 1 << 20  # so few logits are kept for the backward pass
MOST_CHUNKS = 8  # ... or an eighth of the batch's, so that large vocabularies keep large products


class TokenReadout(nn.Module):
    """Final norm and output head of a language model: hidden [N, T, D] -> logits [N, T, V], or losses where there are labels.

    Every use is a call of the module, so that weights which are kept elsewhere can visit for its length (residency.py).
    """

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: Tensor, labels: Tensor | None = None, never: int | None = None) -> Tensor:
        """labels [N, T] (or [M], for hidden [M, D]): cross-entropies in nats of that shape instead, 0 where the label is `IGNORED`.
        never: a token that is no possible answer (the mask)."""
        if labels is None:
            return without(self.head(self.norm(hidden)), never)
        losses = chunked_cross_entropy(self.norm(hidden).flatten(0, -2), self.head, labels.flatten(), never)
        return losses.reshape(labels.shape)


def chunked_cross_entropy(hidden: Tensor, head: nn.Linear, labels: Tensor, never: int | None = None) -> Tensor:
    """Cross-entropies of head(hidden) [M, V] against labels [M] in fp32 [M], 0 where the label is `IGNORED`.

    Chunks of positions are recomputed in the backward pass, so large [M, V] logits never exist together.
    """
    size = max(1, CHUNK_ELEMENTS // head.out_features, -(-len(hidden) // MOST_CHUNKS))
    losses = []
    for part, wanted in zip(hidden.split(size), labels.split(size), strict=True):
        if torch.is_grad_enabled() and len(hidden) * head.out_features > KEPT_ELEMENTS:
            losses.append(checkpoint(_each, part, head.weight, head.bias, wanted, never, use_reentrant=False))
        else:
            losses.append(_each(part, head.weight, head.bias, wanted, never))
    return torch.cat(losses)


def _each(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, never: int | None) -> Tensor:
    logits = without(linear(hidden, weight, bias).float(), never)
    return cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def without(logits: Tensor, never: int | None) -> Tensor:
    """Logits [..., V] with one token made impossible."""
    if never is None:
        return logits
    impossible = torch.arange(logits.shape[-1], device=logits.device) == never
    return logits.masked_fill(impossible, -torch.inf)
