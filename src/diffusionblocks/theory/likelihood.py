"""Likelihood of a denoiser as the area under its error curve.

For a target y with finitely many values, z = y + sigma eps and eta = 1 / (2 sigma^2),

    -log p(y) <= integral over eta of E||y - D(z)||^2 d eta        [nats]

with equality for the posterior mean of the model's own p(y) (I-MMSE: Guo, Shamai, Verdu 2005; mismatched case: Verdu
2010; continuous-time ELBO: Kingma et al. 2021, arXiv 2107.00630). So every block owns a share of the nats, its noise
range's, and the shares add up. Outside the range of levels, what is left is added exactly: above, the distance of z
from pure noise; below, what the lowest level still hides, of a pixel or of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusionblocks.seeds import normal_like, uniform
from diffusionblocks.system.devices import wide, widest
from diffusionblocks.theory.partition import Partition
from diffusionblocks.theory.targets import add_noise

GREYS = 256  # values of a pixel, evenly spaced in [-1, 1]


class Shares(NamedTuple):
    """Nats per image [N] each. blocks: of the noise range of each block [N, B]. prior: of the highest level. pixels: of
    what the lowest level hides."""

    blocks: Tensor
    prior: Tensor
    pixels: Tensor

    @property
    def total(self) -> Tensor:
        return self.blocks.sum(1) + self.prior + self.pixels


def image_bound(
    estimate: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    clean: Tensor,
    partition: Partition,
    *,
    levels_per_block: int = 8,
    generator: torch.Generator | None = None,
) -> Shares:
    """Upper bounds of -log p(image) in nats for 8-bit images, unbiased estimates by stratified sampling.

    Args:
        estimate: (block, rows of the batch, z, sigma) -> D(z) for these rows.
        clean: images with values k / 127.5 - 1 [N, channels, height, width].
        partition: who owns which level. levels_per_block: strata in log sigma of each block's range.
    """
    count = len(clean)
    shares = torch.zeros(count, partition.num_blocks, dtype=torch.float64)
    for block in range(partition.num_blocks):
        span = partition.range(block)
        length = math.log(span.high / span.low)
        for sigma in _strata(span.low, length, count, levels_per_block, clean.device, generator):
            noisy = add_noise(clean, sigma, generator=generator)
            found = estimate(block, torch.arange(count, device=clean.device), noisy, sigma)
            error = (found - clean).cpu().double().square().flatten(1).sum(1)
            # d eta = sigma^-2 d(log sigma)
            shares[:, block] += length / levels_per_block * error / sigma.cpu().double() ** 2
    high, low = partition.levels.highest, partition.levels.lowest
    prior = clean.cpu().double().square().flatten(1).sum(1) / (2 * high**2)  # KL of N(y, high^2) from N(0, high^2)
    return Shares(shares, prior, _hidden_pixels(clean, low, generator))


class TokenShares(NamedTuple):
    """Nats per token [M] each. blocks: of the noise range of each block [M, B]. prior: of what lies above the highest
    level. hidden: of what the lowest level hides, which the last block tells."""

    blocks: Tensor
    prior: Tensor
    hidden: Tensor

    @property
    def total(self) -> Tensor:
        return self.blocks.sum(1) + self.prior + self.hidden


def token_bound(
    measure: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    count: tuple[int, ...],
    partition: Partition,
    *,
    levels_per_block: int = 8,
    lowest: float = 0.0,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> TokenShares:
    """Upper bounds of -log p(token) in nats, unbiased estimates by stratified sampling.

    The integral may end at any level: what is left there is the cross-entropy of a token given z.

    In every block's range, `levels_per_block` strata of equal mass; a level is drawn evenly in eta inside each, so that
    errors are weighed by the length of the stratum alone.

    Args:
        measure: (block, sigma of shape `count`) -> squared errors ||y - D(z)||^2 and cross-entropies -log p(y | z), of
            shape [M] or [N, R], for z = y + sigma eps drawn there.
        count: shape of the levels that are drawn: one per text [N], or one per token.
        lowest: level at which the integral ends; it is moved into the range of the last block. device: where levels are
            drawn, the generator's.
    """
    last = partition.range(partition.num_blocks - 1)
    lowest = min(max(lowest, last.low), last.high)
    _, losses = measure(partition.num_blocks - 1, torch.full(count, lowest, device=device))
    hidden = losses.cpu().double().flatten()
    blocks = []
    for block in range(partition.num_blocks):
        span, found = partition.range(block), torch.zeros_like(hidden)
        end = max(span.low, lowest)
        low_mass = partition.levels.mass(torch.tensor(end, dtype=torch.float64)).item()
        masses = torch.linspace(span.high_mass, low_mass, levels_per_block + 1, dtype=torch.float64)
        edges = partition.levels.level(masses)
        edges[0], edges[-1] = span.high, end
        etas = 1 / (2 * edges**2)
        for low, high in zip(etas[:-1].tolist(), etas[1:].tolist(), strict=True):
            if high > low:
                eta = low + (high - low) * _shares(count, device, generator)
                errors, _ = measure(block, (2 * eta).rsqrt().clamp(end, span.high).float())
                found += (high - low) * errors.cpu().double().flatten()
        blocks.append(found)
    above = 1 / (2 * partition.levels.highest**2)  # there the estimate is 0, and y has unit norm
    return TokenShares(torch.stack(blocks, 1), torch.full_like(hidden, above), hidden)


def walk_bound(
    told: Callable[[Tensor, float, Tensor | None, float], Tensor],
    clean: Tensor,
    levels: Sequence[float],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Upper bounds of -log p(token) in nats [M] when a token is drawn along K levels (`theory.categorical.bridge`).

    z_1 to z_K are ever less noisy versions of y, each z_k = z_{k+1} + more noise. A walk draws v from p(v | z_k) and
    z_{k+1} from q(z_{k+1} | z_k, v); so its p(z_{k+1} | z_k) is a mixture, whose distance from q(z_{k+1} | z_k, y) is
    exact (the ELBO of a chain: [VDM] section 2, here with a discrete target). In all:

        -log p(y) <= E[-log p(y|z_K) + sum over k < K of (log p(y|z_k, z_{k+1}) - log p(y|z_k))] + 1 / (2 sigma_1^2)

    For posteriors of one p(y|x) the sum telescopes to -log p(y|x) at any K; with K it comes to `token_bound`.

    Args:
        told: (z, sigma, z', sigma') -> log p(y | z, z') - log p(y | z) [M], where z' at the lower level sigma' is added
            to what is known; without z' (None, 0) it is known that the token is y, and what remains is -log p(y | z).
        clean: y [N, R, D]. levels: sigma of the K levels, falling.
    """
    z = add_noise(clean, clean.new_full((len(clean),), levels[-1]), generator=generator)
    total = told(z, levels[-1], None, 0.0).cpu().double()
    for level, following in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
        more = clean.new_full((len(clean),), (level**2 - following**2) ** 0.5)
        noisier = add_noise(z, more, generator=generator)
        total += told(noisier, level, z, following).cpu().double()
        z = noisier
    return total + 1 / (2 * levels[0] ** 2)


def _strata(
    low: float, length: float, count: int, parts: int, device: torch.device, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """`parts` levels for each of `count` samples, one in each part of equal length in log sigma."""
    for part in range(parts):
        share = (part + _shares((count,), device, generator)) / parts
        yield (low * torch.exp(length * share)).float()


def _shares(count: tuple[int, ...], device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1) with as many digits as the device has."""
    return uniform(*count, generator=generator, device=device, dtype=widest(device))


def _hidden_pixels(clean: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """-log p(y | z) at the lowest level, where each pixel is read off z alone [N]."""
    values = torch.arange(GREYS, dtype=torch.float64) / ((GREYS - 1) / 2) - 1
    pixels = clean.cpu().double().flatten(1)
    noisy = pixels + sigma * normal_like(wide(clean).flatten(1), generator).cpu().double()
    nearest = ((pixels + 1) * (GREYS - 1) / 2).round().long()
    found = []
    for z, right in zip(noisy, nearest, strict=True):
        log_p = (-((z[:, None] - values) ** 2) / (2 * sigma**2)).log_softmax(1)
        found.append(-log_p.gather(1, right[:, None]).sum())
    return torch.stack(found)
