"""Finished runs side by side, and the table of the demo's result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sarwmix.tasks.intervals import Difference
from scripts import demo_result, show_results
from util.errors import UserError


def write_run(folder: Path, start: str, value: float, split: str = "val") -> Path:
    folder.mkdir(parents=True)
    scalars = {"ap_macro": value, "ap_micro": value + 0.1, "f1_macro": 0.5, "f1_micro": 0.6}
    content = {
        "protocol": "finetune",
        "initialisation": start,
        "dataset": "demo",
        "statistics": "demo",
        "seed": 0,
        "selected_on": {"split": split, "rule": "ap_macro", "epoch": 3},
        "samples": {"train": 464, "val": 160, "test": 144},
        "results": {"checkpoint_best.pth": {"epoch": 3, "test": {"scalars": scalars}}},
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def test_one_line_a_run(tmp_path: Path) -> None:
    rows = [show_results.describe(write_run(tmp_path / name, name, v)) for name, v in (("a", 0.25), ("b", 0.5))]
    lines = show_results.table(rows).splitlines()
    assert lines[0].split() == [
        "run", "protocol", "initialisation", "dataset", "statistics", "seed", "train", "selected_on",
        "tested_on", "ap_macro", "ap_micro", "f1_macro", "f1_micro",
    ]  # fmt: skip
    assert (
        " ".join(lines[1].split())
        == "a finetune a demo demo 0 464 ap_macro on val, epoch 3 test: 144 images 0.2500 0.3500 0.5000 0.6000"
    )
    on_test = show_results.describe(write_run(tmp_path / "c", "c", 0.5, split="test"))
    assert "ap_macro on test, epoch 3 (selected on test: optimistic)" in show_results.table([on_test])
    assert "0.5000" in lines[2]


def test_unfinished_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of main_finetune.py"):
        show_results.describe(tmp_path)
    for content in ("[]", "{}", '{"results": 5}', '{"results": ["a"]}', '{"results": {}}', '{"results": {"a": 1}}'):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(UserError, match="not the result of a finished|expected an object"):
            show_results.describe(tmp_path)


def test_evaluation_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "random", 0.25)
    (run / "metrics.json").rename(run / "metrics_eval.json")
    assert show_results.describe(run)["ap_macro"] == 0.25


def test_finished_runs_of_the_demo_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, value in ((0, 0.3), (1, 0.5)):
        write_run(tmp_path / f"knn_random_{seed}", "random", value)
        write_run(tmp_path / f"knn_pretrained_{seed}", "x.pth", value + 0.1)
    (tmp_path / "x.pth").touch()
    words = ["--data_path", "d", "--pretrained", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo_result.py", *words, "--seeds", "0", "1", "--protocols", "knn"])
    compared: list[object] = []

    def difference(*arms: object, **options: object) -> Difference:
        compared.extend([*arms, options])
        return Difference(0.1, 0.05, 0.15, 0.01, 0.02, 0.03, 2, 7, True)

    monkeypatch.setattr(demo_result, "difference_of_runs", difference)
    demo_result.main()
    random, pretrained, apart = (line for line in capsys.readouterr().out.splitlines() if line.startswith("knn"))
    assert "0.4000 +- 0.1414" in random
    assert "0.5000 +- 0.1414" in pretrained
    assert apart.endswith("+0.1000 [0.0500, 0.1500], 95 % over 2 seeds and 7 test clusters")
    assert compared[0] == [tmp_path / "knn_pretrained_0", tmp_path / "knn_pretrained_1"]
    assert compared[2:] == ["ap_macro", {"seeds": ([0, 1], [0, 1])}]
    assert set(json.loads((tmp_path / "demo_result.json").read_text())["test"]) == {"knn random", "knn pretrained"}
