"""Stop requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


def test_second_signal_leaves_at_once():
    code = (
        "import os, signal, time; from util.signals import StopRequest; s = StopRequest().install();"
        "os.kill(os.getpid(), signal.SIGTERM); assert s.requested; print('alive', flush=True);"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(20); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=15)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "alive\n"
    assert "leaving at once" in done.stderr
