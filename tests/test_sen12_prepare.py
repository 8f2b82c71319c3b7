"""The preparation: values, both layouts, bad input, ownership of folders, a full disk, the zip, and kill -9."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import ROOT, clean_environment
from sen12_fixtures import SIZE, TINY, edit_s1list, make_raw, manifest, problem_kinds, run, tree

from sarwmix.sen12flood import stages
from sarwmix.sen12flood.baseline import prepare_straightforward
from sarwmix.sen12flood.layout import HEADER_BYTES, npy_header, read_pairs
from sarwmix.synthetic.sen12flood import DemoOptions, generate, make_zip
from util.errors import UserError


@pytest.fixture(scope="module")
def shared_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated tree; do not change it."""
    return make_raw(tmp_path_factory.mktemp("sen12"))


@pytest.fixture
def raw(shared_raw: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shared_raw, tmp_path / "raw"))


def tiles(raw: Path, folder: str = "0001", band: str = "VV") -> list[Path]:
    return sorted((raw / folder).glob(f"S1*_{band}.tif"), key=lambda p: p.name.split("_")[4])


def rewrite(path: Path, **changes: Any) -> None:
    """Write a tile anew with other pixels, CRS, transform or no-data value."""
    with rasterio.open(path) as source:
        pixels, profile = source.read(1), source.profile
    if "edit" in changes:
        pixels = changes.pop("edit")(pixels)
    profile.update(changes, height=pixels.shape[0], width=pixels.shape[1], dtype=pixels.dtype)
    path.unlink()
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels, 1)


# Values -------------------------------------------------------------------------------------------------------------


def test_both_layouts_hold_what_the_straightforward_way_gives(shared_raw: Path, tmp_path: Path) -> None:
    kept = prepare_straightforward(shared_raw, tmp_path / "s" / "work", tmp_path / "s" / "out", size=SIZE)
    run(shared_raw, tmp_path / "npy")
    run(shared_raw, tmp_path / "store", layout="store")
    wanted = {p.relative_to(tmp_path / "s" / "out"): np.load(p) for p in (tmp_path / "s" / "out").rglob("*.npy")}
    assert 0 < kept == len(wanted)
    found = {p.relative_to(tmp_path / "npy" / "out"): np.load(p) for p in (tmp_path / "npy" / "out").rglob("*.npy")}
    assert found.keys() == wanted.keys()
    images = np.load(tmp_path / "store" / "out" / "images.npy")
    pairs = read_pairs(tmp_path / "store" / "out")
    assert {Path(p.split) / f"{p.name}.npy" for p in pairs} == wanted.keys()
    for pair in pairs:
        expected = wanted[Path(pair.split) / f"{pair.name}.npy"]
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(found[Path(pair.split) / f"{pair.name}.npy"], expected)
        np.testing.assert_array_equal(images[[pair.row1, pair.row2]], expected)
    # Cleaning dropped something, unused rows were closed up, and each image is there once.
    assert manifest(tmp_path / "npy")["dropped_pairs"]["zeros"] > 0
    assert len(images) == len({row for p in pairs for row in (p.row1, p.row2)}) < 3 * TINY.frames
    assert (images != 0).mean(axis=(2, 3)).min() > 0.75


def test_manifest_counts_and_tables(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path)
    content = manifest(tmp_path)
    files = {name: sorted((tmp_path / "out" / name).glob("*.npy")) for name in ("train", "test")}
    for name, sequences in (("train", 2), ("test", 1)):
        counts = content["counts"][name]
        flood = sum(file.stem.endswith("__1") for file in files[name])
        assert counts["sequences"] == sequences
        assert counts["candidate_pairs"] == 6 * sequences
        assert counts["candidate_flood"] == 3 * sequences
        assert (counts["pairs"], counts["flood"]) == (len(files[name]), flood)
        assert counts["no_flood"] == counts["pairs"] - flood
    assert sum(content["frames"].values()) == 3 * TINY.frames
    assert content["status"] == "complete"
    assert content["options"]["warper"] == "rasterio"
    assert content["versions"]["gdal_of_rasterio"] == rasterio.__gdal_version__
    assert content["split"].startswith("derived")
    assert content["problems"] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json", "pairs.csv", "images.csv", "sequences.csv", "train", "test",
    }  # fmt: skip
    assert not any((tmp_path / "work").iterdir())  # intermediate files are gone


def test_aligned_images_have_the_grid_of_b04(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path, layout="store")
    header, *lines = (tmp_path / "out" / "sequences.csv").read_text().splitlines()
    for line in lines:
        row = dict(zip(header.split(","), line.split(","), strict=True))
        with rasterio.open(shared_raw / row["folder"] / row["origin"]) as band:
            assert row["crs"] == str(band.crs)
            assert (float(row["left"]), float(row["top"])) == (band.bounds.left, band.bounds.top)
            assert (int(row["width"]), int(row["height"])) == (band.width, band.height)
            assert float(row["pixel"]) == band.res[0] == 10


def test_result_does_not_depend_on_the_number_of_processes(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path / "one")
    run(shared_raw, tmp_path / "two", jobs=2)
    assert tree(tmp_path / "one" / "out") == tree(tmp_path / "two" / "out")


@pytest.mark.parametrize("resampling", ["bilinear", "average"])
def test_other_resampling_leaves_uncovered_pixels_out(shared_raw: Path, tmp_path: Path, resampling: str) -> None:
    run(shared_raw, tmp_path / "n", layout="store")
    run(shared_raw, tmp_path / "o", layout="store", resampling=resampling)
    near, other = (np.load(tmp_path / k / "out" / "images.npy") for k in "no")
    assert near.shape == other.shape
    assert not np.array_equal(near, other)
    assert abs(np.log(other[other > 0]).mean() - np.log(near[near > 0]).mean()) < 0.3
    assert other.min() >= 0
    assert abs(float((other == 0).mean()) - float((near == 0).mean())) < 0.03
    # The border of a swath keeps its level: zeros beyond it are not blended in.
    edge = (other > 0) & (near > 0)
    assert other[edge].min() > 0.05 * near[edge].min()


def test_nodata_counts_as_uncovered(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "before", layout="store")
    for path in [*tiles(raw), *tiles(raw, band="VH")]:
        rewrite(path, edit=lambda p: np.where(p == 0, np.float32(-9999), p), nodata=-9999.0)
    run(raw, tmp_path / "after", layout="store")
    for name in ("images.npy", "pairs.csv", "images.csv"):
        assert tree(tmp_path / "before" / "out")[name] == tree(tmp_path / "after" / "out")[name]


def test_npy_files_are_plain_arrays_with_a_block_sized_header(tmp_path: Path) -> None:
    header = npy_header((2, 3))
    assert len(header) == HEADER_BYTES
    path = tmp_path / "x.npy"
    path.write_bytes(header + np.arange(6, dtype="<f4").tobytes())
    np.testing.assert_array_equal(np.load(path), np.arange(6, dtype=np.float32).reshape(2, 3))


def test_store_is_a_quarter_of_the_pairs_at_most(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, DemoOptions(train=1, test=1, frames=14, size=SIZE, swath_edges=0))
    run(raw, tmp_path / "npy")
    run(raw, tmp_path / "store", layout="store")
    sizes = [sum(p.stat().st_size for p in (tmp_path / k / "out").rglob("*") if p.is_file()) for k in ("store", "npy")]
    assert sizes[0] <= 0.25 * sizes[1]


def test_polygon_stands_in_for_a_missing_b04(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "before", layout="store")
    for path in (raw / "0001").glob("S2_*_B04.tif"):
        path.unlink()
    run(raw, tmp_path / "after", layout="store")
    assert manifest(tmp_path / "after")["grids_from_polygon"] == ["0001"]
    before, after = (tree(tmp_path / k / "out") for k in ("before", "after"))
    assert before["images.npy"] == after["images.npy"]


def test_unused_tiles_and_sequences_do_no_harm(raw: Path, tmp_path: Path) -> None:
    """Every image flooded: no pair; a tile that the list does not name is counted."""

    def all_flooded(content: dict[str, Any]) -> None:
        for key in "1234":
            content["0001"][key]["FLOODING"] = True

    edit_s1list(raw, all_flooded)
    shutil.copy(tiles(raw)[0], raw / "0001" / "S1A_OTHER_corrected_VV.tif")
    run(raw, tmp_path)
    content = manifest(tmp_path)
    assert content["frames"]["in no pair"] > 0
    assert content["tiles_not_in_s1list"] == 1
    assert not [p for p in (tmp_path / "out" / "train").iterdir() if p.name.startswith("0001")]


# Warpers ------------------------------------------------------------------------------------------------------------


def test_gdal_gives_the_same_pixels(shared_raw: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "osgeo.gdal_array",
        reason="GDAL's Python bindings are not installed (libgdal-dev and pip install gdal==$(gdal-config --version))",
        exc_type=ImportError,
    )
    run(shared_raw, tmp_path / "rasterio", layout="store")
    run(shared_raw, tmp_path / "gdal", layout="store", warper="gdal")
    ours, theirs = (tree(tmp_path / k / "out") for k in ("rasterio", "gdal"))
    assert ours["images.npy"] == theirs["images.npy"]
    assert "gdal" in manifest(tmp_path / "gdal")["versions"]


def test_gdal_bindings_missing(shared_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "osgeo", None)
    with pytest.raises(UserError, match="--warper gdal needs the Python bindings .* or use --warper rasterio"):
        run(shared_raw, tmp_path, warper="gdal")
    assert not (tmp_path / "out").exists()


# Bad input ----------------------------------------------------------------------------------------------------------


def spoil_truncated(raw: Path) -> None:
    path = tiles(raw)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_pixels(value: float) -> Callable[[Path], None]:
    def spoil(raw: Path) -> None:
        def edit(pixels: np.ndarray) -> np.ndarray:
            pixels[5, 5] = value
            return pixels

        rewrite(tiles(raw)[0], edit=edit)

    return spoil


def spoil_crs(raw: Path) -> None:
    rewrite(tiles(raw)[0], crs="EPSG:32736")


def spoil_no_crs(raw: Path) -> None:
    rewrite(tiles(raw)[0], crs=None)


def spoil_place(raw: Path) -> None:
    with rasterio.open(tiles(raw)[0]) as source:
        transform = source.transform
    rewrite(tiles(raw)[0], transform=rasterio.Affine.translation(1.0, 1.0) @ transform)


def spoil_bands(raw: Path) -> None:
    path = tiles(raw)[0]
    with rasterio.open(path) as source:
        pixels, profile = source.read(1), source.profile
    profile.update(count=2)
    with rasterio.open(path, "w", **profile) as target:
        target.write(np.stack([pixels, pixels]))


def spoil_no_vh(raw: Path) -> None:
    tiles(raw, band="VH")[0].unlink()


def spoil_no_tiles(raw: Path) -> None:
    tiles(raw, band="VH")[0].unlink()
    tiles(raw, band="VV")[0].unlink()


def spoil_folder(raw: Path) -> None:
    shutil.rmtree(raw / "0001")


def spoil_grid(raw: Path) -> None:
    for path in (raw / "0001").glob("S2_*_B04.tif"):
        path.unlink()
    edit_s1list(raw, lambda content: content["0001"].pop("geo"))


def spoil_b04(raw: Path) -> None:
    path = min((raw / "0001").glob("S2_*_B04.tif"))
    path.write_bytes(b"not a tif")


def spoil_twice(raw: Path) -> None:
    edit_s1list(raw, lambda content: content["0001"].update({"9": content["0001"]["1"]}))


def spoil_spaces(raw: Path) -> None:
    edit_s1list(raw, lambda content: content.update({"0001 ": content.pop("0001")}))


BAD = {
    "truncated": (spoil_truncated, "unreadable", "cannot be read .* expected a whole GeoTIFF"),
    "nan": (spoil_pixels(np.nan), "not finite", "1 NaN or infinite pixels, expected linear power >= 0"),
    "infinite": (spoil_pixels(np.inf), "not finite", "1 NaN or infinite pixels"),
    "negative": (spoil_pixels(-0.5), "negative power", "1 negative pixels .minimum -0.5.* is the tile in decibel"),
    "wrong CRS": (spoil_crs, "wrong CRS", "is in EPSG:32736, expected EPSG:4326"),
    "no CRS": (spoil_no_crs, "wrong CRS", "is in no coordinate system, expected EPSG:4326"),
    "no overlap": (spoil_place, "no overlap", "does not touch the grid of S2_.*; expected a tile of this place"),
    "two bands": (spoil_bands, "wrong bands", "has 2 bands, expected 1"),
    "VV without VH": (spoil_no_vh, "VH missing", "although the other band does; expected both"),
    "no tiles": (spoil_no_tiles, "missing frame", "neither VV nor VH tile exists; expected both"),
    "no folder": (spoil_folder, "missing folder", "does not exist; expected the tiles of 4 frames"),
    "no grid": (spoil_grid, "no grid", "no usable S2_<date>_B04.tif, and the polygon has 0 corners"),
    "bad B04": (spoil_b04, "bad B04", "cannot be read .* another B04 or the polygon is used"),
    "listed twice": (spoil_twice, "listed twice", "repeats this product; it is used once"),
    "stray spaces": (spoil_spaces, "stray spaces", "id '0001 ' in S1list.json has spaces; '0001' is used"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_listed_and_fails_unless_skipped(
    raw: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, kind, message = BAD[case]
    spoil(raw)
    with pytest.raises(UserError, match=f"1 problem.s. were found, the first: .*{message}.*--skip-bad"):
        run(raw, tmp_path)
    assert problem_kinds(tmp_path) == [kind]
    # What could be made is whole; the other sequences are complete.
    pairs = read_pairs(tmp_path / "out")
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.npy")} == {
        f"{p.split}/{p.name}.npy" for p in pairs
    }
    assert {p.folder for p in pairs} >= {"0002", "0"}
    before = tree(tmp_path / "out")
    summary = run(raw, tmp_path, skip_bad=True)
    assert [p.kind for p in summary.problems] == [kind]
    after = tree(tmp_path / "out")
    assert {k for k in before if before[k] != after[k]} == {"manifest.json"}  # it notes --skip-bad
    # From scratch with --skip-bad: the same.
    run(raw, tmp_path / "again", skip_bad=True)
    assert tree(tmp_path / "again" / "out") == after


def test_same_tile_good_again_after_repair(raw: Path, tmp_path: Path, shared_raw: Path) -> None:
    """A repaired input is noticed by a run that continues: only its sequence is aligned anew."""
    spoil_truncated(raw)
    with pytest.raises(UserError):
        run(raw, tmp_path)
    shutil.copy(shared_raw / "0001" / tiles(raw)[0].name, tiles(raw)[0])
    with pytest.raises(UserError, match="1 problem"):  # the finished result is left alone
        run(raw, tmp_path)
    run(raw, tmp_path, overwrite=True)
    run(shared_raw, tmp_path / "good")
    assert tree(tmp_path / "out") == tree(tmp_path / "good" / "out")


def test_missing_lists_and_folders(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DATASETS", tmp_path / "datasets")
    content = (raw / "S1list.json").read_bytes()
    (raw / "S1list.json").unlink()
    with pytest.raises(UserError, match=r"no S1list.json in .*raw nor in .*datasets; .* give --s1list"):
        run(raw, tmp_path)
    with pytest.raises(UserError, match=r"nothing.json does not exist"):
        run(raw, tmp_path, s1list=tmp_path / "nothing.json")
    (tmp_path / "elsewhere.json").write_bytes(content)
    with pytest.raises(UserError, match=r"split list .*none.csv does not exist"):
        run(
            raw,
            tmp_path,
            s1list=tmp_path / "elsewhere.json",
            train_csv=tmp_path / "none.csv",
            test_csv=tmp_path / "n2.csv",
        )
    with pytest.raises(UserError, match="raw folder .* does not exist; expected the folder that holds the sequences"):
        run(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="give either --zip FILE or --raw-root FOLDER"):
        run(raw, tmp_path, raw_root=None)
    with pytest.raises(UserError, match="at least 1, got 64 and 0"):
        run(raw, tmp_path, jobs=0)
    assert not (tmp_path / "out").exists()
    run(raw, tmp_path, s1list=tmp_path / "elsewhere.json")
    # datasets/ is the last place, also for the split lists.
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "S1list.json").write_bytes(content)
    (tmp_path / "datasets" / "sen12_train.csv").write_text("0002\n")
    (tmp_path / "datasets" / "sen12_test.csv").write_text("0\n")
    run(raw, tmp_path / "b")
    assert manifest(tmp_path / "b")["counts"]["train"]["sequences"] == 1
    assert manifest(tmp_path / "b")["split"] == "lists sen12_train.csv and sen12_test.csv"


def test_spaces_and_unknown_ids_in_split_lists(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0001 \n0002\n0099\n")
    (tmp_path / "b.csv").write_text("0\n")
    lists = {"train_csv": tmp_path / "a.csv", "test_csv": tmp_path / "b.csv"}
    with pytest.raises(UserError, match="2 problem.s. were found"):
        run(raw, tmp_path, **lists)
    assert problem_kinds(tmp_path) == ["stray spaces", "unknown id"]
    assert manifest(tmp_path)["counts"]["train"]["sequences"] == 2
    run(raw, tmp_path, skip_bad=True, **lists)


def test_images_of_another_size_are_in_no_pair(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path, size=128, skip_bad=True)
    assert manifest(tmp_path)["frames"] == {"other size": 12}
    assert manifest(tmp_path)["dropped_pairs"] == {"other size": 18}


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_foreign_out_is_never_touched(shared_raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is not empty .*thesis.tex.* was not made by this command"):
            run(shared_raw, tmp_path, overwrite=overwrite)
    (tmp_path / "out" / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(UserError, match="was not made by this command"):
        run(shared_raw, tmp_path, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run(shared_raw, tmp_path, out=tmp_path / "file")
    with pytest.raises(UserError, match="lies in the raw folder"):
        run(shared_raw, tmp_path, out=shared_raw / "out")


def test_overwrite_replaces_ours_and_keeps_what_is_not(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "train" / "mine.npy").write_text("mine")
    with pytest.raises(UserError, match="differs in layout: 'npy' there, 'store' now; give --overwrite"):
        run(shared_raw, tmp_path, layout="store")
    run(shared_raw, tmp_path, layout="store", overwrite=True)
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {
        "manifest.json", "pairs.csv", "images.csv", "sequences.csv", "images.npy", "notes.txt", "train/mine.npy",
    }  # fmt: skip


def test_a_complete_folder_is_checked_and_left_alone(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path)
    before = tree(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npy")}
    run(shared_raw, tmp_path)
    assert tree(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npy")} == times
    victim = next(iter(times))
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"1 of \d+ pairs in .* are missing or have not \d+ bytes.*--overwrite"):
        run(shared_raw, tmp_path)
    run(shared_raw, tmp_path, overwrite=True)
    assert tree(tmp_path / "out") == before


def test_a_work_folder_of_somebody_else_is_refused(shared_raw: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "sen12flood_work" / "raw").mkdir(parents=True)
    with pytest.raises(UserError, match="exists and was not made by this command"):
        run(shared_raw, tmp_path)
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious").write_text("mine")
    run(shared_raw, tmp_path)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["precious"]


def test_two_at_once_are_refused(shared_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sarwmix.sen12flood import workspace

    monkeypatch.setattr(workspace, "LOCK_WAIT", 0.2)
    holder = workspace.WorkFolder(tmp_path / "work")
    with pytest.raises(UserError, match="preparing SEN12-FLOOD.*one writer at a time"):
        run(shared_raw, tmp_path)
    holder.lock.release()
    run(shared_raw, tmp_path)


def test_kept_intermediate_images_are_a_store(shared_raw: Path, tmp_path: Path) -> None:
    run(shared_raw, tmp_path, keep_intermediate=True)
    run(shared_raw, tmp_path / "store", layout="store")
    kept = tree(tmp_path / "work" / "sen12flood_work" / "aligned")
    store = tree(tmp_path / "store" / "out")
    assert {name: value for name, value in kept.items() if name != "manifest.json"} == {
        name: value for name, value in store.items() if name != "manifest.json"
    }


# A full disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npy", "store"])
def test_full_disk_leaves_nothing_truncated_and_continues(
    shared_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The 4th large write gets half of its bytes down, and the next says that the disk is full."""
    name = "writev" if layout == "npy" else "pwrite"
    real = getattr(os, name)
    calls = []

    def failing(file: int, data: Any, *place: int) -> int:
        calls.append(1)
        if len(calls) == 4:
            half = [data[0]] if layout == "npy" else data[: len(data) // 2]
            return real(file, half, *place)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, *place)

    monkeypatch.setattr(os, name, failing)
    if layout == "npy":  # the rest of a short write goes through pwrite
        monkeypatch.setattr(os, "pwrite", lambda *a, real=os.pwrite: failing(*a) if len(calls) >= 4 else real(*a))
    with pytest.raises(UserError, match=r"the disk is full .* run the same command again: it continues"):
        run(shared_raw, tmp_path, layout=layout)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "images.npy").exists()
    for path in (tmp_path / "out").rglob("*.npy"):
        assert np.load(path).shape == (2, 2, SIZE, SIZE)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert manifest(tmp_path)["status"] == "in progress"
    run(shared_raw, tmp_path, layout=layout)
    run(shared_raw, tmp_path / "whole", layout=layout)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole" / "out")


def test_too_little_space_is_said_before_the_work(
    shared_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"aligning needs 0\.00 GB .* but 0\.00 GB are free"):
        run(shared_raw, tmp_path)


def test_file_size_limit_in_a_real_process(shared_raw: Path, tmp_path: Path) -> None:
    """ulimit -f stands in for a full disk: the real error of the real system call."""
    command = (
        f"ulimit -f 64; exec {sys.executable} -m sarwmix.sen12flood.prepare --raw-root {shared_raw} --size {SIZE} "
        f"--work {tmp_path}/work --out {tmp_path}/out --jobs 2 --layout store"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full (File too large)" in done.stderr
    assert "Traceback" not in done.stderr


# The zip ------------------------------------------------------------------------------------------------------------


def test_zip_gives_the_same_and_leaves_no_trace(
    shared_raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = make_zip(shared_raw, tmp_path / "raw.zip")
    with caplog.at_level("INFO", logger="sarwmix"):
        run(shared_raw, tmp_path / "z", raw_root=None, zip=archive)
    text = caplog.text
    tifs = len(list(shared_raw.rglob("*.tif")))
    assert f"{tifs + 1} files, 4 directories ({tifs} .tif, 1 .json)" in text
    assert f"the other {3 * 3} are not extracted" in text  # 3 sequences with two B03 and a second B04 tile
    run(shared_raw, tmp_path / "r")
    zipped, direct = tree(tmp_path / "z" / "out"), tree(tmp_path / "r" / "out")
    assert {k: v for k, v in zipped.items() if k != "manifest.json"} == {
        k: v for k, v in direct.items() if k != "manifest.json"
    }
    assert not any((tmp_path / "z" / "work").iterdir())


def test_zip_without_a_top_folder_and_without_s1list(shared_raw: Path, tmp_path: Path) -> None:
    archive = tmp_path / "raw.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in shared_raw.rglob("*.tif"):
            target.write(path, path.relative_to(shared_raw))
    run(shared_raw, tmp_path, raw_root=None, zip=archive, s1list=shared_raw / "S1list.json")
    assert manifest(tmp_path)["problems"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.tif", "climbs out with '..'"),
        ("SEN12FLOOD/../../evil.tif", "climbs out with '..'"),
        ("/etc/evil.tif", "absolute path"),
        ("C:/evil.tif", "absolute path"),
        ("..\\evil.tif", "backslash"),
        ("link", "a symbolic link"),
        ("SEN12FLOOD/S1list.json", "there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_entries_that_lead_outside_are_refused(shared_raw: Path, tmp_path: Path, name: str, message: str) -> None:
    archive = make_zip(shared_raw, tmp_path / "raw.zip")
    with zipfile.ZipFile(archive, "a") as target:
        entry = zipfile.ZipInfo(name)
        entry.filename = name  # zipfile would tidy a backslash on some systems
        if name == "link":
            entry.create_system = 3
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        target.writestr(entry, "/etc/passwd")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"entry .* is .*{message}.*nothing was extracted"):
        run(shared_raw, tmp_path, raw_root=None, zip=archive)
    assert tree(tmp_path) == before


def test_zips_that_are_none(shared_raw: Path, tmp_path: Path) -> None:
    archive = make_zip(shared_raw, tmp_path / "raw.zip")
    data = archive.read_bytes()
    for content in (b"", b"PK", data[: len(data) // 2], b"x" * 1000):
        archive.write_bytes(content)
        with pytest.raises(UserError, match="cannot be opened as a zip .* corrupt or incomplete.*download it again"):
            run(shared_raw, tmp_path, raw_root=None, zip=archive)
    with pytest.raises(UserError, match="does not exist; give the downloaded SEN12FLOOD.zip"):
        run(shared_raw, tmp_path, raw_root=None, zip=tmp_path / "none.zip")
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"holds neither S1list.json nor a tile"):
        run(shared_raw, tmp_path, raw_root=None, zip=archive)


def test_a_corrupt_member_is_listed(shared_raw: Path, tmp_path: Path) -> None:
    archive = make_zip(shared_raw, tmp_path / "raw.zip")
    victim = tiles(shared_raw)[0]
    with zipfile.ZipFile(archive) as source:
        entry = source.getinfo(f"SEN12FLOOD/0001/{victim.name}")
    data = bytearray(archive.read_bytes())
    middle = entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2
    data[middle : middle + 8] = b"\0" * 8
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"2 problem.s. were found"):
        run(shared_raw, tmp_path, raw_root=None, zip=archive)
    assert problem_kinds(tmp_path) == ["VV missing", "corrupt in the zip"]
    run(shared_raw, tmp_path, raw_root=None, zip=archive, skip_bad=True)


def test_foreign_files_among_the_extracted_ones_stay(shared_raw: Path, tmp_path: Path) -> None:
    archive = make_zip(shared_raw, tmp_path / "raw.zip")
    run(shared_raw, tmp_path, raw_root=None, zip=archive, keep_intermediate=True)
    raw = tmp_path / "work" / "sen12flood_work" / "raw"
    (raw / "0001" / "mine.txt").write_text("mine")
    run(shared_raw, tmp_path, raw_root=None, zip=archive)
    assert [str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file()] == ["0001/mine.txt"]


# kill -9 ------------------------------------------------------------------------------------------------------------


def kill_at(tmp_path: Path, moments: list[int] | int, **options: Any) -> dict[str, Any]:
    """Run the driver; see there."""
    raw = generate(tmp_path / "raw", DemoOptions(train=2, test=1, frames=3, size=32, seed=3, swath_edges=0.5))
    if options.pop("zipped", False):
        options["zip"] = str(make_zip(raw, tmp_path / "raw.zip"))
    else:
        options["raw_root"] = str(raw)
    (tmp_path / "scratch").mkdir()
    request = {
        "options": {**options, "size": 32, "jobs": 1},
        "scratch": str(tmp_path / "scratch"),
        "moments": moments,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sen12_kill_driver.py")), json.dumps(request)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", ["npy", "store"])
def test_killed_at_some_moments_and_run_again(tmp_path: Path, layout: str) -> None:
    """With a zip there are about 190 moments from the first marker to the last removal; these lie in every stage."""
    result = kill_at(tmp_path, 23, layout=layout, zipped=True)
    assert len(result["tried"]) >= 5
    assert result["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("layout", "keep"), [("npy", False), ("npy", True), ("store", False), ("store", True)])
def test_killed_at_every_moment_and_run_again(tmp_path: Path, layout: str, keep: bool, zipped: bool) -> None:
    result = kill_at(tmp_path, 1, layout=layout, keep_intermediate=keep, zipped=zipped)
    assert len(result["tried"]) == result["count"] > 50
    assert result["failures"] == []


def group_members(group: int) -> list[int]:
    """Processes of a process group that still run."""
    members = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if folder.name.isdigit() and int(fields[2]) == group and fields[0] != "Z":
            members.append(int(folder.name))
    return members


@pytest.mark.parametrize("trigger", ["align", "out/train"])
def test_kill_of_the_parent_ends_its_workers_and_the_next_run_finishes(tmp_path: Path, trigger: str) -> None:
    raw = make_raw(tmp_path, DemoOptions(train=4, test=1, frames=8, size=128, seed=1))
    command = [sys.executable, "-m", "sarwmix.sen12flood.prepare", "--raw-root", str(raw), "--size", "128"]
    command += ["--jobs", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    watched = tmp_path / ("work/sen12flood_work/align" if trigger == "align" else trigger)
    process = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if watched.is_dir() and any(watched.iterdir()):
            break
        time.sleep(0.002)
    killed = process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_members(process.pid) == []
    assert killed or (tmp_path / "out" / "manifest.json").exists()
    subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, stdout=subprocess.DEVNULL)
    run(raw, tmp_path / "whole", size=128)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole" / "out")


# The command --------------------------------------------------------------------------------------------------------


def test_the_shell_script_prints_progress_and_a_summary(shared_raw: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "prepare_sen12flood.sh"
    command = [str(script), "--raw-root", str(shared_raw), "--work", str(tmp_path / "w"), "--size", str(SIZE)]
    environment = clean_environment({"PYTHON": sys.executable})
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("ALIGN", "PAIR", "CLEAN", "WRITE"):
        assert f"{stage:<5} [" in done.stdout
    assert "ETA" in done.stdout
    assert "derived: ids written with four digits are train" in done.stdout
    assert "the full data set gives 11078 train pairs, this one" in done.stdout
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "b")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out")


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from sarwmix.sen12flood.prepare import build_parser; build_parser().format_help(); "
        "print(sorted({'numpy', 'torch', 'rasterio'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# The generator ------------------------------------------------------------------------------------------------------


def test_generated_tree_is_reproducible_and_looks_real(shared_raw: Path, tmp_path: Path) -> None:
    again = make_raw(tmp_path)
    assert tree(again) == tree(shared_raw)
    listing = json.loads((shared_raw / "S1list.json").read_text())
    assert set(listing) == {"0001", "0002", "0"}
    entry = listing["0001"]
    assert {"count", "folder", "geo", "urls", "1", "2", "3", "4"} == set(entry)
    assert set(entry["1"]) == {"date", "FLOODING", "orbit", "filename"}
    with rasterio.open(shared_raw / "0001" / f"{entry['1']['filename']}_corrected_VV.tif") as tile:
        assert tile.crs.to_epsg() == 4326
        assert tile.dtypes == ("float32",)
        assert tile.read(1).min() >= 0
        assert abs(tile.width - SIZE) < 0.3 * SIZE


def test_generated_floods_are_darker(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, DemoOptions(train=3, test=1, frames=6, size=128, swath_edges=0))
    run(raw, tmp_path, layout="store", size=128)
    images = np.load(tmp_path / "out" / "images.npy")
    change: dict[int, list[float]] = {0: [], 1: []}
    for pair in read_pairs(tmp_path / "out"):
        first, second = (10 * np.log10(images[row]) for row in (pair.row1, pair.row2))
        dark = (second.mean(axis=0) - first.mean(axis=0)) < -5
        change[pair.label].append(float(dark.mean()))
    assert min(change[1]) > max(change[0])


def test_generator_refuses_nonsense(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is not empty; expected an absent or empty folder"):
        generate(tmp_path, TINY)
    with pytest.raises(UserError, match="need at least 1 sequence"):
        DemoOptions(train=0)
    with pytest.raises(UserError, match="fraction between 0 and 1"):
        DemoOptions(swath_edges=2)


def test_the_generator_script_writes_tree_and_zip(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_sen12_demo.py"), "--out", str(tmp_path / "raw")]
    command += ["--train", "1", "--test", "1", "--frames", "2", "--size", "32", "--zip", str(tmp_path / "raw.zip")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True)
    assert "1 + 1 sequences of 2 acquisitions" in done.stdout
    run(tmp_path / "raw", tmp_path / "r", size=32)
    run(tmp_path / "raw", tmp_path / "z", raw_root=None, zip=tmp_path / "raw.zip", size=32)
    assert read_pairs(tmp_path / "r" / "out") == read_pairs(tmp_path / "z" / "out")


@pytest.mark.slow
def test_benchmark_runs_and_compares_values() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_sen12.py"), "--sequences", "2", "--frames", "14"]
    done = subprocess.run(
        [*command, "--size", "128", "--rounds", "1"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["same_values"]
    assert result["store_to_npy_bytes"] <= 0.25
    assert set(result["time_ratio"]) == {"npy", "store"}
