"""Images that samples share are encoded once: through the entry scripts, in each evaluation, and in pretraining."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
from models_sen12_ft import MixMIMPair
from sarwmix.data.registry import build_dataset
from sarwmix.datasets.sen12flood import PairDataset
from sarwmix.synthetic.sen12flood import DemoOptions
from tests.sen12_fixtures import make_raw, run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shared")
    raw = make_raw(base, DemoOptions(train=6, test=2, frames=4, size=128, seed=5))
    run(raw, base, layout="store", size=128)
    return base / "out"


def distinct(store: Path, split: str, **options: Any) -> tuple[int, int]:
    """Distinct images and pairs of a split."""
    data = build_dataset("sen12flood", store, split, **options)
    assert isinstance(data, PairDataset)
    return len(np.unique(data.rows)), len(data)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(whether for training, images) of each call of the encoder."""
    calls: list[tuple[bool, int]] = []
    encode = MixMIMPair.encode_image

    def counting(self: MixMIMPair, images: torch.Tensor) -> torch.Tensor:
        calls.append((torch.is_grad_enabled(), len(images)))
        return encode(self, images)

    monkeypatch.setattr(MixMIMPair, "encode_image", counting)
    return calls


def start(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_each_evaluation_encodes_each_image_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[tuple[bool, int]]
) -> None:
    """Two epochs with a look at val each, the final test, and --eval of the checkpoint, which looks at val and test."""
    common = ["--dataset", "sen12flood", "--data_path", store, "--model", "mixmim_tiny", "--input_size", 128]
    common += ["--batch_size", 4, "--val_frac", 0.3, "--device", "cpu", "--num_workers", 0]
    train = ["--epochs", 2, "--warmup_epochs", 1, "--output_dir", tmp_path / "run"]
    start(main_finetune, monkeypatch, *common, *train)
    val, val_pairs = distinct(store, "val", val_frac=0.3)
    test, test_pairs = distinct(store, "test")
    assert (
        sum(count for training, count in encoded if not training) == 3 * val + test
    )  # two epochs, the temperature; test
    assert val < 2 * val_pairs
    assert test < 2 * test_pairs

    encoded.clear()
    best = tmp_path / "run" / "checkpoint_best.pth"
    start(main_finetune, monkeypatch, *common, "--eval", "--resume", best, "--output_dir", tmp_path / "eval")
    assert encoded
    assert not any(training for training, _ in encoded)
    assert sum(count for _, count in encoded) in (val + test, test)

    encoded.clear()
    probe = ["--protocol", "linear", "--epochs", 1, "--output_dir", tmp_path / "probe"]
    start(main_finetune, monkeypatch, *common, *probe)
    train_images, _ = distinct(store, "train", val_frac=0.3)
    assert sum(count for _, count in encoded) == train_images + val + test


def test_pretraining_takes_each_image_of_the_pairs_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dataset", "sen12flood", "--data_path", store, "--split", "train", "--model", "mixmim_tiny"]
    options += ["--batch_size", 2, "--epochs", 1, "--warmup_epochs", 0, "--device", "cpu", "--num_workers", 0]
    start(main_pretrain, monkeypatch, *options, "--output_dir", tmp_path / "run")
    images, _ = distinct(store, "train")
    text = (tmp_path / "run" / "run.log").read_text()
    assert f"{images} samples of sen12flood (train), bands VH, VV in dB" in text
    row = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert np.isfinite(row["train_loss"])
