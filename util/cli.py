"""The wrapper around every entry point: errors become messages and exit codes (listed in `util.errors`)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from util.errors import (
    EXIT_LOST,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_PROGRAM,
    EXIT_USER,
    StoppedEarly,
    UserError,
    lost_worker,
)

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
    for stream in (sys.stdout, sys.stderr):  # names that are no text must not end a program that prints them
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
        text = traceback.format_exc()
        worker = lost_worker(text)
        if worker is not None:
            _fail(f"error: {worker}", EXIT_USER)
        _fail(text, EXIT_PROGRAM)
    else:
        sys.exit(code)
