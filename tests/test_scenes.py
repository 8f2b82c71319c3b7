"""A user's own folder of Sentinel-1 GeoTIFFs: bands by name, units, tiles, no-data, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from sarwmix.data import registry
from sarwmix.data.base import UnreadableSample
from sarwmix.data.pixels import check_unit
from sarwmix.datasets.scenes import SceneTiles, tile_starts
from util.errors import UserError

Writer = Callable[..., Path]


def scene(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    """VH, VV in dB (2, height, width) with the position in the values, so that misplaced pixels show."""
    rng = np.random.default_rng(seed)
    level = np.array([-18.0, -11.0])[:, None, None]
    return (level + rng.normal(0, 1.5, (2, height, width))).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def write_file(
        name: str,
        bands: np.ndarray,
        *,
        descriptions: tuple[str, ...] = (),
        origin: float = 500000.0,
        epsg: int | None = 32633,
        **profile: Any,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=bands.shape[1],
            width=bands.shape[2],
            count=len(bands),
            dtype=bands.dtype,
            crs=None if epsg is None else f"EPSG:{epsg}",
            transform=from_origin(origin, 5400000.0, 10.0, 10.0),
            **profile,
        ) as target:
            target.write(bands)
            for number, text in enumerate(descriptions, start=1):
                target.set_band_description(number, text)
        return path

    return write_file


def build(path: Path, split: str = "train", **options: Any) -> SceneTiles:
    dataset = registry.build_dataset("s1_scenes", path, split, **{"tile": 16, **options})
    assert isinstance(dataset, SceneTiles)
    return dataset


@pytest.mark.parametrize("names", [
    ("scene_VH.tif", "scene_VV.tif"),
    ("scene/VH.tif", "scene/VV.tif"),
    ("S1_vh_scene.TIF", "S1_vv_scene.TIF"),
    ("scene-VH-db.tiff", "scene-VV-db.tiff"),
])  # fmt: skip
def test_two_files_by_name(tmp_path: Path, write: Writer, names: tuple[str, str]) -> None:
    values = scene()
    write(names[0], values[:1])
    write(names[1], values[1:])
    dataset = build(tmp_path)
    # 40 // 16 = 2 rows and 50 // 16 = 3 columns of whole tiles
    assert len(dataset) == 6
    assert dataset.names[4].endswith("_r16_c16")
    assert np.array_equal(dataset.read(4), values[:, 16:32, 16:32])
    assert dataset[4]["image"].shape == (2, 16, 16)
    assert "label" not in dataset[4]


@pytest.mark.parametrize(("descriptions", "options"), [
    (("VV", "VH"), {}),
    (("Sigma0_VV_db", "Sigma0_VH_db"), {}),
    ((), {"band_order": "VV,VH"}),
    (("VV", "VH"), {"band_order": "vv, vh"}),
])  # fmt: skip
def test_one_file_by_description_or_order(
    tmp_path: Path, write: Writer, descriptions: tuple[str, ...], options: dict[str, str]
) -> None:
    values = scene()
    write("chip.tif", values[::-1], descriptions=descriptions)
    dataset = build(tmp_path, **options)
    assert np.array_equal(dataset.read(0), values[:, :16, :16])
    assert dataset.names[0] == "chip_r0_c0"


def test_band_order_may_name_other_bands(tmp_path: Path, write: Writer) -> None:
    values = scene()
    write("chip.tif", np.stack([values[0], np.full_like(values[0], 38.0), values[1]]))
    dataset = build(tmp_path, band_order="VH,angle,VV")
    assert np.array_equal(dataset.read(0), values[:, :16, :16])


def test_linear_power_becomes_decibel(tmp_path: Path, write: Writer) -> None:
    values = scene()
    power = (10 ** (values / 10)).astype(np.float32)
    power[:, 0, 0] = 0.0  # border fill
    power[0, 1, 1] = -1e-6  # what noise removal leaves
    write("chip.tif", power, descriptions=("VH", "VV"))
    image = build(tmp_path, unit="linear").read(0)
    assert np.isnan(image[:, 0, 0]).all()
    assert np.isnan(image[0, 1, 1])
    assert np.isfinite(image[1, 1, 1])
    keep = np.isfinite(image)
    assert np.allclose(image[keep], values[:, :16, :16][keep], atol=1e-4)


def test_wrong_unit_is_refused(tmp_path: Path, write: Writer) -> None:
    values = scene()
    write("a/chip.tif", values, descriptions=("VH", "VV"))
    write("b/chip.tif", (10 ** (values / 10)).astype(np.float32), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match="give unit=dB"):
        build(tmp_path / "a", unit="linear")
    with pytest.raises(UserError, match="give unit=linear"):
        build(tmp_path / "b")
    with pytest.raises(UserError, match="unit=db"):
        build(tmp_path / "a", unit="db")


def test_implausible_values_warn() -> None:
    values = scene().reshape(2, -1)
    assert check_unit(values, "dB", "x") is None
    assert "swapped" in str(check_unit(values[::-1], "dB", "x"))
    with pytest.raises(UserError, match="digital numbers.*calibrate"):
        check_unit(np.full((2, 10), 300.0, np.float32), "linear", "x")
    with pytest.raises(UserError, match="dB x 100.*divide by 100"):
        check_unit(values * 100, "dB", "x")


def test_no_data_in_all_its_forms(tmp_path: Path, write: Writer) -> None:
    values = scene()
    values[0, 0, 0] = -9999.0
    values[1, 0, 1] = np.nan
    values[0, 0, 2] = -np.inf
    values[:, 0, 3] = 0.0
    write("chip.tif", values, descriptions=("VH", "VV"), nodata=-9999.0)
    dataset = build(tmp_path)
    invalid = np.argwhere(np.isnan(dataset.read(0))).tolist()
    # what stands for no data in one band (-inf dB is power 0) holds for the pixel; NaN stands for its band
    assert invalid == [[0, 0, 0], [0, 0, 2], [0, 0, 3], [1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 0, 3]]
    assert not dataset[0]["valid"][0, 0, 0]


def test_scale_and_offset_are_applied(tmp_path: Path, write: Writer) -> None:
    values = scene()
    path = write("chip.tif", np.round(values * 100).astype(np.int16), descriptions=("VH", "VV"))
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (0.01, 0.01), (0.0, 0.0)
    assert np.allclose(build(tmp_path).read(1), values[:, :16, 16:32], atol=0.0051)


def test_tiles_with_few_valid_pixels_are_counted(tmp_path: Path, write: Writer) -> None:
    values = scene()
    values[:, :16, :16] = np.nan
    values[1, :16, 16:20] = np.nan  # a quarter of the second tile
    write("chip.tif", values, descriptions=("VH", "VV"), nodata=np.nan)
    dataset = build(tmp_path)
    assert dataset.skipped.tiles == 1
    assert list(dataset.names) == ["chip_r0_c16", "chip_r0_c32", "chip_r16_c0", "chip_r16_c16", "chip_r16_c32"]
    assert build(tmp_path, min_valid=0.8).skipped.tiles == 2
    everything = build(tmp_path, min_valid=0)
    assert len(everything) == 6
    with pytest.raises(UnreadableSample, match="chip_r0_c0"):
        everything.read(0)


def test_empty_small_and_foreign_files_are_left_out_by_name(tmp_path: Path, write: Writer, caplog: Any) -> None:
    write("good.tif", scene(), descriptions=("VH", "VV"))
    write("empty.tif", np.full((2, 40, 50), np.nan, np.float32), descriptions=("VH", "VV"), nodata=np.nan)
    write("tiny.tif", scene(8, 8), descriptions=("VH", "VV"))
    write("label.tif", np.zeros((1, 40, 50), np.int16))
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no more")
    dataset = build(tmp_path)
    assert [one.name for one in dataset.scenes] == ["good"]
    assert len(dataset.skipped.scenes) == 2
    assert any("empty: no valid pixel" in text for text in dataset.skipped.scenes)
    assert any("tiny: 8x8 pixels" in text for text in dataset.skipped.scenes)
    assert any("label.tif: one band" in text for text in dataset.skipped.files)
    assert any("broken.tif: cannot be opened" in text for text in dataset.skipped.files)


def test_truncated_scene(tmp_path: Path, write: Writer) -> None:
    """Found at the survey; without it at the read, by name."""
    write("good.tif", scene(), descriptions=("VH", "VV"))
    write("short_VH.tif", scene(seed=1)[:1])
    path = write("short_VV.tif", scene(seed=1)[1:])
    dataset = build(tmp_path, min_valid=0)
    path.write_bytes(path.read_bytes()[:5000])
    assert any(text.startswith("short: cannot be read") for text in build(tmp_path).skipped.scenes)
    with pytest.raises(UnreadableSample, match="short_r16_c0"):
        dataset.read(list(dataset.names).index("short_r16_c0"))


def test_refusals(tmp_path: Path, write: Writer) -> None:
    with pytest.raises(UserError, match="holds no GeoTIFF"):
        build(tmp_path)
    write("vv/a_VV.tif", scene()[1:])
    with pytest.raises(UserError, match=r"a_VV\.tif \(without VH\)"):
        build(tmp_path / "vv")
    write("grid/a_VV.tif", scene()[1:])
    write("grid/a_VH.tif", scene()[:1], origin=500010.0)
    with pytest.raises(UserError, match="different grids"):
        build(tmp_path / "grid")
    write("plain/a.tif", scene())
    with pytest.raises(UserError, match="band_order=VV,VH"):
        build(tmp_path / "plain")
    for order, message in (("VV", "once each"), ("VV,VV", "once each"), ("VH,VV,angle", "band_order names 3")):
        with pytest.raises(UserError, match=message):
            build(tmp_path / "plain", band_order=order)
    write("told/a.tif", scene(), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match="contradicts"):
        build(tmp_path / "told", band_order="VV,VH")
    write("twice/a_VV.tif", scene()[1:])
    write("twice/a-vv.tif", scene()[1:])
    with pytest.raises(UserError, match="both VV"):
        build(tmp_path / "twice")
    write("complex/a.tif", scene().astype(np.complex64), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match="complex64"):
        build(tmp_path / "complex")
    write("nothing/a.tif", np.full((2, 40, 50), np.nan, np.float32), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match="none of them usable"):
        build(tmp_path / "nothing")


@pytest.mark.parametrize(
    "option",
    [{"tile": 8}, {"tile": "x"}, {"stride": 0}, {"min_valid": 1.5}, {"holdout": 1}, {"seed": -1}, {"min_valid": "nan"}],
)
def test_options_out_of_range(tmp_path: Path, write: Writer, option: dict[str, Any]) -> None:
    write("a.tif", scene(), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match=f"{next(iter(option))}="):
        build(tmp_path, **option)


def test_holdout_is_by_scene_and_covers_all(tmp_path: Path, write: Writer) -> None:
    for number in range(10):
        write(f"s{number}.tif", scene(16, 32, seed=number), descriptions=("VH", "VV"))
    with pytest.raises(UserError, match="without holdout"):
        build(tmp_path, "train+val")
    splits = ("train", "val", "test")
    parts = {split: {one.name for one in build(tmp_path, split, holdout=0.4).scenes} for split in splits}
    assert [len(parts[split]) for split in splits] == [6, 2, 2]
    assert len(set.union(*parts.values())) == 10
    assert len(build(tmp_path, "train+val", holdout=0.4)) == 16
    assert {one.name for one in build(tmp_path, "val", holdout=0.4, seed=1).scenes} != parts["val"]


def test_overlap_and_place(tmp_path: Path, write: Writer) -> None:
    write("a.tif", scene(), descriptions=("VH", "VV"))
    dataset = build(tmp_path, stride=8)
    assert len(dataset) == len(tile_starts(40, 16, 8)) * len(tile_starts(50, 16, 8)) == 4 * 5
    place = dataset.place(6)
    assert (place["row"], place["column"]) == (8, 8)
    assert place["transform"] == (10.0, 0.0, 500080.0, 0.0, -10.0, 5399920.0)
    assert (place["x"], place["y"]) == (500160.0, 5399840.0)
    assert "UTM zone 33N" in place["crs"]


def test_same_names_in_two_folders_and_no_georeference(tmp_path: Path, write: Writer) -> None:
    write("one/VH.tif", scene()[:1])
    write("one/VV.tif", scene()[1:])
    write("two/one/VH.tif", scene()[:1], epsg=None)
    write("two/one/VV.tif", scene()[1:], epsg=None)
    dataset = build(tmp_path)
    assert [one.name for one in dataset.scenes] == ["one__one", "two__one__one"]
    assert dataset.place(11)["crs"] == ""


def test_can_be_sent_to_another_process(tmp_path: Path, write: Writer) -> None:
    write("a.tif", scene(), descriptions=("VH", "VV"))
    dataset = build(tmp_path)
    first = dataset.read(0)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).read(0), first)


def test_real_chips_of_sen1floods11(realdata: Path) -> None:
    dataset = build(realdata / "sen1floods11" / "S1Hand", tile=120)
    # 10 usable chips of 512 x 512: 4 x 4 tiles each; the eleventh is NaN throughout
    assert len(dataset) == 160
    assert dataset.skipped.scenes == ["Paraguay_34417_S1Hand: no valid pixel (all no-data)"]
    images = np.stack([dataset.read(index) for index in range(0, 160, 8)])
    assert -26 < np.nanmean(images[:, 0]) < -12
    assert 3 < np.nanmean(images[:, 1] - images[:, 0]) < 12


def test_real_scenes_of_ssl4eo(realdata: Path) -> None:
    dataset = build(realdata / "ssl4eo_s12" / "s1", tile=120)
    assert len(dataset) == 8
    with rasterio.open(dataset.place(5)["paths"][0]) as source:
        wanted = source.read(1)[:120, 120:240]
    assert np.array_equal(dataset.read(5)[0], wanted)


def test_real_vv_only_folder_is_refused(realdata: Path) -> None:
    with pytest.raises(UserError, match="without VH"):
        build(realdata / "spatialist_s1_vv")


def test_copies_of_an_acquisition_stay_together() -> None:
    from sarwmix.datasets.scenes import Scene, _assign, acquisitions

    def scene(name: str, left: float = 0.0) -> Scene:
        return Scene(name, (), 10, 10, "", (10.0, 0.0, left, 0.0, -10.0, 0.0))

    names = [
        "a",
        "a_filtered",
        "b",
        "S1A_20200108T044150_x",
        "S1A_20200108T044150_y",
        "S1A_20200109T044150_x",
        "c1",
        "c10",
    ]
    group = acquisitions([scene(name) for name in names])
    assert group.tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
    assert acquisitions([scene("a"), scene("a_2", left=50.0)]).tolist() == [0, 1]  # a neighbour, no copy
    for seed in range(20):
        parts = [set(_assign(group, 0.5, seed, (part,)).tolist()) for part in ("train", "val", "test")]
        assert sorted(number for part in parts for number in part) == list(range(8))
        assert all(({0, 1} <= part or not {0, 1} & part) and ({3, 4} <= part or not {3, 4} & part) for part in parts)
