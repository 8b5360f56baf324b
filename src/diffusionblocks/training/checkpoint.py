"""Checkpoints that are valid at every moment: written aside, checked by size and hash, renamed into place.

checkpoints/step-N/{shared,block-00,...}.safetensors   weights and moving averages
                   optimizer-{shared,block-00,...}.safetensors
                   state.json                          step counts, configuration, size and hash of every file
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from diffusionblocks.errors import UserError
from diffusionblocks.training.state import BlockState

log = logging.getLogger("diffusionblocks")


def save(folder: Path, step: int, states: Mapping[str, BlockState], progress: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-N below `folder` and removes all but the newest `keep`.

    Raises UserError when the disk is full; older checkpoints stay as they are.
    """
    root = folder / "checkpoints"
    final, partial = root / f"step-{step}", root / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, state in states.items():
            tensors = {key: tensor.contiguous() for key, tensor in state.tensors().items()}
            optimizer = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}
            weights = {key: tensor for key, tensor in tensors.items() if key not in optimizer}
            save_file(weights, str(partial / f"{name}.safetensors"))
            save_file(optimizer, str(partial / f"optimizer-{name}.safetensors"))
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        steps = {name: state.steps for name, state in states.items()}
        (partial / "state.json").write_text(
            json.dumps({"step": step, "steps": steps, **progress, "files": files}, indent=2)
        )
        for path in partial.iterdir():
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(root)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_full_disk(error):
            raise UserError(
                f"the disk is full: no checkpoint written at step {step}; the last one stays valid in {root}. "
                "Free some space and run the same command again"
            ) from None
        raise
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def existing(folder: Path) -> list[Path]:
    """Checkpoints below `folder`, oldest first; unchecked."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.removeprefix("step-")))


def restore_latest(folder: Path, states: Mapping[str, BlockState]) -> dict[str, Any] | None:
    """Loads the newest checkpoint that is whole; says which damaged ones it passed over. None when there is none.

    Raises UserError when it is of another network.
    """
    for path in reversed(existing(folder)):
        reason = damage(path)
        if reason:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path.name, reason)
            continue
        progress = json.loads((path / "state.json").read_text())
        for name, state in states.items():
            state.steps = progress["steps"][name]
            weights = load_file(str(path / f"{name}.safetensors"))
            optimizer = load_file(str(path / f"optimizer-{name}.safetensors"))
            known = state.tensors()
            if unknown := [key for key in weights if key.startswith("model.") and key not in known]:
                raise UserError(
                    f"checkpoint {path} is of another network or version: there is no {unknown[0].removeprefix('model.')} now; "
                    "train it again"
                )
            # Copies: a mapped file would keep the checkpoint's folder alive after it is removed.
            state.replace({key: tensor.clone() for key, tensor in {**weights, **optimizer}.items()})
        return progress
    return None


def damage(path: Path) -> str | None:
    """Why the checkpoint in `path` cannot be used; None when it is whole."""
    try:
        files = json.loads((path / "state.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "state.json is missing or unreadable"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != expected:
            return f"{name} is truncated or changed"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(stream, "blake2b").hexdigest()[:32]}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full_disk(error: BaseException) -> bool:
    # safetensors wraps the system's error in its own type and keeps only the text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
