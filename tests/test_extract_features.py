"""Embeddings of data sets and scenes: values, order, names, coordinates, the map, and what is refused."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sarwmix.data import registry
from sarwmix.inference.embeddings import Embeddings, map_figure, project
from sarwmix.inference.model import from_checkpoint
from tests.prediction_fixtures import ORIGIN, backscatter, write_finetuned, write_pretrained, write_scene
from tests.sen12_fixtures import make_raw
from tests.sen12_fixtures import run as prepare
from util.errors import UserError


@pytest.fixture
def extract(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run scripts/extract_features.py in this process."""
    script = importlib.import_module("scripts.extract_features")

    def run(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, args), "--device", "cpu"])
        script.main()

    return run


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_features_of_a_data_set(tmp_path: Path, demo_root: Path, extract: Any, kind: str) -> None:
    path = tmp_path / "c.pth"
    if kind == "pretrain":
        write_pretrained(path)
    else:
        write_finetuned(path)
    out = tmp_path / "out"
    extract("--model", path, "--dataset", "demo", "--data_path", demo_root, "--out", out / "demo.parquet")
    assert sorted(file.name for file in out.iterdir()) == ["demo.parquet", "demo_map.png"]
    table = pq.read_table(out / "demo.parquet")
    data = registry.build_dataset("demo", demo_root, "test")
    assert table["name"].to_pylist() == list(data.names)
    model = from_checkpoint(path)
    expected = model.features(data.get_batch(np.arange(len(data)))["image"]).numpy()
    assert np.allclose(np.array(table["features"].to_pylist(), dtype=np.float32), expected, atol=1e-5)
    assert data.labels is not None
    names = [name for name, there in zip(data.spec.classes, data.labels[0], strict=True) if there]
    assert table["label"][0].as_py() == "; ".join(names)
    assert table.schema.metadata[b"model"] == str(path).encode()
    if kind == "pretrain":
        return
    extract("--model", path, "--dataset", "demo", "--data_path", demo_root, "--out", out / "d.npy", "--no_map")
    assert np.allclose(np.load(out / "d.npy"), expected, atol=1e-5)
    with open(out / "d.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == list(data.names)
    assert not (out / "d_map.png").exists()


def test_features_of_a_scene(tmp_path: Path, extract: Any) -> None:
    path = write_pretrained(tmp_path / "c.pth")
    values = backscatter(240, 400)
    values[:, :120, :120] = np.nan
    scene = write_scene(tmp_path / "s.tif", values)
    extract("--model", path, "--scene", scene, "--unit", "dB", "--out", tmp_path / "out" / "s.parquet")
    table = pq.read_table(tmp_path / "out" / "s.parquet").to_pydict()
    assert table["name"] == ["s_r0_c120", "s_r0_c240", "s_r0_c280"] + [f"s_r120_c{c}" for c in (0, 120, 240, 280)]
    assert (table["x"][0], table["y"][0]) == (ORIGIN[0] + 1800, ORIGIN[1] - 600)
    assert table["longitude"][0] == pytest.approx(15.0245, abs=1e-3)
    assert table["valid"] == [1.0] * 7
    model = from_checkpoint(path)
    expected = model.features(torch.from_numpy(values[None, :, :120, 120:240]))[0].numpy()
    assert np.allclose(table["features"][0], expected, atol=1e-5)


def test_scene_smaller_than_a_tile_without_georeference(
    tmp_path: Path, extract: Any, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pretrained(tmp_path / "c.pth")
    place = ("--unit", "dB", "--min_valid", 0.3, "--no_map", "--out")
    scene = write_scene(tmp_path / "s.tif", backscatter(100, 80))
    extract("--model", path, "--scene", scene, *place, tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert (table["x"][0], table["y"][0]) == (ORIGIN[0] + 400, ORIGIN[1] - 500)  # of the scene, not of a whole tile
    plain = write_scene(tmp_path / "p.tif", backscatter(100, 80), epsg=None)
    recwarn.clear()  # of writing it
    extract("--model", path, "--scene", plain, *place, tmp_path / "p.parquet")
    assert "p has no georeference: results are in pixel coordinates" in capsys.readouterr().out
    assert not [f"{one.filename}:{one.lineno}" for one in recwarn if "geotransform" in str(one.message)]


def test_pairs_as_pairs_or_as_single_images(tmp_path: Path, extract: Any) -> None:
    prepare(make_raw(tmp_path), tmp_path)
    common = ("--dataset", "sen12flood", "--data_path", tmp_path / "out", "--split", "test", "--no_map")
    pair = write_finetuned(tmp_path / "pair.pth", task="pair", dataset="sen12flood")
    data = registry.build_dataset("sen12flood", tmp_path / "out", "test")
    extract("--model", pair, *common, "--out", tmp_path / "f" / "pairs.parquet")
    table = pq.read_table(tmp_path / "f" / "pairs.parquet").to_pydict()
    assert table["name"] == list(data.names)
    assert set(table["label"]) == {"no flood", "flood"}
    extract("--model", write_pretrained(tmp_path / "c.pth"), *common, "--out", tmp_path / "f" / "images.parquet")
    single = pq.read_table(tmp_path / "f" / "images.parquet").to_pydict()["name"]
    assert len(single) == len(set(single)) == 3  # three pairs of the same three images


def test_maps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 16)).astype(np.float32)
    features[:30] += 8
    classes = tuple(f"class {k}" for k in range(10))
    cases: dict[str, tuple[Any, tuple[str, ...], str]] = {
        "several": (rng.random((60, 10)) < 0.3, classes, "pca"),
        "one": (np.arange(60) % 10, classes, "tsne"),
        "none": (rng.normal(-12, 2, 60).astype(np.float32), (), "pca"),
    }
    for name, (colour, names, method) in cases.items():
        path = map_figure(tmp_path / f"{name}.png", Embeddings(features, {}, colour, names), method, title="A map")
        with Image.open(path) as picture:
            assert min(picture.size) > 400
    points, chosen, note = project(features, "pca")
    assert len(points) == len(chosen) == 60
    assert "60 samples" in note
    assert abs(points[:30, 0].mean() - points[30:, 0].mean()) > 3 * points[:30, 0].std()  # the groups part
    with pytest.raises(UserError, match="three samples or more"):
        project(features[:2], "pca")


def test_what_is_refused(tmp_path: Path, demo_root: Path, extract: Any) -> None:
    encoder, pair = write_pretrained(tmp_path / "c.pth"), tmp_path / "pair.pth"
    write_finetuned(pair, task="pair", dataset="sen12flood")
    scene = write_scene(tmp_path / "s.tif", backscatter(128, 128))
    out = tmp_path / "out" / "x.npy"

    def refused(message: str, *args: object) -> None:
        with pytest.raises(UserError, match=message):
            extract(*args)
        assert not out.parent.exists() or not list(out.parent.iterdir())

    data = ("--dataset", "demo", "--data_path", demo_root)
    refused("ends with .npy or .parquet", "--model", encoder, *data, "--out", tmp_path / "x.txt")
    refused("either --dataset with --data_path, or --scene", "--model", encoder, "--out", out)
    refused("either --dataset", "--model", encoder, "--dataset", "demo", "--out", out)
    refused("does not exist", "--model", encoder, "--scene", tmp_path / "no.tif", "--out", out)
    refused("does not exist", "--model", tmp_path / "no" / "run.pth", *data, "--out", out)
    refused("compares two images", "--model", pair, "--scene", scene, "--unit", "dB", "--out", out)
    refused("compares two images", "--model", pair, *data, "--out", out)
    refused("--unit, --stride has no effect with --dataset", "--model", encoder, *data, "--unit", "dB", "--stride", 60,
            "--out", out)  # fmt: skip
    refused("--data_path has no effect with --scene", "--model", encoder, "--scene", scene, *data[2:], "--out", out)
    optical = write_finetuned(tmp_path / "b.pth", task="segmentation", dataset="sen1floods11", bands=["B04"])
    refused("no descriptions that name B04", "--model", optical, "--scene", scene, "--out", out)
