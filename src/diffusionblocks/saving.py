"""Models on disk: weights as safetensors, everything else as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusionblocks.errors import UserError

WEIGHTS, DESCRIPTION = "model.safetensors", "diffusionblocks.json"


def save_described(model: nn.Module, folder: str | Path, description: Mapping[str, Any]) -> None:
    """Writes the weights of `model` and what they are of."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_once(dict(sorted(model.state_dict().items()))), str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps({"format": 1, **description}, indent=2) + "\n")


def named_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state_dict on the host, each under one name: of a tensor that has several (tied embeddings), the first.

    They may be views of buffers that many tensors share (training/flat.py), which safetensors' own `save_model` refuses.
    """
    found: dict[tuple[int, Any], tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return {name: tensor.detach().contiguous().cpu() for name, tensor in found.values()}


def read_description(folder: str | Path) -> dict[str, Any]:
    """What the weights in a folder are of. Raises UserError where nothing was saved, or it is damaged."""
    try:
        found = json.loads((Path(folder) / DESCRIPTION).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no saved DiffusionBlocks model ({DESCRIPTION} is missing)") from None
    except ValueError:
        raise UserError(f"{Path(folder) / DESCRIPTION} is damaged: it is not valid JSON") from None
    if not isinstance(found, dict) or not {"source", "blocks"} <= found.keys():
        raise UserError(f"{Path(folder) / DESCRIPTION} is damaged: it does not say what the weights are of")
    return found


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Takes over the weights in a folder. Raises UserError when there are none, or of another kind of model."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(str(Path(folder) / WEIGHTS), "pt") as stream:
            check_ties(model, stream.keys(), Path(folder) / WEIGHTS)
        load_model(model, str(Path(folder) / WEIGHTS))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no saved DiffusionBlocks model ({WEIGHTS} is missing)") from None
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {folder} are of another network or conversion: {reason}") from None


def check_ties(module: nn.Module, names: Iterable[str], path: str | Path) -> None:
    """Raises UserError when the file `path` has `names` of its own for two places in which `module` has one tensor."""
    state, seen = module.state_dict(), dict[int, str]()
    for name in names:
        if name in state and (other := seen.setdefault(state[name].data_ptr(), name)) != name:
            raise UserError(
                f"{path} is of another version of this network: {other} and {name}, apart in the file, are one tensor now"
            )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal; the first row names the columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
