"""Files that this package writes and reads back: whole or not at all, with a hash inside, and one message for a damaged one.

A sealed file carries the hash of its own content: JSON in the key `blake2b`, YAML in a comment on its last line. So a file that was
changed or cut is told from a good one without a second file that could disagree. Files that older versions wrote have no seal and
are taken as they are, where their shape is right.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusionblocks.errors import DiskFull, Failed, UserError

SEAL = "blake2b"
PARTIAL = ".partial"  # at the end of the name of what is not yet whole
_LAST_LINE = "# diffusionblocks, blake2b of the lines above: "


class Damaged(UserError):
    """A file of this package's own that is cut or changed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason})")
        self.path, self.reason = path, reason


# ---------------------------------------------------------------- whole or not at all


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        flush(partial)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when everything went well and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, whose files take their place in `path` when everything went well; it is removed otherwise.

    Other files that `path` holds stay. Each file is whole or not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write the folder {path}: a file is there")
    partial = path.with_name(f"{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if not path.exists():
            os.replace(partial, path)
            return
        for file in sorted(file for file in partial.rglob("*") if file.is_file()):
            target = path / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- JSON


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes. Raises Failed for a number that JSON does not have, naming where it is."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        where = next(not_finite(content), "somewhere")
        raise Failed(f"{where} is not a finite number: it cannot be written as JSON") from None


def not_finite(content: Any, name: str = "") -> Iterator[str]:
    """Names (dotted) of the numbers in nested lists and dicts that are NaN or infinite."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from not_finite(value, f"{name}[{index}]")
    elif isinstance(content, float) and content - content != 0:
        yield name


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object with its seal."""
    content = json.loads(to_json(content))  # as it will be read: keys are text, and sorted as such in the seal
    write_text(path, to_json({**content, SEAL: _seal(content)}, indent=2) + "\n")


def read_json(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The object in a file that `write_json` wrote, without its seal.

    Args:
        shape: keys that must be there, each with the type (or tuple of types) of its value.

    Raises Damaged where the file is no JSON object, has another content than was written, or lacks a key.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise Damaged(path, "it is not valid JSON") from None
    if not isinstance(content, dict):
        raise Damaged(path, f"it holds a {type(content).__name__}, not an object")
    if SEAL in content and content.pop(SEAL) != _seal(content):
        raise Damaged(path, "its content is not what was written")
    for key, kind in (shape or {}).items():
        if key not in content:
            raise Damaged(path, f"{key} is missing")
        if not isinstance(content[key], kind) or (isinstance(content[key], bool) and kind in (int, float)):
            raise Damaged(path, f"{key} is a {type(content[key]).__name__}")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_text(path: Path) -> str:
    """A UTF-8 file of this package's own. Raises Damaged where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Damaged(path, "it is not valid UTF-8") from None


# ---------------------------------------------------------------- other text


def sealed(text: str) -> str:
    """Text with the hash of it in a comment on a last line."""
    return text + _LAST_LINE + _hash(text) + "\n"


def unsealed(text: str, path: Path) -> str:
    """The inverse of `sealed`; text without a seal stays as it is. Raises Damaged where the text was changed."""
    body, found, seal = text.rpartition(_LAST_LINE)
    if not found:
        return text
    if seal.strip() != _hash(body):
        raise Damaged(path, "its content is not what was written")
    return body


def has_seal(path: Path) -> bool:
    """Whether this package wrote a text file, damaged or not."""
    with contextlib.suppress(OSError):
        return _LAST_LINE.encode() in path.read_bytes()
    return False


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(stream, "blake2b").hexdigest()[:32]}


# ---------------------------------------------------------------- what the system refuses

_FULL = (errno.ENOSPC, errno.EDQUOT)


def explained(error: BaseException) -> Exception | None:
    """What to tell a user when the system refused to read or write: DiskFull, UserError, or None for any other error.

    Libraries wrap the system's error in types of their own and keep only its text.
    """
    text = str(error)
    if getattr(error, "errno", None) in _FULL or "No space left" in text or "os error 28" in text:
        where = getattr(error, "filename", None)
        return DiskFull(
            f"the disk is full{f': cannot write {where}' if where else ''}; free some space and run it again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        other = f" ({error.filename2})" if error.filename2 else ""
        return UserError(f"cannot use {error.filename}{other}: {error.strerror or type(error).__name__}")
    for code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        if f"os error {code})" in text or getattr(error, "errno", None) == code:
            return UserError(f"cannot write there: {' '.join(text.split())[:200]}")
    return None


def told(function: Callable[[], Any]) -> Any:
    """Calls a function; what the system refuses becomes DiskFull or UserError."""
    try:
        return function()
    except (UserError, Failed):
        raise
    except Exception as error:
        if (better := explained(error)) is None:
            raise
        raise better from error
