"""Errors a user can fix. The command line turns each into one line and exit code 2."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong: says what was got, what was needed and the nearest fix."""


class Failed(Exception):
    """Something went wrong that is not the user's input: one line, exit code 1."""


class OutOfMemory(Failed):
    """The device is full: the message says what was predicted and seen, and what would fit."""


class DiskFull(Failed):
    """The disk is full: nothing is half written, and what was there before is still there."""


class RunStopped(Exception):
    """Ctrl-C or SIGTERM during training: the message says where the checkpoint is. signal: which of the two came."""

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or the list of known names."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def quiet_hub() -> None:
    """Silences the retries that huggingface_hub announces one by one; the error that ends them says it once."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
