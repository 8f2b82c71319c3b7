"""Anybody's own labelled images: layouts, formats, units, splits, refusals, and that every tool takes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sarwmix.data.registry import build_dataset, get_spec
from tests.conftest import ROOT, clean_environment
from util.errors import UserError

VV, VH = -10.0, -17.0


def speckle(seed: int, level: float, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(level, 2.0, (side, side)).astype(np.float32)


def write_tif(path: Path, *bands: np.ndarray, names: tuple[str, ...] = (), **profile: Any) -> None:
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = bands[0].shape
    kind = str(bands[0].dtype)
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=len(bands), dtype=kind, **profile
    ) as out:
        for number, band in enumerate(bands, start=1):
            out.write(band, number)
            if names:
                out.set_band_description(number, names[number - 1])


def scene(path: Path, seed: int, shift: float = 0.0, side: int = 32) -> None:
    """VV before VH, named in the descriptions, as most tools write them."""
    write_tif(path, speckle(seed, VV + shift, side), speckle(seed + 1000, VH + shift, side), names=("VV", "VH"))


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    for label, kind in enumerate(("forest", "water")):
        for number in range(10):
            scene(tmp_path / kind / f"{kind}_{number}.tif", 10 * label + number, shift=-6.0 * label)
    return tmp_path


def test_classes_by_folder(by_class: Path) -> None:
    spec = get_spec("folder", data_path=by_class)
    assert (spec.task, spec.classes, spec.size, spec.cluster) == ("multiclass", ("forest", "water"), 32, None)
    parts = {split: build_dataset("folder", by_class, split) for split in ("train", "val", "test")}
    assert {split: len(data) for split, data in parts.items()} == {"train": 14, "val": 2, "test": 4}
    names = [name for data in parts.values() for name in data.names]
    assert len(set(names)) == 20
    test = parts["test"]
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [2, 2]
    index = list(test.names).index(next(name for name in test.names if name.startswith("water")))
    number = int(test.names[index].rsplit("_", 1)[1])
    assert np.array_equal(test.read(index)[0], speckle(10 + number + 1000, VH - 6))  # VH first
    assert np.array_equal(test.read(index)[1], speckle(10 + number, VV - 6))
    again = build_dataset("folder", by_class, "test", seed=1)
    assert list(again.names) != list(test.names)


def test_several_labels_in_a_list_with_groups(tmp_path: Path) -> None:
    rows = ["name,labels,group"]
    for number in range(12):
        write_tif(tmp_path / f"tiles/t{number}_VH.tif", speckle(number, VH))
        write_tif(tmp_path / f"tiles/t{number}_VV.tif", speckle(number, VV))
        labels = "|".join(["water"] * (number % 2) + ["town"] * (number % 3 == 0))
        rows.append(f"tiles/t{number},{labels},place{number // 3}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    spec = get_spec("folder", data_path=tmp_path)
    assert (spec.task, spec.classes) == ("multilabel", ("town", "water"))
    found = {split: build_dataset("folder", tmp_path, split) for split in ("train", "val", "test")}
    groups = {split: {str(one) for one in data.clusters or ()} for split, data in found.items()}
    assert sorted(len(names) for names in groups.values()) == [1, 1, 2]
    assert len(set.union(*groups.values())) == 4  # no group in two splits
    everything = build_dataset("folder", tmp_path, "train+val+test")
    assert everything.labels is not None
    row = list(everything.names).index("place1::tiles/t3")
    assert everything.labels[row].tolist() == [1, 1]
    assert everything.labels[list(everything.names).index("place0::tiles/t2")].tolist() == [0, 0]


def test_parquet_one_hot_and_split_folders(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(4):
        scene(tmp_path / f"{number}.tif", number)
    table = {"file": ["0.tif", "1.tif", "2.tif", "3.tif"], "split": ["train", "train", "validation", "test"],
             "ice": [1, 0, 1, 0], "Sea": [1, 1, 0, 0]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    data = build_dataset("folder", tmp_path, "train+val+test")
    assert data.spec.classes == ("ice", "sea")
    assert data.labels is not None
    assert data.labels.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]


def test_masks_with_values_that_have_names(tmp_path: Path) -> None:
    for number in range(5):
        scene(tmp_path / f"train/images/{number}.tif", number)
        mask = np.zeros((32, 32), np.uint8)
        mask[:4], mask[4:6] = 7, 255
        write_tif(tmp_path / f"train/masks/{number}_mask.tif", mask)
    scene(tmp_path / "test/images/a.tif", 9)
    write_tif(tmp_path / "test/masks/a.tif", np.full((32, 32), 3, np.uint8))
    with pytest.raises(UserError, match=r"hold the values 0, 3, 7, 255; say what they mean: --data_option classes="):
        get_spec("folder", data_path=tmp_path)
    (tmp_path / "classes.txt").write_text("0=land\n7=water, still\n")
    spec = get_spec("folder", data_path=tmp_path)
    assert (spec.task, spec.classes, spec.preprocessing.geometry) == (
        "segmentation",
        ("land", "water, still"),
        "window",
    )
    data = build_dataset("folder", tmp_path, "train")
    assert len(data) == 4  # one of five became validation
    label = data[0]["label"]
    assert (label[:4] == 1).all()
    assert (label[4:6] == 255).all()
    assert (label[6:] == 0).all()
    with pytest.raises(UserError, match=r"label value\(s\) 3; expected 0, 7, 255"):
        build_dataset("folder", tmp_path, "test")[0]


def test_png_and_npy_with_a_declared_unit(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(3):
        stored = np.clip((speckle(number, VV) + 30) / 30 * 255, 1, 255).astype(np.uint8)
        stored[0, 0] = 0
        Image.fromarray(stored).save(tmp_path / f"{number}_VV.png")
    with pytest.raises(UserError, match="a PNG holds whole numbers: say what 0 and the largest one stand for"):
        get_spec("folder", "VV", data_path=tmp_path)
    data = build_dataset("folder", tmp_path, "train", bands="VV", range="-30,0")
    assert data.spec.task == "unlabelled"
    image = data.read(2)[0]
    assert np.isnan(image[0, 0])
    assert image[5, 5] == pytest.approx(-30 + 30 / 255 * int(stored[5, 5]))

    folder = tmp_path / "arrays"
    folder.mkdir()
    power = 10 ** (np.stack([speckle(1, VV), speckle(2, VH)], axis=-1) / 10)  # rows, columns, bands
    np.save(folder / "x.npy", power)
    options = {"unit": "linear", "band_order": "VV,VH"}
    found = build_dataset("folder", folder, "train", **options).read(0)
    np.testing.assert_allclose(found[0], speckle(2, VH), atol=1e-4)
    np.save(folder / "x.npy", np.moveaxis(power, 2, 0))
    with pytest.raises(UserError, match=r"2 band\(s\) have no names; say which they are.*band_order=VV,VH"):
        build_dataset("folder", folder, "train", unit="linear")
    with pytest.raises(UserError, match="declared as dB, but the values look like linear power"):
        build_dataset("folder", folder, "train", band_order="VV,VH")


def test_sizes_are_one_or_are_asked_for(by_class: Path) -> None:
    scene(by_class / "water" / "small.tif", 77, side=20)
    data = build_dataset("folder", by_class, "train+val+test")
    with pytest.raises(UserError, match=r"has 20x20 pixels, the first image 32x32; --data_option size=PX"):
        data.read(list(data.names).index("water/small"))
    data = build_dataset("folder", by_class, "train+val+test", size=24)
    small = data.read(list(data.names).index("water/small"))
    assert small.shape == (2, 24, 24)
    assert np.isnan(small[:, :2]).all()
    assert np.array_equal(small[1, 2:22, 2:22], speckle(77, VV, 20))
    large = data.read(list(data.names).index("forest/forest_0"))
    assert np.array_equal(large[1], speckle(0, VV)[4:28, 4:28])


def test_what_is_refused(by_class: Path, tmp_path: Path) -> None:
    table = by_class / "labels.csv"
    table.write_text("name,label\nforest/forest_0,a\nnothing.tif,b\n")
    with pytest.raises(UserError, match=r"1 of the 2 samples of .* have no image in .*'nothing.tif'.*missing=skip"):
        get_spec("folder", data_path=by_class)
    assert get_spec("folder", options={"missing": "skip"}, data_path=by_class).classes == ("a",)
    table.write_text("name,label\nforest_0,a\nforest/forest_0.tif,b\n")
    with pytest.raises(UserError, match="row 3: forest/forest_0.tif is listed twice"):
        get_spec("folder", data_path=by_class)
    table.write_text("name,label,split\nforest_0,a,train\nforest_1,b,dev\n")
    with pytest.raises(UserError, match="row 3: split 'dev'; expected train, val or test"):
        get_spec("folder", data_path=by_class)
    table.write_text("name,label\nforest_0,a\nforest_1\n")
    with pytest.raises(UserError, match="row 3 has 1 cells, the first row names 2"):
        get_spec("folder", data_path=by_class)
    table.write_text("name,label\nforest_0,a\nforest_1,b\n")
    with pytest.raises(UserError, match=r"names the class 'b', which is none of a, c"):
        get_spec("folder", options={"classes": "a,c"}, data_path=by_class)
    with pytest.raises(UserError, match="is no folder; see docs/own_data.md"):
        get_spec("folder", data_path=by_class / "nothing")
    with pytest.raises(UserError, match="has no option 'unti'.*did you mean 'unit'"):
        build_dataset("folder", by_class, "train", unti="dB")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_tool_takes_a_folder(by_class: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.mktemp("work")
    data = ("--dataset", "folder", "--data_path", str(by_class))

    def tool(script: str, *words: str) -> str:
        return run(sys.executable, str(ROOT / script), *words, cwd=work)

    assert "folder: train 14, val 2, test 4" in tool("scripts/check_data.py", *data, "--out", "out/check")
    tool("scripts/compute_statistics.py", *data, "--out", "own.json")
    tool("scripts/pack_dataset.py", *data, "--out", "out/packed")
    packed = build_dataset("folder", work / "out/packed", "test")
    files = build_dataset("folder", by_class, "test")
    assert np.array_equal(packed.read(0), files.read(0))
    assert (packed.spec.task, packed.spec.classes) == (files.spec.task, files.spec.classes)
    small = ("--model", "mixmim_tiny", "--batch_size", "4", "--num_workers", "0", "--test_run")
    small += ("--statistics", "own.json")
    tool("main_pretrain.py", *data, *small, "--output_dir", "out/pre")
    start = ("--finetune", "out/pre/checkpoint.pth")
    tool("main_finetune.py", *data, *small, *start, "--output_dir", "out/ft")
    tool("main_finetune.py", *data, *small, *start, "--protocol", "linear", "--output_dir", "out/linear")
    tool("main_finetune.py", *data, "--eval", "--resume", "out/ft/checkpoint_best.pth", "--output_dir", "out/eval")
    tool("scripts/stress.py", "out/ft", "--only", "swapped_bands", "--out", "out/stress")
    tool("scripts/extract_features.py", "--model", "out/ft", *data, "--split", "test", "--out", "out/features.parquet")
    scene = str(by_class / "forest" / "forest_0.tif")
    tool("scripts/predict.py", "--model", "out/ft", "--scene", scene, "--unit", "dB", "--out", "out/maps")
