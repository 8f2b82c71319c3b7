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

import sys
import traceback
from collections.abc import Callable

EXIT_OK = 0
EXIT_PROGRAM = 1
EXIT_USER = 2
EXIT_NONFINITE = 3
EXIT_LOST = 4
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which is what a queue should do


class UserError(Exception):
    """Something the user can put right. The message names the value, what was expected, and what to do."""

    exit_code = EXIT_USER


class NonFiniteError(UserError):
    """Loss or gradients became NaN or infinite."""

    exit_code = EXIT_NONFINITE


class StoppedEarly(SystemExit):
    """A stop request came while there is nothing to save. No `Exception`: nothing may take it for a failure."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message


# Called with (message, exit_code) when the entry point fails. `util.distributed` sets it so that one failing rank
# ends all ranks instead of leaving them in a collective that nobody will complete. The hook prints the message.
_failure_hook: Callable[[str, int], None] | None = None


def set_failure_hook(hook: Callable[[str, int], None] | None) -> None:
    """Register what ends the other processes when this one fails (`None`: nothing to end)."""
    global _failure_hook
    _failure_hook = hook


def _fail(message: str, code: int) -> None:
    """Print `message`, end the other processes when there are some, and leave with `code`."""
    if _failure_hook is not None:
        _failure_hook(message, code)
    log = sys.modules.get("util.log")  # not imported here: it would make `--help` slow
    if log is not None:
        log.record_in_file(message)
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the one place that speaks without a logger
    sys.exit(code)


def run_cli(main: Callable[[], int | None], *, resumable: bool = False) -> None:
    """Run an entry point and turn its outcome into an exit code.

    Args:
        main: the entry point; returns an exit code, or `None` for success.
        resumable: it may be started again after SIGTERM or SIGUSR1; until it listens to them itself, they end it with
            `EXIT_PREEMPTED`.

    Raises:
        SystemExit: always. `UserError` prints `error: ...` without a traceback; anything else keeps its traceback.
    """
    try:
        if resumable:
            from util.signals import StopRequest

            StopRequest(leave=True).install()
        code = main() or EXIT_OK
    except UserError as error:
        _fail(f"error: {error}", error.exit_code)
    except StoppedEarly as stopped:
        _fail(stopped.message, EXIT_PREEMPTED)
    except SystemExit as leaving:
        # Fine for a lone process (argparse leaves so). One of several must not slip away: the others would wait for it.
        if _failure_hook is None:
            raise
        code = leaving.code if isinstance(leaving.code, int) and leaving.code else EXIT_LOST
        _fail(f"error: this process left in the middle of the run (sys.exit({leaving.code!r}))", code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception:  # noqa: BLE001 - printed in full, then handed to the failure hook
        _fail(traceback.format_exc(), EXIT_PROGRAM)
    else:
        sys.exit(code)
