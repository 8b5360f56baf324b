"""Random numbers that depend on what they are for, not on what ran before.

Every random decision draws from a seed derived from the run's seed and the decision's own coordinates (block, step,
epoch ...). So a resumed run, and blocks trained apart, meet the same numbers as an uninterrupted run in one process,
and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *coordinates: str | int) -> int:
    """A 63-bit seed, the same on every machine and in every process."""
    text = "/".join(map(str, (seed, *coordinates)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own on `device`. Equal seeds give equal numbers on equal kinds of device; a CPU's differ from
    a card's."""
    return torch.Generator(torch.device(device)).manual_seed(seed)


def seed_own(seed: int, device: torch.device | str) -> None:
    """Seeds torch's own generators, the CPU's and the device's.

    `torch.manual_seed` does so too, but also writes down the stack for every kind of device that is not in use, which
    costs a step half a millisecond.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if kind == "cuda":
        torch.cuda.manual_seed_all(seed)


def uniform(
    *size: int,
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers in [0, 1), drawn where they are used: on the generator's device, or on `device` from torch's own
    generator."""
    where = device if generator is None else generator.device
    return torch.rand(size, generator=generator, device=where, dtype=dtype)


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers of the shape, type and device of `tensor`, which must be the generator's. Drawn in fp32
    for types that are narrower, so that precision does not change them."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=wide).to(tensor.dtype)


class Draws:
    """All randomness of one step, on the device that it runs on: noise levels, noise and masks come from `generator`,
    what layers draw for themselves (dropout) from torch's own generators.

    A pure function of its arguments, so a step that is made again, resumed or made elsewhere draws the same.

    Args:
        seed: of the run. device: of the step. coordinates: which step it is: block, its own step, part of the batch.
    """

    def __init__(self, seed: int, device: torch.device | str, *coordinates: str | int) -> None:
        self.seed, self.coordinates = seed, coordinates
        self.generator = generator(derive(seed, "step", *coordinates), device)

    def number(self, what: str) -> int:
        """A seed for a decision that the host takes, such as how often a loop runs."""
        return derive(self.seed, what, *self.coordinates)

    def seed_layers(self) -> None:
        """Seeds torch's own generators, before a forward pass."""
        seed_own(self.number("layers"), self.generator.device)

    @classmethod
    def new(cls, device: torch.device | str) -> Draws:
        """For a step that nobody numbered: seeded by torch's own generator."""
        return cls(int(torch.randint(1 << 62, (1,))), device)
