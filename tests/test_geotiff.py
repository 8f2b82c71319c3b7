"""Reading of patch GeoTIFFs: the quick path, its header check, and rasterio for everything else."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from sarwmix.data.io import geotiff
from sarwmix.data.io.geotiff import GeoTiffError, NotPlain, PatchReader, parse_layout
from tests.bigearthnet_fixtures import REALDATA, needs_realdata, patch_image, write_tiff

BAND = patch_image(3)[0]


def read(path: Path, *, plain: bool = True, size: int = 120) -> np.ndarray:
    out = np.empty((size, size), dtype=np.float32)
    PatchReader(size, size, plain=plain).read_into(str(path), out)
    return out


@pytest.fixture
def no_rasterio(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("rasterio was used")

    monkeypatch.setattr(geotiff, "read_band", refuse)


@needs_realdata
def test_real_patches_take_the_quick_path_with_equal_values(no_rasterio: None) -> None:
    import rasterio

    paths = sorted((REALDATA / "bigearthnet_s1").glob("*/*.tif"))
    assert len(paths) == 20
    reader = PatchReader(120, 120)
    for path in paths:
        out = np.empty((120, 120), dtype=np.float32)
        reader.read_into(str(path), out)
        with rasterio.open(path) as source:
            assert np.array_equal(out, source.read(1))


VARIANTS = {
    "plain": {},
    "one_strip": {"blockysize": 120},
    "rows_of_16": {"blockysize": 16},
    "deflate": {"compress": "deflate"},
    "predictor": {"compress": "lzw", "predictor": 3},
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64},
    "big_endian": {"ENDIANNESS": "BIG"},
    "bigtiff": {"BIGTIFF": "YES"},
    "nodata": {"nodata": float(BAND[5, 7])},
    "nodata_nan": {"nodata": float("nan")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_paths_agree(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND, **VARIANTS[variant])
    quick, slow = read(path), read(path, plain=False)
    assert np.array_equal(quick, slow, equal_nan=True)
    expected = BAND.copy()
    if variant == "nodata":
        expected[5, 7] = np.nan
    assert np.array_equal(quick, expected, equal_nan=True)


@pytest.mark.parametrize("variant", ["plain", "one_strip", "rows_of_16"])
def test_plain_variants_do_not_need_rasterio(variant: str, tmp_path: Path, no_rasterio: None) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND, **VARIANTS[variant])
    assert np.array_equal(read(path), BAND)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"plain", "one_strip", "rows_of_16"}))
def test_other_variants_are_not_plain(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND, **VARIANTS[variant])
    with pytest.raises(NotPlain):
        parse_layout(path.read_bytes()[:4096], 120, 120)


def test_scale_and_offset_are_applied(tmp_path: Path) -> None:
    import rasterio

    path = tmp_path / "a.tif"
    write_tiff(path, BAND)
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (0.5,), (3.0,)
    assert np.allclose(read(path), 0.5 * BAND + 3.0, atol=1e-5)


def test_integers_become_float(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, np.full((120, 120), -12, dtype=np.int16))
    assert np.array_equal(read(path), np.full((120, 120), -12, dtype=np.float32))


def test_layouts_may_change_from_file_to_file(tmp_path: Path) -> None:
    reader = PatchReader(120, 120)
    out = np.empty((120, 120), dtype=np.float32)
    for number, variant in enumerate(["plain", "rows_of_16", "deflate", "plain", "one_strip", "nodata_nan", "plain"]):
        path = tmp_path / f"{number}.tif"
        band = patch_image(number)[1]
        write_tiff(path, band, **VARIANTS[variant])
        reader.read_into(str(path), out)
        assert np.array_equal(out, band)


def _tag_entry(data: bytes, tag: int) -> int:
    directory = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, directory)[0]):
        place = directory + 2 + 12 * entry
        if struct.unpack_from("<H", data, place)[0] == tag:
            return place
    raise AssertionError(f"no tag {tag}")


@pytest.mark.parametrize(
    ("tag", "value"),
    [(258, 16), (259, 5), (277, 2), (339, 1), (256, 119), (257, 121), (278, 0), (278, 13)],
)
def test_every_tag_of_the_header_is_checked(tag: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND)
    data = bytearray(path.read_bytes())
    parse_layout(bytes(data[:4096]), 120, 120)
    struct.pack_into("<H", data, _tag_entry(bytes(data), tag) + 8, value)
    with pytest.raises(NotPlain):
        parse_layout(bytes(data[:4096]), 120, 120)


def test_strips_must_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND, blockysize=60)
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, _tag_entry(bytes(data), 273) + 8)[0]
    first, second = struct.unpack_from("<II", data, start)
    struct.pack_into("<II", data, start, second, first)
    path.write_bytes(data)
    with pytest.raises(NotPlain, match="follow"):
        parse_layout(bytes(data[:4096]), 120, 120)
    assert np.array_equal(read(path), np.roll(BAND, 60, axis=0))  # as rasterio reads it


def test_next_file_with_other_strips_is_noticed(tmp_path: Path) -> None:
    """A file whose directory is the same but whose strip table differs must not be read with the old layout."""
    first, second = tmp_path / "a.tif", tmp_path / "b.tif"
    write_tiff(first, BAND, blockysize=60)
    shutil.copy(first, second)
    data = bytearray(second.read_bytes())
    start = struct.unpack_from("<I", data, _tag_entry(bytes(data), 273) + 8)[0]
    offsets = struct.unpack_from("<II", data, start)
    struct.pack_into("<II", data, start, *reversed(offsets))
    second.write_bytes(data)
    reader = PatchReader(120, 120)
    out = np.empty((120, 120), dtype=np.float32)
    reader.read_into(str(first), out)
    assert np.array_equal(out, BAND)
    reader.read_into(str(second), out)
    assert np.array_equal(out, np.roll(BAND, 60, axis=0))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 100, 300, 5000, 57_000])
def test_truncated_file_is_refused(keep: int, plain: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, BAND)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GeoTiffError, match="cannot be read"):
        read(path, plain=plain)


def test_truncated_file_after_a_good_one(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.tif", tmp_path / "b.tif"
    write_tiff(good, BAND)
    bad.write_bytes(good.read_bytes()[:-100])
    reader = PatchReader(120, 120)
    out = np.empty((120, 120), dtype=np.float32)
    reader.read_into(str(good), out)
    with pytest.raises(GeoTiffError):
        reader.read_into(str(bad), out)


def test_wrong_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    import rasterio

    with pytest.raises(GeoTiffError, match="does not exist"):
        read(tmp_path / "absent.tif")
    write_tiff(tmp_path / "small.tif", BAND[:100])
    with pytest.raises(GeoTiffError, match="shape 100x120, expected 120x120"):
        read(tmp_path / "small.tif")
    with rasterio.open(
        tmp_path / "two.tif", "w", driver="GTiff", count=2, height=120, width=120, dtype="float32"
    ) as target:
        target.write(np.stack([BAND, BAND]))
    with pytest.raises(GeoTiffError, match="2 bands"):
        read(tmp_path / "two.tif")
    (tmp_path / "text.tif").write_text("not a raster")
    with pytest.raises(GeoTiffError, match="cannot be read"):
        read(tmp_path / "text.tif")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(GeoTiffError):
        read(tmp_path / "folder.tif")
