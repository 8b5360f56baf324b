"""Ratios of wall times from one process, in turns, so that a slow moment hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

TURNS = 8


def alternating(calls: dict[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, list[float]]:
    """Seconds of every call, in every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Mean over turns, with its standard error."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"value": statistics.fmean(ratios), "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5}


def compared(seconds: dict[str, list[float]], tokens: int, baseline: str) -> dict[str, Any]:
    """Tokens per second of each, and their speed as a multiple of the baseline's."""
    return {
        name: {"tokens_per_second": tokens / statistics.median(own), "of_baseline": ratio(seconds[baseline], own)}
        for name, own in seconds.items()
    }
