"""Training a run in its folder, from where it is to its summary."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.experiments import adaptation
from diffusionblocks.experiments.evaluate import measure
from diffusionblocks.experiments.export import save_model
from diffusionblocks.experiments.folder import read_recipe, read_summary
from diffusionblocks.experiments.memory import NOTHING, peak
from diffusionblocks.experiments.run import Run, prepare
from diffusionblocks.experiments.summary import summarised
from diffusionblocks.methods import METHODS, find_method
from diffusionblocks.recipes import Recipe
from diffusionblocks.recipes.keys import written
from diffusionblocks.system import files, plain_yaml, run_folder
from diffusionblocks.system.run_folder import CONFIG, SUMMARY

log = logging.getLogger("diffusionblocks")

# Keys that may differ between a run folder and the command that resumes it: they do not change the result, or (the last
# four, which memory may ask for in the middle of a run) hardly.
FREE_KEYS = (
    *("log_every", "checkpoint_every", "keep_checkpoints", "num_workers", "tensorboard", "residency", "device"),
    *("keep_graphs", "activation_checkpointing", "accumulation"),
)


def train(recipe: Recipe, output_dir: Path, *, resume: bool = True) -> dict[str, Any]:
    """Trains (or finishes) a run and returns what summary.json holds. A finished run is not trained again.

    The folder is this process's alone in the meantime. resume: False = start over; the run that was there is kept until
    the new one has a checkpoint, and put back where that fails.

    Raises UserError for what cannot run, in the recipe or in the folder.
    """
    _check_place(output_dir)
    with run_folder.held(output_dir), run_folder.tidied(output_dir):
        _check_place(output_dir)
        if resume and (output_dir / CONFIG).is_file():
            _check_same(recipe, output_dir)
            if (summary := _finished(output_dir)) is not None:
                log.info("%s is already finished; use --resume never to train it again", output_dir)
                return summary
        with _collected_warnings() as messages:
            run = prepare(recipe, output_dir)
            begins = not (resume and (output_dir / CONFIG).is_file())
            if begins and (output_dir / CONFIG).is_file():
                run_folder.set_aside(output_dir)
            try:
                if begins:
                    _write_config(recipe, output_dir)
                return _train(run, output_dir, messages)
            except BaseException:
                if begins and not run_folder.has_checkpoint(output_dir):
                    run_folder.put_back(output_dir)
                raise


def _train(run: Run, output_dir: Path, messages: list[str]) -> dict[str, Any]:
    """A run from where it is to its summary."""
    trains = find_method(run.recipe.method).trains
    earlier = adaptation.before(run, output_dir)
    if trains:
        run.trainer.fit()
        save_model(run, output_dir)
    metrics = {**measure(run), **earlier}
    adaptation.write_samples(run, output_dir)
    summary = summarised(run, metrics, peak(run) if trains else NOTHING, messages)
    files.write_json(output_dir / SUMMARY, summary)
    run_folder.drop_previous(output_dir)
    return summary


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished; None where it is not, or the summary is damaged and has to be made
    again."""
    try:
        return read_summary(folder) if (folder / SUMMARY).is_file() else None
    except files.Damaged as error:
        log.warning("%s: %s; it is made again", error.path, error.reason)
        return None


def _check_place(folder: Path) -> None:
    """Raises UserError where a run must not be: nothing that this package did not make is ever overwritten or
    removed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder is needed; choose another --output-dir")
    if run_folder.is_empty(folder):
        return
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not empty and holds no run; choose another --output-dir")
    if not files.has_seal(path) and not _is_older_run(path):
        raise UserError(f"{path} is no recipe of a run, so {folder} stays as it is; choose another --output-dir")


def _is_older_run(config: Path) -> bool:
    """Whether a file without a seal is what earlier versions wrote for a run: all groups of a recipe."""
    try:
        content = plain_yaml.parse(files.read_text(config), str(config))
    except UserError:
        return False
    return isinstance(content, dict) and {"method", "data", "model", "blocks", "task", "train"} <= content.keys()


def _check_same(recipe: Recipe, folder: Path) -> None:
    """Raises UserError when another recipe owns the folder."""
    before = read_recipe(folder, consented=recipe)  # with defaults for keys it did not know
    theirs, ours = (_relevant(written(one.as_dict())) for one in (before, recipe))
    difference = _difference(theirs, ours)
    if difference:
        raise UserError(
            f"{folder} holds a run with another configuration ({difference}); choose another --output-dir, "
            "or --resume never to overwrite it"
        )


def _write_config(recipe: Recipe, folder: Path) -> None:
    files.write_text(folder / CONFIG, files.sealed(plain_yaml.dump(written(recipe.as_dict()))))


def _relevant(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what it says for other methods than its own."""
    method = content["method"]
    own = find_method(method).reads
    others = {key for other in METHODS.values() for key in other.reads} - set(own)
    return {**content, **dict.fromkeys(others), "methods": {method: content["methods"].get(method)}}


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first key that differs, with both values; empty when the runs are the same."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if key in (*FREE_KEYS, "description", "presets") or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, f"{prefix}{key}."):
                return found
            continue
        return f"{prefix}{key} is {a!r} there and {b!r} here"
    return ""


class _collected_warnings:
    """Python warnings and this package's log warnings of a run, for the summary."""

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        self._handler = logging.Handler(logging.WARNING)
        self._handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        log.addHandler(self._handler)
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore")
        return self.messages

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(None, None, None)
        log.removeHandler(self._handler)
