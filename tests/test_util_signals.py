"""Stop requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from util.errors import StoppedEarly
from util.signals import StopRequest

ROOT = Path(__file__).resolve().parent.parent


def test_first_signal_sets_the_flag():
    stop = StopRequest().install()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert stop.signal_name == "SIGUSR1"
    finally:
        stop.restore()


def test_signals_within_seconds_are_one_request_and_a_later_one_leaves_at_once():
    code = (
        "import os, signal, time; import util.signals as u; u.REPEAT_SECONDS = 0.5; s = u.StopRequest().install();"
        "os.kill(os.getpid(), signal.SIGTERM); assert s.requested;"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1); print('alive', flush=True);"
        "time.sleep(0.6); os.kill(os.getpid(), signal.SIGTERM); time.sleep(20); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=15)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "alive\n"
    assert "leaving at once" in done.stderr


def test_where_there_is_nothing_to_save_a_signal_ends_the_program():
    early = StopRequest(leave=True).install()
    try:
        with pytest.raises(StoppedEarly, match="75") as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 75
        os.kill(os.getpid(), signal.SIGUSR1)  # a repetition
        # The exception may have been lost (raised in a destructor): whoever can save learns of the request.
        inner = StopRequest().install()
        assert inner.signal_name == "SIGTERM"
        inner.restore()
    finally:
        early.restore()


def test_a_request_that_was_served_is_not_a_new_one_afterwards():
    early = StopRequest(leave=True).install()
    try:
        inner = StopRequest().install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert inner.requested
        assert not early.requested
        inner.restore()
        os.kill(os.getpid(), signal.SIGUSR1)  # the launcher hands the same request on
        assert early.signal_name == "SIGTERM"
    finally:
        early.restore()


def test_run_cli_ends_a_resumable_program_with_75():
    code = (
        "import os, signal; from util.cli import run_cli;"
        "run_cli(lambda: os.kill(os.getpid(), signal.SIGTERM), resumable={})"
    )
    for resumable, expected in ((True, 75), (False, -signal.SIGTERM)):
        command = [sys.executable, "-c", code.format(resumable)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=15)
        assert done.returncode == expected
        assert ("nothing to save" in done.stderr) == resumable


def test_workers_leave_stop_requests_to_their_parent():
    """Neither signal ends the worker, or reaches it at all; the parent's own SIGTERM does."""
    code = (
        "import os, signal, subprocess, sys, time; from util.signals import *\n"
        "StopRequest().install()\n"
        "with held_signals():\n"
        "    worker = os.fork()\n"
        "if worker == 0:\n"
        "    ignore_stop_signals(); time.sleep(30); os._exit(9)\n"
        "for name in ('TERM', 'USR1', 'TERM'):\n"
        "    time.sleep(0.3); subprocess.run(['sh', '-c', f'kill -{name} {worker}'], check=True)\n"
        "time.sleep(0.3); assert os.waitpid(worker, os.WNOHANG) == (0, 0)\n"
        "os.kill(worker, signal.SIGTERM); assert os.waitpid(worker, 0) == (worker, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
