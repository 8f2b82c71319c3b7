"""Files as real processors write them: the right value, or a refusal that names what was seen and what to do.

Each case makes its own input: gamma speckle at the levels of land, in the layout of the processor that it stands for.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio

from sarwmix.data.io.lmdb import LmdbPatches, check_size
from sarwmix.data.pixels import recognise
from sarwmix.data.registry import build_dataset
from sarwmix.datasets.bigearthnet import read_metadata
from util.errors import UserError

SIZE = 128
LEVELS = {"VH": -18.0, "VV": -11.0}


def power(seed: int = 0, size: int = SIZE) -> dict[str, np.ndarray]:
    """Linear power of both bands, five looks."""
    rng = np.random.default_rng(seed)
    return {band: (10 ** (level / 10) * rng.gamma(5, 1 / 5, (size, size))).astype(np.float32)
            for band, level in LEVELS.items()}  # fmt: skip


def decibel(seed: int = 0) -> dict[str, np.ndarray]:
    return {band: 10 * np.log10(values) for band, values in power(seed).items()}


def write(path: Path, values: np.ndarray, *, left: float = 5e5, **profile: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = rasterio.Affine(10, 0, left, 0, -10, 5e6)
    with rasterio.open(path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
                       dtype=values.dtype, crs="EPSG:32633", transform=transform, **profile) as file:  # fmt: skip
        file.write(values, 1)
    return path


def scene(folder: Path, bands: dict[str, np.ndarray], name: str = "scene", **profile: Any) -> Path:
    for band, values in bands.items():
        write(folder / f"{name}_{band}.tif", values, **profile)
    return folder


def tiles(folder: Path, **options: Any) -> Any:
    return build_dataset("s1_scenes", folder, "train", tile=64, **options)


# Fill values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-9999.0, -999.0, -99.0, -32768.0, -3.4e38, -500.0, 0.0])
@pytest.mark.parametrize("bands", [("VH", "VV"), ("VH",)])
def test_undeclared_fill_is_no_backscatter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fill: float, bands: tuple[str, ...]
) -> None:
    values = decibel()
    for band in bands:
        values[band][:20, :20] = fill
    with caplog.at_level(logging.WARNING):
        image = tiles(scene(tmp_path, values)).read(0)
    assert np.isnan(image[:, :20, :20]).all()  # of one band: holds for the pixel
    assert np.isfinite(image[:, 20:, 20:]).all()
    assert f"{np.float32(fill):g} ({400 * len(bands):,} pixels)" in caplog.text


@pytest.mark.parametrize("fill", [-9999.0, -1.0, 0.0, 3.4e38])
def test_fill_in_linear_power(tmp_path: Path, fill: float) -> None:
    values = power()
    values["VH"][:20, :20] = fill
    image = tiles(scene(tmp_path, values), unit="linear").read(0)
    assert np.isnan(image[:, :20, :20]).all()
    assert np.isfinite(image[:, 20:, 20:]).all()
    assert image[0, 20:, 20:].mean() == pytest.approx(10 * np.log10(values["VH"][20:64, 20:64]).mean(), abs=1e-4)


def test_declared_in_one_band_holds_for_the_pixel(tmp_path: Path) -> None:
    values = decibel()
    values["VH"][3, 4] = -77.0
    write(tmp_path / "s_VH.tif", values["VH"], nodata=-77.0)
    write(tmp_path / "s_VV.tif", values["VV"])
    assert np.argwhere(np.isnan(tiles(tmp_path).read(0))).tolist() == [[0, 3, 4], [1, 3, 4]]


def test_negative_power_is_invalid_in_its_band_and_no_reason_to_advise_decibel(tmp_path: Path) -> None:
    values = power()
    values["VH"] = values["VH"] - np.float32(np.median(values["VH"]))  # noise removed, and more
    data = tiles(scene(tmp_path, values), unit="linear", min_valid=0.1)
    image = data.read(0)
    assert 0.4 < np.isnan(image[0]).mean() < 0.6
    assert np.isfinite(image[1]).all()


def test_tiles_that_are_empty_in_one_band_are_left_out(tmp_path: Path) -> None:
    values = power()
    values["VH"][:, :70] = 0.0
    data = tiles(scene(tmp_path, values), unit="linear")
    assert list(data.names) == ["scene_r0_c64", "scene_r64_c64"]
    assert data.skipped.tiles == 2
    assert len([data[index] for index in range(len(data))]) == 2  # nothing stops


# Units -------------------------------------------------------------------------------------------------------------


def stored(kind: str) -> dict[str, np.ndarray]:
    """The same scene in what people store."""
    linear, db = power(), decibel()
    rng = np.random.default_rng(1)
    makers = {
        "dB": lambda band: db[band],
        "linear": lambda band: linear[band],
        "amplitude": lambda band: np.sqrt(10**0.35 * linear[band]),  # of bright land
        "dB x 100": lambda band: np.round(db[band] * 100).astype(np.int16),
        "digital numbers": lambda band: np.round(np.sqrt(linear[band]) * 700).astype(np.uint16),
        "normalised": lambda band: np.clip((db[band] + 30) / 30 + 0.1 * rng.random(db[band].shape), 0, 1),
    }
    return {band: np.asarray(makers[kind](band)) for band in LEVELS}


KINDS = ("dB", "linear", "amplitude", "dB x 100", "digital numbers", "normalised")


@pytest.mark.parametrize("kind", KINDS)
def test_recognise(kind: str) -> None:
    pixels = np.stack([values.ravel().astype(np.float32) for values in stored(kind).values()])
    assert recognise(pixels) == kind


REMEDIES = {
    "dB": "give unit=dB",
    "linear": "give unit=linear",
    "amplitude": "give unit=amplitude",
    "dB x 100": "divide by 100",
    "digital numbers": "calibrate the product",
    "normalised": "go back to the calibrated values",
}


@pytest.mark.parametrize("declared", ["dB", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_unit_of_scenes(tmp_path: Path, kind: str, declared: str) -> None:
    scene(tmp_path, stored(kind))
    if kind == declared:
        assert tiles(tmp_path, unit=declared).read(0)[0].mean() == pytest.approx(-18.5, abs=1)
        return
    with pytest.raises(UserError) as refused:
        tiles(tmp_path, unit=declared)
    assert REMEDIES[kind] in str(refused.value)
    assert not any(other in str(refused.value) for name, other in REMEDIES.items() if name != kind)


def test_amplitude_is_read_as_its_square(tmp_path: Path) -> None:
    values = power()
    scene(tmp_path, {band: np.sqrt(part) for band, part in values.items()})
    image = tiles(tmp_path, unit="amplitude").read(0)
    assert np.allclose(image[1], 10 * np.log10(values["VV"][:64, :64]), atol=1e-3)


def test_every_data_set_is_looked_at(tmp_path: Path, demo_root: Path) -> None:
    """BigEarthNet patches in linear power, as files and packed, are not trained on in silence."""
    import shutil

    from sarwmix.data.packed import pack

    root = tmp_path / "demo"
    shutil.copytree(demo_root, root)
    data = build_dataset("demo", root, "train")
    for file in root.rglob("*_V?.tif"):
        with rasterio.open(file) as source:
            values, profile = source.read(1), source.profile
        with rasterio.open(file, "w", **profile) as target:
            target.write((10 ** (values / 10)).astype(values.dtype), 1)
    with pytest.raises(UserError, match="look like linear power.*10 log10"):
        build_dataset("demo", root, "train")
    pack([data], tmp_path / "packed")  # opened before the files changed
    with pytest.raises(UserError, match="look like linear power.*10 log10"):
        build_dataset("demo", tmp_path / "packed", "train")


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["s1a_33NWB_vv_DES_007_BorderMask.tif", "scene_VV_area.tif", "scene_VV_lia.tif", "scene_VV_coherence.tif",
             "scene_VV_layover_shadow.tif", "scene_VV_ratio.tif"])  # fmt: skip
def test_side_products_are_no_scenes(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    scene(tmp_path, decibel())
    write(tmp_path / name, np.ones((SIZE, SIZE), np.uint8))
    with caplog.at_level(logging.WARNING):
        data = tiles(tmp_path)
    assert len(data.scenes) == 1
    assert name in caplog.text
    assert "side product" in caplog.text


def test_a_name_may_hold_such_a_word(tmp_path: Path) -> None:
    scene(tmp_path, decibel(), name="study_area")
    assert len(tiles(tmp_path)) == 4


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    scene(tmp_path / "elsewhere", decibel())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "sceneA").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert len(tiles(folder)) == 4


def test_names_that_are_not_utf8_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene(tmp_path, decibel())
    bad = os.fsencode(tmp_path) + b"/g\xe9nes_VV.tif"
    with open(bad, "wb") as file:
        file.write(b"II")
    with caplog.at_level(logging.WARNING):
        assert len(tiles(tmp_path)) == 4
    assert "nes_VV.tif" in caplog.text
    assert "UTF-8" in caplog.text


def test_grids_agree_within_a_hundredth_of_a_pixel(tmp_path: Path) -> None:
    values = decibel()
    for number, (shift, fits) in enumerate({1e-7: True, 0.09: True, 0.2: False}.items()):
        folder = tmp_path / str(number)
        write(folder / "s_VH.tif", values["VH"])
        write(folder / "s_VV.tif", values["VV"], left=5e5 + shift)
        if fits:
            assert len(tiles(folder)) == 4
        else:
            with pytest.raises(UserError, match="different grids"):
                tiles(folder)


def test_a_raw_product_has_to_be_calibrated(tmp_path: Path) -> None:
    measured = tmp_path / "S1A_IW_GRDH_1SDV_X.SAFE" / "measurement"
    for number, band in ((1, "vv"), (2, "vh")):
        write(measured / f"s1a-iw-grd-{band}-2020-00{number}.tiff", np.full((SIZE, SIZE), 200, np.uint16))
    with pytest.raises(UserError, match="calibrate it first"):
        tiles(tmp_path)


def test_one_polarisation_among_scenes_of_both_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene(tmp_path, decibel())
    write(tmp_path / "single_VV.tif", decibel(1)["VV"])
    with caplog.at_level(logging.WARNING):
        assert len(tiles(tmp_path)) == 4
    assert "single_VV.tif: no file of the other polarisation" in caplog.text


def test_a_tif_that_is_another_format_is_not_opened(tmp_path: Path) -> None:
    """A VRT with a .tif name could read other files or ask a server."""
    write(tmp_path / "real.tif", decibel()["VV"])
    text = (f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><VRTRasterBand dataType="Float32" band="1">'
            f"<SimpleSource><SourceFilename>{tmp_path / 'real.tif'}</SourceFilename><SourceBand>1</SourceBand>"
            "</SimpleSource></VRTRasterBand></VRTDataset>")  # fmt: skip
    for band in LEVELS:
        (tmp_path / "vrt" / f"s_{band}.tif").parent.mkdir(exist_ok=True)
        (tmp_path / "vrt" / f"s_{band}.tif").write_text(text)
    with pytest.raises(UserError, match="cannot be opened"):
        tiles(tmp_path / "vrt")


# Stores ------------------------------------------------------------------------------------------------------------


def test_a_cut_lmdb_is_refused_by_its_size(tmp_path: Path) -> None:
    import lmdb

    place = tmp_path / "store"
    with lmdb.open(str(place), map_size=1 << 24) as environment, environment.begin(write=True) as writing:
        for number in range(200):
            writing.put(f"patch_{number}".encode(), os.urandom(3000))
    check_size(place)
    whole = (place / "data.mdb").read_bytes()
    for share in (0.0, 0.001, 0.02, 0.5, 0.99):
        (place / "data.mdb").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="cut short|no LMDB"):
            LmdbPatches(place, ("VH", "VV"), 120)
    (place / "data.mdb").write_bytes(b"not an LMDB at all" * 1000)
    with pytest.raises(UserError, match="is no LMDB"):
        LmdbPatches(place, ("VH", "VV"), 120)


# Lists -------------------------------------------------------------------------------------------------------------

PATCHES = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{row}_1" for row in range(2)]


def as_lists(folder: Path, kind: str) -> Path:
    """The same two patches, one a split, in what people write."""
    from sarwmix.data.labels import CLASSES_19

    labels = ["['Arable land', 'Pastures']", "['Marine waters']"]
    rows = list(zip(PATCHES, ["train", "test"], labels, strict=True))
    table = pd.DataFrame(rows, columns=["s1_name", "split", "labels"])
    hot = table[["s1_name", "split"]].assign(**{name: [int(name in cell) for cell in labels] for name in CLASSES_19})
    path = folder / ("list.pq" if "parquet" in kind else "list.csv")
    if "one-hot" in kind:
        table = hot
    if "header" in kind:
        table.columns = [name.upper() for name in table.columns]
    if "parquet" in kind:
        table.to_parquet(path, index=False)
    elif kind == "UTF-16":
        path.write_bytes(table.to_csv(index=False).encode("utf-16"))
    else:
        table.to_csv(path, index=False, sep={"semicolon": ";", "tab": "\t"}.get(kind, ","))
    return path


@pytest.mark.parametrize(
    "kind", ["csv", "semicolon", "tab", "UTF-16", "header", "one-hot", "parquet", "parquet header", "parquet one-hot"]
)
def test_lists_as_people_write_them(tmp_path: Path, kind: str) -> None:
    from sarwmix.data.labels import CLASSES_19

    table = read_metadata([as_lists(tmp_path, kind)], ("train", "test"))
    assert [table.names[row] for row in range(2)] == PATCHES
    assert table.labels is not None
    found = [[CLASSES_19[number] for number in np.flatnonzero(row)] for row in table.labels]
    assert found == [["Arable land", "Pastures"], ["Marine waters"]]


def test_lists_that_say_too_little_are_named(tmp_path: Path) -> None:
    path = as_lists(tmp_path, "parquet")
    whole = pd.read_parquet(path)
    whole.assign(split=["train", None]).to_parquet(path)
    with pytest.raises(UserError, match="column 'split' has 1 empty cells"):
        read_metadata([path], ("train", "test"))
    whole.assign(labels=[None, "['Pastures']"]).to_parquet(path)
    with pytest.raises(UserError, match="row 1: the cell of its labels is empty"):
        read_metadata([path], ("train", "test"))
    pd.read_parquet(as_lists(tmp_path, "parquet one-hot")).drop(columns=["Pastures"]).to_parquet(path)
    with pytest.raises(UserError, match="columns for 18 of the 19 classes, without pastures"):
        read_metadata([path], ("train", "test"))
    (tmp_path / "latin.csv").write_bytes("s1_name,split\nM\u00fcnchen,train".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_metadata([tmp_path / "latin.csv"], ("train", "test"))
