"""From the last hidden states to a loss, without the logits of a whole batch in memory at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of positions without a target, as in transformers
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once (32 MiB in fp32) ...
KEPT_ELEMENTS = 1 << 20  # so few logits are kept for the backward pass
MOST_CHUNKS = 8  # ... or an eighth of the batch's, so that large vocabularies keep large products


class Evidence(NamedTuple):
    """What is known of the tokens beside what the network says, as a second linear map: features @ rows.T is added to the
    logits. features [..., E], rows [V, E]."""

    features: Tensor
    rows: Tensor


class TokenReadout(nn.Module):
    """Final norm and output head of a language model: hidden [N, T, D] -> logits [N, T, V], or losses where there are labels.

    Every use is a call of the module, so that weights which are kept elsewhere can visit for its length (residency.py).
    """

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        never: int | None = None,
        evidence: Evidence | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """labels [N, T] (or [M], for hidden [M, D]): cross-entropies in nats of that shape instead, 0 where the label is `IGNORED`.
        never: a token that is no possible answer (the mask). evidence: added to the logits. teacher [N, T, D]: other hidden states;
        then Kullback-Leibler divergences in nats [N, T] of the answer to `hidden` from the answer to these."""
        if teacher is not None:
            return chunked_divergence(self.norm(teacher), self.norm(hidden), self.head)
        if labels is None:
            logits = without(self.head(self.norm(hidden)), never)
            return logits if evidence is None else logits.float() + weight_of(evidence)
        flat = None if evidence is None else Evidence(evidence.features.flatten(0, -2), evidence.rows)
        losses = chunked_cross_entropy(self.norm(hidden).flatten(0, -2), self.head, labels.flatten(), never, flat)
        return losses.reshape(labels.shape)


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, never: int | None = None, evidence: Evidence | None = None
) -> Tensor:
    """Cross-entropies of head(hidden) + evidence [M, V] against labels [M] in fp32 [M], 0 where the label is `IGNORED`.

    Chunks of positions are recomputed in the backward pass, so large [M, V] logits never exist together.
    """
    size = chunk_size(len(hidden), head.out_features)
    known = [None] * len(hidden) if evidence is None else evidence.features.split(size)
    losses = []
    for part, wanted, features in zip(hidden.split(size), labels.split(size), known, strict=False):
        more = None if evidence is None or features is None else Evidence(features, evidence.rows)
        arguments = (part, head.weight, head.bias, wanted, never, more)
        if torch.is_grad_enabled() and len(hidden) * head.out_features > KEPT_ELEMENTS:
            losses.append(checkpoint(_each, *arguments, use_reentrant=False))
        else:
            losses.append(_each(*arguments))
    return torch.cat(losses)


def chunked_divergence(teacher: Tensor, student: Tensor, head: nn.Linear) -> Tensor:
    """KL(softmax(head(teacher)) || softmax(head(student))) in fp32 [N, T], for both [N, T, D]; no gradient reaches the teacher."""
    size = chunk_size(student.shape[:-1].numel(), head.out_features)
    found = []
    for right, ours in zip(
        teacher.detach().flatten(0, -2).split(size), student.flatten(0, -2).split(size), strict=True
    ):
        found.append(checkpoint(_divergence, right, ours, head.weight, head.bias, use_reentrant=False))
    return torch.cat(found).reshape(student.shape[:-1])


def _divergence(teacher: Tensor, student: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        right = linear(teacher, weight, bias).float().log_softmax(-1)
    ours = linear(student, weight, bias).float().log_softmax(-1)
    return (right.exp() * (right - ours)).sum(-1)


def chunk_size(positions: int, tokens: int) -> int:
    """Positions whose logits are in memory together."""
    return max(1, CHUNK_ELEMENTS // tokens, -(-positions // MOST_CHUNKS))


def _each(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, never: int | None, evidence: Evidence | None
) -> Tensor:
    logits = without(linear(hidden, weight, bias).float(), never)
    if evidence is not None:
        logits = logits + weight_of(evidence)
    return cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def weight_of(evidence: Evidence) -> Tensor:
    """What evidence adds to the logits [..., V], in fp32 whatever the rest computes in: at low levels it is large."""
    features, rows = evidence
    with torch.autocast(features.device.type, enabled=False):
        return linear(features.float(), rows.float())


def without(logits: Tensor, never: int | None) -> Tensor:
    """Logits [..., V] with one token made impossible."""
    if never is None:
        return logits
    impossible = torch.arange(logits.shape[-1], device=logits.device) == never
    return logits.masked_fill(impossible, -torch.inf)
