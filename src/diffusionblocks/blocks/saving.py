"""Models on disk: weights as safetensors, everything else as JSON. Nothing is ever unpickled.

The description of a model has the size and hash of its weights, so that a changed byte is found before it is used. A
file that stands for itself (a block, say) carries the hash of its tensors in its own header. What older versions wrote
has no hashes and is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.errors import UserError, first_line
from diffusionblocks.system.files import Damaged, fingerprint, read_json, replacing, told, write_json

WEIGHTS, DESCRIPTION = "model.safetensors", "diffusionblocks.json"
HASH = "blake2b"  # in the header of a file of tensors
CHANGED = "its content is not what was written"


def save_described(model: nn.Module, folder: str | Path, description: Mapping[str, Any]) -> None:
    """Writes the weights of `model` and what they are of. Raises DiskFull or UserError where the system refuses."""
    from safetensors.torch import save_file

    with ExitStack() as stack:  # both take their places when both are written
        weights = stack.enter_context(replacing(Path(folder) / WEIGHTS))
        about = stack.enter_context(replacing(Path(folder) / DESCRIPTION))
        save_file(named_once(dict(sorted(model.state_dict().items()))), str(weights), metadata={"format": "pt"})
        write_json(about, {"format": 1, **description, "files": {WEIGHTS: fingerprint(weights)}})


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, facts: Mapping[str, str]) -> None:
    """Writes tensors and facts about them, with the hash of both. Raises DiskFull or UserError where the system
    refuses."""
    from safetensors.torch import save_file

    with replacing(Path(path)) as partial:
        save_file(dict(tensors), str(partial), metadata={**facts, HASH: _hash(tensors, facts)})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote. Raises Damaged for another content than was written, and OSError where nothing can be
    read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as stream:
            facts = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise Damaged(Path(path), first_line(error)) from None
    expected = facts.pop(HASH, None)
    if expected is not None and expected != _hash(tensors, facts):
        raise Damaged(Path(path), CHANGED)
    return tensors, facts


def _hash(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """Of facts, and of names, dtypes, shapes and bytes of tensors on the host."""
    found = hashlib.blake2b(json.dumps(sorted(facts.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def named_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state_dict on the host, each under one name: of a tensor that has several (tied embeddings), the
    first.

    They may be views of buffers that many tensors share (training/flat.py), which safetensors' own `save_model`
    refuses.
    """
    found: dict[tuple[int, Any], tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return {name: tensor.detach().contiguous().cpu() for name, tensor in found.values()}


def read_description(folder: str | Path) -> dict[str, Any]:
    """What the weights in a folder are of. Raises UserError where nothing was saved, or it is damaged."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} holds no saved DiffusionBlocks model ({DESCRIPTION} is missing)")
    with told():
        found = read_json(path, {"source": dict, "blocks": dict})
    if not isinstance(found.get("files", {}), dict):
        raise Damaged(path, f"files is a {type(found['files']).__name__}")
    return found


def check_weights(folder: str | Path, description: Mapping[str, Any]) -> None:
    """Raises UserError where the weights in a folder are missing or not those that were described."""
    path, expected = Path(folder) / WEIGHTS, description.get("files", {}).get(WEIGHTS)
    if not path.is_file():
        raise UserError(f"{folder} holds no saved DiffusionBlocks model ({WEIGHTS} is missing)")
    if expected is None:
        return
    if not isinstance(expected, Mapping) or path.stat().st_size != expected.get("bytes"):
        raise Damaged(path, "its size is not what was written")
    with told():
        found = fingerprint(path)
    if found != expected:
        raise Damaged(path, CHANGED)


def load_weights(model: nn.Module, folder: str | Path, *, checked: bool = False) -> None:
    """Takes over the weights in a folder. checked: `check_weights` has seen them.

    Raises UserError when there are none, damaged ones, or those of another kind of model.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    path = Path(folder) / WEIGHTS
    if not checked:
        check_weights(folder, read_description(folder) if (Path(folder) / DESCRIPTION).exists() else {})
    try:
        with safe_open(str(path), "pt") as stream:
            check_ties(model, stream.keys(), path)
    except (SafetensorError, OSError) as error:
        raise Damaged(path, first_line(error)) from None
    try:
        load_model(model, str(path))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {folder} are of another network or conversion: {reason}") from None


def check_ties(module: nn.Module, names: Iterable[str], path: str | Path) -> None:
    """Raises UserError when the file `path` has `names` of its own for two places in which `module` has one tensor."""
    state, seen = module.state_dict(), dict[int, str]()
    for name in names:
        if name in state and (other := seen.setdefault(state[name].data_ptr(), name)) != name:
            raise UserError(
                f"{path} is of another version of this network: {other} and {name}, apart in the file, are one tensor "
                "now"
            )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal; the first row names the columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
