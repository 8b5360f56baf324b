"""Sizes of memory, read and written."""

from __future__ import annotations

import re

from diffusionblocks.errors import UserError

UNITS = {"B": 1} | {p + s: b**e for e, p in enumerate("KMGT", 1) for s, b in (("iB", 1024), ("B", 1000))}
LARGEST = 1 << 50


def parse_memory(text: str) -> int:
    """`16GiB`, `24 GB`, `512MiB` -> bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): (unit, size) for unit, size in UNITS.items()}
    if match and not match[2]:
        raise UserError(f"memory {text!r} has no unit; write {match[1]}GiB")
    if not match or match[2].lower() not in units:
        raise UserError(f"memory {text!r} is not a size; write a number and a unit, such as 16GiB or 24GB")
    size = float(match[1]) * units[match[2].lower()][1]
    if not 1 << 20 <= size <= LARGEST:
        raise UserError(f"memory {text!r} is out of range; cards have between 1MiB and 1024TiB")
    return int(size)


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
