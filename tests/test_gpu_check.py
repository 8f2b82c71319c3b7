"""The check of a card, rehearsed on a CPU with the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def rehearse(tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "results.json"
    command = [sys.executable, "scripts/gpu_check.py", "--dry", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_sections_run_and_are_written(tmp_path: Path) -> None:
    names = [
        "environment",
        "step",
        "profile",
        "repeats",
        "pairs",
        "finetuning",
        "curves",
        "sizes",
        "candidates",
    ]
    found = rehearse(tmp_path, "--only", *names)
    assert set(names) <= set(found)
    assert not any("error" in found[name] for name in names)
    assert found["step"]["kernel, eager"]["loss"] == found["step"]["explicit, eager"]["loss"]
    assert found["repeats"]["repeat"]["equal"]
    assert found["repeats"]["resume"]["equal"]
    assert found["command"].startswith("python scripts/gpu_check.py --dry")


def test_a_small_budget_is_said(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "--only", "environment", "step", "--budget", "1")
    assert all("skipped" in found[name] for name in ("environment", "step"))


def test_without_a_card_the_remedy_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--out", str(tmp_path / "r.json"), "--only", "environment"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    )
    assert done.returncode == 2
    assert "--dry" in done.stderr
