"""From the last hidden states to a loss, without the logits of a whole batch in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of positions without a target, as in transformers
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once (32 MiB in fp32) ...
MOST_CHUNKS = 8  # ... or an eighth of the batch's, so that large vocabularies keep large products


class TokenReadout(nn.Module):
    """Final norm and output head of a language model: hidden [N, T, D] -> logits [N, T, V]."""

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))

    def losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, T, D], labels [N, T] -> summed cross-entropy in nats (scalar) and the number of targets."""
        return chunked_cross_entropy(self.norm(hidden).flatten(0, 1), self.head, labels.flatten())


def chunked_cross_entropy(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies of head(hidden) [M, V] against labels [M], and how many are not `IGNORED`.

    Chunks of positions are recomputed in the backward pass, so the [M, V] logits never exist together. Returns a scalar
    in fp32 and an integer.
    """
    size = max(1, CHUNK_ELEMENTS // head.out_features, -(-len(hidden) // MOST_CHUNKS))
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(size), labels.split(size), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_summed, part, head.weight, head.bias, wanted, use_reentrant=False)
        else:
            total = total + _summed(part, head.weight, head.bias, wanted)
    return total, (labels != IGNORED).sum()


def _summed(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight, bias).float(), labels, reduction="sum", ignore_index=IGNORED)
