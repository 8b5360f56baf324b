"""What a run tells while it goes: a progress bar on a terminal, lines otherwise, and metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.system import files
from diffusionblocks.system.devices import memory_in_use
from diffusionblocks.system.run_folder import JOURNAL
from diffusionblocks.training import checkpoint

log = logging.getLogger("diffusionblocks")
LINE_SECONDS = 20.0


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    layer_evaluations: layers passed forward and backward, times samples. A forward pass without backward (features of
    earlier blocks, when the order does not hand them on) counts a third. samples_seen: samples loaded for training.
    recent: running mean of the loss of each block, where `trust` needs it.
    """

    visits: int = 0
    block_steps: int = 0
    samples_seen: int = 0
    layer_evaluations: float = 0.0
    wall_seconds: float = 0.0
    journal_bytes: int = 0
    journal_hash: str = ""
    recent: dict[str, float] = field(default_factory=dict)
    finished: bool = False


class Journal:
    """metrics.jsonl: one line per log interval with the mean loss of every block that trained in it.

    Args:
        folder: run folder, None = keep nothing. length, digest: bytes to keep of an existing file (resume), and what
            `digest` said of them; of a damaged file the lines before the damage are kept. tensorboard: also write the
            same numbers below folder/tensorboard.

    Raises UserError when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, length: int, digest: str = "", tensorboard: bool = False) -> None:
        self.path = None if folder is None else folder / JOURNAL
        self._losses: dict[int, list[Tensor]] = {}
        self._rates: dict[int, float] = {}
        kept = b""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = _kept(self.path, length, digest)
            with self.path.open("ab") as stream:
                stream.truncate(len(kept))
        self.bytes, self._hash = len(kept), hashlib.blake2b(kept, digest_size=16)
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
            encoded = (files.to_json(line) + "\n").encode()
            with files.told(self.path), self.path.open("ab") as stream:
                stream.write(encoded)
            self.bytes += len(encoded)
            self._hash.update(encoded)

    @property
    def digest(self) -> str:
        """Hash of all lines so far."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        if self.path is not None and self.path.is_file():
            files.flush(self.path)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _kept(path: Path, length: int, digest: str) -> bytes:
    """The first `length` bytes of a file, or of a damaged one the whole lines before the damage."""
    found = path.read_bytes()[:length] if path.is_file() else b""
    if len(found) == length and digest in ("", _digest(found)):
        return found
    good = b""
    for line in found.splitlines(keepends=True):
        if not line.endswith(b"\n") or _entry(line) is None:
            break
        good += line
    log.warning("%s is damaged: it goes on after its first %d lines", path, good.count(b"\n"))
    return good


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None where it is none."""
    try:
        entry = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _is_entry(entry) else None


def _is_entry(entry: dict[str, Any]) -> bool:
    losses = entry.get("loss", {})
    numbers = [entry.get("block_steps"), *([entry.get("layer_evaluations")] if losses else [])]
    numbers += list(losses.values()) if isinstance(losses, dict) else [None]
    return all(isinstance(number, int | float) for number in numbers) and all(name.isdecimal() for name in losses)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_journal(folder: Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where it has no such file.

    whole: the run is finished. Else the lines that are complete so far.

    Raises Damaged where a line of a finished run is none, or the file is another than the newest checkpoint knows.
    """
    path, found = folder / JOURNAL, list[dict[str, Any]]()
    fix = "remove it, and the report has no curve"
    if not files.there(path, fix):
        return []
    content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True)):
        entry = _entry(line) if line.endswith(b"\n") else None
        if entry is not None:
            found.append(entry)
        elif whole:
            raise files.Damaged(path, f"line {number + 1} is none that a run writes", fix)
    known = checkpoint.existing(folder) if whole else []
    if known and checkpoint.damage(known[-1]) is None:
        progress = checkpoint.read_state(known[-1])["progress"]
        length, digest = progress.get("journal_bytes", 0), progress.get("journal_hash", "")
        if digest and (digest != _digest(content[:length]) or (len(content) > length and progress.get("finished"))):
            raise files.Damaged(path, "its content is not what was written", fix)
    return found


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
