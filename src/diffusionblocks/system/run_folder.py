"""A run folder: what in it is a run's, who works in it, and what a process that died left there.

DIR/config.yaml  metrics.jsonl  summary.json  checkpoints/  model/      written as system/files.py says
    .lock  .owner.json                                                  held for the life of a run, by one process
    .previous/                                                          the run before, until a new one has its first
                                                                        checkpoint
    .moving/                                                            what is on its way there or back
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from diffusionblocks.errors import UserError
from diffusionblocks.system import files

log = logging.getLogger("diffusionblocks")
CONFIG, JOURNAL, SUMMARY, COMPARISON, REPORT = (
    *("config.yaml", "metrics.jsonl", "summary.json", "compare.json", "report.html"),
)
SAMPLES, BEFORE = "samples.json", "before.json"
CHECKPOINTS, MODEL, DEPLOYED, RESIDENCY = "checkpoints", "model", "huggingface", "residency"
RUN = (CONFIG, JOURNAL, SUMMARY, BEFORE, SAMPLES, CHECKPOINTS, MODEL, DEPLOYED, RESIDENCY, "tensorboard")
LOCK, OWNER, PREVIOUS, MOVING = ".lock", ".owner.json", ".previous", ".moving"
OLD = ".old-"  # before the number of a checkpoint that is being replaced

WAIT = "DIFFUSIONBLOCKS_WAIT_FOR_FOLDER"  # environment: seconds, of runs that a comparison starts again
BEGINNING = 2.0  # seconds between taking the lock and saying who did, at most
LETTING_GO = 10.0  # seconds in which what a killed process started ends, too


_held = set[Path]()  # by this process


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone. A folder that stays empty is removed again.

    The system gives the lock back when its owner dies, however it dies. Within itself, for the same folder, this does
    nothing.

    Raises UserError when another process holds it, naming that.
    """
    from filelock import FileLock

    if (key := folder.resolve()) in _held:
        yield
        return
    made = _make(folder)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        _acquire(lock, folder)
        try:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            files.write_json(folder / OWNER, {"host": platform.node(), "pid": os.getpid(), "since": now})
            _held.add(key)
            _tidy(folder)
            yield
        finally:
            _held.discard(key)
            (folder / OWNER).unlink(missing_ok=True)
            if not any(path.name != LOCK for path in folder.iterdir()):
                (folder / LOCK).unlink(missing_ok=True)
            lock.release()
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns those that were not there, the innermost first."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder is needed; choose another --output-dir")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); choose another --output-dir") from None
    return missing


def _acquire(lock: object, folder: Path) -> None:
    from filelock import BaseFileLock, Timeout

    assert isinstance(lock, BaseFileLock)
    patience = time.monotonic() + float(os.environ.get(WAIT) or 0)
    named, orphaned = time.monotonic() + BEGINNING, time.monotonic() + LETTING_GO
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            owner = _owner(folder)
            # Nobody is named while one begins; and what a killed process started ends after it.
            beginning, dead = owner is None, owner is not None and _is_dead(*owner[:2])
            until = max(patience, named if beginning else orphaned if dead else 0.0)
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is in use{_named(owner)}; wait until that ends, or choose another --output-dir"
                ) from None
            time.sleep(0.1)
        except NotImplementedError:  # older versions of filelock, on a file system without locks
            log.warning("%s is on a file system without locks: nothing keeps a second process out", folder)
            return
        except OSError as error:
            raise UserError(f"cannot write in {folder} ({error.strerror}); choose another --output-dir") from None


def _owner(folder: Path) -> tuple[str, int, str] | None:
    try:
        found = files.read_json(folder / OWNER, {"host": str, "pid": int, "since": str})
    except (OSError, UserError):
        return None
    return found["host"], found["pid"], found["since"]


def _named(owner: tuple[str, int, str] | None) -> str:
    return "" if owner is None else f" by process {owner[1]} on {owner[0]} since {owner[2]}"


def _is_dead(host: str, pid: int) -> bool:
    """Whether a process of this host is no more; of other hosts nobody knows."""
    return host == platform.node() and not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be known."""
    if os.name == "nt":  # where asking would interrupt it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed process may leave."""
    return not folder.is_dir() or all(
        path.name in (LOCK, OWNER, RESIDENCY, MOVING) or path.suffix == files.PARTIAL for path in folder.iterdir()
    )


@contextlib.contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """The folder, afterwards without what this process left half done. Only who holds it may."""
    try:
        yield
    finally:
        shutil.rmtree(folder / RESIDENCY, ignore_errors=True)
        _tidy(folder)


def _tidy(folder: Path) -> None:
    """Mends and removes what processes that died left half done."""
    _finish_moving(folder)
    for old in folder.glob(f"{CHECKPOINTS}/{OLD}*"):
        place = old.with_name(f"step-{old.name.removeprefix(OLD)}")
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, place)
    for path in (*(folder / f"{name}{files.PARTIAL}" for name in RUN), *folder.glob(f"{CHECKPOINTS}/.partial-*")):
        files.remove(path)
    for path in folder.glob(f"{RESIDENCY}/*"):
        if path.name != str(os.getpid()):
            files.remove(path)


def set_aside(folder: Path) -> None:
    """Moves the run in a folder aside, to make room for a new one. Of several that never had a checkpoint, the first
    one stays."""
    aside, moving = folder / PREVIOUS, folder / MOVING
    if aside.is_dir() and not has_checkpoint(folder) and not (folder / SUMMARY).is_file():
        _remove_run(folder)
        return
    shutil.rmtree(aside, ignore_errors=True)
    moving.mkdir()
    for name in RUN:
        if (folder / name).exists():
            os.replace(folder / name, moving / name)
    os.replace(moving, aside)


def put_back(folder: Path) -> None:
    """Undoes `set_aside`, for a new run that failed before it had a checkpoint."""
    if (folder / PREVIOUS).is_dir():
        os.replace(folder / PREVIOUS, folder / MOVING)
        _remove_run(folder)
        _finish_moving(folder)


def _finish_moving(folder: Path) -> None:
    """What is between its place and `PREVIOUS` goes to its place: a process died while it moved a run. The recipe
    goes last."""
    moving = folder / MOVING
    if not moving.is_dir():
        return
    for path in sorted(moving.iterdir(), key=lambda path: path.name == CONFIG):
        files.remove(folder / path.name)
        os.replace(path, folder / path.name)
    moving.rmdir()


def drop_previous(folder: Path) -> None:
    """Removes the run that was set aside: the new one has its first checkpoint."""
    shutil.rmtree(folder / PREVIOUS, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("step-*"))


def _remove_run(folder: Path) -> None:
    for name in RUN:
        files.remove(folder / name)
