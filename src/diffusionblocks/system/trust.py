"""Consent to run code that comes with data. Nothing that a recipe or a run folder says is consent: a file is somebody
else's.

The command line gives it with `--trust-remote-code` and `--trust-inception`, Python with

    with diffusionblocks.trusting(remote_code=True):
        recipe = load_recipe("theirs.yaml")

Objects that Python code makes itself (`ModelConfig(trust_remote_code=True)`) say what they want, and are not asked
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """remote_code: Python code in the repositories of models and tokenizers. inception: a TorchScript file, which is
    code too."""

    remote_code: bool = False
    inception: bool = False


_given: ContextVar[Trust] = ContextVar("diffusionblocks_trust", default=Trust())  # noqa: B039  (frozen)


@contextlib.contextmanager
def trusting(*, remote_code: bool = False, inception: bool = False) -> Iterator[None]:
    """Inside, recipes and run folders that are read may name such code, and it runs. What is not named here is not
    trusted inside, whatever surrounds it."""
    before = _given.set(Trust(remote_code, inception))
    try:
        yield
    finally:
        _given.reset(before)


def trusted() -> Trust:
    """What may run now."""
    return _given.get()
