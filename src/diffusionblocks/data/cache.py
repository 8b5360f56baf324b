"""Where caches of data are, and how a file in them is known to be whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder(chosen: str = "") -> Path:
    """Where caches go: data.cache_dir, else below the user's cache folder."""
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusionblocks"


def publish(partial: Path, folder: Path, proof: str) -> None:
    """Moves what was made in `partial` to its place; keeps what another process put there first (`proof` is a file of it)."""
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / proof).is_file():
            raise


def file_hash(path: Path) -> str:
    """Of a file's content; `missing` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return "missing"
