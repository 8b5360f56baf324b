"""The comparison table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusionblocks.experiments.compare import pairs
from diffusionblocks.planning.units import size

KINDS = ("parameters", "gradients", "optimizer", "activations")
# Of adapted language models, the rest is in summary.json.
ADAPTED = (
    "nats_per_token_before",
    "nats_per_token",
    "perplexity",
    "general_nats_per_token_before",
    "general_nats_per_token",
)
UNITS = {"accuracy": "%", "class_accuracy": "%", "validation_loss": "nats"}


def columns(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, one row per result; memory also as a ratio to end-to-end when that is among them."""
    reference = next((r for r in results if r["method"] == "end-to-end"), None)
    metrics = [name for name in results[0]["metrics"] if all(name in r["metrics"] for r in results)]
    # Each block's own, and what is there for reference, are in summary.json.
    metrics = [name for name in metrics if "_block_" not in name and not name.endswith(("_train", "_real"))]
    metrics = [name for name in metrics if not name.startswith("nats_at_")]  # a figure of the report
    if adapted := [name for name in ADAPTED if name in metrics]:
        metrics = adapted if set(adapted) - {"nats_per_token", "perplexity"} else metrics
    if "bits_per_character" in metrics:  # the same in another unit
        metrics = [name for name in metrics if name not in ("bits_per_byte", "perplexity")]
    units = UNITS if "accuracy" in metrics else {**UNITS, "validation_loss": ""}
    heads = [name.replace("_", " ") + (f" ({units[name]})" if units.get(name) else "") for name in metrics]
    heads = ["method", "blocks", *heads]
    looped = all("layers_per_token" in result for result in results)
    heads += ["layers per token, training", "inference"] if looped else []
    heads += ["layer evaluations", "samples", "seconds", "peak memory"]
    rows = []
    for result in results:
        cells = [result["method"], str(result["num_blocks"])]
        cells += [_with_error(result["metrics"][name]) for name in metrics]
        cells += [f"{number:.4g}" for number in result["layers_per_token"].values()] if looped else []
        cells += [_count(result["layer_evaluations"]), _count(result["samples_seen"]), f"{result['wall_seconds']:.0f}"]
        total = result["peak_memory"]["total"]
        ratio = f" ({total / reference['peak_memory']['total']:.2f}x)" if reference and len(results) > 1 else ""
        rows.append([*cells, size(total) + ratio])
    return heads, rows


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints the table; standard errors are over seeds, or over test samples for a single seed."""
    from rich.table import Table

    heads, rows = columns(results)
    seeds = max(len(result["seeds"]) for result in results)
    over = f"{seeds} seeds" if seeds > 1 else "test samples of one seed"
    table = Table(title=f"{results[0]['recipe']} (± standard error over {over})", title_justify="left")
    for head in heads:
        first = head == "method"
        table.add_column(head, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(*row)
    _console().print(table)
    for line in paired(results):
        print(line)


def paired(results: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence per pair of a method that trains blocks and one that does not: the difference of the first metric
    within a seed."""
    return [
        f"{pair['method']} minus {pair['against']}, pairs of the same seed: {pair['metric'].replace('_', ' ')} "
        f"{pair['value']:+.4f} ± {pair['stderr']:.4f}, below zero for "
        f"{sum(one < 0 for one in pair['each'])} of {len(pair['each'])} seeds"
        for pair in pairs(results)
    ]


def show_plan(found: dict[str, Any]) -> None:
    """Prints what `dblocks plan` found."""
    from rich.table import Table

    title = f"predicted peak of training, batch size {found['batch_size']}"
    if found["memory"]:
        free = "" if found["free"] is None else f", of which {size(found['free'])} are free now"
        title += f"; {size(found['usable'])} of {size(found['memory'])}{free} are usable"
    table = Table(title=title, title_justify="left")
    heads = ["method", "blocks", "peak", *KINDS, "host or disk", "moved per step"]
    heads += ["layers, training", "layers, inference", *(["fits"] if found["memory"] else [])]
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=head == "method")
    for row in found["rows"]:
        sizes = row["predicted"]
        away = size(row["host"] or row["disk"]) if row["host"] or row["disk"] else ""
        cells = [row["method"], str(row["num_blocks"]), *(size(sizes[kind]) for kind in ("total", *KINDS)), away]
        cells += [size(row["transfer_per_step"]) if away else ""]
        cells += [f"{row['layer_evaluations_per_sample']:.4g}", f"{row['inference_layers']:.4g}"]
        table.add_row(*cells, *([] if row["fits"] is None else ["yes" if row["fits"] else "no"]))
    _console().print(table)
    if found["traced_on"] != found["target"]:
        print(_traced(found["traced_on"], found["target"], found["workspaces"]))
    best = found["recommendation"]
    if best is not None:
        blocks = f" with {best['num_blocks']} blocks" if (best["num_blocks"] or 1) > 1 else ""
        print(f"{best['method']}{blocks}: {best['reason']}" if best["method"] else best["reason"])
    if best is not None and best["method"]:
        print(f"largest batch that fits: {best['largest_batch']}")
        print(best["command"] or "run it from Python with diffusionblocks.Trainer: there is no recipe for it yet")


DEVICES = {"cpu": "the CPU", "cuda": "a CUDA card"}


def _traced(traced_on: str, target: str, workspaces: int) -> str:
    """What is said where the steps of one device stand for those of another."""
    on, planned = (DEVICES.get(device, f"the device {device}") for device in (traced_on, target))
    if target != "cuda":
        return f"traced on {on} for {planned}, whose kernels may keep other tensors."
    return (
        f"traced on {on} for {planned}: attention is counted as the card's kernels keep it, and activations include "
        f"{size(workspaces)} of workspaces for matrix products."
    )


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return Console(width=160) if console.width < 100 and not console.is_terminal else console


def _with_error(metric: dict[str, Any]) -> str:
    """With as many digits as the error has: at least 2 or 3, at most 4."""
    digits = 2 if abs(metric["value"]) >= 1 else 3
    while metric["stderr"] and metric["stderr"] * 10**digits < 1 and digits < 4:
        digits += 1
    error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.{digits}f}"
    return f"{metric['value']:.{digits}f}{error}"


def _count(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"
