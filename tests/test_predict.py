"""Prediction of scenes: blending, georeference, no-data, units, memory, and what is refused without leaving files."""

from __future__ import annotations

import csv
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from torch import Tensor, nn

from sarwmix.datasets.scenes import SceneReader
from sarwmix.figures.base import class_colours
from sarwmix.inference.model import Pretrained, from_checkpoint
from sarwmix.inference.predict import (
    NO_CLASS,
    EmptyScene,
    Mosaic,
    Options,
    Source,
    open_scenes,
    overlaps,
    predict_scene,
)
from sarwmix.transforms import blend_weights, starts
from tests.conftest import ROOT, clean_environment
from tests.prediction_fixtures import ORIGIN, backscatter, write_finetuned, write_pretrained, write_scene
from util.errors import UserError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "multilabel": write_finetuned(folder / "labels.pth"),
        "multiclass": write_finetuned(folder / "classes.pth", task="multiclass", dataset="eurosat_sar"),
        "pair": write_finetuned(folder / "pair.pth", task="pair", dataset="sen12flood", input_size=256),
        "segmentation": write_finetuned(folder / "water.pth", task="segmentation", dataset="sen1floods11"),
        "pretrain": write_pretrained(folder / "encoder.pth"),
    }


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Warnings of the project's logger, which does not hand them on by itself."""
    logger = logging.getLogger("sarwmix")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def predict(model: Pretrained, path: Path, out: Path, **more: Any) -> dict[str, Any]:
    (scene,) = open_scenes([path], model.bands)
    if "second" in more:
        (more["second"],) = open_scenes([more["second"]], model.bands)
    return predict_scene(model, scene, out, **{"unit": "dB", **more}).summary


def read(path: Path) -> tuple[np.ndarray, Any]:
    with rasterio.open(path) as source:
        return source.read(), source.profile | {"names": source.descriptions, "crs": source.crs}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


# Pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tile", "stride", "expected"), [
    (300, 120, 120, [0, 120, 180]),
    (240, 120, 120, [0, 120]),
    (120, 120, 60, [0]),
    (100, 120, 60, [0]),
    (250, 120, 60, [0, 60, 120, 130]),
])  # fmt: skip
def test_tiles_cover_the_scene(length: int, tile: int, stride: int, expected: list[int]) -> None:
    assert starts(length, tile, stride) == expected


def test_overlaps_count_pixels() -> None:
    first, counts = overlaps(180, 120, 120, 3)  # pixels 180 to 300 over cells of 120
    assert first == 1
    assert counts.tolist() == [60, 60]
    first, counts = overlaps(120, 120, 120, 3)
    assert (first, counts.tolist()) == (1, [120])
    first, counts = overlaps(0, 120, 50, 2)  # the grid ends before the tile
    assert (first, counts.tolist()) == (0, [50, 50])


def test_mosaic_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    tile, stride, height, width = 16, 8, 50, 40
    weights = blend_weights(tile)
    mosaic = Mosaic(2, height, width, reach=2 * tile)
    total, weight = np.zeros((2, height, width)), np.zeros((height, width))
    rows, columns = starts(height, tile, stride), starts(width, tile, stride)
    blocks = []
    for number, row in enumerate(rows):
        for column in columns:
            values = rng.random((2, tile, tile)).astype(np.float32)
            mosaic.add(row, column, values, weights)
            total[:, row : row + tile, column : column + tile] += values * weights
            weight[row : row + tile, column : column + tile] += weights
        begin, block = mosaic.finish(rows[number + 1] if number + 1 < len(rows) else height)
        assert begin == sum(part.shape[1] for part in blocks)
        blocks.append(block)
    found = np.concatenate(blocks, axis=1)
    assert found.shape == (2, height, width)
    assert np.isfinite(found).all()  # the weights are nowhere 0
    assert np.allclose(found, total / weight, atol=1e-5)


def test_strips_read_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = backscatter(100, 40)
    (scene,) = open_scenes([write_scene(tmp_path / "s.tif", values)], ("VV", "VH"))
    source = Source(scene, SceneReader(None), "dB", (0, 1))
    reads: list[tuple[int, int]] = []
    original = Source.rows

    def watched(self: Source, row: int, height: int) -> np.ndarray:
        reads.append((row, height))
        return original(self, row, height)

    monkeypatch.setattr(Source, "rows", watched)
    rows = starts(100, 32, 20)
    for row, strip, _ in source.strips(rows, 32):
        assert np.array_equal(strip, values[::-1, row : row + 32])  # bands in the model's order
    assert sum(height for _, height in reads) == 100


# Classification --------------------------------------------------------------------------------------------------


def test_classification_grid(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["multilabel"])
    values = backscatter(300, 500)
    values[:, :120, 240:360] = np.nan
    values[:, 130:200, 0:30] = 0  # 15 % of a tile
    scene = write_scene(tmp_path / "scene.tif", values)
    summary = predict(model, scene, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "scene.json", "scene_probability.tif", "scene_quicklook.png", "scene_tiles.csv"]  # fmt: skip
    found, profile = read(tmp_path / "out" / "scene_probability.tif")
    assert found.shape == (19, 3, 5)
    assert profile["crs"].to_epsg() == 32633
    assert profile["transform"] == Affine(1200, 0, ORIGIN[0], 0, -1200, ORIGIN[1])
    assert profile["names"] == model.classes
    assert np.isnan(profile["nodata"])
    assert np.isnan(found[:, 0, 2]).all()
    assert np.isfinite(found[:, 1]).all()

    def tile(row: int, column: int) -> np.ndarray:
        cut = values[:, row : row + 120, column : column + 120].copy()
        cut[:, (cut == 0).all(axis=0)] = np.nan
        return model.scores(torch.from_numpy(cut)[None])[0].numpy()

    assert np.allclose(found[:, 0, 1], tile(0, 120), atol=1e-6)
    # The last row of tiles is moved up to end with the scene: 240 to 300 is 60 pixels of the tile from 180 on; cell
    # 120 to 240 is all of the tile there and 60 pixels of the next one.
    assert np.allclose(found[:, 2, 1], tile(180, 120), atol=1e-6)
    assert np.allclose(found[:, 1, 0], (120 * tile(120, 0) + 60 * tile(180, 0)) / 180, atol=1e-6)

    lines = rows_of(tmp_path / "out" / "scene_tiles.csv")
    assert len(lines) == summary["tiles"] == 15 - 1
    assert [float(lines[1][name]) for name in model.classes] == pytest.approx(tile(0, 120).tolist(), rel=1e-4)
    assert (float(lines[1]["x"]), float(lines[1]["y"])) == (ORIGIN[0] + 1800, ORIGIN[1] - 600)
    assert float(lines[1]["longitude"]) == pytest.approx(15.0245, abs=1e-3)
    assert float(next(line for line in lines if (line["row"], line["column"]) == ("120", "0"))["valid"]) < 0.9
    named = [name for name, value in zip(model.classes, tile(0, 120), strict=True) if value > 0.5]
    assert lines[1]["classes"] == "; ".join(named)
    assert summary["mean_probability"] == pytest.approx(
        {name: np.mean([float(line[name]) for line in lines]) for name in model.classes}, abs=1e-5
    )
    assert json.loads((tmp_path / "out" / "scene.json").read_text())["unit"] == ["dB"]


def test_overlapping_tiles_blend(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["multiclass"])
    values = backscatter(192, 192)
    scene = write_scene(tmp_path / "scene.tif", values)
    predict(model, scene, tmp_path / "out", options=Options(stride=32))
    found, profile = read(tmp_path / "out" / "scene_probability.tif")
    assert found.shape == (10, 6, 6)
    assert profile["transform"].a == 320
    assert np.allclose(found.sum(axis=0), 1, atol=1e-5)
    images = torch.from_numpy(
        np.stack([values[:, row : row + 64, column : column + 64] for row in (0, 32) for column in (32, 64)])
    )
    # Cell (1, 2) is pixels 32 to 64, 64 to 96: tiles from rows 0, 32 and columns 32, 64 hold it.
    assert np.allclose(found[:, 1, 2], model.scores(images).mean(dim=0).numpy(), atol=1e-5)


def test_unit_and_files_do_not_matter(
    tmp_path: Path, checkpoints: dict[str, Path], log: pytest.LogCaptureFixture
) -> None:
    model = from_checkpoint(checkpoints["multilabel"])
    values = backscatter(240, 240)
    power = 10 ** (values / 10)
    predict(model, write_scene(tmp_path / "db" / "s.tif", values), tmp_path / "1")
    predict(model, write_scene(tmp_path / "power" / "s.tif", power), tmp_path / "2", unit="linear")
    predict(model, write_scene(tmp_path / "order" / "s.tif", values[::-1], descriptions=("VV", "VH")), tmp_path / "3")
    write_scene(tmp_path / "two" / "s_VH.tif", values[:1], descriptions=())
    write_scene(tmp_path / "two" / "s_VV.tif", values[1:], descriptions=())
    predict(model, tmp_path / "two", tmp_path / "4")
    relative = Path(os.path.relpath(tmp_path / "two" / "s_VH.tif"))
    (scene,) = open_scenes([tmp_path / "two" / "s_VV.tif", relative], model.bands)
    predict_scene(model, scene, tmp_path / "5", unit="dB")
    expected, _ = read(tmp_path / "1" / "s_probability.tif")
    for folder in ("2", "3", "4", "5"):
        assert np.allclose(read(tmp_path / folder / "s_probability.tif")[0], expected, atol=1e-4), folder
    assert "--unit is not given" not in log.text
    for name, unit in (("db", "dB"), ("power", "linear")):
        summary = predict(model, tmp_path / name / "s.tif", tmp_path / "6", unit=None)
        assert summary["unit"] == [unit]
        assert f"the values look like {unit}" in log.text


# Class maps ------------------------------------------------------------------------------------------------------


class PixelNet(nn.Module):
    """Logit of the second class is the first band; `tilt` adds a term that depends on the place in the window."""

    def __init__(self, tilt: float = 0.0) -> None:
        super().__init__()
        self.tilt = tilt

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        ramp = torch.linspace(-1, 1, side)
        logit = images[:, 0] + self.tilt * (ramp[:, None] + ramp[None, :])
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def test_class_map_of_a_pixel_wise_model_has_no_tiles(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["segmentation"])
    model.model = PixelNet()
    values = backscatter(300, 410)
    values[:, 50:80, 60:90] = np.nan
    values[1, 200, 300] = np.nan  # one band is enough
    scene = write_scene(tmp_path / "s.tif", values, nodata=float("nan"))
    summary = predict(model, scene, tmp_path / "out", options=Options(probabilities=True))
    (classes,), profile = read(tmp_path / "out" / "s_classes.tif")
    with rasterio.open(scene) as source:
        assert profile["transform"] == source.transform
        assert profile["crs"] == source.crs
    assert profile["nodata"] == NO_CLASS
    valid = np.isfinite(values).all(axis=0)
    mean, std = model.statistics.mean[0], model.statistics.std[0]
    logit = (values[0] - mean) / std
    assert np.array_equal(classes == NO_CLASS, ~valid)
    assert np.array_equal(classes[valid], (logit[valid] > 0).astype(np.uint8))
    chance, _ = read(tmp_path / "out" / "s_probability.tif")
    assert np.allclose(chance[1][valid], 1 / (1 + np.exp(-logit[valid])), atol=1e-5)
    assert np.isnan(chance[:, ~valid]).all()
    assert summary["pixels"]["water"] == int((logit[valid] > 0).sum())
    assert sum(summary["share"].values()) == pytest.approx(1)


def test_seams_are_invisible(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """A model that says something else at the left of its window than at the right: tiles side by side would jump."""
    model = from_checkpoint(checkpoints["segmentation"])
    model.model = PixelNet(tilt=1.0)
    level = np.array(model.statistics.mean, dtype=np.float32)[:, None, None]
    scene = write_scene(tmp_path / "s.tif", np.broadcast_to(level, (2, 512, 512)).copy())
    jumps = {}
    for name, stride in (("blended", 64), ("side by side", 128)):
        predict(model, scene, tmp_path / name, options=Options(stride=stride, probabilities=True))
        chance = read(tmp_path / name / "s_probability.tif")[0][1]
        jumps[name] = max(np.abs(np.diff(chance, axis=axis)).max() for axis in (0, 1))
    assert jumps["side by side"] > 0.4
    # A window's own slope is 2 / 127 in the logit, a quarter of it in probability: 0.004 a pixel; blending may add
    # as much again where one window fades into the next.
    assert jumps["blended"] < 0.02


def test_segmentation_model_end_to_end(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["segmentation"])
    assert model.tile == 128  # windows of the input size, in the scene's own resolution
    values = backscatter(128, 200)
    summary = predict(model, write_scene(tmp_path / "s.tif", values), tmp_path / "out", options=Options(stride=128))
    (classes,), _ = read(tmp_path / "out" / "s_classes.tif")
    direct = model.scores(torch.from_numpy(values[None, :, :, :128]))[0].argmax(dim=0).numpy()
    assert np.array_equal(classes[:, :72], direct[:, :72])  # the second window begins at column 72
    assert summary["tiles"] == 2


# Two dates -------------------------------------------------------------------------------------------------------


def test_one_window_is_what_the_model_says(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["pair"])
    before, after = backscatter(256, 256), backscatter(256, 256, seed=1) - 4
    summary = predict(
        model, write_scene(tmp_path / "a.tif", before), tmp_path / "out", second=write_scene(tmp_path / "b.tif", after)
    )
    expected = float(model.scores(torch.from_numpy(before[None]), torch.from_numpy(after[None]))[0, 1])
    assert summary["probability_flood"] == pytest.approx(expected, abs=1e-5)
    assert summary["highest_window"] == pytest.approx(expected, abs=1e-5)
    found, profile = read(tmp_path / "out" / "a_flood.tif")
    assert found.shape == (2, 2, 2)
    assert profile["transform"].a == 1280
    assert np.allclose(found[0], expected, atol=1e-5)

    def logit(chance: Any) -> Any:
        return np.log(chance / (1 - chance))

    # avg: the window's logit is the mean of its tiles' logits
    assert logit(found[1].astype(np.float64)).mean() == pytest.approx(logit(expected), abs=1e-3)
    lines = rows_of(tmp_path / "out" / "a_tiles.csv")
    assert [line["kind"] for line in lines] == ["window", "tile", "tile", "tile", "tile"]
    assert float(lines[2]["column"]) == 128


@pytest.mark.parametrize("patch_op", ["avg", "max"])
def test_larger_scene_and_no_data(tmp_path: Path, patch_op: str) -> None:
    path = write_finetuned(
        tmp_path / "c.pth", task="pair", dataset="sen12flood", input_size=256, options={"patch_op": patch_op}
    )
    model = from_checkpoint(path)
    before, after = backscatter(300, 512), backscatter(300, 512, seed=1) - 4
    after[:, :130, :130] = np.nan
    summary = predict(
        model, write_scene(tmp_path / "a.tif", before), tmp_path / "out", second=write_scene(tmp_path / "b.tif", after)
    )
    assert summary["windows"] == 4
    found, _ = read(tmp_path / "out" / "a_flood.tif")
    assert found.shape == (2, 3, 4)
    assert np.isnan(found[1, 0, 0])  # no tile there, although the window has enough of others
    assert np.isfinite(found[0]).all()
    # Each tile counts once in the scene, the last row of windows with what the first one did not see.
    first, second = (torch.from_numpy(image[None]) for image in (before, after))
    network: Any = model.model
    total, weight, most = 0.0, 0.0, None
    with torch.no_grad():
        for row, share in ((0, (1, 1)), (44, (0, 44 / 128))):
            for column in (0, 256):
                one, two = model.inputs(
                    *(image[:, :, row : row + 256, column : column + 256] for image in (first, second))
                )
                difference = (network.encode_image(one) - network.encode_image(two)).abs()[0]
                use = np.repeat(share, 2).astype(np.float32)
                valid = np.isfinite(after[0, row : row + 256, column : column + 256]).reshape(2, 128, 2, 128)
                known = torch.from_numpy(valid.mean(axis=(1, 3)).ravel() >= 0.5)
                use = torch.from_numpy(use) * known
                total, weight = total + (difference * use[:, None]).sum(dim=0), weight + use.sum()
                top = difference[known].amax(dim=0)
                most = top if most is None else torch.maximum(most, top)
        features = total / weight if patch_op == "avg" else most
        chance = torch.softmax(network.apply_head(features[None]).double(), dim=1)[0, 1]
    assert summary["probability_flood"] == pytest.approx(float(chance), abs=1e-5)


def test_two_dates_must_share_their_grid(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["pair"])
    values = backscatter(256, 256)
    first = write_scene(tmp_path / "a.tif", values)
    moved = write_scene(tmp_path / "b.tif", values, origin=(ORIGIN[0] + 10, ORIGIN[1]))
    other = write_scene(tmp_path / "c.tif", values, epsg=32634)
    small = write_scene(tmp_path / "d.tif", values[:, :200])
    for second in (moved, other, small):
        with pytest.raises(UserError, match="lie on different grids: a has 256 x 256 pixels.*gdalwarp"):
            predict(model, first, tmp_path / "out", second=second)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="compares two dates: give the second one with --second"):
        predict(model, first, tmp_path / "out")
    labels = from_checkpoint(checkpoints["multilabel"])
    with pytest.raises(UserError, match="looks at one date; leave --second out"):
        predict(labels, first, tmp_path / "out", second=first)


# What is refused -------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_bad_scenes(tmp_path: Path, checkpoints: dict[str, Path], log: pytest.LogCaptureFixture) -> None:
    model, out = from_checkpoint(checkpoints["multilabel"]), tmp_path / "out"
    values = backscatter(240, 240)

    def refused(path: Path, message: str, **more: Any) -> None:
        with pytest.raises(UserError, match=message):
            predict(model, path, out, **more)
        assert not out.exists() or not list(out.iterdir())

    refused(tmp_path / "nothing.tif", "does not exist")
    refused(write_scene(tmp_path / "vv" / "s_VV.tif", values[:1], descriptions=()), "no partner.*without VH")
    (tmp_path / "text.tif").write_text("no raster")
    refused(tmp_path / "text.tif", "truncated or no GeoTIFF")
    damaged = write_scene(tmp_path / "damaged.tif", values, tiled=True, blockxsize=64, blockysize=64)
    _truncate(damaged)
    refused(damaged, "truncated or damaged|truncated or no GeoTIFF")
    refused(write_scene(tmp_path / "nan.tif", values * np.nan), "no valid pixel")
    refused(write_scene(tmp_path / "small.tif", values[:, :40, :50]), "less than one tile of 120 x 120.*14 %")
    refused(write_scene(tmp_path / "p.tif", 10 ** (values / 10)), "declared as dB.*give --unit linear")
    refused(write_scene(tmp_path / "db.tif", values), "declared as linear.*give --unit dB", unit="linear")
    refused(tmp_path / "db.tif", "leaves gaps", options=Options(stride=121))
    holes = values.copy()
    holes[:, ::2] = np.nan
    refused(write_scene(tmp_path / "holes.tif", holes), "no tile has 60 % valid", options=Options(min_valid=0.6))
    with pytest.raises(EmptyScene):
        predict(model, tmp_path / "nan.tif", out)

    predict(model, write_scene(tmp_path / "part.tif", values[:, :100, :110]), out)  # 76 % of a tile
    assert "less than one tile" in log.text
    predict(model, write_scene(tmp_path / "nowhere.tif", values, epsg=None), out)
    assert "nowhere has no georeference: results are in pixel coordinates" in log.text
    assert read(out / "nowhere_probability.tif")[1]["crs"] is None
    assert "longitude" not in rows_of(out / "nowhere_tiles.csv")[0]


def test_flags_without_effect_are_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    scene = write_scene(tmp_path / "s.tif", backscatter(150, 150))
    for task, options, message in (
        ("multilabel", Options(probabilities=True), "--probabilities is for class maps"),
        ("segmentation", Options(min_valid=0.5), "--min_valid 0.5 has no effect on class maps"),
    ):
        with pytest.raises(UserError, match=message):
            predict(from_checkpoint(checkpoints[task]), scene, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_class_map_of_a_scene_smaller_than_a_tile(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    scene = write_scene(tmp_path / "s.tif", backscatter(40, 50))
    predict(from_checkpoint(checkpoints["segmentation"]), scene, tmp_path / "out")
    assert (read(tmp_path / "out" / "s_classes.tif")[0] != 255).all()


def test_damaged_files_of_a_folder_are_left_out(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose pixels are cut off, one band that is no GeoTIFF at all: the third scene is predicted all the same."""
    script = importlib.import_module("scripts.predict")
    folder, values = tmp_path / "scenes", backscatter(240, 240)
    write_scene(folder / "good.tif", values)
    for number, band in enumerate(("VH", "VV")):
        _truncate(write_scene(folder / f"cut_{band}.tif", values[number : number + 1], descriptions=()))
    write_scene(folder / "lone_VV.tif", values[:1], descriptions=())
    (folder / "lone_VH.tif").write_text("no raster")
    args = ["--model", checkpoints["multilabel"], "--scene", folder, "--unit", "dB", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args), "--device", "cpu"])
    with pytest.raises(UserError, match=r"2 file\(s\) could not be read") as error:
        script.main()
    assert "lone_VH.tif" in str(error.value)
    assert "scene cut" in str(error.value)
    assert {path.name[:4] for path in (tmp_path / "out").iterdir()} == {"good"}


def test_hint_names_the_flag(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    write_scene(tmp_path / "s.tif", backscatter(150, 150), descriptions=())
    with pytest.raises(UserError, match="for example --band_order VV,VH"):
        open_scenes([tmp_path / "s.tif"], ("VH", "VV"))


def test_map_has_the_colours_of_the_training_pictures(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(checkpoints["segmentation"])
    predict(model, write_scene(tmp_path / "s.tif", backscatter(150, 150)), tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "s_classes.tif") as raster:
        table = raster.colormap(1)
    shown = ["#{:02x}{:02x}{:02x}".format(*table[number][:3]) for number in range(len(model.classes))]
    assert shown == [colour.lower() for colour in class_colours(model.classes)]


def test_model_of_other_bands_or_kind(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    scene = write_scene(tmp_path / "s.tif", backscatter(128, 128))
    encoder = from_checkpoint(checkpoints["pretrain"])
    with pytest.raises(UserError, match="pretraining checkpoint"):
        predict(encoder, scene, tmp_path / "out")
    with pytest.raises(UserError, match="VH and VV and B02"):
        open_scenes([scene], ("VH", "VV", "B02"))


def test_models_of_other_bands(tmp_path: Path) -> None:
    """One radar band, Sentinel-2 bands, and both together: each finds its bands by name in a file of all of them."""
    radar = backscatter(128, 128)
    optical = np.abs(np.random.default_rng(1).normal(1200, 300, (2, 128, 128))).astype(np.float32)
    names = ("B04", "VV", "VH", "B03")
    stored = np.stack([optical[0], radar[1], radar[0], optical[1]])
    power = np.stack([optical[0], *(10 ** (stored[1:3] / 10)), optical[1]])
    scene = write_scene(tmp_path / "all.tif", stored, descriptions=names)
    linear = write_scene(tmp_path / "linear.tif", power.astype(np.float32), descriptions=names)

    def maps(bands: tuple[str, ...], path: Path, **more: Any) -> np.ndarray:
        checkpoint = tmp_path / f"{'_'.join(bands)}.pth"
        if not checkpoint.exists():
            kind = {"task": "segmentation", "dataset": "sen1floods11", "sample_size": (128, 128)}
            write_finetuned(checkpoint, bands=bands, **kind)
        out = tmp_path / f"{path.stem}_{'_'.join(bands)}"
        summary = predict(from_checkpoint(checkpoint), path, out, options=Options(probabilities=True), **more)
        assert summary["bands"] == list(bands)
        assert next(out.glob("*.png")).stat().st_size > 10_000
        return read(next(out.glob("*_probability.tif")))[0]

    alone = maps(("VH",), scene)
    assert np.allclose(alone, maps(("VH",), linear, unit="linear"), atol=1e-4)
    assert np.isfinite(maps(("B04", "B03"), scene, unit=None)).all()
    together = maps(("VV", "B03"), scene)
    assert np.allclose(together, maps(("VV", "B03"), linear, unit="linear"), atol=1e-4)
    with pytest.raises(UserError, match="--unit dB is for radar bands; the model reads B04, B03"):
        maps(("B04", "B03"), linear)


def run_predict(*args: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/predict.py"), *map(str, args)],
        capture_output=True, text=True, env=clean_environment(), check=False, preexec_fn=limited,
    )  # fmt: skip


def test_command_line(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("scripts.predict")

    def run(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args), "--device", "cpu"])
        script.main()

    for name in ("one", "two"):
        write_scene(tmp_path / "scenes" / f"{name}.tif", backscatter(150, 260))
    write_scene(tmp_path / "scenes" / "empty.tif", backscatter(150, 260) * np.nan)
    common = ("--scene", tmp_path / "scenes", "--unit", "dB", "--out", tmp_path / "out")
    run("--model", checkpoints["multilabel"], *common)
    output = capsys.readouterr().out
    assert "left out: scene empty" in output
    assert "2 scene(s) in" in output
    assert len(list((tmp_path / "out").iterdir())) == 8
    for model, message in (
        (tmp_path / "no_run", "does not exist"),
        (checkpoints["pretrain"], "pretraining checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            run("--model", model, *common)
    with pytest.raises(UserError, match="two dates need one scene each"):
        run("--model", checkpoints["pair"], *common, "--second", tmp_path / "scenes")
    with pytest.raises(UserError, match="none of the 1 scenes|no valid pixel"):
        run("--model", checkpoints["multilabel"], "--scene", tmp_path / "scenes" / "empty.tif", "--out", tmp_path)


@pytest.mark.parametrize("limit", [2_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_full_disk_leaves_nothing(tmp_path: Path, checkpoints: dict[str, Path], limit: int) -> None:
    """2 kB: the raster fails. 60 kB: raster and table fit, the picture does not."""
    scene = write_scene(tmp_path / "s.tif", backscatter(600, 600))
    out = tmp_path / "out"
    out.mkdir()
    (out / "s.json").write_text("older")
    done = run_predict(
        "--model", checkpoints["multilabel"], "--scene", scene, "--unit", "dB", "--out", out, "--stride", 40,
        "--device", "cpu", limit=limit,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["s.json"]
    assert (out / "s.json").read_text() == "older"


@pytest.mark.slow
def test_kill_leaves_no_result(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    scene = write_scene(tmp_path / "s.tif", backscatter(2000, 2000))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/predict.py"), "--model", str(checkpoints["multilabel"]), "--scene",
         str(scene), "--unit", "dB", "--out", str(tmp_path / "out"), "--stride", "10", "--device", "cpu"],
        env=clean_environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".*/s_probability.tif")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("task", "edge"), [("multilabel", 1000), ("segmentation", 150)])
def test_memory_does_not_grow_with_the_scene(
    tmp_path: Path, checkpoints: dict[str, Path], task: str, edge: int
) -> None:
    """20,000 x 20,000 px within 3 GiB, everything included.

    Most of each row is no-data: rows are read and results written in full width all the same, and the model,
    whose batches are as large as ever, has less to do.
    """
    side = 20_000
    path = tmp_path / "large.tif"
    block = backscatter(1000, side)
    block[:, :, edge : side - edge] = np.nan
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 2, "dtype": "float32", "crs": "EPSG:32633"}
    with rasterio.open(
        path, "w", transform=Affine(10, 0, *ORIGIN[:1], 0, -10, ORIGIN[1]), tiled=True, **profile
    ) as file:
        for row in range(0, side, 1000):
            file.write(block, window=((row, row + 1000), (0, side)))
        file.descriptions = ("VH", "VV")
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/predict.py"), "--model", checkpoints[task], "--scene", path,
         "--unit", "dB", "--out", tmp_path / "out", "--device", "cpu"],
        stdout=subprocess.DEVNULL, env=clean_environment(),
    )  # fmt: skip
    _, status, usage = os.wait4(child.pid, 0)  # the peak of this child, not of the largest one so far
    child.returncode = os.waitstatus_to_exitcode(status)
    os.unlink(path)
    assert child.returncode == 0
    peak = usage.ru_maxrss
    assert peak < 3 * 2**20, f"{peak / 2**20:.2f} GiB"
    print(f"peak {peak / 2**10:.0f} MiB")


# Real data -------------------------------------------------------------------------------------------------------


def test_real_chips(realdata: Path, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = realdata / "sen1floods11" / "S1Hand"
    model = from_checkpoint(checkpoints["segmentation"])
    model.model = PixelNet()
    for name in ("Nigeria_812045", "Spain_7370579"):
        path = folder / f"{name}_S1Hand.tif"
        (scene,) = open_scenes([path], model.bands)
        predict_scene(model, scene, tmp_path, unit="dB")
        (classes,), profile = read(tmp_path / f"{path.stem}_classes.tif")
        with rasterio.open(path) as source:
            assert (profile["transform"], profile["crs"]) == (source.transform, source.crs)
            assert np.array_equal(classes == NO_CLASS, ~np.isfinite(source.read()).all(axis=0))
    (empty,) = open_scenes([folder / "Paraguay_34417_S1Hand.tif"], model.bands)
    with pytest.raises(EmptyScene, match="no valid pixel"):
        predict_scene(model, empty, tmp_path)


def test_real_dates(realdata: Path, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    first, second = sorted(path for path in (realdata / "ssl4eo_s12" / "s1" / "0000200").iterdir() if path.is_dir())
    model = from_checkpoint(checkpoints["pair"])
    summary = predict(model, first, tmp_path, second=second, unit=None)
    assert summary["unit"] == ["dB", "dB"]
    assert 0 < summary["probability_flood"] < 1
    found, profile = read(tmp_path / f"{first.name}_flood.tif")
    with rasterio.open(first / "VV.tif") as source:
        assert profile["crs"] == source.crs
        assert profile["transform"].a == pytest.approx(128 * source.transform.a)
    assert np.isfinite(found).all()
