"""One writer a folder: who comes second is told who holds it; a kill releases it, also without locks."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from util import locks
from util.errors import EXIT_USER, UserError
from util.locks import LOCK_NAME, FolderLock

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import os, sys, time
from util.locks import FolderLock
lock = FolderLock(sys.argv[1], "holding")
if os.fork() == 0:  # a worker that outlives its parent holds nothing
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_is_told_and_a_kill_releases(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"process {process.pid} on .*, holding, since 20.*one writer at a time"):
            FolderLock(tmp_path, "training")
        process.kill()
        process.wait()
        FolderLock(tmp_path, "training", wait=20).release()  # the worker may not have run at all yet
        assert not (tmp_path / LOCK_NAME).exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_waiting_gets_what_becomes_free(tmp_path: Path) -> None:
    first = FolderLock(tmp_path, "a")
    began = time.monotonic()
    with pytest.raises(UserError):
        FolderLock(tmp_path, "b", wait=0.3)
    assert time.monotonic() - began >= 0.3
    first.release()
    first.release()  # a second time changes nothing, also for who has it now
    with FolderLock(tmp_path, "b"):
        first.release()
        with pytest.raises(UserError, match=", b, since"):
            FolderLock(tmp_path, "c")


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(locks, "BEAT", 0.1)
    first = FolderLock(tmp_path, "a")
    with pytest.raises(UserError, match=", a, since"):
        FolderLock(tmp_path, "b")
    first._stop.set()  # killed: no more signs of life, the file stays
    time.sleep(0.2)
    second = FolderLock(tmp_path, "b")
    assert ", b, since" in (tmp_path / LOCK_NAME).read_text()
    second.release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_odd_lock_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_NAME)
    with pytest.raises(UserError, match="not a regular file"):
        FolderLock(tmp_path, "a")
    (tmp_path / LOCK_NAME).unlink()
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot write"):
        FolderLock(tmp_path, "a")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_second_run_in_a_folder_touches_nothing(tmp_path: Path, script: str) -> None:
    process = hold(tmp_path / "run")
    try:
        (tmp_path / "run/log.txt").write_text('{"epoch": 0}\n')
        (tmp_path / "run/checkpoint.pth").write_text("of the first")
        result = subprocess.run(
            [sys.executable, script, "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--device",
             "cpu"],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == EXIT_USER, result.stderr
        assert f"process {process.pid} on" in result.stderr
        assert sorted(os.listdir(tmp_path / "run")) == [LOCK_NAME, "checkpoint.pth", "log.txt"]
        assert (tmp_path / "run/log.txt").read_text() == '{"epoch": 0}\n'
    finally:
        os.killpg(process.pid, signal.SIGKILL)
