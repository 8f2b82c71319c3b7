"""run_cli: exit codes, messages, the failure hook."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from util import cli, errors


@pytest.fixture(autouse=True)
def _no_hook():
    yield
    cli.set_failure_hook(None)


def _outcome(main):
    with pytest.raises(SystemExit) as caught:
        cli.run_cli(main)
    return caught.value.code


def test_success_and_returned_code():
    assert _outcome(lambda: None) == 0
    assert _outcome(lambda: errors.EXIT_PREEMPTED) == 75


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("--x 3 is odd; use 2"), 2),
        (errors.NonFiniteError("loss nan"), 3),
    ],
)
def test_user_errors_print_one_line(capsys, error, code):
    def main():
        raise error

    assert _outcome(main) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_programming_error_keeps_traceback(capsys):
    assert _outcome(lambda: {}["missing"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "KeyError: 'missing'" in err


def test_interrupt(capsys):
    def main():
        raise KeyboardInterrupt

    assert _outcome(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_hook_ends_the_others():
    calls = []
    cli.set_failure_hook(lambda message, code: calls.append((message, code)))

    def main():
        raise errors.UserError("no")

    _outcome(main)
    assert calls == [("error: no", 2)]


@pytest.mark.parametrize(("code", "expected"), [(0, 4), (None, 4), (5, 5)])
def test_sys_exit_of_one_of_several_is_a_failure(code, expected):
    calls = []
    cli.set_failure_hook(lambda message, number: calls.append(number))
    _outcome(lambda: sys.exit(code))
    assert calls == [expected]


def test_sys_exit_of_a_lone_process_passes():
    assert _outcome(lambda: sys.exit(7)) == 7


def test_a_killed_loader_worker_is_said_in_one_line_wherever_the_signal_lands():
    """PyTorch raises in whatever the main thread does; here it computes, and waits for no batch."""
    program = """
import os, signal, sys, time, torch
from util.cli import run_cli

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return index

def main():
    batches = iter(torch.utils.data.DataLoader(Data(), num_workers=1))
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    end = time.monotonic() + 20
    x = torch.ones(8, requires_grad=True)
    while time.monotonic() < end:
        (x * x).sum().backward()
        for _ in range(1000):
            pass

run_cli(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: a loader worker died (DataLoader worker (pid")
    assert "use fewer --num_workers" in done.stderr
    assert "Traceback" not in done.stderr
