"""Stop requests: SIGTERM, SIGUSR1, SIGINT (Ctrl-C) ask for a checkpoint and a clean exit; a later one leaves at once.

Who ends a job often signals every process in it, and the launcher hands its own signal on: the same request arrives
several times. Signals within `REPEAT_SECONDS` of the first therefore count as one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from util.errors import StoppedEarly

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 5.0


class StopRequest:
    """Remembers that the queue system or the user asked the run to stop.

    The handler only sets a flag: the training loop looks at it between steps, all ranks agree, save, and leave with
    `util.errors.EXIT_PREEMPTED`.
    """

    def __init__(self, *, leave: bool = False) -> None:
        """Begin without a request.

        Args:
            leave: there is nothing to save: a signal raises `StoppedEarly` in the main thread.
        """
        self.signal_name: str | None = None
        self._since = 0.0
        self._leave = leave
        self._previous: dict[int, object] = {}

    def install(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> StopRequest:
        """Install the handlers (main thread only) and return self; takes over a request that found nothing to save."""
        for number in signals:
            self._previous[number] = signal.signal(number, self._handle)
        for earlier in self._earlier():
            if earlier.signal_name is not None:
                self.signal_name, self._since = earlier.signal_name, earlier._since
        return self

    def restore(self) -> None:
        """Put the previous handlers back. They know of the request: what repeats it must not be a new one to them."""
        for earlier in self._earlier():
            if self.signal_name is not None:
                earlier.signal_name, earlier._since = self.signal_name, self._since
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _earlier(self) -> list[StopRequest]:
        owners = [getattr(handler, "__self__", None) for handler in self._previous.values()]
        return [owner for owner in owners if isinstance(owner, StopRequest) and owner._leave]

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived in this process."""
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal_name is not None:
            if time.monotonic() - self._since < REPEAT_SECONDS:
                return
            # No clean-up on purpose: whoever asks twice wants the process gone. Files are safe (atomic writes).
            os.write(2, f"{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        self.signal_name, self._since = name, time.monotonic()
        if self._leave:
            raise StoppedEarly(f"{name}: stopped where there was nothing to save; the same command continues")
        again = f"another signal more than {REPEAT_SECONDS:g} s later leaves at once"
        os.write(2, f"{name}: stopping after this step, with a checkpoint; {again}\n".encode())


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Hold stop requests back for a moment; worker processes that start in it inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """In a worker process: leave stop requests to the parent, which needs the worker until it has saved.

    The parent's own SIGTERM (how `multiprocessing` ends workers that it no longer needs) still ends the worker.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    if not hasattr(signal, "sigwaitinfo"):  # macOS: the sender is not told
        return
    # Blocked signals wait for a thread that asks for them, and tells who sent them; a handler would not know.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGINT])
    threading.Thread(target=_wait_for_parent, name="signals", daemon=True).start()


def _wait_for_parent() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            os._exit(0)
