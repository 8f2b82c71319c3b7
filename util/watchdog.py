"""Ends a job of several processes when one of them hangs, with a message that says where.

The training loop tells the watchdog what it is about to do: fetch a batch, or compute a step (which includes waiting
for the gradients of the others). A process that waits too long for data is the culprit itself and says so first; the
others would only be seen waiting for it, and therefore get more time.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TypeVar

from util.distributed import Processes
from util.errors import EXIT_LOST

T = TypeVar("T")

_COMPUTE_SHARE = 1.2  # a step may take this share of the limit, so that the one that waits for data speaks first
_SLOWEST_SHARE = 4.0  # ... or this many times the slowest step so far
_FIRST_SHARE = 20.0  # the first steps compile kernels and may take this many limits
_FIRST_STEPS = 3


class Watchdog:
    """A thread that ends the job when the main thread makes no progress. Idle with one process or without a limit."""

    def __init__(self, processes: Processes, *, limit: float) -> None:
        """Begin, with nothing to watch yet.

        Args:
            processes: those to end.
            limit: seconds a batch may take to arrive; 0: never end anything.
        """
        self._processes = processes
        self._limit = limit
        self._slowest = 0.0
        self._steps = 0
        self._watched: tuple[str, float, float] | None = None  # what is done, since when, how long it may take
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if limit > 0 and processes.world_size > 1:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()

    def watch(self, batches: Iterator[T], *, alone: bool = False) -> Iterator[T]:
        """Pass `batches` on, watching the time each takes to come and the time until the next is asked for.

        Args:
            batches: of a loader.
            alone: this process computes without the others (evaluation): only the coming of batches is watched.
        """
        try:
            while True:
                self._watched = ("waiting for a batch from the data loader", time.monotonic(), self._limit)
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                if alone:
                    self._watched = None
                    yield batch
                    continue
                began = time.monotonic()
                self._watched = ("computing a step together with the other processes", began, self._patience())
                yield batch
                self._steps += 1
                if self._steps > _FIRST_STEPS:
                    self._slowest = max(self._slowest, time.monotonic() - began)
        finally:
            self._watched = None

    def _patience(self) -> float:
        if self._steps < _FIRST_STEPS:
            return _FIRST_SHARE * self._limit
        return max(_COMPUTE_SHARE * self._limit, _SLOWEST_SHARE * self._slowest)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing for a while: all processes do something of unknown length together (saving)."""
        watched, self._watched = self._watched, None
        try:
            yield
        finally:
            if watched is not None:
                self._watched = (watched[0], time.monotonic(), watched[2])

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > watched[2]:
                self._end(*watched)

    def _end(self, what: str, since: float, allowed: float) -> None:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)[-6:]) if frame is not None else ""
        self._processes.abort(
            f"error: no progress for {time.monotonic() - since:.0f} s while {what} (limit {allowed:.0f} s, from "
            f"--hang_timeout {self._limit:g}); ending the job. If this was slow storage, raise --hang_timeout; "
            f"continue with --resume auto.\n{stack}",
            EXIT_LOST,
        )
