"""Files that commit 32ca28c wrote are still read: checkpoints, exports, packed and SEN12-FLOOD stores, results.

Made there by main_pretrain.py, main_finetune.py --export, pack_dataset.py and prepare_sen12flood.sh on generated data,
with the code of that commit; weights are constants, so that the files compress to a few kB.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
from models_mixmim import MixMIM, model_config
from sarwmix.data.registry import build_dataset
from sarwmix.inference.model import open_model
from sarwmix.reports.run import load_run, read_run
from tests.conftest import ROOT
from util.checkpoint import load_checkpoint, load_model_state

HERE = ROOT / "tests" / "fixtures" / "32ca28c"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, unpacked."""
    folder = tmp_path_factory.mktemp("old") / "files"
    shutil.copytree(HERE, folder)
    for path in folder.rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


def call(monkeypatch: pytest.MonkeyPatch, script: object, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    script.main()  # type: ignore[attr-defined]


def test_pretraining_checkpoint_loads_strictly(old: Path) -> None:
    checkpoint = load_checkpoint(old / "pretrain.pth")  # its checksum is verified
    model = MixMIM(**model_config("mixmim_tiny"))
    load_model_state(model, checkpoint, path="pretrain.pth")
    assert (checkpoint["epoch"], checkpoint["kind"]) == (0, "pretrain")
    state = checkpoint["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_both_runs_go_on(old: Path, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--allow_mismatch: the names of the samples are others here. Everything else is compared, and agrees."""
    common = ["--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny", "--batch_size", 2]
    common += ["--num_workers", 0, "--device", "cpu", "--test_run", "--allow_mismatch"]
    words = [*common, "--epochs", 4, "--stop_epoch", 2, "--warmup_epochs", 1, "--norm_pix_loss"]
    call(monkeypatch, main_pretrain, *words, "--resume", old / "pretrain.pth", "--output_dir", tmp_path / "pre")
    rows = [json.loads(line) for line in (tmp_path / "pre" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]
    console = (tmp_path / "pre" / "run.log").read_text()
    (said,) = [line for line in console.splitlines() if "resuming a different run" in line]
    assert "weighting" not in said
    assert "schedule" not in said
    words = [*common, "--epochs", 3, "--stop_epoch", 2, "--warmup_epochs", 0]
    call(monkeypatch, main_finetune, *words, "--resume", old / "finetune.pth", "--output_dir", tmp_path / "ft",
         "--select", "weighted")  # fmt: skip
    assert read_run(tmp_path / "ft").scalars["ap_macro"] > 0


def test_evaluation_of_an_old_checkpoint(
    old: Path, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, main_finetune, "--data_path", demo_root, "--eval", "--resume", old / "finetune.pth",
         "--output_dir", tmp_path / "eval", "--test_run", "--device", "cpu")  # fmt: skip
    assert read_run(tmp_path / "eval").dataset == "demo"


def test_export_opens(old: Path) -> None:
    opened = open_model(old / "export")
    assert (opened.kind, opened.bands, len(opened.classes), opened.tile) == ("finetune", ("VH", "VV"), 19, 120)
    with torch.no_grad():
        scores = opened.model(torch.zeros(1, 2, 128, 128))
    assert scores.shape == (1, 19)
    assert torch.isfinite(scores).all()


def test_packed_store_and_sen12_store_hold_what_was_written(old: Path) -> None:
    packed = build_dataset("demo", old / "packed", "test")
    pixels = packed.get_batch(np.arange(2))["image"]
    # sums and first pixels as that commit printed them
    assert float(np.asarray(pixels, dtype=np.float64).sum()) == pytest.approx(-892074.3642892838, rel=1e-12)
    assert np.asarray(pixels)[0, 0, 0, :3] == pytest.approx([-21.818716, -18.824512, -17.424461])
    counts = {split: len(build_dataset("sen12flood", old / "sen12", split)) for split in ("train", "test")}
    assert counts == {"train": 6, "test": 3}
    images = build_dataset("sen12flood", old / "sen12", "train").single_images()
    assert len(images) == 6


def test_results_are_read(old: Path) -> None:
    assert load_run(old / "pre").kind == "pretrain"
    run = read_run(old / "ft")
    assert run.dataset == "demo"
    assert run.selected == "not recorded"
    assert set(run.scalars) >= {"ap_macro", "f1_micro"}
