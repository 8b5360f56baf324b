"""Figures of the report, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from diffusionblocks.training.figures import Moments, Picture, Pictures, Stages, Table, Texts, Value

# One hue per block, light to dark from the highest noise to the lowest.
BLOCK_COLOURS = plt.get_cmap("viridis")
CURVE = "nats_at_"  # metrics of looped networks, by the number of iterations
PARTS = ("parameters", "gradients", "optimizer", "activations")
PART_COLOURS = ("#3b6ea5", "#e08e45", "#6aa56e", "#b0b4ba")
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "diffusionblocks",
    }
)


def block_colour(block: int, num_blocks: int) -> Any:
    return BLOCK_COLOURS(0.15 + 0.7 * block / max(1, num_blocks - 1))


def plain(text: str) -> str:
    """A text as it is: matplotlib would set what stands between two $ as a formula, and SVG has no lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def block_css(block: int, num_blocks: int) -> str:
    return matplotlib.colors.to_hex(block_colour(block, num_blocks))


def noise_ranges(ranges: Sequence[dict[str, float]], unit: str = "sigma") -> str:
    """A bar per block over log sigma, or over t: what it owns (solid) and what it trains on (light)."""
    figure, axes = plt.subplots(figsize=(6.4, 0.7 + 0.35 * len(ranges)))
    for block, span in enumerate(ranges):
        colour = block_colour(block, len(ranges))
        axes.barh(block, span["trained_high"] - span["trained_low"], left=span["trained_low"], color=colour, alpha=0.35)
        axes.barh(block, span["high"] - span["low"], left=span["low"], color=colour)
    if unit == "sigma":
        axes.set_xscale("log")
    axes.set_yticks(range(len(ranges)), [f"block {block}" for block in range(len(ranges))])
    axes.invert_yaxis()
    axes.set_xlabel(plain(f"noise level {unit} (light: overlap, also trained on)"))
    return _svg(figure)


def losses(curves: dict[str, tuple[list[float], list[float]]], num_blocks: int, unit: str = "") -> str:
    """Training loss over layer evaluations, one line per block. unit: what follows the axis's name."""
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=plain(f"block {name}"), color=block_colour(int(name), num_blocks), linewidth=1.2)
    axes.set_xlabel("layer evaluations")
    axes.set_ylabel(plain(f"training loss{unit}"))
    axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def memory(results: Sequence[dict[str, Any]]) -> str:
    """Stacked bars of peak memory per method."""
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.38 * len(results)))
    largest = max(result["peak_memory"]["total"] for result in results)
    unit, name = (2**30, "GiB") if largest > 2**30 else (2**20, "MiB")
    left = np.zeros(len(results))
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        values = np.array([result["peak_memory"][part] / unit for result in results])
        axes.barh([plain(result["method"]) for result in results], values, left=left, color=colour, label=part)
        left += values
    axes.invert_yaxis()
    axes.set_xlabel(f"peak training memory ({name})")
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure)


def quality(results: Sequence[dict[str, Any]], metric: str) -> str:
    """A dot with its standard error per method."""
    figure, axes = plt.subplots(figsize=(6.4, 0.7 + 0.34 * len(results)))
    for row, result in enumerate(results):
        value = result["metrics"][metric]
        axes.errorbar(value["value"], row, xerr=value["stderr"] or 0, fmt="o", capsize=3, color=PART_COLOURS[0])
    axes.set_yticks(range(len(results)), [plain(result["method"]) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(plain(f"{metric} (± standard error)"))
    return _svg(figure)


def iterations(results: Sequence[dict[str, Any]]) -> str:
    """Nats per token over the iterations K of looped networks at inference, one line per method; empty for other
    networks."""
    curves = []
    for result in results:
        found = {
            int(name.rpartition("_")[2]): value for name, value in result["metrics"].items() if name.startswith(CURVE)
        }
        if found:
            curves.append((result["method"], sorted(found.items())))
    if not curves:
        return ""
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for method, points in curves:
        errors = [value["stderr"] or 0 for _, value in points]
        nats = [value["value"] for _, value in points]
        axes.errorbar([count for count, _ in points], nats, yerr=errors, marker="o", label=plain(method))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_xlabel("iterations K at inference")
    axes.set_ylabel("nats per token (± standard error)")
    axes.legend(frameon=False)
    return _svg(figure)


def samples(images: np.ndarray, captions: Sequence[str], right: Sequence[bool]) -> str:
    """Images [n, height, width] or [n, height, width, 3] in a row of eight each, wrong captions in red."""
    columns = 8
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4, 1.05 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, good in zip(axes.flat, images, captions, right, strict=False):
        axis.imshow(image, cmap="gray_r", interpolation="nearest")
        axis.set_title(plain(caption), fontsize=7, color="black" if good else "#c0392b")
    return _svg(figure)


def picture(array: np.ndarray) -> str:
    """One picture [height, width] or [height, width, 3], as it is."""
    height, width = array.shape[:2]
    figure, axes = plt.subplots(figsize=(6.4, 6.4 * height / width))
    axes.axis("off")
    axes.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return _svg(figure)


def stages(found: Stages) -> str:
    """From noise to images, one column per stage; the bar above a column has the colour of the block that ran."""
    columns, rows = len(found.stages), len(found.stages[0].images)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4, 0.35 + 6.4 / columns * rows), squeeze=False)
    for column, stage in enumerate(found.stages):
        colour = block_colour(stage.block, found.num_blocks)
        axes[0, column].set_title(f"block {stage.block}\n{stage.level:.2g}", fontsize=6, color=colour)
        axes[0, column].axhline(-1.5, color=colour, linewidth=4, clip_on=False)
        for row in range(rows):
            axis = axes[row, column]
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour)
            axis.imshow(stage.images[row], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _svg(figure)


def _moments(found: Moments) -> list[dict[str, Any]]:
    """Every token in the colour of the block that wrote it."""
    colours = {block: block_css(block, found.num_blocks) for block in range(found.num_blocks)}

    def colour(block: int | None) -> str:
        return "#ccc" if block is None else colours[block]

    return [
        {
            "level": moment.level,
            "block": moment.block,
            "colour": colour(moment.block),
            "tokens": [(text, colour(writer)) for text, writer in moment.tokens],
        }
        for moment in found.moments
    ]


def drawn(title: str, value: Value) -> dict[str, Any]:
    """A figure of a task or of the report, as page.html shows it."""
    match value:
        case Pictures():
            content: dict[str, Any] = {"svg": samples(value.images, value.captions, value.right)}
        case Picture():
            content = {"svg": picture(value.image)}
        case Stages():
            content = {"svg": stages(value)}
        case Texts():
            content = {"texts": value.texts}
        case Moments():
            content = {"moments": _moments(value)}
        case Table():
            content = {"heads": value.heads, "rows": value.rows}
    return {"title": title, **content}


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]
