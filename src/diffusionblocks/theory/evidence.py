"""What is known of the tokens beside what the network says: a second linear map, whose product is added to the logits.

For unit rows e_v the evidence of z = e_y + sigma eps is z . e_v / sigma^2 (`CategoricalTarget.evidence`). Its product
has as many multiplications as the head's, and fp32 ones are an order of magnitude slower than bf16 ones on a card.

Shapes: M positions, V tokens, E width of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from diffusionblocks.theory.products import multiplies_halves


class Evidence(NamedTuple):
    """features @ rows.T is added to the logits. features [..., E], rows [V, E]."""

    features: Tensor
    rows: Tensor


def weight_of(evidence: Evidence) -> Tensor:
    """What evidence adds to the logits [..., V], in fp32 whatever the rest computes in: at low levels it is large."""
    features, rows = evidence
    if torch.is_grad_enabled() and (features.requires_grad or rows.requires_grad):
        with torch.autocast(features.device.type, enabled=False):
            return linear(features.float(), rows.float())
    return adding(rows)(features.flatten(0, -2)).reshape(*features.shape[:-1], len(rows))


def adding(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """features [M, E] -> features @ rows.T [M, V] in fp32, without gradients. The rows [V, E] are prepared once.

    Where the card multiplies bf16 into fp32, in three products of halves side by side (see `features_in_halves`); else
    in fp32.
    """
    fast = multiplies_halves(rows.device)
    wide = rows_in_halves(rows) if fast else rows.float()

    def product(features: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            if fast:
                return torch.mm(features_in_halves(features), wide.T, out_dtype=torch.float32)
            return linear(features.float(), wide)

    return product


def features_in_halves(features: Tensor) -> Tensor:
    """[M, E] -> [M, 3E] in bf16: upper, lower, upper half, for a product with `rows_in_halves`.

    x is its upper half, x rounded to the 8 bits of bf16, and its lower half, the rest rounded likewise. Of the four
    products of halves the lower ones' with each other is left out. So a term of the sum is wrong by at most 3 * 2^-18
    of itself, some 5e-6 on average, and with |x_d e_d| about 1 / (sigma sqrt(E)) an evidence by 5e-6 / sigma nats
    (more, as 1 / sigma^2, below sigma = 1 / sqrt(E)). One product of rounded numbers would be wrong by 1e-3 / sigma in
    bf16 and 3e-4 / sigma in TF32: too much wherever tokens are told apart. Where sigma is so low that halves could
    matter, one token has all the probability, and nothing is lost: every cross-entropy is within 1e-3 nats at all
    levels (tests/laws/test_readout_laws.py).
    """
    upper, lower = halves(features)
    return torch.cat([upper, lower, upper], 1)


def rows_in_halves(rows: Tensor) -> Tensor:
    """[V, E] -> [V, 3E] in bf16: upper, upper, lower half."""
    upper, lower = halves(rows)
    return torch.cat([upper, upper, lower], 1)


def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum has the first 16 bits of a tensor's numbers."""
    upper = tensor.to(torch.bfloat16)
    return upper, (tensor.float() - upper).to(torch.bfloat16)
