"""From the last hidden states to a loss, without the logits of a whole batch in memory at once.

Training takes one weighted sum of cross-entropies. Its gradient is known as soon as the logits of a chunk of positions
are, so it is made with them, in the forward pass: logits are neither kept for the backward pass nor made again there
(Hsu et al. 2024, Liger-Kernel, arXiv 2410.10989). Evaluation takes the cross-entropy of every position.

Shapes: N batch, T positions of a text, M positions, D width, V tokens, E width of the evidence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from diffusionblocks.theory.evidence import Evidence, adding, weight_of
from diffusionblocks.theory.products import NARROW, add_product, multiplies_halves

IGNORED = -100  # label of positions without a target, as in transformers
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once (32 MiB in fp32) ...
MOST_CHUNKS = 8  # ... or an eighth of the batch's, so that large vocabularies keep large products


class TokenReadout(nn.Module):
    """Final norm and output head of a language model: hidden [N, T, D] -> logits [N, T, V], or losses where there are
    labels.

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
        weights: Tensor | None = None,
    ) -> Tensor:
        """labels [N, T] (or [M], for hidden [M, D]): cross-entropies in nats of that shape instead, 0 where the label
        is `IGNORED`. never: a token that is no possible answer (the mask). evidence: added to the logits. teacher
        [N, T, D]: other hidden states; then Kullback-Leibler divergences in nats [N, T] of the answer to `hidden` from
        the answer to these. weights (like labels): the sum of the cross-entropies times these instead, a scalar, which
        is what training should ask for."""
        if teacher is not None:
            return chunked_divergence(self.norm(teacher), self.norm(hidden), self.head)
        if labels is None:
            logits = without(self.head(self.norm(hidden)), never)
            return logits if evidence is None else logits.float() + weight_of(evidence)
        flat = None if evidence is None else Evidence(evidence.features.flatten(0, -2), evidence.rows)
        states = self.norm(hidden).flatten(0, -2)
        if weights is not None:
            return weighted_cross_entropy(states, self.head, labels.flatten(), weights.flatten(), never, flat)
        return chunked_cross_entropy(states, self.head, labels.flatten(), never, flat).reshape(labels.shape)


def weighted_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    weights: Tensor,
    never: int | None = None,
    evidence: Evidence | None = None,
) -> Tensor:
    """Sum over positions of weights [M] times the cross-entropy of head(hidden) + evidence [M, V] against labels [M], a
    scalar in fp32. Positions whose label is `IGNORED` add nothing. weights are constants: no gradient reaches them.

    With gradients enabled, those of hidden [M, D], of the head and of the evidence are made here, chunk by chunk, as
    far as anyone wants them; the backward pass scales them. torch's `linear_cross_entropy` (2.13) and Liger-Kernel's
    kernel do so too, but for equal weights, without evidence and without a token that is no answer; torch's takes 1.1
    to 2 times as long on a CPU.
    """
    if not torch.is_grad_enabled():
        return chunked_cross_entropy(hidden, head, labels, never, evidence) @ weights.float()
    features, rows = (None, None) if evidence is None else evidence
    return _WeightedCrossEntropy.apply(hidden, head.weight, head.bias, features, rows, labels, weights, never)


class _WeightedCrossEntropy(torch.autograd.Function):
    """See `weighted_cross_entropy`. The gradient of a position's part of the loss with respect to its logits is its
    weight times (softmax - one-hot of the label). The bracket is made in the place of the log-probabilities [chunk, V];
    the weight is multiplied where there are D numbers to a position instead of V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        features: Any,
        rows: Any,
        labels: Tensor,
        weights: Tensor,
        never: int | None,
    ) -> Tensor:
        device, wanted = hidden.device.type, ctx.needs_input_grad[:5]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = torch.zeros((), device=hidden.device)
        # Products of low precision are summed over chunks in fp32.
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float) if bias is not None and wanted[2] else None
        to_features = torch.empty_like(features) if features is not None and wanted[3] else None
        to_rows = torch.zeros_like(rows, dtype=torch.float) if rows is not None and wanted[4] else None
        counted = labels != IGNORED
        weights, labels = weights.float() * counted, labels.clamp(min=0)
        size = chunk_size(len(hidden), len(weight))
        # Not by autocast itself: it would remember the head as it is cast here, without a graph.
        with torch.autocast(device, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            weigh = None if rows is None else adding(rows)
            for first in range(0, len(hidden), size):
                here = slice(first, first + size)
                part, label = hidden[here], labels[here, None]
                scores = _logits(part.to(dtype), matrix, offset, None if weigh is None else weigh(features[here]))
                if never is not None:
                    scores.select(1, never).fill_(-torch.inf)
                bracket = scores.log_softmax(1)
                del scores
                losses = -bracket.gather(1, label)[:, 0]
                total += losses.masked_fill(~counted[here], 0.0) @ weights[here]
                bracket.exp_().scatter_add_(1, label, bracket.new_full((), -1.0).expand(label.shape))
                scale = weights[here, None]
                if to_features is not None:
                    to_features[here] = (bracket @ rows.float()) * scale
                if to_rows is not None:
                    to_rows.addmm_(bracket.T, features[here].float() * scale)
                if to_bias is not None:
                    to_bias.addmv_(bracket.T, scale[:, 0])
                if to_hidden is not None or to_weight is not None:
                    bracket = bracket.to(dtype)
                if to_hidden is not None:
                    to_hidden[here] = (bracket @ matrix) * scale
                if to_weight is not None:
                    add_product(to_weight, bracket.T, (part * scale).to(dtype))
                del bracket  # before the next chunk's logits
        made = (to_hidden, to_weight, to_bias, to_features, to_rows)
        owners = (hidden, weight, bias, features, rows)
        pairs = zip(made, owners, strict=True)
        ctx.save_for_backward(*(None if g is None or o is None else g.to(o.dtype) for g, o in pairs))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another gradient of the head's size would come at the peak of memory.
        scaled = (None if gradient is None else gradient.mul_(upstream) for gradient in ctx.saved_tensors)
        return *scaled, None, None, None


def _logits(part: Tensor, matrix: Tensor, offset: Tensor | None, evidence: Tensor | None) -> Tensor:
    """part [chunk, D] @ matrix.T [D, V] + offset + evidence [chunk, V] in fp32, in the place of the evidence."""
    wide = offset is None and part.dtype in NARROW and multiplies_halves(part.device)
    if wide and evidence is None:
        return torch.mm(part, matrix.T, out_dtype=torch.float)
    if wide and evidence is not None:
        add_product(evidence, part, matrix.T)
        return evidence
    scores = linear(part, matrix, offset)
    return scores.float() if evidence is None else evidence.add_(scores)


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, never: int | None = None, evidence: Evidence | None = None
) -> Tensor:
    """Cross-entropies of head(hidden) + evidence [M, V] against labels [M] in fp32 [M], 0 where the label is `IGNORED`.

    For evaluation. They can be differentiated: chunks of positions are recomputed in the backward pass, so large [M, V]
    logits never exist together (training, which needs one sum of them, is served faster by `weighted_cross_entropy`).
    """
    size = chunk_size(len(hidden), head.out_features)
    weigh = None if evidence is None or torch.is_grad_enabled() else adding(evidence.rows)

    def each(part: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor | None) -> Tensor:
        logits = without(linear(part, weight, bias).float(), never)
        if evidence is not None and features is not None:
            logits = logits + (weight_of(Evidence(features, evidence.rows)) if weigh is None else weigh(features))
        return cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)

    known = [None] * len(hidden) if evidence is None else evidence.features.split(size)
    losses = []
    for part, wanted, features in zip(hidden.split(size), labels.split(size), known, strict=False):
        arguments = (part, wanted, head.weight, head.bias, features)
        if torch.is_grad_enabled():
            losses.append(checkpoint(each, *arguments, use_reentrant=False))
        else:
            losses.append(each(*arguments))
    return torch.cat(losses)


def chunked_divergence(teacher: Tensor, student: Tensor, head: nn.Linear) -> Tensor:
    """KL(softmax(head(teacher)) || softmax(head(student))) in fp32 [N, T], for both [N, T, D]; no gradient reaches the
    teacher."""
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


def without(logits: Tensor, never: int | None) -> Tensor:
    """Logits [..., V] with one token made impossible."""
    if never is None:
        return logits
    impossible = torch.arange(logits.shape[-1], device=logits.device) == never
    return logits.masked_fill(impossible, -torch.inf)
