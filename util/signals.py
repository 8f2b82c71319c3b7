"""Stop requests: SIGTERM and SIGUSR1 ask for a checkpoint and a clean exit; a second one leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Remembers that the queue system or the user asked the run to stop.

    The handler only sets a flag: the training loop looks at it between steps, all ranks agree, save, and leave with
    `util.errors.EXIT_PREEMPTED`.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def install(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)) -> StopRequest:
        """Install the handlers (main thread only) and return self."""
        for number in signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived in this process."""
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            # No clean-up on purpose: whoever asks twice wants the process gone. Files are safe (atomic writes).
            os.write(2, f"{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        self.signal_name = name
        os.write(2, f"{name}: stopping after this step, with a checkpoint; a second signal leaves at once\n".encode())
