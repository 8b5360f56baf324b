"""Grids of noise levels, highest first. A sampler that is to end on a clean target gets `[*grid, 0.0]`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusionblocks.errors import UserError
from diffusionblocks.theory.noise import LevelDistribution

RHO = 7.0  # [EDM] table 1


def rho(levels: LevelDistribution, steps: int) -> list[float]:
    """`steps` levels at equal distances in sigma^(1/7), from the highest to the lowest inclusive ([EDM] eq. 5)."""
    ends = torch.tensor([levels.highest, levels.lowest], dtype=torch.float64) ** (1 / RHO)
    grid = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, _checked(steps), dtype=torch.float64)) ** RHO
    return _exact_ends(grid, levels)


def equal_mass(levels: LevelDistribution, steps: int) -> list[float]:
    """`steps` levels at equal distances in mass, from the highest to the lowest inclusive (released code of [DB])."""
    return _exact_ends(levels.level(torch.linspace(1, 0, _checked(steps), dtype=torch.float64)), levels)


def equal_mass_tops(levels: LevelDistribution, steps: int) -> list[float]:
    """The upper ends of `steps` ranges of equal mass: like `equal_mass`, without the level where nothing is hidden."""
    grid = levels.level(torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64))
    return _exact_ends(grid, levels)[:-1]


GRIDS: dict[str, Callable[[LevelDistribution, int], list[float]]] = {"rho": rho, "equal-mass": equal_mass}


def _exact_ends(grid: torch.Tensor, levels: LevelDistribution) -> list[float]:
    """The grid with its ends as they are, not as their round trip gives them."""
    grid[0] = levels.highest
    if len(grid) > 1:
        grid[-1] = levels.lowest
    return grid.tolist()


def _checked(steps: int) -> int:
    if steps < 1:
        raise UserError(f"sampling needs at least 1 step, got {steps}")
    return steps
