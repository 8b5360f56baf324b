"""Where caches of data are, how they are made whole or not at all, and how a file in them is known to be whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from diffusionblocks.errors import Failed, UserError
from diffusionblocks.system.files import explained, remove
from diffusionblocks.system.run_folder import is_alive

CHOOSE = "pass --data.cache-dir FOLDER to keep caches elsewhere"


def cache_folder(chosen: str = "") -> Path:
    """Where caches go: data.cache_dir, else below the user's cache folder."""
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusionblocks"


@contextlib.contextmanager
def making(path: Path, remedy: str = CHOOSE) -> Iterator[Path]:
    """A place beside `path`, of this process alone, to make it in, not there yet. It is removed
    afterwards, as is what killed processes left. remedy: how to keep caches elsewhere.

    Raises DiskFull or UserError where the system refuses to write.
    """
    host = socket.gethostname()
    partial = path.with_name(f"{path.name}.{host}.{os.getpid()}")
    try:
        with writable(path.parent, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(path, host)
            yield partial
    finally:
        remove(partial)


@contextlib.contextmanager
def writable(folder: Path, remedy: str = CHOOSE) -> Iterator[None]:
    """What the system refuses in a cache becomes DiskFull or UserError."""
    try:
        yield
    except (UserError, Failed):
        raise
    except Exception as error:
        better = explained(error)
        if better is None and isinstance(error, OSError):
            better = UserError(str(error))
        if isinstance(better, UserError):
            better = UserError(f"cannot write the cache in {folder} ({better}); {remedy}")
        if better is None:
            raise
        raise better from None


def _clear_leftovers(path: Path, host: str) -> None:
    """Removes what processes of this machine that are no longer alive left of making `path`."""
    for found in path.parent.glob(f"{path.name}.*"):
        where, _, number = found.name.removeprefix(f"{path.name}.").rpartition(".")
        if where in ("", host) and number.isdecimal() and not is_alive(int(number)):
            remove(found)


def publish(partial: Path, folder: Path, proof: str) -> None:
    """Moves what was made in `partial` to its place; keeps what another process put there first (`proof` is a file of
    it)."""
    if folder.is_dir() and not (folder / proof).is_file():  # half removed
        remove(folder)
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
