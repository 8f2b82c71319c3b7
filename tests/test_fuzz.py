"""Damaged and hostile files of every kind: the right result, or one clear line; no hang, no memory, no request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from tests.fuzzing import DAMAGE, Target, fuzz


def run_fuzzer(*args: str) -> str:
    """In a process of its own: it forks, and this one may have threads."""
    command = [sys.executable, "-m", "tests.fuzzing", *args]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_damaged_files_are_read_or_refused_in_one_line() -> None:
    found = run_fuzzer("--tries", "4", "--seed", "1")
    assert "failed" not in found, found
    assert found.count("refused") >= 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_damaged_files(seed: int) -> None:
    found = run_fuzzer("--tries", "100", "--seed", str(100 + seed))
    assert "failed" not in found, found


class Careless:
    """Readers that do what must not be done; the fuzzer has to say so."""

    @staticmethod
    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"a": [1, 2, 3]}')

    @staticmethod
    def raises(folder: Path) -> object:
        import json

        return json.loads((folder / "a.json").read_text()) if (folder / "a.json").is_file() else None

    @staticmethod
    def unpickles(folder: Path) -> object:
        import contextlib
        import pickle

        with contextlib.suppress(Exception):
            pickle.loads((folder / "a.json").read_bytes()[:500]) if (folder / "a.json").is_file() else None
        return None

    @staticmethod
    def dies(folder: Path) -> object:
        import os
        import signal

        if (folder / "a.json").is_file() and (folder / "a.json").stat().st_size != 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return None


@pytest.mark.parametrize(
    ("reader", "said"), [("raises", "Error"), ("unpickles", "code in the file was run"), ("dies", "ended with status")]
)
def test_the_fuzzer_finds_what_it_looks_for(reader: str, said: str, tmp_path: Path) -> None:
    target = Target("careless", Careless.make, getattr(Careless, reader))
    found = fuzz(target, tmp_path / "f", tries=40)
    assert found.failures
    assert any(said in failure for failure in found.failures)
    assert len(DAMAGE) == 9
