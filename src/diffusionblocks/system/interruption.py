"""Ctrl-C and SIGTERM: what they end, when, and what is saved before.

While a run trains, the first signal lets the visit under way end and a checkpoint be written (`Stop`). Everywhere else
it ends what is going on at once, and what was half written is removed (`interruptible`). SIGTERM, which schedulers
follow up with a kill, waits for a visit `GRACE` seconds at most. Nothing interrupts the cleaning up.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from diffusionblocks.errors import Failed, RunStopped

T = TypeVar("T")

GRACE = 8.0  # seconds that SIGTERM leaves a visit to end
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PARENT = "DIFFUSIONBLOCKS_ENDS_WITH_PARENT"  # environment: this process ends when its standard input does


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def code_of(number: int) -> int:
    """The exit code of what a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


def ignore() -> None:
    """From now on, neither signal does anything: this process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handled(handle: Any) -> Iterator[None]:
    """Both signals go to `handle`, where this is the main thread and they are not ignored (as in what a shell puts in
    the background)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: found for number, found in previous.items() if found not in (None, signal.SIG_IGN)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, once; what follows lets the cleaning up be.

    An interrupted import may end as another error, which is none of its own: outside, it is the interruption again.
    """
    came = []

    def handle(number: int, frame: object) -> None:
        ignore()
        came.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    with _handled(handle):
        try:
            yield
        except Exception as error:
            if not came or isinstance(error, RunStopped | Failed):
                raise
    if came:
        raise Terminated if came[0] == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """For what only reads: either signal ends the process where it is. An error raised in the middle of torch's
    tracing, where C++ calls Python, could end it with a core dump."""

    def handle(number: int, frame: object) -> None:
        _say(f"dblocks: {'terminated' if number == signal.SIGTERM else 'interrupted'}")
        os._exit(code_of(number))

    with _handled(handle):
        yield


def only_commands_end() -> None:
    """Outside of commands, neither signal does anything: for a program that has nothing else to do."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


class Stop:
    """What asked a training run to stop, if anything did. signal: its number, 0 = nothing."""

    def __init__(self) -> None:
        self.signal, self._saving, self._late = 0, False, False
        self._timer: threading.Timer | None = None

    def __bool__(self) -> bool:
        return self.signal != 0

    def between(self, batches: Iterable[T]) -> Iterator[T]:
        """For what may be given up and loses nothing: the batches of it, and Stopped in place of the next one."""
        for batch in batches:
            if self:
                raise Stopped
            yield batch

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """For what is written when a visit ended: it is waited for."""
        self._saving = True
        self.close()
        try:
            yield
        finally:
            self._saving = False

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def handle(self, number: int, frame: object) -> None:
        if self._late or (self and number == signal.SIGINT == self.signal):
            ignore()
            raise Terminated if self._late else KeyboardInterrupt
        if self:
            return
        self.signal = number
        more = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
        _say(f"stopping after this visit{more}")
        if number == signal.SIGTERM and not self._saving:
            self._timer = threading.Timer(GRACE, self._too_late)
            self._timer.daemon = True
            self._timer.start()

    def _too_late(self) -> None:
        self._late = True
        _terminate()


class Stopped(BaseException):
    """Raised by `Stop.between`; no handler of errors is meant to see it."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """What Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = Stop()
    try:
        with _handled(stop.handle):
            yield stop
    finally:
        stop.close()


def _say(line: str) -> None:
    """A signal may come in the middle of a print: this goes past what Python holds back."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


def end_with_parent() -> None:
    """Where the environment asks for it, SIGTERM comes when the process that started this one is gone: its end of our
    standard input closes then, however it died."""
    if os.environ.pop(PARENT, ""):
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    _terminate()


def _terminate() -> None:
    """SIGTERM for the main thread, from another one."""
    if hasattr(signal, "pthread_kill"):  # ends what the main thread waits for in the system
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    else:
        _thread.interrupt_main(signal.SIGTERM)


def worker_ignores_ctrl_c(number: int = 0) -> None:
    """For processes that load data: Ctrl-C on a terminal reaches them too, and they end with the run that they load
    for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
