"""Figures for docs from the committed results.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "docs" / "comparison.png"
COLOURS = {
    "end-to-end": "#8a8f98",
    "checkpointing": "#c3a26b",
    "shallow": "#e08e45",
    "diffusionblocks": "#2f6fb0",
    "diffusionblocks-paper": "#8db8df",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy(axes: Any, recipe: str) -> None:
    results = load(f"classification-{recipe}")["budgets"]["layer-evaluations"]["results"]
    for row, result in enumerate(results):
        metric = result["metrics"]["accuracy"]
        colour = COLOURS[result["method"]]
        axes.errorbar(metric["value"], row, xerr=metric["stderr"], fmt="o", capsize=3, color=colour)
        axes.annotate(
            f"{metric['value']:.1f}",
            (metric["value"], row),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(results)), [result["method"] for result in results])
    axes.set_ylim(len(results) - 0.5, -0.6)
    counts = sorted({len(result["seeds"]) for result in results})
    axes.set_xlabel(f"{recipe}: test accuracy (%), {' to '.join(map(str, counts))} seeds")
    axes.grid(axis="x", alpha=0.3)


def memory(axes: Any) -> None:
    rows = load("memory-and-time")["memory"]
    names = [
        "end-to-end",
        "checkpointing",
        "diffusionblocks B=2",
        "diffusionblocks B=3",
        "diffusionblocks B=4",
        "diffusionblocks B=6",
    ]
    for shift, (regime, colour) in enumerate((("activations dominate", "#2f6fb0"), ("parameters dominate", "#e08e45"))):
        ratios = {row["method"]: row["ratio"] for row in rows if row["regime"] == regime}
        places = [index + 0.38 * shift for index in range(len(names))]
        bars = axes.barh(places, [ratios[name] for name in names], height=0.36, color=colour, label=regime)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks([index + 0.19 for index in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("peak training memory / end-to-end")
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def accuracy_table(recipe: str) -> None:
    data = load(f"classification-{recipe}")["budgets"]
    print(f"\n| {recipe}, B = 3 | accuracy (%), equal layer evaluations | equal samples | loss (nats) | peak memory |")
    print("|---|---|---|---|---|")
    samples = {result["method"]: result for result in data.get("samples", {"results": []})["results"]}
    results = data["layer-evaluations"]["results"]
    whole = results[0]["peak_memory"]["total"]
    for result in results:
        same = samples.get(result["method"])
        metric, loss = result["metrics"]["accuracy"], result["metrics"]["validation_loss"]
        equal_samples = _error(same["metrics"]["accuracy"], 2) if same else "not run"
        cells = [result["method"], _error(metric, 2), equal_samples, _error(loss, 3)]
        print("| " + " | ".join([*cells, f"{result['peak_memory']['total'] / whole:.2f}x"]) + " |")


def memory_table() -> None:
    data = load("memory-and-time")
    regimes = list(dict.fromkeys(row["regime"] for row in data["memory"]))
    print("\n| peak training memory | " + " | ".join(regimes) + " |\n|---|---|---|")
    for name in dict.fromkeys(row["method"] for row in data["memory"]):
        rows = {row["regime"]: row for row in data["memory"] if row["method"] == name}
        cells = [f"{rows[r]['total'] / 2**20:.0f} MiB ({rows[r]['ratio']:.2f}x)" for r in regimes]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for row in data["wall_time"]:
        print(f"{row['regime']}, {row['method']}: 3 block steps take {row['median']:.2f}x one end-to-end step")


def _error(metric: dict[str, Any], digits: int) -> str:
    return f"{metric['value']:.{digits}f} ± {metric['stderr']:.{digits}f}"


def generation_table() -> None:
    data = load("generation-quality")["results"]
    whole = data[0]["peak_memory"]["total"]
    print(
        "\n| dit-mnist, B = 3 | denoising loss | feature distance | class accuracy (%) | bits per dimension "
        "| peak memory |"
    )
    print("|---|---|---|---|---|---|")
    for result in data:
        metrics = result["metrics"]
        cells = [result["method"], _error(metrics["validation_loss"], 4), _error(metrics["feature_distance"], 1)]
        cells += [_error(metrics["class_accuracy"], 1), _error(metrics["bits_per_dimension"], 3)]
        print("| " + " | ".join([*cells, f"{result['peak_memory']['total'] / whole:.2f}x"]) + " |")


def adapt_table(part: str) -> None:
    data = load(f"adapt-{part}")["results"]
    whole = next(row for row in data if row["method"] == "full")
    print(
        f"\n| {part} | seeds | nats per token | behind full | general text, nats | layer evaluations | samples "
        "| peak memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in data:
        nats, general = (row["metrics"][name] for name in ("nats_per_token", "general_nats_per_token"))
        pairs = dict(zip(whole["seeds"], whole["each_seed"], strict=True))
        behind = [own - pairs[seed] for seed, own in zip(row["seeds"], row["each_seed"], strict=True) if seed in pairs]
        error = f" ± {stdev(behind) / len(behind) ** 0.5:.3f}" if len(behind) > 1 else ""
        peak = row["peak_memory"]["total"]
        cells = [row["method"], str(len(row["seeds"])), f"{nats['value']:.3f}", f"{fmean(behind):+.3f}{error}"]
        cells += [f"{general['value']:.3f}", f"{row['layer_evaluations']:.0f}", f"{row['samples_seen']:.0f}"]
        cells.append(f"{peak / 2**20:.0f} MiB ({peak / whole['peak_memory']['total']:.2f}x)" if peak else "")
        print("| " + " | ".join(cells) + " |")


def over_run(axis: Any, runs: dict[str, Any]) -> None:
    labelled: set[str] = set()
    for label, run in runs.items():
        method = label.split()[0]
        shown = None if method in labelled else method
        labelled.add(method)
        axis.plot(*zip(*run["curve"], strict=True), color=COLOURS[method], linewidth=1, label=shown)
    axis.set_xlabel("share of the layer evaluations")


def over_lengths(axis: Any, steps: dict[str, Any]) -> None:
    """A training of its own at every point."""
    for method in next(iter(steps.values())):
        found = [row[method] for row in steps.values()]
        spent = [row["layer_evaluations"] / 1e3 for row in found]
        nats = [row["metrics"]["nats_per_token"]["value"] for row in found]
        axis.plot(spent, nats, color=COLOURS[method], linewidth=1, marker="o", markersize=3, label=method)
    axis.set_xlabel("layer evaluations, thousands of samples (each point a training)")


def over_compute(
    name: str, metrics: dict[str, str], curve_label: str, scale: str, target: str, lengths: str = ""
) -> None:
    """A validation curve over compute of every run (with `lengths`, a result's name: of trainings of several lengths),
    and test metrics {name: label} of the finished ones."""
    data = load(name)
    figure, axes = plt.subplots(1, 1 + len(metrics), figsize=(11.5, 2.6), layout="constrained")
    if lengths:
        over_lengths(axes[0], load(lengths)["steps"])
    else:
        over_run(axes[0], data["runs"])
    axes[0].set(ylabel=curve_label, yscale=scale)
    axes[0].legend(frameon=False)
    seeds = len(data["results"][0]["seeds"])
    for axis, (metric, label) in zip(axes[1:], metrics.items(), strict=True):
        for row, result in enumerate(data["results"]):
            value = result["metrics"][metric]
            colour = COLOURS[result["method"]]
            axis.errorbar(value["value"], row, xerr=value["stderr"], fmt="o", capsize=3, color=colour)
            axis.annotate(
                f"{value['value']:.4g}", (value["value"], row), (0, 6), textcoords="offset points", ha="center"
            )
        axis.set_yticks(range(len(data["results"])), [result["method"] for result in data["results"]])
        axis.set_ylim(len(data["results"]) - 0.5, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(f"{label}, {seeds} seeds")
    figure.savefig(TARGET.with_name(target), dpi=130)


def text_table(name: str, recipe: str, bits: str) -> None:
    data = load(name)["results"]
    whole = data[0]["peak_memory"]["total"]
    print(
        f"\n| {recipe}, B = 3 | {bits.replace('_', ' ')} | entropy | distinct pairs | peak memory |\n"
        "|---|---|---|---|---|"
    )
    for result in data:
        metrics = result["metrics"]
        cells = [result["method"], _error(metrics[bits], 3), _error(metrics["entropy"], 2)]
        cells += [_error(metrics["distinct_2"], 3), f"{result['peak_memory']['total'] / whole:.2f}x"]
        print("| " + " | ".join(cells) + " |")
    real = data[0]["metrics"]
    print(
        f"real text: entropy {real['entropy_real']['value']:.2f}, distinct pairs {real['distinct_2_real']['value']:.3f}"
    )


def looped() -> None:
    """Quality over compute, over iterations at inference, and memory over truncation; and the table."""
    found = load("looped-quality")["layer-evaluations"]
    print(
        "\n| looped-pydocs | nats per byte | K = 1 | 4 | 16 | 32 | layers, training | inference | peak memory |\n"
        + "|---" * 9
        + "|"
    )
    whole = found["results"][0]["peak_memory"]["total"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 2.9), layout="constrained")
    for result in found["results"]:
        method, metrics = result["method"], result["metrics"]
        own = [run for name, run in found["runs"].items() if name.split()[0] == method]
        for number, run in enumerate(own):
            spent = [run["layer_evaluations"] * point[0] / run["steps"] / 1e3 for point in run["validation"]]
            label = None if number else method
            left.plot(spent, [point[1] for point in run["validation"]], color=COLOURS[method], label=label)
        curve = {int(name[8:]): metric for name, metric in metrics.items() if name.startswith("nats_at_")}
        points = sorted(curve.items())
        errors = [metric["stderr"] for _, metric in points]
        middle.errorbar(
            [k for k, _ in points],
            [m["value"] for _, m in points],
            yerr=errors,
            marker="o",
            ms=3,
            color=COLOURS[method],
        )
        at = [_error(curve[k], 3) if k in curve else "" for k in (1, 4, 16, 32)]
        layers = [f"{value:.1f}" for value in result["layers_per_token"].values()]
        memory = f"{result['peak_memory']['total'] / whole:.2f}x"
        print("| " + " | ".join([method, _error(metrics["nats_per_token"], 3), *at, *layers, memory]) + " |")
    left.set(xlabel="layer evaluations, thousands of samples", ylabel="nats per byte (validation)")
    left.legend(frameon=False)
    middle.set(xlabel="iterations K at inference", ylabel="nats per byte (test, part)", xscale="log")
    middle.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    middle.xaxis.set_minor_formatter(lambda value, place: "")
    rows = [row for row in load("memory")["rows"] if row["family"] == "looped" and "truncation" in row]
    for method in ("end-to-end", "checkpointing", "diffusionblocks"):
        own = sorted(
            (row["truncation"], row["measured"], row["predicted"]["total"]) for row in rows if row["method"] == method
        )
        depth = [point[0] for point in own]
        right.plot(depth, [point[1] / 2**20 for point in own], color=COLOURS[method], label=method)
        right.plot(depth, [point[2] / 2**20 for point in own], "x", ms=4, color=COLOURS[method])
    right.set(xlabel="truncation depth", ylabel="peak training memory (MiB)", ylim=(0, None))
    right.set_title("lines measured, crosses predicted", fontsize=8)
    right.legend(frameon=False)
    figure.savefig(TARGET.parent / "looped.png", dpi=130)


def main() -> None:
    for part in ("code", "docstrings"):
        if (RESULTS / f"adapt-{part}.json").is_file():
            adapt_table(part)
    if (RESULTS / "looped-quality.json").is_file():
        plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
        looped()
    if (RESULTS / "generation-quality.json").is_file():
        plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
        generation_table()
        shown = {
            "validation_loss": "dit-mnist: denoising loss (test)",
            "feature_distance": "feature distance, 5,000 samples",
        }
        over_compute("generation-quality", shown, "denoising loss (validation)", "log", "generation.png")
    texts = (
        ("text-quality", "mdlm-pydocs", "bits_per_character", "nats per token (validation)", "text.png", ""),
        ("text-stdlib", "mdlm-stdlib", "bits_per_byte", "nats per byte (test)", "text-code.png", "text-lengths"),
    )
    for name, recipe, bits, label, target, lengths in texts:
        if (RESULTS / f"{name}.json").is_file():
            plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
            text_table(name, recipe, bits)
            shown = {bits: f"{recipe}: {bits.replace('_', ' ')} (test)", "distinct_2": "distinct pairs in samples"}
            over_compute(name, shown, label, "linear", target, lengths)
    for recipe in ("digits", "mnist"):
        accuracy_table(recipe)
    memory_table()
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 2.6), layout="constrained")
    accuracy(left, "digits")
    accuracy(middle, "mnist")
    memory(right)
    figure.savefig(TARGET, dpi=130)
    print(TARGET)


if __name__ == "__main__":
    main()
