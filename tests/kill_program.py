"""Run by the fault tests: trains once without interruption, then again while being killed with -9 again and again.

    python kill_program.py KILLS SEED OUT --dataset demo ...

Every attempt is a fork of this process, so that it need not import everything again. Half of the kills come at a random
time; the others at a random place inside the writing of a checkpoint. Prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fault_program import use_micro_model

PLACES = ("writing", "fsync", "before rename", "after rename", "linking", "pruning")


def die_inside_writing(place: str, number: int) -> None:
    """Kill this process at a ``place`` of checkpoint ``number``."""
    from util import checkpoint, files

    def die(function: Any, *, after: bool = False, at: int = 1) -> Any:
        calls = 0

        def replacement(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if calls >= at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return replacement

    save = checkpoint.save_checkpoint
    saves = 0

    def save_checkpoint(*args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == number:
            if place == "writing":
                writer = checkpoint._HashingWriter
                writer._pass = die(writer._pass, at=random.randrange(1, 60))  # type: ignore[method-assign]
            elif place == "fsync":
                os.fsync = die(os.fsync)
            elif place == "before rename":
                os.replace = die(os.replace)
            elif place == "after rename":
                os.replace = die(os.replace, after=True)
            elif place == "linking":
                checkpoint.link_file = die(checkpoint.link_file)
            else:
                files.os.unlink = die(os.unlink, after=True)
        save(*args)

    checkpoint.save_checkpoint = save_checkpoint


def attempt(flags: list[str], log: Path, delay: float | None, place: str | None, number: int) -> int:
    """One process: trains until it ends or is killed. Returns its wait status."""
    child = os.fork()
    if child == 0:
        with open(log, "a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        import main_pretrain
        from util.cli import run_cli

        random.seed(number)
        if place is not None:
            die_inside_writing(place, number)
        sys.argv = ["main_pretrain.py", *flags]
        code = 1
        try:
            run_cli(main_pretrain.main)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        os._exit(code)
    if delay is not None:
        end = time.monotonic() + delay
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    kills, seed, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    flags = sys.argv[4:]
    use_micro_model()
    import torch
    import torch.utils.tensorboard.writer

    import engine_pretrain  # noqa: F401
    import main_pretrain  # noqa: F401
    import util.saving  # noqa: F401

    torch.set_num_threads(1)
    chance = random.Random(seed)
    began = time.monotonic()
    status = attempt([*flags, "--output_dir", str(out / "whole")], out / "whole.log", None, None, 0)
    assert status == 0, (out / "whole.log").read_text()[-3000:]
    whole = time.monotonic() - began
    report: dict[str, Any] = {"whole_seconds": round(whole, 2), "timed": 0, "inside": {}, "attempts": 0}
    killed = 0
    resume = [*flags, "--output_dir", str(out / "killed"), "--resume", "auto"]
    while killed < kills:
        report["attempts"] += 1
        assert report["attempts"] < 20 * kills
        place = chance.choice(PLACES) if chance.random() < 0.5 else None
        delay = chance.uniform(0.0, whole / 3) if place is None else None
        status = attempt(resume, out / "killed.log", delay, place, chance.randrange(1, 4))
        if os.WIFSIGNALED(status):
            killed += 1
            if place is None:
                report["timed"] += 1
            else:
                report["inside"][place] = report["inside"].get(place, 0) + 1
        elif status != 0:
            raise AssertionError((out / "killed.log").read_text()[-3000:])
        else:  # finished before the kill: begin once more, in a new folder
            compare(out)
            os.rename(out / "killed", out / f"finished{report['attempts']}")
    status = attempt(resume, out / "killed.log", None, None, 0)
    assert status == 0, (out / "killed.log").read_text()[-3000:]
    compare(out)
    report["killed"] = killed
    print(json.dumps(report))


def compare(out: Path) -> None:
    """Final weights, optimizer state and logged losses equal those of the uninterrupted run, bit for bit."""
    import torch

    from util.checkpoint import load_checkpoint
    from util.files import read_jsonl

    whole, killed = (load_checkpoint(out / run / "checkpoint.pth") for run in ("whole", "killed"))
    assert whole["epoch"] == killed["epoch"]
    assert whole["model"].keys() == killed["model"].keys()
    for key, value in whole["model"].items():
        assert torch.equal(value, killed["model"][key]), key
    for index, state in whole["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, killed["optimizer"]["state"][index][key]), (index, key)
    epochs = [[row["epoch"] for row in read_jsonl(out / run / "log.txt")] for run in ("whole", "killed")]
    assert epochs[0] == epochs[1], epochs


if __name__ == "__main__":
    main()
