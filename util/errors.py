"""Errors meant for the user, exit codes, and the wrapper around every entry point.

Exit codes (documented in docs/cluster.md):

==== ===========================================================================================
code meaning
==== ===========================================================================================
0    finished
1    programming error (a traceback was printed)
2    refused: wrong input, option, file or environment; the message says what to do
3    training stopped because loss or gradients were not finite
4    a process was lost or hung; the job was ended for all
75   stopped on request (SIGTERM, SIGUSR1) after saving, or with nothing to save; `--resume auto`
     continues
128+ left at once on a later signal (128 + signal number)
==== ===========================================================================================
"""

from __future__ import annotations

import re

EXIT_OK = 0
EXIT_PROGRAM = 1
EXIT_USER = 2
EXIT_NONFINITE = 3
EXIT_LOST = 4
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which is what a queue should do


class UserError(Exception):
    """Something the user can put right. The message names the value, what was expected, and what to do."""

    exit_code = EXIT_USER


_WORKER = re.compile(r"DataLoader worker \(pid[^\n]*?\) (?:is killed by signal|exited unexpectedly)[^\n]*")


def lost_worker(text: str) -> str | None:
    """What to say when a loader's worker died; None when `text`, an error or its traceback, is of something else.

    PyTorch learns of it by a signal, and raises wherever the program then is: in the middle of a step, or while saving.
    """
    found = _WORKER.search(text)
    return (
        None if found is None else f"a loader worker died ({found[0]}); often memory ran out: use fewer --num_workers"
    )


class NonFiniteError(UserError):
    """Loss or gradients became NaN or infinite."""

    exit_code = EXIT_NONFINITE


class StoppedEarly(SystemExit):
    """A stop request came while there is nothing to save. No `Exception`: nothing may take it for a failure."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message
