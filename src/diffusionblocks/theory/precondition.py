"""EDM coefficients and loss weights as pure functions ([EDM] table 1 and section 5; [DB] section 3.2).

D(z; sigma) = c_skip z + c_out net(c_in z, c_noise). All functions take and return tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # [EDM] section 5; kept for unit-norm targets as well ([DB] app. E)


class Coefficients(NamedTuple):
    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Coefficients:
    """c_skip, c_out, c_in and c_noise of [EDM] table 1, each with the shape of `sigma`."""
    total = sigma**2 + sigma_data**2
    return Coefficients(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data / total.sqrt(),
        input=total.rsqrt(),
        noise=sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 ([EDM] table 1): made for the L2 loss."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def _unweighted(losses: Tensor, sigma: Tensor) -> Tensor:
    return losses.mean()


def _edm(losses: Tensor, sigma: Tensor) -> Tensor:
    return (losses * edm_weight(sigma)).mean()


LOSS_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"none": _unweighted, "edm": _edm}
"""Means of per-sample losses [N] at levels sigma [N]. `none` is right for cross-entropy: the EDM weight spans a
factor 45,000 across sigma. `edm` is the printed formula. (The released code multiplies losses [N] by weights [N, 1] and
averages the [N, N] product, which is a constant factor in expectation.)"""


def euler_step(z: Tensor, estimate: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE from sigma to next_sigma < sigma ([EDM] algorithm 2).

    z, estimate [N, ...]; sigma, next_sigma [N]. With estimate = y it lands exactly on y + next_sigma * eps. The
    sign printed in [DB] eq. 3-5 would add noise; their released code and this function agree.
    """
    ratio = (next_sigma / sigma).reshape(-1, *[1] * (z.dim() - 1))
    return torch.lerp(estimate, z, ratio.to(z.dtype))
