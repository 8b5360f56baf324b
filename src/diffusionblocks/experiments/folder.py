"""What a run's folder says: its recipe and its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.recipes import Recipe, build
from diffusionblocks.recipes.keys import of_run
from diffusionblocks.system import files, plain_yaml
from diffusionblocks.system.run_folder import CONFIG, SUMMARY

AGAIN = "remove it, and the same dblocks train command makes it again"
SUMMARY_SHAPE = {
    **{
        "method": str,
        "recipe": str,
        "seed": int,
        "num_blocks": int,
        "metrics": dict,
        "layer_evaluations": (int, float),
    },
    **{"samples_seen": int, "block_steps": int, "wall_seconds": (int, float), "versions": {"torch": str}},
    "peak_memory": {
        **dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "total"), int),
        **{"how_measured": str, "device": str},
    },
    **{"warnings": list, "git_commit": (str, type(None))},
}


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises UserError where there is none, or a damaged one."""
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run ({SUMMARY} is missing)")
    found = files.read_json(path, SUMMARY_SHAPE, AGAIN)
    for name, metric in found["metrics"].items():
        shape = {"value": (int, float), "stderr": (int, float, type(None))}
        if not isinstance(metric, dict) or files.misfit(metric, shape) is not None:
            raise files.Damaged(path, f"the metric {name} has no value and standard error", AGAIN)
    return found


def read_recipe(folder: Path, consented: Recipe | None = None) -> Recipe:
    """The recipe of a run. consented: what this one asks to run is not asked again. Raises UserError where the folder
    holds none, or a damaged one."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder ({CONFIG} is missing); dblocks train makes one")
    content = plain_yaml.parse(files.unsealed(files.read_text(path), path), str(path))
    if not isinstance(content, dict):
        raise files.Damaged(path, f"it holds a {type(content).__name__}, not a recipe")
    try:
        return build(of_run(content), consented=consented)
    except UserError as error:
        raise UserError(f"{path} is no recipe of this version: {error}") from None
