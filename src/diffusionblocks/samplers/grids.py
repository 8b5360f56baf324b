"""Grids of noise levels, highest first."""

from __future__ import annotations

import torch

from diffusionblocks.errors import UserError
from diffusionblocks.noise import LevelDistribution


def equal_mass(levels: LevelDistribution, steps: int) -> list[float]:
    """`steps` levels at equal distances in mass, from the highest to the lowest inclusive (released code of [DB])."""
    return _at(levels, torch.linspace(1, 0, _checked(steps), dtype=torch.float64))


def equal_mass_tops(levels: LevelDistribution, steps: int) -> list[float]:
    """The upper ends of `steps` ranges of equal mass: like `equal_mass`, without the level where nothing is hidden."""
    return _at(levels, torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64)[:-1])


def _at(levels: LevelDistribution, mass: torch.Tensor) -> list[float]:
    grid = levels.level(mass)
    grid[mass == 1], grid[mass == 0] = levels.highest, levels.lowest  # exact ends, not their round trip
    return grid.tolist()


def _checked(steps: int) -> int:
    if steps < 1:
        raise UserError(f"sampling needs at least 1 step, got {steps}")
    return steps
