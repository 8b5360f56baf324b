"""Two lanes between host and device, one up and one down, beside the device's own work.

On CUDA a lane is a stream: a copy is asked for and goes on while kernels run, and events say what must come before
what. Elsewhere a copy is made at once. Nothing here waits on the host but `finish`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import torch
from torch import Tensor

Lane = Literal["up", "down"]
Pair = tuple[Tensor, Tensor]  # into, from
Event = torch.cuda.Event | Future[torch.cuda.Event | None] | None  # when something is done; None = it is


class Lanes(Protocol):
    """What residency needs of a device."""

    def mark(self) -> Event:
        """The moment at which everything that was asked of the device so far has been computed."""
        ...

    def copy(self, lane: Lane, pairs: Sequence[Pair], after: Iterable[Event], *, slow: bool = False) -> Event:
        """Copies tensors once the events `after` have passed. slow: the source is read from a disk, which a thread
        waits for."""
        ...

    def wait(self, event: Event) -> None:
        """What is asked of the device from now on comes after `event`."""
        ...

    def finish(self, event: Event) -> None:
        """Waits on the host."""
        ...


class AtOnce:
    """A device without streams, or the CPU: copies are made when they are asked for, slow ones by a thread."""

    def __init__(self) -> None:
        self._reader: ThreadPoolExecutor | None = None

    def mark(self) -> Event:
        return None

    def copy(self, lane: Lane, pairs: Sequence[Pair], after: Iterable[Event], *, slow: bool = False) -> Event:
        for event in after:
            self.finish(event)
        if slow:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
            return self._reader.submit(_copy, pairs)
        return _copy(pairs)

    def wait(self, event: Event) -> None:
        self.finish(event)

    def finish(self, event: Event) -> None:
        if isinstance(event, Future):
            event.result()


class Streams:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {"up": torch.cuda.Stream(device), "down": torch.cuda.Stream(device)}
        self._reader: ThreadPoolExecutor | None = None

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, lane: Lane, pairs: Sequence[Pair], after: Iterable[Event], *, slow: bool = False) -> Event:
        stream = self._streams[lane]
        for event in after:
            if (passed := _passed(event)) is not None:
                stream.wait_event(passed)
        if not slow:
            return self._ask(stream, pairs)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        return self._reader.submit(self._ask, stream, pairs)

    def _ask(self, stream: torch.cuda.Stream, pairs: Sequence[Pair]) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            _copy(pairs)
            return stream.record_event()

    def wait(self, event: Event) -> None:
        if (passed := _passed(event)) is not None:
            torch.cuda.current_stream(self.device).wait_event(passed)

    def finish(self, event: Event) -> None:
        if (passed := _passed(event)) is not None:
            passed.synchronize()


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return Streams(device) if device.type == "cuda" else AtOnce()


@torch.no_grad()
def _copy(pairs: Sequence[Pair]) -> None:
    for into, source in pairs:
        into.copy_(source, non_blocking=True)


def _passed(event: Event) -> torch.cuda.Event | None:
    return event.result() if isinstance(event, Future) else event
