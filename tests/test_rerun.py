"""Passports of runs, and runs that are repeated from them: equal to the last bit, or what differs is said."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sarwmix.inference.export import config_of, model_card
from sarwmix.inference.model import from_checkpoint
from sarwmix.reports.rerun import command_of, compare_runs, differences
from tests.conftest import Runner
from tests.prediction_fixtures import write_finetuned
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError
from util.files import sha256_file
from util.passport import PASSPORT_FILE, passport_differences, source_hash, take_passport, write_passport


def passport(monkeypatch: pytest.MonkeyPatch, *words: str, **flags: Any) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["/somewhere/main_finetune.py", *words])
    data = {"train": {"count": 3, "names_sha256": "ab"}}
    return take_passport(Namespace(**flags), device=torch.device("cpu"), processes=2, data=data)


def test_passport_names_code_command_device_data_and_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "start.pth"
    parent.write_bytes(b"weights")
    found = passport(monkeypatch, "--seed", "1", finetune=str(parent), resume="auto")
    assert found["command"]["program"] == "main_finetune.py"
    assert found["command"]["words"] == ["--seed", "1"]
    assert found["parents"] == {"finetune": {"path": str(parent), "sha256": sha256_file(parent)}}
    assert found["machine"]["processes"] == 2
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"]
    assert found["code"]["sha256"] == source_hash()
    assert found["data"]["train"]["count"] == 3
    assert json.loads(json.dumps(found)) == found


def test_a_run_that_goes_on_keeps_its_earlier_passports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        whole = write_passport(tmp_path, passport(monkeypatch, f"--x{number}"), resumed=number > 0)
    assert whole == json.loads((tmp_path / PASSPORT_FILE).read_text())
    assert [one["command"]["words"] for one in whole["before"]] == [["--x0"], ["--x1"]]
    assert "before" not in write_passport(tmp_path, passport(monkeypatch), resumed=False)


def test_differences_leave_out_time_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = passport(monkeypatch, "--a"), passport(monkeypatch, "--b")
    second["started"] = "later"
    second["machine"]["host"] = "elsewhere"
    assert passport_differences(first, second) == {}
    second["packages"]["torch"] = "1.0"
    second["data"]["train"]["names_sha256"] = "cd"
    assert set(passport_differences(first, second)) == {"packages.torch", "data.train.names_sha256"}


def test_command_of_a_run_goes_to_the_new_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    found = passport(monkeypatch, "--lr", "-1", "--output_dir", "old", "--resume=auto", "--use_wandb", "--export", "E",
                     "--save_epochs", "1", "2")  # fmt: skip
    program, words = command_of(found, "new", ["--seed", "4"])
    assert program == "main_finetune.py"
    assert words == ["--lr", "-1", "--save_epochs", "1", "2", "--seed", "4", "--output_dir", "new"]
    found["command"]["program"] = "pytest"
    with pytest.raises(UserError, match="started by pytest"):
        command_of(found, "new")


def test_one_bit_is_a_difference() -> None:
    values = {"a": np.array([1.0, np.nan], dtype=np.float32), "b": np.array(["x"])}
    same = {"a": values["a"].copy(), "b": np.array(["x"])}
    assert differences(values, same) is None
    same["a"][0] = np.nextafter(np.float32(1), np.float32(2))
    said = differences(values, same)
    assert said is not None
    assert "1 of 2 entries, largest difference 1.19e-07 (a)" in said
    assert "one of them alone" in str(differences({"a": 1}, {"b": 1}))


def test_folders_without_passport_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no passport.json"):
        compare_runs(tmp_path, tmp_path)


def test_exports_carry_the_passport_without_host_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_finetuned(tmp_path / "checkpoint_best.pth")
    content = load_checkpoint(path)
    content["passport"] = passport(monkeypatch, "--data_path", "/secret/place/data", finetune=str(path))
    save_checkpoint(path, content)
    model = from_checkpoint(path)
    text = json.dumps(config_of(model)) + model_card(model)
    assert "## Made by" in text
    assert content["passport"]["code"]["sha256"][:16] in model_card(model)
    for word in ("/secret", str(tmp_path), '"host"'):
        assert word not in text.replace(model.source, "")


@pytest.mark.slow
def test_a_run_repeats_and_another_seed_is_said(tmp_path: Path, demo_root: Path, run_script: Runner) -> None:
    words = ["--dataset", "demo", "--data_path", str(demo_root), "--model", "mixmim_tiny", "--batch_size", "4",
             "--epochs", "2", "--warmup_epochs", "0", "--num_workers", "0"]  # fmt: skip
    first = tmp_path / "run"
    assert run_script("main_finetune.py", *words, "--output_dir", str(first)).returncode == 0
    done = run_script("scripts/rerun.py", str(first))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal: log.txt, checkpoint.pth, checkpoint_best" in done.stdout
    assert "the runs agree bit by bit" in done.stdout
    other = run_script(
        "scripts/rerun.py", str(first), "--out", str(tmp_path / "other"), "--", "--seed", "1", check=False
    )
    assert other.returncode == 10
    assert "not the same: --seed: 0 then, 1 now" in other.stdout
    assert other.stdout.count("not the same: ") == 1
