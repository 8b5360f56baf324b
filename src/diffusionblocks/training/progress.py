"""What a run tells while it goes: a progress bar on a terminal, lines otherwise, and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusionblocks.devices import memory_in_use
from diffusionblocks.errors import UserError

if TYPE_CHECKING:
    from diffusionblocks.training.trainer import Progress

log = logging.getLogger("diffusionblocks")
LINE_SECONDS = 20.0


class Journal:
    """metrics.jsonl: one line per log interval with the mean loss of every block that trained in it.

    Args:
        folder: run folder, None = keep nothing. length: bytes to keep of an existing file (resume). tensorboard: also write the
            same numbers below folder/tensorboard.

    Raises UserError when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, length: int, tensorboard: bool = False) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.bytes = length
        self._losses: dict[int, list[Tensor]] = {}
        self._rates: dict[int, float] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                stream.truncate(length)
        self._board = _summary_writer(folder or Path(".")) if tensorboard else None

    def record(self, block: int, losses: list[Tensor], rate: float) -> None:
        self._losses.setdefault(block, []).extend(losses)
        self._rates[block] = rate

    def flush(self, progress: Progress) -> None:
        """Writes what was recorded since the last line."""
        if not self._losses:
            return
        means = {str(block): torch.stack(losses).mean().item() for block, losses in sorted(self._losses.items())}
        rates = {str(block): rate for block, rate in sorted(self._rates.items())}
        position = {"block_steps": progress.block_steps, "seconds": round(progress.wall_seconds, 3)}
        self.write({**position, "layer_evaluations": progress.layer_evaluations, "loss": means, "learning_rate": rates})
        self._losses.clear()
        self._rates.clear()

    def write(self, line: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in _flat(line).items():
                self._board.add_scalar(name, value, line["block_steps"])
        if self.path is not None:
            encoded = (json.dumps(line) + "\n").encode()
            with self.path.open("ab") as stream:
                stream.write(encoded)
            self.bytes += len(encoded)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("train.tensorboard needs tensorboard: pip install 'diffusionblocks[tracking]'") from None
    return SummaryWriter(str(folder / "tensorboard"))


def _flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in line.items():
        flat.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


class ProgressBar:
    """Loss per block, steps per second, memory and time left, on stderr."""

    def __init__(self, total: int, done: int, device: torch.device) -> None:
        self.total, self.first, self.device = total, done, device
        self.done = done
        self.losses: dict[int, Tensor] = {}
        self.started = self.spoken = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, block: int, losses: list[Tensor], done: int) -> None:
        self.losses[block], self.done = losses[-1], done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=self._text(now) if now - self.spoken > 0.5 else None)
        elif now - self.spoken > LINE_SECONDS:
            left = (self.total - done) * (now - self.started) / max(1, done - self.first)
            log.info("%d/%d block steps  %s  %.0f s left", done, self.total, self._text(now), left)
        if now - self.spoken > (0.5 if self.bar is not None else LINE_SECONDS):
            self.spoken = now

    def _text(self, now: float) -> str:
        losses = " ".join(f"{block}:{loss.item():.3f}" for block, loss in sorted(self.losses.items()))
        speed = (self.done - self.first) / max(1e-9, now - self.started)
        used = memory_in_use(self.device)
        if used is None:  # else the largest resident set of this process
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return f"loss {losses}  {speed:.1f} steps/s  {used / 2**20:.0f} MiB"
