"""Noise levels as functions of a mass coordinate u in [0, 1].

Every distribution maps a level to the share of mass at or below it (`mass`) and back (`level`). Higher
level = more noise = larger mass, so equal shares of mass are equal shares of work, whatever the unit of
the level: sigma for Gaussian noise, t for masking.

Symbols follow [EDM] (Karras et al. 2022, arXiv 2206.00364) and [DB] (DiffusionBlocks, arXiv 2506.14202).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from diffusionblocks.errors import UserError
from diffusionblocks.system.devices import wide


class LevelDistribution(ABC):
    """A strictly increasing map between levels in [lowest, highest] and mass in [0, 1]."""

    lowest: float
    highest: float
    unit = "sigma"

    @abstractmethod
    def mass(self, level: Tensor) -> Tensor:
        """Share of mass at or below `level`. Any shape; levels outside the support are clipped."""

    @abstractmethod
    def level(self, mass: Tensor) -> Tensor:
        """The level at which `mass` is reached: the inverse of `mass`. Any shape, values in [0, 1]."""

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """A range widened on both sides by `overlap` times its own length, clipped to the support."""
        margin = overlap * (high - low)
        return max(low - margin, self.lowest), min(high + margin, self.highest)

    def between(self, share: Tensor) -> Tensor:
        """The levels that lie at a `share` of the distance from lowest to highest. Any shape."""
        return self.lowest + (self.highest - self.lowest) * share


class _GaussianLevels(LevelDistribution):
    """Levels are sigma > 0; lengths of ranges are measured in log sigma ([DB] section 3.3)."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.lowest, self.highest = float(sigma_min), float(sigma_max)

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        factor = (high / low) ** overlap
        return max(low / factor, self.lowest), min(high * factor, self.highest)

    def between(self, share: Tensor) -> Tensor:
        return self.lowest * (self.highest / self.lowest) ** share


class LogNormal(_GaussianLevels):
    """log sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max] ([EDM] table 1, [DB] section 3.3)."""

    def __init__(
        self,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        if p_std <= 0:
            raise UserError(f"p_std must be positive, got {p_std}")
        self.p_mean, self.p_std = float(p_mean), float(p_std)
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64, device="cpu")
        self._low, self._high = self._cdf(ends).tolist()

    def _cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)

    def mass(self, level: Tensor) -> Tensor:
        cdf = self._cdf(wide(level).clamp(self.lowest, self.highest))
        return ((cdf - self._low) / (self._high - self._low)).to(level.dtype)

    def level(self, mass: Tensor) -> Tensor:
        cdf = self._low + (self._high - self._low) * wide(mass).clamp(0, 1)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(cdf))
        return sigma.clamp(self.lowest, self.highest).to(mass.dtype)


class MaskingSchedule(LevelDistribution):
    """Masked diffusion: level t in [0, 1], alpha(t) = share still unmasked, mass = 1 - alpha(t) ([DB] app. D, [MD4]).

    `linear`: alpha = 1 - t. `cosine`: alpha = 1 - cos(pi/2 (1 - t)) ([MD4] table 4).
    """

    lowest, highest = 0.0, 1.0
    unit = "t"

    def __init__(self, kind: str = "linear") -> None:
        if kind not in ("linear", "cosine"):
            raise UserError(f"masking schedule must be 'linear' or 'cosine', got {kind!r}")
        self.kind = kind

    def mass(self, level: Tensor) -> Tensor:
        t = level.clamp(0, 1)
        return t if self.kind == "linear" else torch.cos(math.pi / 2 * (1 - t))

    def level(self, mass: Tensor) -> Tensor:
        u = mass.clamp(0, 1)
        return u if self.kind == "linear" else 1 - torch.acos(u) * 2 / math.pi

    def slope(self, level: Tensor) -> Tensor:
        """-alpha'(t): the mass that a short stretch of t holds, per length. Any shape."""
        if self.kind == "linear":
            return torch.ones_like(level)
        return math.pi / 2 * torch.sin(math.pi / 2 * (1 - level.clamp(0, 1)))


class Information(_GaussianLevels):
    """Mass = share of a discrete target's entropy that noise still hides (information partition).

    For a target v drawn from `prior` with embedding e_v, z = e_v + sigma eps, and H(sigma) the entropy of v
    given z, mass(sigma) = H(sigma) / H(sigma_max). Drawing the mass uniformly spends equal training on equal
    shares of the nats that the target carries, whatever its dimension ([CDCD], Dieleman et al. 2022, learns such
    a warp). H is estimated once by Monte Carlo on a grid in log sigma, made monotone, and interpolated linearly.

    Args:
        table: target embeddings e_v [V, D].
        prior: probabilities [V]; uniform when None.
        least_hidden: the lowest level still hides this share of the entropy. Below it a batch teaches little, since
            the noisy target almost gives the answer away.
        samples: Monte-Carlo draws per grid point, fewer for tables of more than 128 rows. The draws are common to all
            points and seeded, so the same table always gives the same partition.
    """

    def __init__(
        self,
        table: Tensor,
        prior: Tensor | None = None,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        least_hidden: float = 0.0,
        samples: int = 4096,
        points: int = 257,
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        if not 0 <= least_hidden < 1:
            raise UserError(f"least_hidden is a share in [0, 1), got {least_hidden}")
        if len(table) > 128:
            samples, points = min(samples, max(128, (1 << 19) // len(table))), 65
        log_sigma = torch.linspace(math.log(sigma_min), math.log(sigma_max), points, dtype=torch.float64)
        entropy = _conditional_entropy(table, prior, log_sigma.exp(), samples)
        mass = torch.cummax(entropy, dim=0).values
        # A strictly increasing sliver keeps the map invertible where the entropy is flat (0 or saturated).
        mass = mass / mass[-1] + 1e-6 * torch.linspace(0, 1, points, dtype=torch.float64)
        if least_hidden > mass[0]:
            floor = torch.tensor([least_hidden], dtype=torch.float64)
            lowest, kept = _interpolate(floor, mass, log_sigma), mass > floor
            log_sigma, mass = torch.cat([lowest, log_sigma[kept]]), torch.cat([floor, mass[kept]])
            self.lowest = lowest.exp().item()
        mass = (mass - mass[0]) / (mass[-1] - mass[0])
        self._tables = {mass.device: (log_sigma, mass)}  # copied once to every device that asks

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """log sigma and mass at the points of the map, on the device of `like` and as precise."""
        if like.device not in self._tables:
            log_sigma, mass = next(iter(self._tables.values()))
            self._tables[like.device] = log_sigma.to(like), mass.to(like)
        return self._tables[like.device]

    def mass(self, level: Tensor) -> Tensor:
        log_sigma = wide(level).clamp(self.lowest, self.highest).log()
        return _interpolate(log_sigma, *self._table(log_sigma)).to(level.dtype)

    def level(self, mass: Tensor) -> Tensor:
        share = wide(mass).clamp(0, 1)
        log_sigmas, masses = self._table(share)
        log_sigma = _interpolate(share, masses, log_sigmas)
        return log_sigma.exp().clamp(self.lowest, self.highest).to(mass.dtype)

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """Overlap in mass: in log sigma the outermost ranges are so long that a share of them swallows neighbours."""
        low_mass, high_mass = self.mass(torch.tensor([low, high], dtype=torch.float64)).tolist()
        margin = overlap * (high_mass - low_mass)
        widened = self.level(torch.tensor([low_mass - margin, high_mass + margin], dtype=torch.float64)).tolist()
        return widened[0], widened[1]


def _conditional_entropy(table: Tensor, prior: Tensor | None, sigmas: Tensor, samples: int) -> Tensor:
    """H(v | z) in nats at each sigma, where z = e_v + sigma eps. table [V, D], sigmas [S] -> [S]."""
    generator = torch.Generator().manual_seed(0)
    table = table.detach().cpu().double()
    prior = torch.full((len(table),), 1.0 / len(table)) if prior is None else prior.detach().cpu()
    log_prior = (prior / prior.sum()).double().log()
    labels = torch.multinomial(log_prior.exp(), samples, replacement=True, generator=generator)
    # Only z @ table.T enters, and it is Gaussian with covariance table @ table.T: draw it in V dimensions if smaller.
    noise = torch.randn(samples, table.shape[1], generator=generator, dtype=torch.float64) @ table.T
    signal, half_norm = table[labels] @ table.T, table.square().sum(1) / 2
    entropies = []
    for sigma in sigmas:
        logits = log_prior + (signal - half_norm + sigma * noise) / sigma**2
        entropies.append(cross_entropy(logits, labels))
    return torch.stack(entropies)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear interpolation through (xs, ys), xs increasing; constant outside."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x0, x1 = xs[right - 1], xs[right]
    weight = ((x - x0) / (x1 - x0)).clamp(0, 1)
    return torch.lerp(ys[right - 1], ys[right], weight)


def unit_rows(table: Tensor) -> Tensor:
    """Rows scaled to unit L2 norm ([DB] section 5.1: targets are unit-norm embeddings)."""
    return normalize(table, dim=-1)
