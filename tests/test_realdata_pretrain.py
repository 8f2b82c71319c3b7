"""Pretraining on real Sentinel-1 samples, from every kind of storage; skipped where the samples are absent."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import main_pretrain
from sarwmix.data.registry import build_dataset
from util.errors import UserError
from util.files import read_jsonl

Train = Callable[..., list[float]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Two epochs of mixmim_tiny; returns the losses."""

    def run(dataset: str, data_path: Path, *arguments: object) -> list[float]:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        flags = [
            "--model",
            "mixmim_tiny",
            "--epochs",
            "2",
            "--warmup_epochs",
            "0",
            "--lr",
            "1e-3",
            "--num_workers",
            "0",
        ]
        where = ["--dataset", dataset, "--data_path", str(data_path), "--output_dir", str(out)]
        monkeypatch.setattr(sys, "argv", ["main_pretrain.py", *where, *flags, *map(str, arguments)])
        main_pretrain.main()
        return [row["train_loss"] for row in read_jsonl(out / "log.txt")]

    return run


def test_geotiff_and_zarr_give_the_same_training(train: Train, realdata: Path, tmp_path: Path) -> None:
    from sarwmix.data.io.zarr import write_zarr

    root = realdata / "bigearthnet_s1"
    with (root / "index.csv").open() as file:
        index = list(csv.DictReader(file))
    metadata = tmp_path / "metadata.csv"
    with metadata.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["patch_id", "labels", "split", "country", "s1_name"])
        for r in index:
            labels = str(r["v2_labels19"].split("|"))
            rows.writerow([r["v2_patch_id"], labels, "train", r["country"], r["s1_name"]])
    tiff = build_dataset("benv2", root, "train", metadata=metadata)
    images = tiff.get_batch(np.arange(len(tiff)))["image"].numpy()
    labels43 = {r["s1_name"]: r["v1_labels43"].split("|") for r in index}
    write_zarr(tmp_path / "s.zarr", [(name, images[i], labels43[name]) for i, name in enumerate(tiff.names)])

    common = ["--split", "train", "--batch_size", 4, "--statistics", "benv2", "--data_option", f"metadata={metadata}"]
    from_tiff = train("benv2", root, *common)
    from_zarr = train("benv1", tmp_path / "s.zarr", *common)
    assert np.isfinite(from_tiff).all()
    assert from_tiff == from_zarr


def test_sen1floods11_as_scenes(train: Train, realdata: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = train("s1_scenes", realdata / "sen1floods11" / "S1Hand", "--batch_size", 8, "--test_run")
    assert np.isfinite(losses).all()
    survey = build_dataset("s1_scenes", realdata / "sen1floods11" / "S1Hand", "train")
    assert not any("Paraguay_34417" in name for name in survey.names)  # the chip without a valid pixel
    assert sum("Nigeria_812045" in name for name in survey.names) > 0  # 0.2 % invalid pixels: kept


def test_ssl4eo_as_scenes(train: Train, realdata: Path) -> None:
    losses = train("s1_scenes", realdata / "ssl4eo_s12" / "s1", "--batch_size", 4)
    assert np.isfinite(losses).all()


def test_bands_missing_are_refused(train: Train, realdata: Path) -> None:
    with pytest.raises(UserError, match="VH"):
        train("s1_scenes", realdata / "spatialist_s1_vv", "--batch_size", 4)
