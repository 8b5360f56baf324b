"""One self-contained HTML page from run folders and comparisons. Opening it needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from diffusionblocks.blocks.model import DiffusionBlocksModel
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.adaptation import read_samples
from diffusionblocks.experiments.compare import read_comparison, summarise
from diffusionblocks.experiments.folder import read_recipe, read_summary
from diffusionblocks.experiments.run import Run, load_run
from diffusionblocks.methods import find_method
from diffusionblocks.report import figures, table
from diffusionblocks.system.files import write_text
from diffusionblocks.system.run_folder import COMPARISON, SUMMARY
from diffusionblocks.training.figures import Figure, Table
from diffusionblocks.training.progress import read_journal

CONTINUED = "Greedy continuations of held-out texts"
SHOWN = 400  # characters shown of a text that is continued


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Writes the page for run folders and comparison folders and returns its path.

    Raises UserError when a folder is neither.
    """
    import jinja2

    groups, runs = [], []
    singles: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        if (folder / COMPARISON).is_file():
            results = read_comparison(folder)
            first = _first_seeds(folder, results)
            groups.append(_group(f"Comparison on {results[0]['recipe']}", results))
            beside = _side_by_side({path.parent.name: path for path in first})
            groups[-1]["figures"] = [figures.drawn(CONTINUED, beside)] if beside else []
            runs += [_run(path) for path in first if find_method(path.parent.name).trains]
        elif (folder / SUMMARY).is_file():
            summary = read_summary(folder)
            singles.setdefault(summary["recipe"], []).append(summarise([summary]))
            runs.append(_run(folder))
        else:
            raise UserError(f"{folder} holds no finished run (summary.json) and no comparison (compare.json)")
    groups += [_group(f"Runs of {recipe}", results) for recipe, results in singles.items()]
    template = jinja2.Template((resources.files(__package__) / "page.html").read_text(), autoescape=True)
    subtitle = "Blocks that learn one at a time, compared with the same network trained in the usual ways"
    page = template.render(title=groups[0]["title"], subtitle=subtitle, groups=groups, runs=runs)
    write_text(output, page)
    return output


def _first_seeds(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    return [folder / result["method"] / f"seed-{result['seeds'][0]}" for result in results]


def _side_by_side(folders: Mapping[str, Path]) -> Table | None:
    """How every method continues the same held-out texts."""
    found = {name: texts for name, path in folders.items() if (texts := read_samples(path))}
    if not found:
        return None
    texts = next(iter(found.values()))
    rows = [
        [text["prompt"][-SHOWN:], text["real"], *(made[index]["written"] for made in found.values())]
        for index, text in enumerate(texts)
    ]
    return Table(["held-out text", "its true continuation", *found], rows)


def _before_and_after(folder: Path) -> Table | None:
    """How a model continues held-out texts before and after it was adapted."""
    if not (texts := read_samples(folder)):
        return None
    earlier = ["before"] if all("before" in text for text in texts) else []
    rows = [
        [text["prompt"][-SHOWN:], text["real"], *(text[name] for name in earlier), text["written"]] for text in texts
    ]
    original = ["original model"] if earlier else []
    return Table(["held-out text", "its true continuation", *original, "adapted model"], rows)


def _group(title: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    heads, rows = table.columns(results)
    seeds = max(len(result["seeds"]) for result in results)
    over = f"{seeds} seeds" if seeds > 1 else "the test samples of one seed"
    budget = results[0].get("budget")
    note = f"Values are given ± their standard error over {over}."
    note += f" All methods have equal {budget.replace('-', ' ')}." if budget else ""
    peak = results[0]["peak_memory"]
    return {
        "title": title,
        "heads": heads,
        "rows": rows,
        "note": note,
        "pairs": table.paired(results),
        "quality": "".join(figures.quality(results, name) for name in _shown(results)) + figures.iterations(results),
        "memory": figures.memory(results),
        "measured": f"Measured with {peak['how_measured']} on {peak['device']}, after every block has made a step.",
    }


def _shown(results: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics that get a figure: the first, and for generated images their distance from real ones."""
    names = list(results[0]["metrics"])
    return [names[0], *(name for name in ("feature_distance", "fid") if name in names[1:])]


def _run(folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    beside = _before_and_after(folder)
    # Loading a large pretrained network takes long; only what is drawn from one needs it.
    run = None if beside is not None and not find_method(summary["method"]).denoises else load_run(folder)
    recipe = read_recipe(folder) if run is None else run.recipe
    model = None if run is None else run.model
    ranges = [_range(model, b) for b in range(model.num_blocks)] if isinstance(model, DiffusionBlocksModel) else []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in read_journal(folder):
        for block, loss in entry.get("loss", {}).items():
            x, y = curves.setdefault(block, ([], []))
            x.append(entry["layer_evaluations"])
            y.append(loss)
    train, unit = recipe.train, f" ({recipe.task.unit})" if recipe.task.unit else ""
    unit_of_level = model.partition.levels.unit if isinstance(model, DiffusionBlocksModel) else ""
    order = f"order of the blocks {train.order}, " if summary["num_blocks"] > 1 else ""
    return {
        "title": f"{summary['method']}, seed {summary['seed']}",
        "note": f"{summary['block_steps']} optimizer steps in all, batch {train.batch_size}, {order}"
        f"{summary['wall_seconds']:.0f} s, commit {summary['git_commit'] or 'unknown'}, "
        f"torch {summary['versions']['torch']}",
        "warnings": summary["warnings"],
        "ranges": figures.noise_ranges(ranges, unit_of_level) if ranges else "",
        "losses": figures.losses(curves, summary["num_blocks"], unit) if curves else "",
        "figures": [figures.drawn(*figure) for figure in (_of_task(run) if beside is None else [(CONTINUED, beside)])],
    }


def _of_task(run: Run | None) -> list[Figure]:
    """What the task shows of a run."""
    assert run is not None
    with run.trainer.averaged():
        return run.recipe.task.figures(run.trained)


def _range(model: DiffusionBlocksModel, block: int) -> dict[str, float]:
    own, trained = model.partition.range(block), model.partition.range(block, widened=True)
    return {"low": own.low, "high": own.high, "trained_low": trained.low, "trained_high": trained.high}
