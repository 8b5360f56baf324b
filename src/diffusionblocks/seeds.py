"""Random numbers that depend on what they are for, not on what ran before.

Every random decision draws from a seed derived from the run's seed and the decision's own coordinates (block, step,
epoch ...). So a resumed run, and blocks trained apart, meet the same numbers as an uninterrupted run in one process,
and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *coordinates: str | int) -> int:
    """A 63-bit seed, the same on every machine and in every process."""
    text = "/".join(map(str, (seed, *coordinates)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
