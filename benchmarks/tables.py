"""The tables of docs/results.md, from the committed results.

    python benchmarks/tables.py

Rewrites what stands between `<!-- NAME -->` and `<!-- end -->` in docs/results.md, so that a table cannot differ from
its JSON. A test checks that the page is current.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
MARKED = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
MIB, GB = 2**20, 10**9
Row = Sequence[str]


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def with_error(metric: dict[str, Any], digits: int) -> str:
    if metric["stderr"] is None:
        return f"{metric['value']:.{digits}f}"
    return f"{metric['value']:.{digits}f} ± {metric['stderr']:.{digits}f}"


def of_first(results: Sequence[dict[str, Any]]) -> list[str]:
    """Peak memory as a share of the first result's."""
    totals = [result["peak_memory"]["total"] for result in results]
    return [f"{total / totals[0]:.2f}x" for total in totals]


def markdown(heads: Row, rows: Iterable[Row]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------- training on the CPU


def classification(recipe: str) -> str:
    budgets = load(f"classification-{recipe}")["budgets"]
    equal, samples = (budgets[name]["results"] for name in ("layer-evaluations", "samples"))
    heads = [recipe, "accuracy (%)", "loss (nats)", "accuracy (%), equal samples", "loss, equal samples", "peak memory"]
    rows = []
    for one, other, memory in zip(equal, samples, of_first(equal), strict=True):
        cells = [
            with_error(result["metrics"][name], digits)
            for result in (one, other)
            for name, digits in (("accuracy", 2), ("validation_loss", 3))
        ]
        rows.append([one["method"], *cells, memory])
    return markdown(heads, rows)


def generation() -> str:
    results = load("generation-quality")["results"]
    shown = {"validation_loss": 4, "feature_distance": 1, "class_accuracy": 1, "bits_per_dimension": 2}
    heads = ["dit-mnist", "denoising loss", "feature distance", "class accuracy (%)", "bits per dimension"]
    rows = [
        [one["method"], *(with_error(one["metrics"][name], digits) for name, digits in shown.items()), memory]
        for one, memory in zip(results, of_first(results), strict=True)
    ]
    return markdown([*heads, "peak memory"], rows)


def generation_blocks() -> str:
    results = load("generation-blocks")["results"]
    heads = ["method", "B", "denoising loss", "feature distance", "bits per dimension", "peak memory"]
    rows = []
    for index, (one, memory) in enumerate(zip(results, of_first(results), strict=True)):
        name = one["method"] + (", uniform borders" if index == len(results) - 1 else "")
        # A shallow network has one block; it has the depth of one of the blocks in the row below it.
        count = results[index + 1]["num_blocks"] if name == "shallow" else one["num_blocks"]
        values = [one["metrics"][key]["value"] for key in ("validation_loss", "feature_distance", "bits_per_dimension")]
        rows.append([name, str(count), f"{values[0]:.4f}", f"{values[1]:.1f}", f"{values[2]:.3f}", memory])
    return markdown(heads, rows)


def masked(name: str, unit: str) -> str:
    results = load(name)["results"]
    heads = [results[0]["recipe"], unit, "entropy of samples", "distinct pairs in samples", "peak memory"]
    rows = []
    for one, memory in zip(results, of_first(results), strict=True):
        metrics = one["metrics"]
        cells = [with_error(metrics["bits_per_character"], 3), f"{metrics['entropy']['value']:.2f}"]
        rows.append([one["method"], *cells, f"{metrics['distinct_2']['value']:.3f}", memory])
    return markdown(heads, rows)


def masked_lengths() -> str:
    steps = load("text-lengths")["steps"]
    names = ("end-to-end", "shallow", "diffusionblocks")
    rows = [
        [f"{int(count):,}", *(f"{found[name]['metrics']['nats_per_token']['value']:.4f}" for name in names)]
        for count, found in steps.items()
    ]
    return markdown(["end-to-end steps (nats per byte)", *names], rows)


def next_token() -> str:
    quality, speed = load("causal-quality"), load("causal-speed")
    results = quality["layer-evaluations"]["results"]
    samples = {one["method"]: one["metrics"]["nats_per_token"] for one in quality["samples"]["results"]}
    heads = ["lm-stdlib", "nats per byte", "nats per byte, equal samples", "training speed", "writing speed"]
    rows = []
    for one, memory in zip(results, of_first(results), strict=True):
        method, nats = one["method"], one["metrics"]["nats_per_token"]
        # A step of these passes as many layers of a batch as an end-to-end step: both budgets are the same run.
        same = method in ("end-to-end", "diffusionblocks-features")
        equal = nats if same else samples.get(method)
        cells = [with_error(nats, 3), with_error(equal, 3) if equal else ""]
        cells += [
            f"{with_error(speed[what][method]['of_baseline'], 2)}x" if method in speed[what] else ""
            for what in ("training", "writing")
        ]
        rows.append([method, *cells, memory])
    return markdown([*heads, "peak memory"], rows)


def looped() -> str:
    results = load("looped-quality")["layer-evaluations"]["results"]
    heads = ["looped-pydocs", "nats per byte", "K = 1", "K = 4", "K = 16", "layers per token, training"]
    rows = []
    for one, memory in zip(results, of_first(results), strict=True):
        metrics, layers = one["metrics"], one["layers_per_token"]
        curve = [
            f"{metrics[key]['value']:.3f}" if key in metrics else "" for key in (f"nats_at_{k}" for k in (1, 4, 16))
        ]
        cells = [with_error(metrics["nats_per_token"], 3), *curve, f"{layers['training']:.3g}"]
        rows.append([f"{one['method']} ({len(one['seeds'])} seeds)", *cells, f"{layers['inference']:.3g}", memory])
    return markdown([*heads, "layers per written token", "peak memory"], rows)


def looped_writing() -> str:
    found = load("looped-writing")
    found.pop("environment")
    heads = ["one seed, 16 texts at once", "iterations per token", "layer evaluations per text", "tokens per second"]
    rows = [
        [
            name,
            f"{one['iterations_per_token']:.3g}",
            f"{one['layer_evaluations_per_text']:,.0f}",
            f"{one['tokens_per_second']:,.0f}",
        ]
        for name, one in found.items()
    ]
    return markdown(heads, rows)


# ---------------------------------------------------------------- adapting a pretrained model


def adapted(name: str) -> str:
    results = load(f"adapt-{name}")["results"]
    full = results[0]
    heads = ["method", "seeds", "nats per token", "behind full", "general text, nats", "layer evaluations", "samples"]
    rows = []
    for one in results:
        behind = [a - b for a, b in zip(one["each_seed"], full["each_seed"], strict=False)]
        error = f" ± {statistics.stdev(behind) / len(behind) ** 0.5:.3f}" if len(behind) > 1 else ""
        total = one["peak_memory"]["total"]
        ratio = total / full["peak_memory"]["total"]
        rows.append(
            [
                one["method"],
                str(len(one["seeds"])),
                f"{one['metrics']['nats_per_token']['value']:.3f}",
                f"{statistics.fmean(behind):+.3f}{error}",
                f"{one['metrics']['general_nats_per_token']['value']:.3f}",
                f"{one['layer_evaluations']:,.0f}",
                f"{one['samples_seen']:.0f}",
                f"{total / MIB:,.0f} MiB ({ratio:.2f}x)" if total else "",
            ]
        )
    return markdown([*heads, "peak memory"], rows)


def adapted_memory() -> str:
    rows = load("adapt-memory")["rows"]
    full, found = rows[0]["measured"], []
    for row in rows:
        if row.get("wide"):
            continue
        kept = f", {row.get('keep_graphs', 1)} of {row['num_blocks']} graphs kept" if row["method"] == "exact" else ""
        count = "" if row["num_blocks"] == 1 else str(row["num_blocks"])
        found.append(
            [
                row["method"] + kept,
                count,
                f"{row['measured'] / MIB:,.0f} MiB",
                f"{row['measured'] / full:.2f}x",
                f"{round(100 * row['error'], 2) + 0.0:+.2f} %",
            ]
        )
    return markdown(["method", "blocks", "measured", "of full", "prediction error"], found)


# ---------------------------------------------------------------- memory


def memory() -> str:
    rows = load("memory-and-time")["memory"]
    regimes = ("activations dominate", "parameters dominate")
    found = {regime: {row["method"]: row for row in rows if row["regime"] == regime} for regime in regimes}
    cells = [
        [
            method,
            *(
                f"{found[regime][method]['total'] / MIB:,.0f} MiB ({found[regime][method]['ratio']:.2f}x)"
                for regime in regimes
            ),
        ]
        for method in found[regimes[0]]
    ]
    heads = ["activations dominate (width 256, 65 tokens, batch 64)", "parameters dominate (width 1024, batch 1)"]
    return markdown(["12 layers, fp32, AdamW", *heads], cells)


def predicted() -> str:
    families: dict[str, list[float]] = {}
    for row in load("memory")["rows"]:
        families.setdefault(row["family"], []).append(row["error"])
    rows = [[name, str(len(errors)), f"{100 * max(map(abs, errors)):.2f} %"] for name, errors in families.items()]
    return markdown(["family", "runs", "largest prediction error"], rows)


# ---------------------------------------------------------------- on a card


def card_speed() -> str:
    heads = [
        "row",
        "per second",
        "of a plain loop",
        "of end-to-end",
        "other ratio",
        "allocated",
        "reserved / allocated",
    ]
    other = {"host_over_device": "time over all blocks on the card", "compiled_over_eager": "speed over not compiled"}
    rows = []
    for row in load("gpu-speed")["rows"]:
        ratios = [with_error(row[key], 2) if key in row else "" for key in ("of_plain", "of_end_to_end")]
        more = [f"{text} {with_error(row[key], 2)}" for key, text in other.items() if key in row]
        rows.append(
            [
                row["row"],
                f"{row['per_second']:,.0f} {row['unit']}",
                *ratios,
                *(more or [""]),
                f"{row['peak_allocated'] / GB:.2f} GB",
                f"{row['reserved_over_allocated']:.2f}",
            ]
        )
    return markdown(heads, rows)


def card_large() -> str:
    rows = load("gpu-large")["rows"]
    full = {row["row"].partition(", ")[2]: row for row in rows if row["row"].startswith("full")}
    heads = ["row", "planned", "allocated", "of full", "reserved", "seconds per step", "tokens per second"]
    found = []
    for row in rows:
        same = full[row["row"].partition(", ")[2]]
        found.append(
            [
                row["row"],
                *(f"{row[key] / GB:.2f} GB" for key in ("planned", "peak_allocated")),
                f"{row['peak_allocated'] / same['peak_allocated']:.2f}x",
                f"{row['peak_reserved'] / GB:.2f} GB",
                f"{row['seconds_per_round']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / same['tokens_per_second']:.2f}x",
            ]
        )
    return markdown([*heads, "speed of full"], found)


def card_memory() -> str:
    rows = sorted(load("gpu-memory")["rows"], key=lambda row: row["row"])
    found = [
        [
            row["row"],
            f"{row['predicted']['total'] / MIB:,.0f} MiB",
            f"{row['measured'] / MIB:,.0f} MiB",
            f"{round(100 * row['error'], 1) + 0.0:+.1f} %",
            f"{row['reserved_over_allocated']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["row", "predicted", "allocated", "error", "reserved / allocated"], found)


TABLES: dict[str, Callable[[], str]] = {
    "digits": lambda: classification("digits"),
    "mnist": lambda: classification("mnist"),
    "generation": generation,
    "generation-blocks": generation_blocks,
    "masked-code": lambda: masked("text-stdlib", "bits per byte"),
    "masked-prose": lambda: masked("text-quality", "bits per character"),
    "masked-lengths": masked_lengths,
    "next-token": next_token,
    "looped": looped,
    "looped-writing": looped_writing,
    "adapt-code": lambda: adapted("code"),
    "adapt-docstrings": lambda: adapted("docstrings"),
    "adapt-memory": adapted_memory,
    "memory": memory,
    "predicted": predicted,
    "card-speed": card_speed,
    "card-large": card_large,
    "card-memory": card_memory,
}


def filled(page: str) -> str:
    """The page with every marked table made anew. Raises KeyError for a mark that names no table."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
