"""main_pretrain.py end to end: training, resume, refusals, pictures, every flag."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Runner

import main_pretrain
from sarwmix.pretraining import picture_paths
from util.checkpoint import find_latest, load_checkpoint
from util.errors import UserError
from util.files import read_jsonl

FAST = ["--model", "mixmim_tiny", "--batch_size", "8", "--num_workers", "0", "--warmup_epochs", "1", "--lr", "1e-3"]

Main = Callable[..., Path]


@pytest.fixture
def pretrain(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Run main() in this process on the demo data; returns the output folder."""

    def run(*arguments: object, out: str = "run", data: Path = demo_root, dataset: str = "demo") -> Path:
        folder = tmp_path / out
        where = ["--dataset", dataset, "--data_path", str(data), "--output_dir", str(folder)]
        monkeypatch.setattr(sys, "argv", ["main_pretrain.py", *where, *FAST, *map(str, arguments)])
        main_pretrain.main()
        return folder

    return run


@pytest.fixture(scope="module")
def reference(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a plain test run."""
    out = tmp_path_factory.mktemp("reference")
    arguments = ["--dataset", "demo", "--data_path", str(demo_root), "--output_dir", str(out), *FAST]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main_pretrain.py", *arguments, "--test_run", "--epochs", "2"])
        main_pretrain.main()
    return losses(out)


def weights(folder: Path, name: str = "checkpoint.pth") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(folder: Path) -> list[float]:
    return [row["train_loss"] for row in read_jsonl(folder / "log.txt")]


def test_training_falls_and_leaves_the_documented_files(pretrain: Main) -> None:
    out = pretrain("--epochs", 3, "--norm_pix_loss", "--save_epochs", 2, "--save_every", 5)
    assert losses(out)[-1] < losses(out)[0] - 0.05
    for name in ("checkpoint.pth", "checkpoint_2.pth", "log.txt", "args.json", "run.log", "tensorboard"):
        assert (out / name).exists(), name
    assert json.loads((out / "args.json").read_text())["epochs"] == 3
    row = read_jsonl(out / "log.txt")[1]
    assert row["epoch"] == 1
    assert {"train_loss", "train_lr", "grad_norm", "images_per_s", "invalid_pixels", "unreadable_samples"} <= set(row)
    assert {"plain_error", "dark_error", "bright_error"} <= set(row)

    raw = torch.load(out / "checkpoint.pth", weights_only=True)  # plain torch reads it, nothing but plain values
    expected = {"model", "optimizer", "epoch", "scaler", "args", "rng", "sampler", "data", "weighting", "model_config"}
    assert expected <= set(raw)
    assert isinstance(raw["args"], dict)
    assert raw["epoch"] == 2
    assert raw["data"]["bands"] == ["VH", "VV"]
    assert raw["data"]["unit"] == "dB"
    assert raw["data"]["statistics"]["mean"]
    assert raw["weighting"]["mode"] == "per_channel"
    assert load_checkpoint(out / "checkpoint_2.pth")["epoch"] == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [0, 1000, 2000]
    assert [e.step for e in events.Scalars("dark_error")] == [0, 1000, 2000]
    assert events.Scalars("lr")[0].value > 0


def test_same_seed_same_result_other_seed_not(pretrain: Main) -> None:
    runs = [pretrain("--epochs", 1, "--seed", seed, out=f"s{i}") for i, seed in enumerate((3, 3, 4))]
    assert same(weights(runs[0]), weights(runs[1]))
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_resume_equals_no_interruption(pretrain: Main) -> None:
    whole = pretrain("--epochs", 3, out="whole")
    pretrain("--epochs", 3, "--stop_epoch", 1, out="parts")  # the schedule stays planned for 3
    parts = pretrain("--epochs", 3, "--resume", "auto", out="parts")
    assert losses(whole) == losses(parts)
    assert same(weights(whole), weights(parts))
    a, b = (load_checkpoint(f / "checkpoint.pth") for f in (whole, parts))
    for key, state in a["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], b["optimizer"]["state"][key]["exp_avg_sq"])


def test_resume_in_mid_epoch_is_bit_equal(pretrain: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from util.signals import StopRequest

    whole = pretrain("--epochs", 2, out="whole")
    answers = iter([False] * 4 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", property(lambda self: next(answers)))
        with pytest.raises(SystemExit) as stop:
            pretrain("--epochs", 2, out="parts")
    assert stop.value.code == 75
    parts = whole.parent / "parts"
    assert load_checkpoint(parts / "checkpoint.pth")["step"] == 5
    pretrain("--epochs", 2, "--resume", "auto", out="parts")
    assert same(weights(whole), weights(parts))


def test_resume_refuses_another_run(pretrain: Main, demo_root: Path) -> None:
    out = pretrain("--epochs", 2, "--stop_epoch", 1)
    for changed, name in (
        (["--weight_mode", "none"], "weighting.mode"),
        (["--norm_pix_loss"], "model_config.norm_pix_loss"),
        (["--split", "train"], "data.split"),
        (["--mask_ratio", "0.25"], "weighting.mask_ratio"),
        (["--weight_decay", "0.3"], "recipe.weight_decay"),
        (["--lr", "2e-3"], "schedule.lr"),
    ):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as refused:
            pretrain("--epochs", 2, "--resume", "auto", *changed)
        assert "--allow_mismatch" in str(refused.value)
        assert json.loads((out / "args.json").read_text())["mask_ratio"] == 0.5  # still those of the run
    pretrain("--epochs", 2, "--resume", "auto", "--weight_mode", "none", "--allow_mismatch")
    assert len(losses(out)) == 2


def test_another_batch_may_keep_the_rate(pretrain: Main) -> None:
    out = pretrain("--epochs", 2, "--stop_epoch", 1, "--lr", 1e-3)
    old = load_checkpoint(out / "checkpoint.pth")
    # What the message about the change prints: the old peak rate, here of a run that had none of --blr.
    pretrain("--epochs", 2, "--resume", "auto", "--batch_size", 4, "--lr", f"{old['batch']['lr']:.4g}")
    new = load_checkpoint(out / "checkpoint.pth")
    assert (new["epoch"], new["batch"]["lr"], new["batch"]["batch_size"]) == (1, 1e-3, 4)
    assert new["run_id"] != old["run_id"]  # steps count other samples: their numbers do not compare
    assert new["lineage"] == [old["run_id"]]


def test_from_an_older_checkpoint_the_run_goes_its_own_way(pretrain: Main) -> None:
    out = pretrain("--epochs", 4, "--stop_epoch", 3, "--save_every", 1, "--keep_checkpoints", 3)
    first = out / "recent" / "epochs_0001_step_000000.pth"
    pretrain("--epochs", 4, "--stop_epoch", 2, "--save_every", 1, "--keep_checkpoints", 3, "--resume", first)
    latest = find_latest(out)
    assert latest is not None
    assert load_checkpoint(latest)["epoch"] == 1  # not epoch 2 of the branch that was left
    assert [row["epoch"] for row in read_jsonl(out / "log.txt")] == [0, 1]


def test_a_new_run_moves_the_old_one_aside(pretrain: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = pretrain("--epochs", 2)
    old = weights(out)
    with pytest.raises(UserError, match="another --output_dir"):
        pretrain("--epochs", 2, "--test_run")
    assert same(weights(out), old)
    pretrain("--epochs", 1, "--seed", 3)
    assert "checkpoints of an earlier run, which are now in" in capsys.readouterr().out
    assert same(weights(out / "previous" / "1"), old)
    assert len(losses(out / "previous" / "1")) == 2
    assert len(losses(out)) == 1
    assert len(list((out / "recent").iterdir())) == 1
    pretrain("--epochs", 1, "--seed", 4)
    assert same(weights(out / "previous" / "1"), old)
    assert (out / "previous" / "2" / "checkpoint.pth").is_file()


def test_finetune_starts_from_weights(pretrain: Main) -> None:
    first = pretrain("--epochs", 1)
    second = pretrain("--epochs", 1, "--finetune", first / "checkpoint.pth", out="second")
    assert losses(second)[0] < losses(first)[0]
    assert load_checkpoint(second / "checkpoint.pth")["epoch"] == 0
    third = pretrain(
        "--epochs", 3, "--resume", first / "checkpoint.pth", "--start_epoch", 2, "--allow_mismatch", out="third"
    )
    assert [row["epoch"] for row in read_jsonl(third / "log.txt")] == [2]


@pytest.mark.parametrize(
    "flags",
    [
        ["--weight_mode", "none"],
        ["--weight_mode", "shared_avg"],
        ["--weight_mode", "shared_intensity"],
        ["--weight_level", "pixel"],
        ["--weight_domain", "zscore"],
        ["--weight_exp_scale", "0.5"],
        ["--weight_clip", "5"],
        ["--weight_norm", "dataset"],
        ["--weight_renorm"],
        ["--weight_mode", "noise"],
        ["--weight_domain", "db"],
        ["--weight_norm", "dataset", "--weight_range", "p01-median"],
        ["--weight_exp_scale", "-1"],
        ["--weight_permute"],
        ["--target_looks", "8"],
        ["--target", "gradient"],
        ["--target", "hog"],
        ["--mask_ratio", "0.25"],
        ["--norm_pix_loss"],
        ["--clip_grad", "0.01"],
        ["--weight_decay", "0.9"],
        ["--min_lr", "1e-3"],
        ["--accum_iter", "2"],
        ["--amp", "bf16"],
        ["--blr", "1"],
        ["--warmup_epochs", "0"],
        ["--statistics", "benv2"],
        ["--split", "train"],
        ["--input_size", "256"],
        ["--seed", "9"],
    ],
    ids=" ".join,
)
def test_each_flag_changes_the_result(
    pretrain: Main, flags: list[str], reference: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags[0] == "--blr":  # only read when --lr is not given
        monkeypatch.setattr(sys.modules[__name__], "FAST", [flag for flag in FAST if flag not in ("--lr", "1e-3")])
    changed = losses(pretrain("--test_run", "--epochs", 2, *flags))
    assert np.isfinite(changed).all()
    assert changed != reference


@pytest.mark.parametrize(
    "flags",
    [
        ["--activation_checkpointing"],
        ["--num_workers", "2"],
        ["--no_pin_mem", "--device", "cpu"],
        ["--save_minutes", "0"],
    ],
    ids=" ".join,
)
def test_flags_that_must_not_change_the_result(pretrain: Main, flags: list[str], reference: list[float]) -> None:
    assert losses(pretrain("--test_run", "--epochs", 2, *flags)) == reference


def test_memory_budget_without_the_compiler(pretrain: Main) -> None:
    with pytest.raises(UserError, match="--memory_budget 0.5 is kept by the compiler: add --compile"):
        pretrain("--test_run", "--memory_budget", 0.5)


def test_log_dir(pretrain: Main, tmp_path: Path) -> None:
    out = pretrain("--test_run", "--epochs", 1, "--log_dir", tmp_path / "board")
    assert list((tmp_path / "board").glob("events*"))
    assert not (out / "tensorboard").exists()


def test_accumulation_equals_a_larger_batch(pretrain: Main) -> None:
    """Two batches of 8 accumulated see the learning rate and count of one update; the short last group still counts."""
    out = pretrain("--epochs", 1, "--accum_iter", 4)  # 9 or 10 steps of 8: the last group is short
    state = load_checkpoint(out / "checkpoint.pth")["optimizer"]["state"]
    steps = int(load_checkpoint(out / "checkpoint.pth")["data"]["count"]) // 8
    assert steps % 4  # otherwise this test shows nothing
    assert state[0]["step"].item() == -(-steps // 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "7"], "odd"),
        (["--batch_size", "4096"], "no step"),
        (["--input_size", "120"], "multiple of 128"),
        (["--mask_ratio", "0.01"], "mask ratio"),
        (["--resume", "nowhere.pth"], "nowhere.pth"),
        (["--finetune", "nowhere.pth"], "nowhere.pth"),
        (["--inference", "nowhere.pth"], "nowhere.pth"),
        (["--resume", "a.pth", "--finetune", "b.pth"], "one of them"),
        (["--stop_epoch", "9000"], "--stop_epoch"),
        (["--start_epoch", "1024"], "--start_epoch 1024 leaves nothing"),
        (["--log_dir", __file__], "is a file"),
        (["--weight_exp_scale", "1000"], "between -80"),
        (["--epochs", "1", "--warmup_epochs", "4"], "warm"),
        (["--split", "training"], "training"),
        (["--statistics", "moon"], "moon"),
        (["--data_option", "unit=linear"], "unit"),
        (["--data_option", "nonsense"], "NAME=VALUE"),
        (["--weight_mode", "noise", "--weight_domain", "db"], "no exponent"),
        (["--target", "hog", "--target_looks", "8"], "drop one of them"),
        (["--weight_range", "p01-median"], "needs --weight_norm dataset"),
        (["--weight_permute", "--weight_level", "pixel"], "weight_level token"),
        (["--weight_norm", "dataset", "--weight_clip", "1"], "no effect"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refused_before_training(pretrain: Main, flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(*flags)
    assert not list(tmp_path.rglob("checkpoint*.pth"))


@pytest.mark.parametrize("path", ["", "/nowhere/at/all"])
def test_missing_data_path(pretrain: Main, path: str) -> None:
    with pytest.raises(UserError, match="data path"):
        pretrain(data=path)


def test_weights_of_another_size_are_refused(pretrain: Main, tmp_path: Path) -> None:
    out = pretrain("--test_run", "--epochs", 1)
    with pytest.raises(UserError, match="other shapes"):
        pretrain("--finetune", out / "checkpoint.pth", "--input_size", 256, out="b")
    truncated = tmp_path / "half.pth"
    truncated.write_bytes((out / "checkpoint.pth").read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"half\.pth"):
        pretrain("--finetune", truncated, out="c")
    torch.save({"model": weights(out), "args": Path("x")}, tmp_path / "object.pth")
    with pytest.raises(UserError, match="object"):
        pretrain("--finetune", tmp_path / "object.pth", out="d")


def test_unreadable_patches_while_training(pretrain: Main, demo_root: Path, tmp_path: Path, capfd: Any) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(demo_root, data)
    files = sorted(data.rglob("*_VH.tif"))
    files[3].write_bytes(files[3].read_bytes()[:3000])
    files[40].unlink()
    out = pretrain("--epochs", 1, "--split", "train+val+test", data=data, out="few")
    row = read_jsonl(out / "log.txt")[0]
    assert 1 <= row["unreadable_samples"] <= 2  # drop_last may leave one out
    assert np.isfinite(row["train_loss"])
    text = (out / "run.log").read_text()
    assert files[3].parent.name in text or files[40].parent.name in text
    with pytest.raises(UserError, match="--max_bad_samples 0"):
        pretrain("--epochs", 1, "--split", "train+val+test", "--max_bad_samples", 0, data=data, out="none")


def test_inference_draws_each_checkpoint(pretrain: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = pretrain("--epochs", 2, "--norm_pix_loss", "--save_epochs", 1)
    pretrain(
        "--norm_pix_loss", "--split", "test", "--batch_size", 2,
        "--inference", out / "checkpoint_1.pth", out / "checkpoint.pth",
    )  # fmt: skip
    pictures = sorted((out / "reconstructions").glob("*.png"))
    assert [path.name for path in pictures] == ["run_checkpoint.png", "run_checkpoint_1.png"]
    losses_drawn = re.findall(r"loss (\S+), 2 samples drawn", capsys.readouterr().out)
    # The checkpoint knows how its target was standardised: without the flag the picture is the same.
    pretrain("--split", "test", "--batch_size", 2, "--inference", out / "checkpoint_1.pth", out="other")
    assert re.findall(r"loss (\S+), 2 samples drawn", capsys.readouterr().out) == losses_drawn[:1]
    twins = [str(out / "a" / "run" / "x.pth"), str(out / "b" / "run" / "x.pth")]
    assert [p.name for p in picture_paths(twins, out)] == ["a_run_x.png", "b_run_x.png"]
    with pytest.raises(UserError, match="was trained with mean"):
        pretrain("--statistics", "benv2", "--split", "test", "--batch_size", 2, "--inference", out / "checkpoint.pth")
    import matplotlib.image

    assert matplotlib.image.imread(pictures[0]).std() > 0.05


@pytest.mark.mpi
def test_two_processes_under_mpirun(run_script: Runner, demo_root: Path, tmp_path: Path) -> None:
    done = run_script(
        "main_pretrain.py", "--dataset", "demo", "--data_path", demo_root, "--output_dir", tmp_path / "run", *FAST,
        "--epochs", 2, "--norm_pix_loss", processes=2,
    )  # fmt: skip
    assert "2 processes (mpi, gloo)" in done.stdout
    assert done.stdout.count("Training time") == 1  # one rank speaks
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["world_size"] == 2
    assert losses(tmp_path / "run")[1] < losses(tmp_path / "run")[0]


def test_error_message_and_exit_code(run_script: Runner, tmp_path: Path) -> None:
    done = run_script("main_pretrain.py", "--data_path", tmp_path, "--batch_size", 3, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --batch_size 3 is odd")
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_complete(run_script: Runner) -> None:
    import time

    began = time.perf_counter()
    done = run_script("main_pretrain.py", "--help")
    assert time.perf_counter() - began < 1.0
    from models_mixmim import MODELS
    from util.args import MIXMIM_NAMES

    assert tuple(MODELS) == MIXMIM_NAMES  # the parser's list, which must not import torch, against the size table
    for name in (*MODELS, "--weight_mode", "--stop_epoch", "--inference", "benv2", "benv1", "s1_scenes", "demo"):
        assert name in done.stdout


@pytest.mark.slow
def test_base_trains_within_four_gib(run_script: Runner, demo_root: Path, tmp_path: Path) -> None:
    """mixmim_base, batch 8, 22 steps on the CPU: at most 4 GiB beyond what the imported framework takes."""
    import subprocess

    code = (
        "import torch, main_pretrain, engine_pretrain, models_mixmim, sarwmix.data.loader, resource;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    own = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    run_script(
        "main_pretrain.py", "--dataset", "demo", "--data_path", demo_root, "--output_dir", tmp_path / "run",
        "--model", "mixmim_base", "--batch_size", 8, "--epochs", 2, "--warmup_epochs", 1, "--num_workers", 0,
        "--norm_pix_loss", timeout=580, OMP_NUM_THREADS="2",
    )  # fmt: skip
    rows = read_jsonl(tmp_path / "run" / "log.txt")
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    assert rows[-1]["memory_mib"] - own < 4096
