"""Export: the folder gives the checkpoint's outputs, appears whole or not at all, and hub and tracking are opt-in."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main_finetune
from sarwmix.data.registry import get_spec
from sarwmix.inference.export import example_inputs, export_model, push_to_hub
from sarwmix.inference.model import from_checkpoint, from_pretrained, open_model
from scripts import export as script
from tests.conftest import ROOT, clean_environment
from tests.prediction_fixtures import write_finetuned, write_pretrained
from tests.test_pretrained import images
from util.errors import UserError
from util.files import new_folder
from util.tracking import Tracker

METRICS = {"epoch": 3, "test": {"scalars": {"ap_macro": 0.5}, "per_class": [], "absent_classes": []}}


def test_folder_restores_model_and_preprocessing(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "checkpoint_best.pth", bands=["VV", "VH"], sample_size=[64, 64])
    folder = export_model(path, tmp_path / "out", metrics=METRICS)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "model.pt2", "model.safetensors"]  # fmt: skip
    before, after = from_checkpoint(path), from_pretrained(folder)
    assert torch.equal(before.scores(images()), after.scores(images()))
    for name in ("bands", "unit", "statistics", "classes", "sample_size", "settings", "kind"):
        assert getattr(after, name) == getattr(before, name), name
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"]["bands"] == ["VV", "VH"]
    assert config["metrics"] == METRICS == after.metrics
    card = (folder / "README.md").read_text()
    assert "| ap_macro | 0.5000 |" in card
    assert "| VV |" in card
    (folder / "README.md").unlink()  # weights and configuration are enough: that is what is fetched from the hub
    assert torch.equal(open_model(folder).scores(images()), before.scores(images()))


@pytest.mark.parametrize("kind", ["pair", *(pytest.param(kind, marks=pytest.mark.slow) for kind in
                                           ("multilabel", "pretrain"))])  # fmt: skip
def test_program_gives_the_same_numbers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.pth"
    if kind == "pretrain":
        write_pretrained(path)
    else:
        write_finetuned(path, task=kind, dataset="demo" if kind == "multilabel" else "sen12flood")
    folder = export_model(path, tmp_path / "out")
    model = from_checkpoint(path)
    program = torch.export.load(folder / "model.pt2").module()
    for batch in (1, 4):
        inputs = example_inputs(model, batch)
        with torch.no_grad():
            expected = model.model(*inputs)
        assert torch.allclose(program(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["program"]["largest_difference"] <= 1e-5


@pytest.mark.parametrize(("name", "task", "dataset", "size"), [
    ("resnet18", "multiclass", "eurosat_sar", 64),
    ("vit_tiny_patch16_224", "segmentation", "dfc2020", 64),
    ("mixmim_tiny", "segmentation", "sen1floods11", 128),
])  # fmt: skip
def test_other_backbones_and_tasks(tmp_path: Path, name: str, task: str, dataset: str, size: int) -> None:
    path = write_finetuned(tmp_path / "c.pth", task=task, dataset=dataset, name=name, input_size=size)
    before, after = from_checkpoint(path), from_pretrained(export_model(path, tmp_path / "out", program=False))
    image = images(side=before.tile)
    assert torch.equal(before.scores(image), after.scores(image))
    assert after.transform.preprocessing == before.transform.preprocessing == get_spec(dataset).preprocessing
    assert after.features(image).ndim == 2
    assert after.scores(image).shape[:2] == (2, len(after.classes))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task", "dataset", "size"), [
    ("resnet18", "multiclass", "eurosat_sar", 64),
    ("vit_tiny_patch16_224", "segmentation", "dfc2020", 64),
    ("mixmim_tiny", "segmentation", "sen1floods11", 128),
])  # fmt: skip
def test_programs_of_other_backbones(tmp_path: Path, name: str, task: str, dataset: str, size: int) -> None:
    path = write_finetuned(tmp_path / "c.pth", task=task, dataset=dataset, name=name, input_size=size)
    export_model(path, tmp_path / "out")  # compares the program's numbers before the folder appears
    assert (tmp_path / "out" / "model.pt2").is_file()


def test_metrics_come_from_the_run(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "checkpoint_best.pth")
    (tmp_path / "metrics.json").write_text(json.dumps({"results": {"checkpoint_best.pth": METRICS}}))
    folder = export_model(path, tmp_path / "out", program=False)
    assert from_pretrained(folder).metrics == METRICS
    assert not (folder / "model.pt2").exists()


@pytest.mark.parametrize(("task", "dataset"), [(None, ""), ("pair", "sen12flood"), ("multilabel", "demo")])
def test_card_names_a_command_that_works(tmp_path: Path, task: str | None, dataset: str) -> None:
    path = tmp_path / "c.pth"
    if task is None:
        write_pretrained(path)
    else:
        write_finetuned(path, task=task, dataset=dataset)
    card = (export_model(path, tmp_path / "out", program=False) / "README.md").read_text()
    assert ("scripts/extract_features.py" in card) == (task is None)
    assert ("scripts/predict.py" in card) == (task is not None)
    assert ("--second SECOND" in card) == (task == "pair")


def test_a_run_folder_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint_best.pth").touch()
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", str(tmp_path), "--export", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is a folder; give a .pth file in it: checkpoint_best.pth"):
        script.main()


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "c.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        export_model(path, tmp_path / "out", program=False)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_finetuned(tmp_path / "c.pth")

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("unsupported operator")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UserError, match="cannot trace.*unsupported operator.*--no_program"):
        export_model(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"]


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "c.pth")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/export.py"), "--checkpoint", str(path), "--export", str(tmp_path / "out")],
        capture_output=True, text=True, env=clean_environment(), check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "not what was exported"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text('{"format": "other"}'), "does not say format"),
    (lambda folder: (folder / "config.json").unlink(), "cannot read.*config.json"),
])  # fmt: skip
def test_damaged_folders_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    folder = export_model(write_finetuned(tmp_path / "c.pth"), tmp_path / "out", program=False)
    damage(folder)
    with pytest.raises(UserError, match=message):
        from_pretrained(folder)


def test_push_is_opt_in_and_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append(("create", (name, options)))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))
            if options["repo_id"] == "a/refused":
                raise OSError("no route to host\nmore")

    monkeypatch.setattr(hub, "HfApi", Api)
    folder = export_model(write_finetuned(tmp_path / "c.pth"), tmp_path / "out", program=False)
    assert not calls
    assert push_to_hub(folder, "a/b") == "https://hub/a/b"
    assert calls[0] == ("create", ("a/b", {"private": True, "exist_ok": True}))
    assert calls[1][1]["folder_path"] == str(folder)
    with pytest.raises(UserError, match=r"was written, but pushing it to a/refused failed \(no route to host\)"):
        push_to_hub(folder, "a/refused")
    with pytest.raises(UserError, match="expected owner/name"):
        push_to_hub(folder, "nonsense")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        push_to_hub(folder, "a/b")


def test_tracking_is_opt_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Tracker(tmp_path, {})
    seen: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            if step == 1:
                raise OSError("connection lost")
            seen.append((step, values))

        def finish(self) -> None:
            seen.append("finish")

    fake = types.SimpleNamespace(init=lambda **options: seen.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(tmp_path / "run7", {"lr": 1.0})
    tracker.log(0, {"loss": 0.5, "names": ["x"]})
    tracker.log(1, {"loss": 0.4})  # fails: said once, training goes on
    tracker.log(2, {"loss": 0.3})
    tracker.close()
    assert seen == [
        {"project": "sar-w-mixmae", "name": "run7", "dir": str(tmp_path / "run7"), "config": {"lr": 1.0}},
        (0, {"loss": 0.5}),
    ]


def test_tracking_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    run = types.SimpleNamespace(id="abc", log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: seen.append(options) or run))
    (tmp_path / "run").mkdir()
    for resumed in (False, True, False):  # the last one starts afresh in the same folder
        Tracker(tmp_path / "run", {}, resumed=resumed).close()
    assert [(one.get("id"), one.get("resume")) for one in seen] == [(None, None), ("abc", "allow"), (None, None)]


def test_finetuning_exports_its_best_epoch(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finetune(*args: object) -> None:
        words = ["--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny", "--num_workers", 0]
        monkeypatch.setattr(sys, "argv", ["main_finetune.py", *map(str, [*words, "--device", "cpu", *args])])
        main_finetune.main()

    # Programs are traced in tests of their own.
    monkeypatch.setattr("sarwmix.inference.export.write_program", lambda path, model: {"file": path.name})
    finetune("--test_run", "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8, "--output_dir", tmp_path / "run",
             "--export", tmp_path / "trained")  # fmt: skip
    best = from_checkpoint(tmp_path / "run" / "checkpoint_best.pth")
    assert best.record["sample_size"] == [120, 120]
    exported = from_pretrained(tmp_path / "trained")
    assert torch.equal(exported.scores(images()), best.scores(images()))
    assert "ap_macro" in exported.metrics["test"]["scalars"]
    finetune("--test_run", "--batch_size", 8, "--eval", "--resume", tmp_path / "run" / "checkpoint_best.pth",
             "--output_dir", tmp_path / "eval", "--export", tmp_path / "evaluated")  # fmt: skip
    again = from_pretrained(tmp_path / "evaluated")
    assert set(again.metrics) >= {"val", "test"}
    assert torch.equal(again.scores(images()), best.scores(images()))


@pytest.mark.parametrize(("flags", "message"), [
    ({"push_to_hub": "a/b"}, "give --export DIR"),
    ({"export": "."}, "exists already"),
    ({"export": "new", "protocol": "knn"}, "leave none"),
])  # fmt: skip
def test_flags_that_do_not_fit(flags: dict[str, Any], message: str) -> None:
    words = ["--data_path", "x"]
    for name, value in flags.items():
        words += [f"--{name}", value]
    args: argparse.Namespace = main_finetune.get_parser().parse_args(words)
    with pytest.raises(UserError, match=message):
        main_finetune.check_args(args)


def test_new_folder_refuses_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "file"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("task", "dataset", "size"), [
    ("multilabel", "demo", None), ("multilabel", "demo", [200, 180]), ("pair", "sen12flood", None),
])  # fmt: skip
def test_onnx_takes_decibel_and_gives_probabilities(tmp_path: Path, task: str, dataset: str, size: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from sarwmix.inference.onnx import example_db

    path = write_finetuned(tmp_path / "checkpoint_best.pth", task=task, dataset=dataset, sample_size=size)
    entry = {"epoch": 3, "calibration": {"temperature": 1.7}}
    (tmp_path / "metrics.json").write_text(json.dumps({"results": {"checkpoint_best.pth": entry}}))
    folder = export_model(path, tmp_path / "out", program=False, onnx=True)
    config = json.loads((folder / "config.json").read_text())["onnx"]
    assert config["largest_difference"] <= 1e-5
    model = from_pretrained(folder)
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    inputs = {}
    for number, (name, (_, _, height, width)) in enumerate(config["inputs"].items()):
        inputs[name] = example_db(model, 5, height, width, 77 + number)
    (given,) = session.run(["probabilities"], {name: image.numpy() for name, image in inputs.items()})
    assert np.abs(given - model.scores(*inputs.values()).numpy()).max() <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(120, 120), (200, 180), (128, 128)])
def test_the_input_side_of_onnx_is_the_transform(tmp_path: Path, height: int, width: int) -> None:
    from sarwmix.inference.onnx import DecibelToProbabilities, example_db

    model = from_checkpoint(write_finetuned(tmp_path / "c.pth"))
    images = example_db(model, 2, height, width, 0)
    given = DecibelToProbabilities(model, height, width).prepare(images)
    assert torch.allclose(given, model.inputs(images)[0], atol=1e-5)


def test_onnx_without_its_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="--onnx needs onnx"):
        export_model(write_finetuned(tmp_path / "c.pth"), tmp_path / "out", program=False, onnx=True)
    assert not (tmp_path / "out").exists()
