"""Grids of runs: how a grid becomes jobs, what is refused, resuming, and the table."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sarwmix.reports.ablation import (
    Row,
    as_csv,
    as_latex,
    as_markdown,
    collect,
    differences,
    folder_name,
    parse_arms,
    parse_axis,
    plan,
    share_of,
)
from sarwmix.reports.run import score_of
from sarwmix.tasks.metrics import multilabel_report
from scripts import ablate
from util.errors import UserError
from util.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = "--dataset demo --data_path nowhere --model mixmim_tiny --epochs 2 --warmup_epochs 0"
FINETUNE = "--dataset demo --data_path nowhere --model mixmim_tiny --epochs 2 --warmup_epochs 0"


def axes(*texts: str):
    return [parse_axis(text) for text in texts]


def finish(job, ap: float, **more: float) -> None:
    """What a finished fine-tuning run leaves."""
    job.folder.mkdir(parents=True)
    write_json(job.folder / "args.json", dict(job.settings))
    scalars = {"ap_macro": ap, "loss": 0.5, **more}
    content = {
        "dataset": "demo", "protocol": "finetune", "seed": 0, "model": "mixmim_tiny", "samples": {},
        "results": {"checkpoint_best.pth": {"epoch": 1, "test": {"scalars": scalars}}},
    }  # fmt: skip
    write_json(job.folder / "metrics.json", content)


def test_a_grid_becomes_jobs_and_shares_pretraining(tmp_path: Path) -> None:
    grid = axes("weight_mode=none,per_channel", "norm_pix_loss=on,off", "finetune.lr=1e-3,1e-4", "seed=0,1")
    cells = plan(grid, PRETRAIN, FINETUNE, tmp_path)
    assert len(cells) == 16
    assert len({c.pretrain.folder for c in cells}) == 8
    assert len({c.finetune.folder for c in cells}) == 16
    first = cells[0]
    assert first.values == {"weight_mode": "none", "norm_pix_loss": "on", "finetune.lr": "1e-3", "seed": "0"}
    assert first.pretrain.settings["norm_pix_loss"] is True
    assert cells[4].pretrain.settings["norm_pix_loss"] is False
    assert first.finetune.settings["lr"] == 1e-3
    assert first.finetune.settings["finetune"] == str(first.pretrain.folder / "checkpoint.pth")
    assert cells[1].pretrain.settings["seed"] == cells[1].finetune.settings["seed"] == 1


ARMS = ["plain=--weight_mode none", "dB=--weight_domain db --weight_norm dataset", "scratch=random"]


def test_arms_are_lists_of_flags_times_the_grid(tmp_path: Path) -> None:
    cells = plan(axes("finetune.protocol=knn,linear", "seed=0,1"), PRETRAIN, FINETUNE, tmp_path, parse_arms(ARMS))
    assert len(cells) == 12
    assert [cell.values["arm"] for cell in cells[::4]] == ["plain", "dB", "scratch"]
    assert cells[4].pretrain.settings["weight_domain"] == "db"
    assert cells[4].pretrain.folder == cells[6].pretrain.folder == tmp_path / "pretrain" / "arm-dB_seed-0"
    assert cells[8].pretrain is None
    assert "--finetune" not in cells[8].finetune.flags
    for cell in cells:
        finish(cell.finetune, 0.5)
        if cell.pretrain is not None and not cell.pretrain.finished:
            cell.pretrain.folder.mkdir(parents=True)
            write_json(cell.pretrain.folder / "ablation_done.json", {})
    # one more arm: nothing of the others is made again
    more = plan(axes("finetune.protocol=knn,linear", "seed=0,1"), PRETRAIN, FINETUNE, tmp_path,
                parse_arms([*ARMS, "noise=--weight_mode noise"]))  # fmt: skip
    todo = {job.folder for cell in more for job in (cell.pretrain, cell.finetune) if job and not job.finished}
    assert len(todo) == 6
    assert all("arm-noise" in folder.name for folder in todo)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["--weight_mode none"], "is not NAME=FLAGS"),
        (["a=", "a=--weight_renorm"], "given twice"),
        (["a b=", "a-b=--weight_renorm"], "folder would be that of another"),
        (["a=--output_dir x"], "which the grid sets itself"),
        (["bad=--weight_mode noise --weight_domain db"], "no range and no exponent"),
        (["bad=--weight_range p01-median"], "needs --weight_norm dataset"),
        (["bad=--epoks 2"], "unrecognized"),
    ],
)
def test_a_refused_arm_fails_in_a_dry_run(
    arms: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["ablate.py", "--finetune", FINETUNE, "--pretrain", PRETRAIN, "--out", str(tmp_path), "--dry_run"]
    monkeypatch.setattr(sys, "argv", [*arguments, *(word for arm in arms for word in ("--arm", arm))])
    with pytest.raises(UserError, match=message):
        ablate.main()


def test_differences_are_paired_with_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan(axes("seed=0,1,2"), PRETRAIN, FINETUNE, tmp_path, parse_arms(ARMS))
    rng = np.random.default_rng(0)
    target = (rng.random((240, 2)) < 0.4).astype(np.uint8)
    names, clusters = [f"s{i}" for i in range(240)], np.repeat(np.arange(12), 20)
    for cell in cells:
        gain = {"plain": 1.0, "dB": 1.3, "scratch": 0.2}[cell.values["arm"]]
        scores = gain * target + rng.normal(size=target.shape)
        finish(cell.finetune, multilabel_report(scores, target, ["a", "b"]).scalars["ap_macro"])
        content = json.loads((cell.finetune.folder / "metrics.json").read_text())
        write_json(cell.finetune.folder / "metrics.json", {**content, "task": "multilabel", "classes": ["a", "b"]})
        np.savez(
            cell.finetune.folder / "predictions_test.npz", names=names, clusters=clusters, scores=scores, target=target
        )
    found = {arm.name: arm for arm in differences(cells, "ap_macro", "plain")}
    assert found["plain"].difference is None
    scratch = found["scratch"].difference
    assert scratch is not None
    assert scratch.paired_seeds
    assert scratch.high < 0 < found["dB"].difference.high  # type: ignore[union-attr]
    assert scratch.estimate == pytest.approx(found["scratch"].mean - found["plain"].mean)
    arguments = ["ablate.py", "--grid", "seed=0,1,2", "--finetune", FINETUNE, "--pretrain", PRETRAIN, "--table_only"]
    arguments += ["--out", str(tmp_path), *(word for arm in ARMS for word in ("--arm", arm))]
    monkeypatch.setattr(sys, "argv", [*arguments, "--reference", "plain"])
    assert ablate.main() == 0
    assert "3 seeds and 12 test clusters" in (tmp_path / "differences.md").read_text()
    assert (tmp_path / "differences.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", [*arguments, "--reference", "best"])
    with pytest.raises(UserError, match="no arm or AXIS=VALUE"):
        ablate.main()


def test_without_pretraining(tmp_path: Path) -> None:
    (cell,) = plan(axes("finetune.protocol=knn"), "", FINETUNE, tmp_path)
    assert cell.pretrain is None
    assert "--finetune" not in cell.finetune.flags


@pytest.mark.parametrize(
    ("grid", "pretrain", "finetune", "message"),
    [
        (["weight_mode"], PRETRAIN, FINETUNE, "is not NAME=VALUE"),
        (["weight_mode=none,"], PRETRAIN, FINETUNE, "is not NAME=VALUE"),
        (["seed=0,0"], PRETRAIN, FINETUNE, "names a value twice"),
        (["seed=0", "seed=1"], PRETRAIN, FINETUNE, "--grid names 'seed' twice"),
        (["output_dir=a,b"], PRETRAIN, FINETUNE, "the grid sets --output_dir itself"),
        (["weight_mode=none,bright"], PRETRAIN, FINETUNE, "refuses the flags of weight_mode=bright.*invalid choice"),
        (["wieght_mode=none"], PRETRAIN, FINETUNE, "refuses the flags of wieght_mode=none.*unrecognized"),
        (["epochs=1,2"], PRETRAIN, FINETUNE, "--epochs is in the grid and among the flags"),
        (["lr=1e-3"], "", FINETUNE, "did you mean finetune.lr"),
        (["seed=0"], PRETRAIN, FINETUNE + " --resume auto", "--finetune contains --resume"),
        (["batch_size=7"], PRETRAIN, FINETUNE, "--batch_size 7 is odd"),
        (["finetune.protocol=knn"], PRETRAIN, FINETUNE + " --mixup 0.8", "--mixup changes images"),
    ],
)
def test_what_is_refused_before_anything_runs(grid, pretrain, finetune, message, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(axes(*grid), pretrain, finetune, tmp_path)


def test_folder_names_are_plain() -> None:
    assert (
        folder_name({"weight_mode": "per_channel", "lr": "1e-3", "x": "a/b c"})
        == "weight_mode-per-channel_lr-1e-3_x-a-b-c"
    )
    assert folder_name({}) == "run"


def test_table_by_hand(tmp_path: Path) -> None:
    cells = plan(axes("weight_mode=none,per_channel", "seed=0,1,2"), PRETRAIN, FINETUNE, tmp_path)
    for cell, value in zip(cells[:5], (0.1, 0.2, 0.3, 0.5, 0.7), strict=True):
        finish(cell.finetune, value, f1_macro=value / 2)
    metric, rows = collect(cells, None)
    assert metric == "ap_macro"
    assert [row.values for row in rows] == [{"weight_mode": "none"}, {"weight_mode": "per_channel"}]
    first = rows[0].score
    assert first is not None
    assert rows[1].missing == 1
    assert (first.mean, first.count) == (pytest.approx(0.2), 3)
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    assert (first.low, first.high) == (pytest.approx(0.2 - half, rel=1e-6), pytest.approx(0.2 + half, rel=1e-6))
    assert "| none | 0.200 [-0.048, 0.448] (3) | 3 |" in as_markdown(metric, rows)
    assert "| per_channel | 0.600 [-0.671, 1.871] (2) | 2 of 3 |" in as_markdown(metric, rows)
    assert r"per\_channel & 0.600 [" in as_latex(metric, rows)
    lines = as_csv(cells).splitlines()
    assert lines[0] == "weight_mode,seed,ap_macro,f1_macro,folder"
    assert lines[1] == "none,0,0.1,0.05,weight_mode-none_seed-0"
    assert len(lines) == 6
    assert collect(cells, "f1_macro")[1][0].score.mean == pytest.approx(0.1)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="no test metric 'f2'"):
        collect(cells, "f2")


def test_one_seed_has_no_interval() -> None:
    assert "| 0.500 | 1 |" in as_markdown("acc", [Row({}, score_of([0.5]), 0)])
    assert "| - | 0 of 2 |" in as_markdown("acc", [Row({}, None, 2)])


def test_a_folder_of_other_settings_is_not_mistaken_for_a_result(tmp_path: Path) -> None:
    grid = axes("finetune.lr=1e-3")
    (cell,) = plan(grid, "", FINETUNE, tmp_path)
    finish(cell.finetune, 0.5)
    assert cell.finetune.finished
    (other,) = plan(grid, "", FINETUNE.replace("--epochs 2", "--epochs 3"), tmp_path)
    with pytest.raises(UserError, match="holds a run with --epochs 2, this grid has 3"):
        _ = other.finetune.finished
    with pytest.raises(UserError, match="nothing to put into a table"):
        collect(plan(grid, "", FINETUNE, tmp_path / "elsewhere"), None)


def test_other_settings_of_a_pretraining_are_not_mistaken_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table alone is refused, too: its runs would pass for runs of the new settings."""
    (cell,) = plan(axes("seed=0"), PRETRAIN, FINETUNE, tmp_path)
    finish(cell.finetune, 0.5)
    cell.pretrain.folder.mkdir(parents=True)
    write_json(cell.pretrain.folder / "args.json", dict(cell.pretrain.settings))
    arguments = ["ablate.py", "--grid", "seed=0", "--finetune", FINETUNE, "--out", str(tmp_path), "--table_only"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--pretrain", PRETRAIN])
    assert ablate.main() == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--pretrain", PRETRAIN.replace("--epochs 2", "--epochs 3")])
    with pytest.raises(UserError, match="holds a run with --epochs 2, this grid has 3"):
        ablate.main()


@pytest.mark.parametrize("flags", [["--launcher", "no_such_program -np 2"], ["--launcher", '"open']])
def test_launcher_that_cannot_start(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--grid", "seed=0", "--finetune", FINETUNE, "--out", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    with pytest.raises(UserError, match="there is no program no_such_program|cannot be split into words"):
        ablate.main()
    assert not (tmp_path / "out").exists()


def test_logs_are_named_when_every_job_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    assert false is not None
    arguments = ["--grid", "seed=0,1", "--finetune", FINETUNE, "--out", str(tmp_path), "--launcher", false]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    with pytest.raises(UserError, match=r"2 jobs failed(.|\n)*seed-0/ablation.log\n(.|\n)*seed-1/ablation.log"):
        ablate.main()


def test_latex_escapes_braces(tmp_path: Path) -> None:
    assert r"a\_\{b\} & 0.500" in as_latex("acc", [Row({"x": "a_{b}"}, score_of([0.5]), 0)])


def command(demo: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    common = f"--dataset demo --data_path {demo} --model mixmim_tiny --epochs 1 --warmup_epochs 0 --num_workers 0"
    arguments = ["--grid", "weight_mode=none,per_channel", "--grid", "finetune.protocol=knn", "--out", str(out)]
    arguments += ["--pretrain", f"{common} --batch_size 16 --device cpu", "--finetune", f"{common} --batch_size 8"]
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "ablate.py"), *arguments, *more],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_grid_end_to_end_continues_and_names_what_failed(demo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    blocked = out / "pretrain" / "weight_mode-per-channel" / "recent"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    broken = command(demo_root, out)
    assert broken.returncode == 2, broken.stderr
    assert "4 jobs, 4 to run" in broken.stdout
    assert "2 jobs failed" in broken.stderr
    assert "| per_channel | knn | - | 0 of 1 |" in (out / "table.md").read_text()
    blocked.unlink()
    whole = command(demo_root, out)
    assert whole.returncode == 0, whole.stderr
    assert "4 jobs, 2 to run" in whole.stdout
    assert "0 of 1" not in (out / "table.md").read_text()
    assert len((out / "table.csv").read_text().splitlines()) == 3
    assert json.loads((out / "pretrain" / "weight_mode-none" / "args.json").read_text())["weight_mode"] == "none"
    assert "0 to run" in command(demo_root, out).stdout
    assert command(demo_root, out, "--dry_run").stdout == ""


def test_several_checkpoints_of_one_pretraining(tmp_path: Path) -> None:
    cells = plan(
        axes("checkpoint=checkpoint_1.pth,checkpoint.pth", "seed=0"), f"{PRETRAIN} --save_epochs 1", FINETUNE, tmp_path
    )
    assert len({cell.pretrain.folder for cell in cells if cell.pretrain}) == 1
    starts = [cell.finetune.settings["finetune"] for cell in cells]
    assert [Path(start).name for start in starts] == ["checkpoint_1.pth", "checkpoint.pth"]
    assert len({cell.finetune.folder for cell in cells}) == 2
    with pytest.raises(UserError, match=r"checkpoint=checkpoint_9.pth: the pretraining leaves checkpoint.pth"):
        plan(axes("checkpoint=checkpoint_9.pth"), PRETRAIN, FINETUNE, tmp_path)
    with pytest.raises(UserError, match="but there is no --pretrain"):
        plan(axes("checkpoint=checkpoint.pth"), "", FINETUNE, tmp_path)


def test_shares_are_disjoint_and_whole(tmp_path: Path) -> None:
    """What starts from one pretraining is run by the command that runs it."""
    cells = plan(axes("seed=0,1,2,3,4", "finetune.protocol=linear,knn"), PRETRAIN, FINETUNE, tmp_path)
    parts = [share_of(cells, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(len(part) for part in parts) == [2, 4, 4]
    folders = [{cell.pretrain.folder for cell in part if cell.pretrain} for part in parts]
    assert sum(len(f) for f in folders) == len(set().union(*folders)) == 5
    assert share_of(cells, "0/3") == parts[2]  # as job arrays count
    assert share_of(cells, None) == cells
    for wrong in ("4/3", "1", "a/b", "0/0"):
        with pytest.raises(UserError, match="is not K/N"):
            share_of(cells, wrong)
