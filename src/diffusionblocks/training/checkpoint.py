"""Checkpoints that are valid at every moment: finite, written aside, checked by size and hash, renamed into place.

checkpoints/step-N/{shared,block-00,...}.safetensors   weights and moving averages
                   optimizer-{shared,block-00,...}.safetensors
                   state.json                          step counts, progress, size and hash of every file and of itself
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionblocks.errors import DiskFull, UserError
from diffusionblocks.system import files
from diffusionblocks.system.run_folder import CHECKPOINTS, OLD
from diffusionblocks.training.state import BlockState

log = logging.getLogger("diffusionblocks")


KINDS = {"model": "weight", "average": "average of", "optimizer": "optimizer state"}


class NotFinite(UserError):
    """What would be written holds NaN or infinity."""


def save(folder: Path, step: int, states: Mapping[str, BlockState], progress: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-N below `folder` and removes all but the newest `keep`.

    Raises NotFinite where a tensor is not finite and DiskFull when the disk is full; older checkpoints stay as they
    are.
    """
    root = folder / CHECKPOINTS
    final, partial = root / f"step-{step}", root / f".partial-{step}"
    tensors = {name: state.tensors() for name, state in states.items()}
    for name, found in tensors.items():
        buffers = {f"model.{buffer}" for buffer in states[name].buffers}  # a mask may be infinite
        if (bad := not_finite({key: t for key, t in found.items() if key not in buffers})) is not None:
            kind, _, own = bad.partition(".")
            raise NotFinite(f"the {KINDS[kind]} {own} of {name} is not finite at step {step}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, found in tensors.items():
            optimizer = {key: t.contiguous() for key, t in found.items() if key.startswith("optimizer.")}
            save_file(optimizer, str(partial / f"optimizer-{name}.safetensors"))
            del optimizer
            weights = {key: t.contiguous() for key, t in found.items() if not key.startswith("optimizer.")}
            save_file(weights, str(partial / f"{name}.safetensors"))
        written = {path.name: files.fingerprint(path) for path in sorted(partial.iterdir())}
        steps = {name: state.steps for name, state in states.items()}
        files.write_json(partial / "state.json", {"step": step, "steps": steps, **progress, "files": written})
        for path in partial.iterdir():
            files.flush(path)
        if final.exists():  # of the same step: at no moment is there none
            shutil.rmtree(root / f"{OLD}{step}", ignore_errors=True)
            os.replace(final, root / f"{OLD}{step}")
        os.replace(partial, final)
        shutil.rmtree(root / f"{OLD}{step}", ignore_errors=True)
        files.flush(root)
    except BaseException as error:  # Ctrl-C too leaves nothing half written
        shutil.rmtree(partial, ignore_errors=True)
        better = files.explained(error)
        if isinstance(better, DiskFull):
            kept = existing(folder)
            left = f"{kept[-1]} stays valid" if kept else "there is none yet"
            raise DiskFull(
                f"the disk is full: no checkpoint written at step {step}; {left}. Free some space and run the same "
                "command again"
            ) from None
        if better is not None:
            raise better from None
        raise
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity; None where there is none. Waits for the device once."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    ends: dict[torch.device, list[Tensor]] = {}  # NaN in a tensor is its least and its largest number
    for tensor in numbers.values():
        ends.setdefault(tensor.device, []).extend(end.float() for end in tensor.aminmax())
    if all(bool(torch.stack(found).isfinite().all()) for found in ends.values()):
        return None
    return next((name for name, tensor in numbers.items() if not tensor.isfinite().all()), None)


def existing(folder: Path) -> list[Path]:
    """Checkpoints below `folder`, oldest first; unchecked."""
    found = (path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name))
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
        saved = read_state(path)
        for name, state in states.items():
            _check_tensors(path, name, state, saved)
        if not files.is_sealed(path / "state.json") and (bad := _not_finite_in(path, states)) is not None:
            log.warning("checkpoint %s is damaged (%s is not finite); using the one before it", path.name, bad)
            continue
        for name, state in states.items():
            state.steps = saved["steps"][name]
            # Copies: a mapped file would keep the checkpoint's folder alive after it is removed.
            tensors = {key: t for part in _parts(name) for key, t in load_file(str(path / part)).items()}
            state.replace({key: tensor.clone() for key, tensor in tensors.items()})
        return saved
    return None


def _parts(name: str) -> tuple[str, str]:
    return f"{name}.safetensors", f"optimizer-{name}.safetensors"


def _check_tensors(path: Path, name: str, state: BlockState, saved: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint's tensors are not those of the network and its optimizer."""
    if name not in saved["steps"] or not set(_parts(name)) <= saved["files"].keys():
        raise _differs(path, f"it has no {name}")
    known, seen = state.shapes(), set[str]()
    for part in _parts(name):
        with safe_open(str(path / part), "pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a dict)
                if key not in known:
                    raise _differs(path, f"there is no {key.removeprefix('model.')} now")
                tensor, (dtype, shape) = stream.get_tensor(key), known[key]  # mapped, not read
                if (tensor.dtype, tensor.shape) != (dtype, shape):
                    there = f"{tensor.dtype} {list(tensor.shape)} there and {dtype} {list(shape)} here"
                    raise _differs(path, f"{key.removeprefix('model.')} is {there}")
                seen.add(key)
    if missing := [key for key in state.tensors() if key.startswith("model.") and key not in seen]:
        raise _differs(path, f"it has no {missing[0].removeprefix('model.')}")


def _not_finite_in(path: Path, names: Iterable[str]) -> str | None:
    """The first tensor that is not finite, in a checkpoint of an earlier version: what `save` seals is."""
    parts = (load_file(str(path / part)) for name in names for part in _parts(name))
    return next(filter(None, map(not_finite, parts)), None)


def _differs(path: Path, what: str) -> UserError:
    return UserError(f"checkpoint {path} is of another network or version: {what}; train it again")


SHAPE = {
    **{"step": int, "steps": dict, "files": dict},
    "progress": {
        **dict.fromkeys(("visits", "block_steps", "samples_seen", "journal_bytes"), int),
        **{"layer_evaluations": (int, float), "wall_seconds": (int, float), "finished": bool},
    },
}


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises Damaged (a UserError) where it is not what was written."""
    saved = files.read_json(path / "state.json", SHAPE)
    unknown = saved.keys() - SHAPE.keys()
    if unknown:
        raise files.Damaged(path / "state.json", f"nobody wrote {min(unknown)}")
    if not all(isinstance(steps, int) for steps in saved["steps"].values()):
        raise files.Damaged(path / "state.json", "steps are not numbers")
    return saved


def damage(path: Path) -> str | None:
    """Why the checkpoint in `path` cannot be used; None when it is whole."""
    try:
        listed = read_state(path)["files"]
    except files.Damaged as error:
        return f"state.json: {error.reason}"
    except OSError:
        return "state.json is missing or unreadable"
    for name, expected in listed.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if files.fingerprint(path / name) != expected:
            return f"{name} is truncated or changed"
    return None
