"""The fine-tuning script end to end on the demo data: outputs, resume, protocols, processes, refusals."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import main_finetune
from models_mixmim import MixMIM, model_config
from models_mixmim_ft import MixMIMClassifier
from sarwmix.data.registry import build_dataset
from tests.conftest import ROOT, Runner, clean_environment
from tests.test_bigearthnet import write_csv, write_zarr
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import EXIT_PREEMPTED, UserError
from util.files import sha256_file
from util.training import Trainer

Script = Callable[..., None]
TRAIN = ("--batch_size", 16, "--epochs", 4, "--warmup_epochs", 1, "--lr", 1e-3, "--save_every", 2)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, demo_root: Path, tmp_path: Path) -> Iterator[Script]:
    """Run main_finetune in this process on the demo data; `out` is the output folder's name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: a second thread mostly waits

    def run(*args: object, out: str = "run") -> None:
        command = ["main_finetune.py", "--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny"]
        command += ["--num_workers", 0, "--device", "cpu", "--output_dir", tmp_path / out, *args]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main_finetune.main()

    yield run
    torch.set_num_threads(threads)


def metrics_of(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining checkpoint as published ones are: weights and an argparse.Namespace."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    model = MixMIM(**model_config("mixmim_tiny"))
    torch.save({"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(model="mixmim_tiny")}, path)
    return path


def test_a_run_leaves_what_the_guide_says(
    script: Script, tmp_path: Path, demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(*TRAIN, "--bootstrap", 10, "--mixup", 0.8, "--cutmix", 1.0, "--smoothing", 0.1, "--reprob", 0.2)
    output, run = capsys.readouterr().out, tmp_path / "run"

    assert "training from random initialisation" in output
    lines = output.strip().splitlines()
    assert re.fullmatch(r"Training time \d+:\d\d:\d\d", lines[-1])
    start = next(i for i, line in enumerate(lines) if line.startswith("Best Results Summary: Epoch "))
    assert [cell.strip() for cell in lines[start + 1].split("|")] == ["Metric", "Macro", "Micro"]
    assert [lines[start + k].split("|")[0].strip() for k in (3, 4, 5)] == ["Average precision", "F1", "Precision"]
    named = next(line for line in lines if line.startswith("checkpoint_best.pth: protocol"))
    for word in ("protocol finetune", "data set demo", "split test", "statistics", "seed 0", "test 8"):
        assert word in named

    epochs = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3]
    for key in (
        "train_loss",
        "train_lr",
        "val_ap_macro",
        "val_ap_micro",
        "val_f1_macro",
        "val_precision_micro",
        "val_loss",
    ):
        assert all(key in record for record in epochs), key
    published = [f"checkpoint_best_{name}.pth" for name in ("weighted", "default", "mbr")]
    assert epochs[0]["best"] == ["checkpoint_best.pth", *published]

    result = metrics_of(run)
    assert result["initialisation"] == "random"
    assert result["samples"] == {"train": 64, "val": 24, "test": 8}
    assert (result["pool"], result["precision"], result["effective_batch"]) == (None, "float32", 16)
    assert result["data_options"] == {}
    for split, entry in result["splits"].items():
        data = build_dataset("demo", demo_root, split)
        assert entry["names_sha256"] == data.identity()["names_sha256"]
        assert len(entry["labels_sha256"]) == 64
    assert list(result["results"]) == ["checkpoint_best.pth", *published]
    assert result["selected_on"] == {"split": "val", "rule": "ap_macro", "epoch": result["best_epoch"]}
    rules = [entry["selected_on"]["rule"] for entry in result["results"].values()]
    assert rules == ["ap_macro", "weighted", "sum", "mbr"]
    highest = max(epochs, key=lambda record: record["val_ap_macro"])["epoch"]
    assert result["best_epoch"] == highest
    assert "best epoch: highest ap_macro on val" in output
    assert result["clusters"] == {"test": 1}
    best = result["results"]["checkpoint_best.pth"]
    assert best["epoch"] == result["best_epoch"] == int(lines[start].rsplit(" ", 1)[1])
    # these 8 patches are of one site, which tells nothing about other sites
    assert "intervals_95" not in best["test"]
    assert "no interval for split test: it has one site" in output
    assert len(best["test"]["per_class"]) == 19
    assert best["test"]["absent_classes"]
    assert best["val_scalars"] == {k.removeprefix("val_"): v for k, v in epochs[best["epoch"]].items() if "val_" in k}
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [
        "per_class_test.png",
        "precision_recall_test.png",
    ]
    assert list((run / "tensorboard").iterdir())

    files = {name: run / name for name in ("checkpoint.pth", *result["results"])}
    contents = {name: torch.load(path, weights_only=True) for name, path in files.items()}
    for one in files:
        for other in files:  # an epoch is stored once, whatever it is called
            assert files[one].samefile(files[other]) == (contents[one]["epoch"] == contents[other]["epoch"])
    final = contents["checkpoint.pth"]
    assert (final["kind"], final["protocol"], final["epoch"], final["step"]) == ("finetune", "finetune", 3, 0)
    assert final["args"]["mixup"] == 0.8
    assert len(final["classes"]) == 19
    assert set(final["best"]) == set(result["results"])


def test_eval_repeats_the_result_and_changes_nothing(
    script: Script, tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(*TRAIN, "--epochs", 1, "--warmup_epochs", 0, "--finetune", pretrained)
    assert "entries left out (decoder, mask token, other parts)" in capsys.readouterr().out
    best = tmp_path / "run" / "checkpoint_best.pth"
    before = best.read_bytes()
    script("--eval", "--resume", best, "--batch_size", 7, out="eval")
    again = metrics_of(tmp_path / "eval", "metrics_eval.json")["results"][str(best)]
    trained = metrics_of(tmp_path / "run")["results"]["checkpoint_best.pth"]
    for name, value in trained["test"]["scalars"].items():
        assert again["test"]["scalars"][name] == pytest.approx(value, abs=1e-5 if name == "loss" else 0), name
    assert again["val"]["scalars"]["ap_macro"] == trained["val_scalars"]["ap_macro"]
    assert best.read_bytes() == before
    assert not (tmp_path / "eval" / "checkpoint.pth").exists()


def test_an_evaluation_needs_no_settings_and_overwrites_nothing(
    tmp_path: Path, demo_root: Path, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, data set and protocol come from the checkpoint; the result goes beside it, and says where."""
    script("--protocol", "linear", "--batch_size", 16, "--epochs", 2, "--select", "f1_macro")
    run = tmp_path / "run"
    before = {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "run.log")
    }
    command = ["main_finetune.py", "--data_path", demo_root, "--eval", "--resume", run / "checkpoint_best.pth"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, "--device", "cpu", "--num_workers", 0)])
    for name in ("eval_checkpoint_best", "eval_checkpoint_best_2"):
        main_finetune.main()
        assert f"the evaluation is in {run / name / 'metrics_eval.json'}" in capsys.readouterr().out
        found = metrics_of(run / name, "metrics_eval.json")
        assert (found["model"], found["dataset"], found["protocol"]) == ("mixmim_tiny", "demo", "linear")
        assert found["selected_on"] == metrics_of(run)["selected_on"]
        assert found["selected_on"]["rule"] == "f1_macro"
        assert (run / name / "predictions_test.npz").is_file()
    assert {path: path.read_bytes() for path in before} == before
    # what the command line names, stays
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, "--device", "cpu", "--model", "mixmim_base")])
    with pytest.raises(UserError, match="mixmim_base"):
        main_finetune.main()


def test_stopped_and_resumed_run_has_the_same_best_checkpoints(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM in the middle of an epoch, resumed, killed after an epoch that was not saved, resumed."""
    options = (*TRAIN, "--mixup", 0.5, "--drop_path", 0.2)
    script(*options, out="whole")

    real, steps = Trainer.update, 0

    def step_and_stop(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 6:  # step 2 of epoch 1
            os.kill(os.getpid(), signal.SIGTERM)
        if steps == 13:  # epoch 3; the last save is that of epoch 1
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Trainer, "update", step_and_stop)
    with pytest.raises(SystemExit) as caught:
        script(*options, out="parts")
    assert caught.value.code == EXIT_PREEMPTED
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["step"] > 0
    with pytest.raises(KeyboardInterrupt):
        script(*options, "--resume", "auto", out="parts")
    script(*options, "--resume", "auto", out="parts")

    best = ("checkpoint_best.pth", *(f"checkpoint_best_{name}.pth" for name in ("weighted", "default", "mbr")))
    for name in ("checkpoint.pth", *best):
        whole, parts = (load_checkpoint(tmp_path / run / name) for run in ("whole", "parts"))
        assert whole["epoch"] == parts["epoch"], name
        assert whole["best"] == parts["best"], name
        for key, value in whole["model"].items():
            assert torch.equal(value, parts["model"][key]), (name, key)
        for number, state in whole["optimizer"]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, parts["optimizer"]["state"][number][key]), (name, number, key)
    first, second = (metrics_of(tmp_path / run)["results"] for run in ("whole", "parts"))
    assert first == second
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "parts" / "log.txt").read_text().splitlines()]
    assert epochs == [0, 1, 2, 3]


def test_only_epochs_whose_weights_are_there_are_reported(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--batch_size", 16, "--epochs", 3, "--warmup_epochs", 1, "--lr", 1e-3, "--save_every", 1)
    script(*options, "--stop_epoch", 2)
    run = tmp_path / "run"
    best = load_checkpoint(run / "checkpoint_best.pth")
    (run / "checkpoint_best.pth").unlink()
    script(*options, "--resume", "auto")
    assert "checkpoint_best.pth is missing; its epoch" in capsys.readouterr().out
    assert metrics_of(run)["best_epoch"] == 2 == load_checkpoint(run / "checkpoint_best.pth")["epoch"]

    # A file that holds an earlier epoch than the best one, whose write failed: its own numbers are told.
    monkeypatch.setattr("util.checkpoint.CheckpointManager.renew_names", lambda *arguments: None)
    save_checkpoint(run / "checkpoint_best.pth", best)
    script(*options, "--resume", "auto")
    assert f"holds epoch {best['epoch']}, not 2" in capsys.readouterr().out
    metrics = metrics_of(run)
    assert metrics["best_epoch"] == metrics["results"]["checkpoint_best.pth"]["epoch"] == best["epoch"]
    assert metrics["results"]["checkpoint_best.pth"]["val_scalars"] == best["best"]["checkpoint_best.pth"]["metrics"]

    save_checkpoint(run / "checkpoint_best.pth", {**best, "run_id": "0123456789abcdef"})
    with pytest.raises(UserError, match=r"checkpoint_best\.pth .*cannot be reported"):
        script(*options, "--resume", "auto")


def test_a_resumed_run_keeps_its_start(script: Script, tmp_path: Path, pretrained: Path) -> None:
    """The checkpoint that it is resumed from knows it, whatever has become of the file, and whether named or not."""
    start = tmp_path / "pretrained.pth"
    shutil.copy(pretrained, start)
    options = (*TRAIN, "--epochs", 2, "--warmup_epochs", 0)
    script(*options, "--finetune", start, "--stop_epoch", 1)
    start.unlink()
    script(*options, "--resume", tmp_path / "run" / "checkpoint.pth")
    result = metrics_of(tmp_path / "run")
    assert result["initialisation"] == str(start)
    assert result["initialisation_sha256"] == sha256_file(pretrained)


def test_frozen_protocols_share_cached_features(
    script: Script, tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--feature_cache", tmp_path / "cache", "--finetune", pretrained)
    script("--protocol", "knn", *cache, out="knn")
    assert "computed" in capsys.readouterr().out
    script("--protocol", "linear", "--epochs", 3, "--batch_size", 16, *cache, out="linear")
    output = capsys.readouterr().out
    assert output.count("(cached)") == 3
    assert "computed," not in output
    script("--protocol", "linear", "--probe_solver", "lbfgs", *cache, out="lbfgs")
    script("--protocol", "frozen", "--epochs", 2, "--batch_size", 16, *cache, out="frozen")
    script("--protocol", "knn", *cache, "--seed", 3, "--train_frac", 0.5, out="half")
    assert len((tmp_path / "half" / "train_ids.txt").read_text().splitlines()) == 32
    # the seed decides which half: named is the split that it was taken from, or no two seeds could be averaged
    assert metrics_of(tmp_path / "half")["splits"] == metrics_of(tmp_path / "knn")["splits"]
    assert metrics_of(tmp_path / "half")["initialisation_sha256"] == sha256_file(pretrained)
    for run in ("knn", "linear", "lbfgs", "frozen", "half"):
        result = metrics_of(tmp_path / run)
        for entry in result["results"].values():
            assert 0 < entry["test"]["scalars"]["ap_macro"] <= 1
    assert metrics_of(tmp_path / "lbfgs")["protocol"] == "linear (lbfgs)"
    assert len(metrics_of(tmp_path / "lbfgs")["c_sweep"]) == 8
    saved = load_checkpoint(tmp_path / "linear" / "checkpoint.pth")
    encoder = load_checkpoint(pretrained)["model"]
    assert torch.equal(saved["model"]["norm.weight"], encoder["norm.weight"])  # frozen
    # a probe's checkpoint is a whole model: it can be evaluated on images
    best = tmp_path / "linear" / "checkpoint_best.pth"
    script("--eval", "--resume", best, out="eval")  # with the protocol of the checkpoint
    again = metrics_of(tmp_path / "eval", "metrics_eval.json")["results"][str(best)]["test"]["scalars"]
    on_features = metrics_of(tmp_path / "linear")["results"]["checkpoint_best.pth"]["test"]["scalars"]
    assert again["ap_macro"] == on_features["ap_macro"]
    with pytest.raises(UserError, match="trained with --protocol linear"):
        script("--eval", "--resume", best, "--protocol", "finetune", out="eval")


def test_train_frac_names_a_class_that_vanishes(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("--protocol", "knn", "--train_frac", 0.1, "--output_dir", tmp_path / "frac")
    output = capsys.readouterr().out
    assert "leaves no training sample of:" in output
    assert len((tmp_path / "frac" / "train_ids.txt").read_text().splitlines()) == 6
    with pytest.raises(SystemExit):
        script("--train_frac", 0)


def finetuned(path: Path, **changes: Any) -> Path:
    classes = changes.pop("num_classes", 19)
    config = {k: v for k, v in model_config("mixmim_tiny").items() if not k.startswith("decoder")}
    model = MixMIMClassifier(classes, **{**config, **changes})
    save_checkpoint(path, {"format": "sarwmix/1", "kind": "finetune", "model": model.state_dict(), "epoch": 0})
    return path


def test_bad_input_is_one_clear_error(script: Script, tmp_path: Path, pretrained: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--eval",), "--resume CKPT"),
        (("--eval", "--resume", tmp_path / "no.pth"), "no.pth does not exist"),
        (("--eval", "--resume", "auto"), "found no checkpoint"),
        (("--finetune", tmp_path / "no.pth"), "no.pth does not exist"),
        (("--finetune", pretrained, "--model", "mixmim_base"), "mixmim_tiny .* but the model is mixmim_base"),
        (("--finetune", finetuned(tmp_path / "b1.pth", in_chans=1)), "1 band, the data set has 2"),
        (("--finetune", finetuned(tmp_path / "c5.pth", num_classes=5)), "5 classes, the data set has 19"),
        (("--eval", "--resume", finetuned(tmp_path / "d5.pth", num_classes=5)), "5 classes, the data set has 19"),
        (("--eval", "--resume", pretrained), "missing: head.weight"),
        (("--new_head",), "--finetune"),
        (("--protocol", "linear", "--mixup", 0.8), "cached features"),
        (("--probe_solver", "lbfgs"), "--protocol linear"),
        (("--patch_op", "max"), "patch_op is not an option of the multilabel task"),
        (("--val_frac", 0.1), "val_frac"),
        (("--select", "ap"), "--select ap is neither a metric of this task .*ap_macro"),
        (("--protocol", "knn", "--select", "ap_macro"), "--protocol knn has none"),
        (("--stop_epoch", 60), "--stop_epoch 60"),
        (("--warmup_epochs", 60), "--warmup_epochs 60"),
        (("--batch_size", 100), "batch size of at most 64"),
        (("--statistics", "nonsense"), "no statistics preset 'nonsense'"),
        (("--data_option", "metadata"), "NAME=VALUE"),
    ]
    for args, words in cases:
        with pytest.raises(UserError, match=words):
            script(*args)


def test_other_classes_and_other_bands_are_refused_by_name(script: Script, tmp_path: Path) -> None:
    path = finetuned(tmp_path / "x.pth")
    state = load_checkpoint(path)
    names = [f"class {k}" for k in range(19)]
    save_checkpoint(path, {**state, "classes": names})
    with pytest.raises(UserError, match="knows the classes class 0, class 1"):
        script("--eval", "--resume", path)
    save_checkpoint(path, {**state, "data": {"bands": ["VV", "VH"]}})
    with pytest.raises(UserError, match="bands VV, VH, the data set delivers VH, VV"):
        script("--finetune", path)


def test_checkpoints_that_hold_code_are_refused(script: Script, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds an object of type"):
        script("--finetune", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def copied(demo_root: Path, target: Path) -> Path:
    shutil.copytree(demo_root, target, copy_function=os.link)
    return target


def test_a_split_whose_patches_are_missing(script: Script, demo_root: Path, tmp_path: Path) -> None:
    root = copied(demo_root, tmp_path / "data")
    for path in root.rglob("*.tif"):
        path.unlink()
    with pytest.raises(UserError):
        script(*TRAIN, "--epochs", 1, "--warmup_epochs", 0, "--data_path", root)


def test_labels_that_are_unknown_or_empty(script: Script, demo_root: Path, tmp_path: Path) -> None:
    import pandas

    root = copied(demo_root, tmp_path / "data")
    table = pandas.read_parquet(root / "metadata.parquet")
    (root / "metadata.parquet").unlink()
    unknown = table.copy()
    unknown.at[3, "labels"] = ["Moon dust"]
    unknown.to_parquet(root / "metadata.parquet")
    with pytest.raises(UserError, match="Moon dust"):
        script(*TRAIN, "--data_path", root)
    empty = table.copy()
    empty["labels"] = [[] for _ in range(len(empty))]
    empty.to_parquet(root / "metadata.parquet")
    with pytest.raises(UserError, match="label"):
        script("--protocol", "knn", "--data_path", root)


def test_real_patches_as_v2_geotiff_and_as_v1_zarr_give_the_same_result(
    script: Script, realdata: Path, tmp_path: Path
) -> None:
    root = realdata / "bigearthnet_s1"
    with (root / "index.csv").open() as stream:
        index = list(csv.DictReader(stream))
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    rows = [["patch_id", "labels", "split", "country", "s1_name"]]
    rows += [
        [row["v2_patch_id"], str(row["v2_labels19"].split("|")), split, row["country"], row["s1_name"]]
        for row, split in zip(index, splits, strict=True)
    ]
    metadata = write_csv(tmp_path / "metadata.csv", rows)
    tiff = build_dataset("benv2", root, "train+val+test", metadata=metadata)
    store = tmp_path / "v1.zarr"
    write_zarr(store, [(name, tiff.read(i), []) for i, name in enumerate(tiff.names)], zarr_format=3)
    common = ("--statistics", "benv2", "--data_option", f"metadata={metadata}", "--batch_size", 4)
    common += ("--epochs", 2, "--warmup_epochs", 0, "--lr", 1e-3)
    script("--dataset", "benv2", "--data_path", root, *common, out="v2")
    script("--dataset", "benv1", "--data_path", store, *common, out="v1")
    first, second = (metrics_of(tmp_path / name) for name in ("v2", "v1"))
    assert first["results"] == second["results"]
    assert first["samples"] == {"train": 6, "val": 2, "test": 2}


@pytest.mark.slow
@pytest.mark.mpi
def test_evaluation_is_the_same_with_1_2_and_3_processes(
    script: Script, run_script: Runner, demo_root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path = finetuned(tmp_path / "checkpoint.pth")
    state = load_checkpoint(path)
    torch.nn.init.normal_(state["model"]["head.weight"], std=3.0)
    save_checkpoint(path, state)
    script("--eval", "--resume", path, "--batch_size", 64, out="np1")
    common = ("--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny", "--device", "cpu")
    for processes, batch in ((2, 7), (3, 1)):
        out = tmp_path / f"np{processes}"
        run_script(
            "main_finetune.py", *common, "--num_workers", 0, "--output_dir", out, "--eval", "--resume", path,
            "--batch_size", batch, processes=processes,
        )  # fmt: skip
        expected = metrics_of(tmp_path / "np1", "metrics_eval.json")["results"][str(path)]
        found = metrics_of(out, "metrics_eval.json")["results"][str(path)]
        for split in ("val", "test"):
            assert found[split]["scalars"].pop("loss") == pytest.approx(expected[split]["scalars"]["loss"], rel=1e-5)
            assert found[split]["scalars"] == {k: v for k, v in expected[split]["scalars"].items() if k != "loss"}
            assert found[split]["per_class"] == expected[split]["per_class"]


@pytest.mark.mpi
def test_training_under_mpirun_and_torchrun(run_script: Runner, demo_root: Path, tmp_path: Path) -> None:
    common = ("--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny", "--device", "cpu", "--test_run")
    common += ("--num_workers", "0", "--batch_size", "8", "--warmup_epochs", "0", "--mixup", "0.8")
    run_script("main_finetune.py", *common, "--output_dir", tmp_path / "mpi", processes=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "main_finetune.py")]
    done = subprocess.run(
        [*command, *map(str, common), "--output_dir", str(tmp_path / "torchrun")],
        capture_output=True, text=True, timeout=300, env=clean_environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (metrics_of(tmp_path / name)["results"] for name in ("mpi", "torchrun"))
    assert first == second  # the launcher makes no difference


VIT = ("--model", "vit_tiny_patch16_224", "--input_size", 32)


def test_a_timm_vit_stops_early_and_stays_stopped(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learning rate 1e-12: nothing rises after the first epoch, so patience 2 ends the run after the third."""
    options = (*VIT, "--batch_size", 16, "--epochs", 9, "--warmup_epochs", 0, "--lr", 1e-12, "--patience", 2)
    options += ("--min_lr", 1e-12, "--drop_rate", 0.2, "--layer_decay", 0.75, "--pool", "avg", "--save_every", 1)
    script(*options, "--epochs", 9, "--stop_epoch", 2)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert (state["epoch"], state["best"]["checkpoint_best.pth"]["epoch"]) == (1, 0)  # one epoch waited
    assert state["model_config"]["pool"] == "avg"
    script(*options, "--resume", "auto")
    assert "stopped early: no better epoch by ap_macro for 2 epochs" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 2
    first = metrics_of(tmp_path / "run")
    assert first["trainable_parameters"] == sum(
        value.numel() for name, value in state["model"].items() if not name.endswith("num_batches_tracked")
    )
    script(*options, "--resume", "auto")  # a run that has ended early does not go on
    again = metrics_of(tmp_path / "run")
    assert again["results"] == first["results"]
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 3


def test_bands_of_a_checkpoint_are_stored_and_enforced(script: Script, tmp_path: Path) -> None:
    script(*VIT, "--protocol", "frozen", "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 16)
    path = tmp_path / "run" / "checkpoint.pth"
    state = load_checkpoint(path)
    assert state["data"]["bands"] == ["VH", "VV"]
    state["data"]["bands"] = ["VV", "VH"]
    save_checkpoint(tmp_path / "swapped.pth", state)
    for options in (("--eval", "--resume"), ("--finetune",)):
        with pytest.raises(UserError, match="trained on bands VV, VH, the data set delivers VH, VV"):
            script(*VIT, "--protocol", "frozen", *options, tmp_path / "swapped.pth", out="refused")


def test_a_frozen_encoder_may_run_on_augmented_images(script: Script, tmp_path: Path) -> None:
    options = (*VIT, "--protocol", "linear", "--feature_cache", "none", "--epochs", 2, "--warmup_epochs", 0)
    script(*options, "--batch_size", 16, "--mixup", 0.8)
    assert not (tmp_path / "run" / "none").exists()
    assert metrics_of(tmp_path / "run")["trainable_parameters"] == 192 * 19 + 19
    path = tmp_path / "run" / "checkpoint_best.pth"
    script(*VIT, "--protocol", "linear", "--eval", "--resume", path, out="eval")
    again = metrics_of(tmp_path / "eval", "metrics_eval.json")["results"][str(path)]["test"]["scalars"]
    before = metrics_of(tmp_path / "run")["results"]["checkpoint_best.pth"]["test"]["scalars"]
    assert again["ap_macro"] == before["ap_macro"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet5"), "did you mean .*resnet50"),
        (("--head", "upernet"), "--head upernet does not fit the multilabel task; choose one of linear, bn_linear"),
        (("--adapt_bands",), "--adapt_bands spreads the first layer of a --finetune checkpoint"),
        (("--weight_bands", "VV,VH"), "--weight_bands names the bands of a --finetune checkpoint"),
        (("--protocol", "knn", "--feature_cache", "none"), "--feature_cache none"),
        (("--protocol", "linear", "--drop_rate", "0.1"), "--drop_rate has no place in --protocol linear"),
    ],
)
def test_backbones_and_heads_that_do_not_fit(script: Script, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(*options)


@pytest.mark.mpi
@pytest.mark.slow
def test_running_statistics_do_not_depend_on_the_process(
    script: Script, run_script: Runner, demo_root: Path, tmp_path: Path
) -> None:
    """Each process sees other samples; what is evaluated and saved are the statistics of rank 0."""
    common = ("--model", "resnet10t", "--input_size", 32, "--epochs", 1, "--warmup_epochs", 0, "--lr", 1e-3)
    out = tmp_path / "np2"
    run_script(
        "main_finetune.py", *common, "--dataset", "demo", "--data_path", demo_root, "--device", "cpu", "--num_workers",
        0, "--batch_size", 8, "--output_dir", out, processes=2,
    )  # fmt: skip
    path = out / "checkpoint_best.pth"
    script(*common, "--eval", "--resume", path, out="np1")
    alone = metrics_of(tmp_path / "np1", "metrics_eval.json")["results"][str(path)]["test"]["scalars"]
    together = metrics_of(out)["results"]["checkpoint_best.pth"]
    assert together["test"]["scalars"] == pytest.approx(alone, abs=1e-5)
    val = metrics_of(tmp_path / "np1", "metrics_eval.json")["results"][str(path)]["val"]["scalars"]
    assert together["val_scalars"] == pytest.approx(val, abs=1e-5)  # of the training processes, before any loading


def test_help_is_quick_and_names_every_protocol() -> None:
    import time

    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "main_finetune.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 3  # 0.1 s on an idle machine
    for word in ("finetune", "linear", "frozen", "knn", "--train_frac", "--bootstrap", "blr 0.125"):
        assert word in done.stdout
