"""Which block owns which noise levels, and which layers.

One function, `Partition.block_of`, maps a level to its block; training, evaluation and sampling all call it.
Block 0 owns the HIGHEST range: it holds the first layers and meets pure noise first ([DB] section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.seeds import uniform
from diffusionblocks.system.devices import wide
from diffusionblocks.theory.noise import LevelDistribution, MaskingSchedule

Blocks = int | range  # one block, or neighbours that learn as one


class NoiseRange(NamedTuple):
    """Levels in [low, high], which hold the mass between low_mass and high_mass."""

    low: float
    high: float
    low_mass: float
    high_mass: float


class Partition:
    """B noise ranges, each widened by `overlap` for training.

    Args:
        levels: distribution of levels over mass.
        num_blocks: B.
        overlap: gamma of [DB]: a training range grows on both sides by gamma times its length (in log sigma for
            Gaussian noise). Ownership (`block_of`) never overlaps.
        borders: `equal-mass` ([DB]), or `uniform`: ranges of equal length (in log sigma), the paper's ablation.
    """

    def __init__(
        self, levels: LevelDistribution, num_blocks: int, overlap: float = 0.05, borders: str = "equal-mass"
    ) -> None:
        if num_blocks < 1:
            raise UserError(f"num_blocks must be at least 1, got {num_blocks}")
        if overlap < 0:
            raise UserError(f"overlap must not be negative, got {overlap}")
        self.levels, self.num_blocks, self.overlap = levels, num_blocks, overlap
        shares = torch.linspace(0, 1, num_blocks + 1, dtype=torch.float64, device="cpu")
        # Ascending, exactly [lowest, ..., highest]: the ends are part of the first and last range.
        self.boundaries = levels.between(shares) if borders == "uniform" else levels.level(shares)
        self.boundaries[0], self.boundaries[-1] = levels.lowest, levels.highest
        self._ranges: dict[tuple[Blocks, bool], NoiseRange] = {}  # every step asks for its own
        self._means: dict[Blocks, float] = {}

    def block_of(self, level: Tensor) -> Tensor:
        """Index of the block that owns each level; same shape, int64. A boundary belongs to the block below it, which
        denoises from there.

        Raises UserError when a level lies outside [lowest, highest].
        """
        level = wide(level)
        if bool((level < self.levels.lowest * (1 - 1e-6)).any() | (level > self.levels.highest * (1 + 1e-6)).any()):
            raise UserError(
                f"level outside [{self.levels.lowest}, {self.levels.highest}]: got {level.min():g} to {level.max():g}"
            )
        inner = self.boundaries[1:-1].to(level)
        # A level read back in single precision may miss its own boundary by a rounding: accept 1e-6 relative.
        return self.num_blocks - 1 - torch.searchsorted(inner * (1 + 1e-6), level.contiguous())

    def range(self, block: Blocks, *, widened: bool = False) -> NoiseRange:
        """The range that `block` owns, or the wider one that it trains on. Of several neighbouring blocks: their ranges
        as one."""
        if (known := self._ranges.get((block, widened))) is not None:
            return known
        first, last = (block, block) if isinstance(block, int) else (block[0], block[-1])
        self._check(first)
        self._check(last)
        low = self.boundaries[self.num_blocks - 1 - last].item()
        high = self.boundaries[self.num_blocks - first].item()
        if widened:
            low, high = self.levels.widen(low, high, self.overlap)
        low_mass, high_mass = self.levels.mass(torch.tensor([low, high], dtype=torch.float64)).tolist()
        found = NoiseRange(low, high, low_mass, high_mass)
        self._ranges[block, widened] = found
        return found

    def sample(self, block: Blocks, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`count` training levels of `block`, or of several that learn as one, [count], uniform in mass over its
        widened range; on the generator's device."""
        span = self.range(block, widened=True)
        mass = uniform(count, generator=generator)
        return self.levels.level(span.low_mass + (span.high_mass - span.low_mass) * mass)

    def spread(self, block: Blocks, count: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`count` training levels of `block`, or of several that learn as one, at even distances with one random
        offset, and weights [count] that make a mean over them a mean over mass. Masking schedules only: they are
        uniform in t, not in mass.

        Even distances lower the variance of the loss (low discrepancy: [VDM] appendix I.1, [MD4] section 4).
        """
        schedule = self.levels
        assert isinstance(schedule, MaskingSchedule)
        span = self.range(block, widened=True)
        offset = uniform(1, generator=generator)
        shares = (offset + torch.arange(count, device=offset.device) / count) % 1
        levels = span.low + (span.high - span.low) * shares
        return levels, schedule.slope(levels) * (span.high - span.low) / (span.high_mass - span.low_mass)

    def mean_mass(self, block: Blocks) -> float:
        """Of the levels that `spread` draws: the share of a text that is masked, on average."""
        if block not in self._means:
            span = self.range(block, widened=True)
            shares = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
            self._means[block] = self.levels.mass(span.low + (span.high - span.low) * shares).mean().item()
        return self._means[block]

    def _check(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UserError(
                f"block {block} does not exist: there are {self.num_blocks} blocks, 0 to {self.num_blocks - 1}"
            )


def split_layers(num_layers: int, num_blocks: int, sizes: Sequence[int] | None = None) -> list[range]:
    """Layers of each block, in order. Equal parts, or the explicit `sizes` ([3, 6, 3] and the like).

    Raises UserError when the layers cannot be split so, naming what would work.
    """
    if sizes:
        if len(sizes) != num_blocks or min(sizes) < 1 or sum(sizes) != num_layers:
            raise UserError(
                f"layers per block {list(sizes)} must be {num_blocks} positive numbers with sum {num_layers}, "
                f"got {len(sizes)} with sum {sum(sizes)}"
            )
    else:
        divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        if num_blocks not in divisors:
            raise UserError(
                f"{num_layers} layers do not divide into {num_blocks} equal blocks; num_blocks can be "
                f"{', '.join(map(str, divisors))}, or give uneven sizes (--blocks.layers-per-block) that add up to "
                f"{num_layers}"
            )
        sizes = [num_layers // num_blocks] * num_blocks
    ends = list(accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
