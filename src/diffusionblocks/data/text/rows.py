"""What rows of tables hold, and which of them are left out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from diffusionblocks.errors import UserError

log = logging.getLogger("diffusionblocks")
SURROGATES = re.compile("[\ud800-\udfff]")
SKIP = "pass --data.skip-unreadable to leave such rows and files out"


class LeftOut:
    """Rows and files that cannot be read: the first ends it with its error, or all are counted
    (`data.skip_unreadable`)."""

    def __init__(self, skip: bool) -> None:
        self.skip, self.count, self.first = skip, 0, ""

    def __call__(self, reason: str, remedy: str = "") -> None:
        """Raises UserError with the reason, and what can be done about it, unless such rows are left out."""
        if not self.skip:
            raise UserError(f"{reason}; repair it, {remedy}{', ' if remedy else ''}or {SKIP}")
        self.count += 1
        self.first = self.first or reason


def say(left: Mapping[str, Any]) -> None:
    """Logs what was left out: `count` and `first`."""
    log.warning("left out %d unreadable rows or files of the text; the first: %s", left["count"], left["first"])


def text_of(value: Any, what: str, where: str, errors: str = "strict") -> str:
    """The text that a row holds; an empty one where it is missing.

    Args:
        what: names the value. errors: `strict`, or `replace` for what is not Unicode (half a surrogate pair, which JSON
            can spell; bytes that are not UTF-8).

    Raises UserError where it is no text.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):  # as some writers of Parquet store text
        try:
            return value.decode("utf-8", errors=errors)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: {what} is not valid UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be text, got {_short(value)} ({type(value).__name__})")
    if value.isascii() or not (found := SURROGATES.search(value)):
        return value
    if errors == "replace":
        return SURROGATES.sub("\ufffd", value)
    raise UserError(f"{where}: {what} has half a character (\\u{ord(found[0]):x}, a lone surrogate) at {found.start()}")


def _short(value: Any) -> str:
    return ascii(value)[:60]
