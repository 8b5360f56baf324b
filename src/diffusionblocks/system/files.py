"""Files that this package writes and reads back: whole or not at all, with a hash inside, and one message for a damaged
one.

A sealed file carries the hash of its own content: JSON in the key `blake2b`, YAML in a comment on its last line. So a
file that was changed or cut is told from a good one without a second file that could disagree. Files that older
versions wrote have no seal and are taken as they are, where their shape is right.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.errors import DiskFull, Failed, UserError

SEAL = "blake2b"
PARTIAL = ".partial"  # at the end of the name of what is not yet whole
_FIRST_LINE = "# written by diffusionblocks: the last line has a hash of all others\n"  # so that a cut is seen
_LAST_LINE = "# blake2b: "


class Damaged(UserError):
    """A file of this package's own that is cut or changed. fix: what to do about it."""

    def __init__(self, path: Path, reason: str, fix: str = "") -> None:
        super().__init__(f"{path} is damaged: {reason}" + (f"; {fix}" if fix else ""))
        self.path, self.reason = path, reason


# ---------------------------------------------------------------- whole or not at all


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        flush(partial)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when everything went well and is removed otherwise.

    Raises DiskFull or UserError where the system refuses.
    """
    path = _target(path)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout and the like stay what they are
            yield path
            return
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def replacing_folder(path: Path, instead: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to fill, whose files take their place in `path` when everything went well; it is removed otherwise.

    Other files that `path` holds stay, but for those of the patterns `instead`. Each file is whole or not there.

    Raises DiskFull or UserError where the system refuses.
    """
    path = _target(path)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write the folder {path}: a file is there")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            if not path.exists():
                os.replace(partial, path)
                return
            made = sorted(file for file in partial.rglob("*") if file.is_file())
            for file in made:
                target = path / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            new = {file.name for file in made}
            for old in {old for pattern in instead for old in path.glob(pattern) if old.name not in new}:
                old.unlink()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _target(path: Path) -> Path:
    """Where a link leads, so that it stays one; a link that leads nowhere is a place like any other."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with what is in it, where that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk, where the system can say that."""
    if os.name == "nt":
        return
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


def read_json(path: Path, shape: Mapping[str, Any] | None = None, fix: str = "") -> dict[str, Any]:
    """The object in a file that `write_json` wrote, without its seal.

    Args:
        shape: keys that must be there, each with the type of its value, or a dict that is the shape of an object.
        fix: what a user can do about a damaged one.

    Raises Damaged where the file is no JSON object, has another content than was written, or lacks a key.
    """
    try:
        content = json.loads(read_text(path), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Damaged(path, getattr(error, "reason", "it is not valid JSON"), fix) from None
    if not isinstance(content, dict):
        raise Damaged(path, f"it holds a {type(content).__name__}, not an object", fix)
    if SEAL in content and content.pop(SEAL) != _seal(content):
        raise Damaged(path, "its content is not what was written", fix)
    if (wrong := misfit(content, shape or {})) is not None:
        raise Damaged(path, wrong, fix)
    return content


def is_sealed(path: Path) -> bool:
    """Whether a JSON object that can be read has a seal: this version wrote it."""
    return SEAL in json.loads(read_text(path))


def misfit(content: Mapping[str, Any], shape: Mapping[str, Any], name: str = "") -> str | None:
    """What a JSON object lacks of a shape; None where it has all of it."""
    for key, kind in shape.items():
        full = f"{name}.{key}" if name else key
        if key not in content:
            return f"{full} is missing"
        value, expected = content[key], dict if isinstance(kind, Mapping) else kind
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"{full} is a {type(value).__name__}"
        if isinstance(kind, Mapping) and (wrong := misfit(value, kind, full)) is not None:
            return wrong
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_text(path: Path) -> str:
    """A UTF-8 file of this package's own. Raises Damaged where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Damaged(path, "it is not valid UTF-8") from None
    if "\0" in text:
        raise Damaged(path, "it holds NUL characters")
    return text


# ---------------------------------------------------------------- other text


def sealed(text: str) -> str:
    """Text with the hash of it in a comment on a last line."""
    text = _FIRST_LINE + text
    return text + _LAST_LINE + _hash(text) + "\n"


def unsealed(text: str, path: Path) -> str:
    """The inverse of `sealed`; text without a seal stays as it is. Raises Damaged where the text was changed."""
    if not text.startswith(_FIRST_LINE):
        if _LAST_LINE in text or _FIRST_LINE.startswith(text):
            raise Damaged(path, "its first line is not what was written", _ON_PURPOSE)
        return text
    body, _, seal = text.rpartition(_LAST_LINE)
    if seal != _hash(body) + "\n":
        raise Damaged(path, "its content is not what was written", _ON_PURPOSE)
    return body.removeprefix(_FIRST_LINE)


_ON_PURPOSE = "if it was changed on purpose, remove its first and its last line"


def has_seal(path: Path) -> bool:
    """Whether this package wrote a text file, damaged or not."""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        return _FIRST_LINE.encode() in content or _LAST_LINE.encode() in content
    return False


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def there(path: Path, fix: str = "") -> bool:
    """Whether a file that may be missing is there. Raises Damaged where something else is."""
    if not path.is_file() and os.path.lexists(path):
        raise Damaged(path, "it is no file", fix)
    return path.is_file()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(stream, "blake2b").hexdigest()[:32]}


# ---------------------------------------------------------------- what the system refuses

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PLACE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY),
)


def explained(error: BaseException, path: Path | None = None) -> Exception | None:
    """What to tell a user when the system refused to read or write: DiskFull, UserError for a wrong place, Failed for
    anything else that it says, or None for an error that is not the system's.

    Libraries wrap the system's error in types of their own and keep only its text. path: what was to be written, where
    that is known.
    """
    text, code = " ".join(str(error).split()), getattr(error, "errno", None)
    if isinstance(error, ValueError) and "null byte" in text:
        return UserError("a path holds a NUL character, which no file can have in its name")
    found = re.search(r"\(os error (\d+)\)", text)
    code = int(found.group(1)) if code is None and found else code
    where = path or getattr(error, "filename", None)
    where = where if len(str(where)) <= 300 else f"{str(where)[:100]}..."
    if "/torch_" in text and (code in _FULL or "No space left" in text):
        return Failed("shared memory (/dev/shm) is full: --train.num-workers 0 loads data without it")
    if code in _FULL or "No space left" in text:
        place = f": cannot write {where}" if where else ""
        return DiskFull(f"the disk is full{place}; free some space and run the same command again")
    if code is None or not (isinstance(error, OSError) or code in _WRONG_PLACE):
        return None
    reason = os.strerror(code)
    said = f"cannot {'write' if path else 'use'} {where}: {reason}" if where else f"{reason}: {text[:200]}"
    return (UserError if code in _WRONG_PLACE else Failed)(said)


@contextlib.contextmanager
def told(path: Path | None = None) -> Iterator[None]:
    """What the system refuses becomes DiskFull or UserError. path: what is written there."""
    try:
        yield
    except (UserError, Failed):
        raise
    except Exception as error:
        if (better := explained(error, path)) is None:
            raise
        raise better from error
