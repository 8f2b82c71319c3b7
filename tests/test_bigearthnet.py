"""BigEarthNet v1 and v2: metadata in its forms, the storages, and everything that can be wrong with them."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sarwmix.data import labels
from sarwmix.data.base import SarDataset, UnreadableSample
from sarwmix.data.io.zarr import ZarrPatches, write_zarr
from sarwmix.data.registry import build_dataset
from sarwmix.datasets import bigearthnet
from tests.bigearthnet_fixtures import (
    REALDATA,
    expected_indices,
    metadata_rows,
    needs_realdata,
    patch_image,
    patch_labels,
    patch_name,
    split_of,
    write_benv2,
    write_parquet,
    write_tree,
)
from util.errors import UserError

COUNT = 12


@pytest.fixture(scope="module")
def benv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only tree of 12 patches."""
    return write_benv2(tmp_path_factory.mktemp("benv2"), COUNT)


def check_content(dataset: SarDataset, expected: list[int]) -> None:
    assert list(dataset.names) == [patch_name(i) for i in expected]
    batch = dataset.get_batch(np.arange(len(dataset)))
    for row, index in enumerate(expected):
        assert np.array_equal(batch["image"][row].numpy(), patch_image(index))
        assert labels.names_of(batch["label"][row].numpy()) == sorted(
            set(patch_labels(index)), key=labels.CLASSES_19.index
        )


@pytest.mark.parametrize("split", ["train", "val", "test", "train+val", "test+train"])
def test_geotiff_tree_with_parquet(benv2: Path, split: str) -> None:
    check_content(build_dataset("benv2", benv2, split, check="all"), expected_indices(split.split("+"), COUNT))


def test_cloudy_patches_on_request(benv2: Path) -> None:
    for choice in (False, "false"):
        dataset = build_dataset("benv2", benv2, "train+val+test", exclude_snow_cloud=choice)
        check_content(dataset, expected_indices(("train", "val", "test"), COUNT, cloudy=True))
    with pytest.raises(UserError, match="exclude_snow_cloud must be true or false, not 'maybe'"):
        build_dataset("benv2", benv2, "train", exclude_snow_cloud="maybe")


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


COLUMNS = ["patch_id", "labels", "split", "country", "s1_name"]


def csv_rows(*, numpy_style: bool = False) -> list[list[str]]:
    return [
        [
            str(row["patch_id"]),
            str(np.array(row["labels"], dtype=object)) if numpy_style else str(row["labels"]),
            str(row["split"]),
            "Austria",
            f"  {row['s1_name']} ",
        ]
        for row in metadata_rows(range(COUNT))
    ]


@pytest.mark.parametrize("numpy_style", [False, True])
def test_csv_with_header_and_stray_spaces(benv2: Path, tmp_path: Path, numpy_style: bool) -> None:
    rows = [[f" {name} " for name in COLUMNS], *csv_rows(numpy_style=numpy_style)]
    path = write_csv(tmp_path / "all.csv", rows)
    check_content(
        build_dataset("benv2", benv2, "train", metadata=path), expected_indices(["train"], COUNT, cloudy=True)
    )


def test_csv_without_header_one_file_a_split(benv2: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = [row for i, row in enumerate(csv_rows()) if split_of(i) == split]
        write_csv(tmp_path / f"benv2_{split}.csv", rows)
    expected = expected_indices(("train", "val"), COUNT, cloudy=True)
    for choice in (tmp_path, f"{tmp_path}/benv2_{{split}}.csv"):
        check_content(build_dataset("benv2", benv2, "train+val", metadata=choice), expected)
    check_content(
        build_dataset("benv2", benv2, "train+val", metadata=f"{tmp_path}/benv2_train.csv,{tmp_path}/benv2_val.csv"),
        expected,
    )


def test_columns_by_position_under_other_headers(benv2: Path, tmp_path: Path) -> None:
    """Labels in column 1 and the name in column 4, whatever the header calls them."""
    rows = [row for i, row in enumerate(csv_rows()) if split_of(i) == "val"]
    path = write_csv(tmp_path / "b_val.csv", [["patch", "lbl", "part", "where", "radar"], *rows])
    check_content(build_dataset("benv2", benv2, "val", metadata=path), expected_indices(["val"], COUNT, cloudy=True))


def test_id_col_by_name_and_number(benv2: Path, tmp_path: Path) -> None:
    rows = [[row[4].strip(), row[1], row[2]] for row in csv_rows()]
    path = write_csv(tmp_path / "m.csv", [["sentinel", "labels", "split"], *rows])
    expected = expected_indices(["test"], COUNT, cloudy=True)
    for choice in ("sentinel", 0, "0"):
        check_content(build_dataset("benv2", benv2, "test", metadata=path, id_col=choice), expected)
    with pytest.raises(UserError, match="no column 'name'; it has: sentinel, labels, split"):
        build_dataset("benv2", benv2, "test", metadata=path, id_col="name")
    with pytest.raises(UserError, match="columns 0 to 2, id_col 7"):
        build_dataset("benv2", benv2, "test", metadata=path, id_col=7)


def test_several_parquet_files_are_joined(benv2: Path, tmp_path: Path) -> None:
    first = write_parquet(tmp_path / "a.parquet", metadata_rows(range(6)))
    second = write_parquet(tmp_path / "b.parquet", metadata_rows(range(6, COUNT)))
    dataset = build_dataset("benv2", benv2, "train", metadata=[first, second], exclude_snow_cloud=False)
    check_content(dataset, expected_indices(["train"], COUNT, cloudy=True))


def test_metadata_beside_the_tree_and_inner_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "BigEarthNet-S1", range(5))
    write_parquet(tmp_path / "metadata.parquet", metadata_rows(range(5)))
    check_content(build_dataset("benv2", tmp_path, "train"), [0, 2, 4])
    check_content(build_dataset("benv2", tmp_path / "BigEarthNet-S1", "train"), [0, 2, 4])


def test_tree_without_scene_folders(tmp_path: Path) -> None:
    write_tree(tmp_path, range(5), nested=False)
    write_parquet(tmp_path / "metadata.parquet", metadata_rows(range(5)))
    check_content(build_dataset("benv2", tmp_path, "train", check="all"), [0, 2, 4])


# Wrong metadata --------------------------------------------------------------------------------------------------


def change(tmp_path: Path, row: int, **values: object) -> Path:
    rows = metadata_rows(range(COUNT))
    rows[row].update(values)
    return write_parquet(tmp_path / "changed.parquet", rows)


def test_unknown_label_is_named_with_its_row(benv2: Path, tmp_path: Path) -> None:
    path = change(tmp_path, 7, labels=["Pasture"])
    with pytest.raises(UserError, match=r"changed.parquet row 8: unknown label 'Pasture'"):
        build_dataset("benv2", benv2, "train", metadata=path)
    rows = csv_rows()
    rows[7][1] = "['Pasture']"
    with pytest.raises(UserError, match=r"m.csv row 9: unknown label 'Pasture'"):
        build_dataset("benv2", benv2, "train", metadata=write_csv(tmp_path / "m.csv", [COLUMNS, *rows]))
    with pytest.raises(UserError, match=r"m_train.csv row 8: unknown label 'Pasture'"):
        build_dataset("benv2", benv2, "train", metadata=write_csv(tmp_path / "m_train.csv", rows))


def test_double_name(benv2: Path, tmp_path: Path) -> None:
    path = change(tmp_path, 2, s1_name=patch_name(0))
    with pytest.raises(UserError, match=f"'{patch_name(0)}' appears twice"):
        build_dataset("benv2", benv2, "train", metadata=path)


def test_name_in_two_splits(benv2: Path, tmp_path: Path) -> None:
    """Whatever split is asked for: the file itself is wrong."""
    rows = metadata_rows(range(COUNT))
    first = rows[0]["split"]
    other = next(row["split"] for row in rows if row["split"] != first)
    path = write_parquet(tmp_path / "both.parquet", [*rows, {**rows[0], "split": other}])
    for split in ("train", "val", "test"):
        with pytest.raises(UserError, match="is in more than one split"):
            build_dataset("benv2", benv2, split, metadata=path)


@pytest.mark.parametrize(
    "name",
    ["../S1A_IW_GRDH_1SDV_20170613T165043_33UUP_1_1", "/S1A_IW_GRDH_1SDV_2017_33UUP_1_1", "S1A_IW_GRDH_1SDV_.._3_1_1",
     "S1A_IW/GRDH_1SDV_2017_33UUP_1_1", "patch_3", "S1A_IW_GRDH_1SDV_2017_33UUP_1_1\x00"],
)  # fmt: skip
def test_names_cannot_leave_the_folder(benv2: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="row 3.*is no Sentinel-1 patch name"):
        build_dataset("benv2", benv2, "train", metadata=change(tmp_path, 2, s1_name=name))


def test_sentinel_2_names_ask_for_the_other_column(benv2: Path, tmp_path: Path) -> None:
    rows = [["S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_1_1", patch_name(i)] for i in range(3)]
    path = write_csv(tmp_path / "x_train.csv", rows)
    with pytest.raises(UserError, match="Sentinel-2 patch.*id_col"):
        build_dataset("benv2", benv2, "train", metadata=path, id_col=0)


def test_missing_or_unusable_metadata(benv2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.parquet does not exist"):
        build_dataset("benv2", benv2, "train", metadata=tmp_path / "absent.parquet")
    (tmp_path / "tree").mkdir()
    with pytest.raises(UserError, match=r"no metadata.*looked for .*metadata.parquet.*prepare_datasets"):
        build_dataset("benv2", tmp_path / "tree", "train")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        build_dataset("benv2", benv2, "train", metadata=tmp_path / "broken.parquet")
    (tmp_path / "empty_train.csv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        build_dataset("benv2", benv2, "train", metadata=tmp_path / "empty_train.csv")
    path = write_csv(tmp_path / "names.csv", [[patch_name(0)]])
    with pytest.raises(UserError, match="no column 'split' and its name does not tell"):
        build_dataset("benv2", benv2, "train", metadata=path)
    (tmp_path / "ragged_train.csv").write_text(f"a,b\n{patch_name(0)},x,y,z\n")
    with pytest.raises(UserError, match="cannot be read"):
        build_dataset("benv2", benv2, "train", metadata=tmp_path / "ragged_train.csv")


def test_unknown_split_text_and_empty_split(benv2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown split 'training'"):
        build_dataset("benv2", benv2, "train", metadata=change(tmp_path, 0, split="training"))
    rows = [row for row in metadata_rows(range(COUNT)) if row["split"] != "test"]
    path = write_parquet(tmp_path / "no_test.parquet", rows)
    with pytest.raises(UserError, match="split 'test' is empty"):
        build_dataset("benv2", benv2, "train+test", metadata=path)


def test_labels_missing_everywhere(benv2: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "names_train.csv", [[patch_name(0)], [patch_name(2)]])
    with pytest.raises(UnreadableSample, match="labels_metadata.json"):
        build_dataset("benv2", benv2, "train", metadata=path)


# Wrong patches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_tree(benv2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(benv2, tmp_path / "tree"))


def band_path(root: Path, index: int, band: str = "VV") -> Path:
    name = patch_name(index)
    return root / "_".join(name.split("_")[:5]) / name / f"{name}_{band}.tif"


def test_absent_patch_is_found_before_training(own_tree: Path) -> None:
    band_path(own_tree, 2).unlink()
    with pytest.raises(UserError, match=rf"1 of 7 patches looked for.*the first is .*{patch_name(2)}_VV.tif"):
        build_dataset("benv2", own_tree, "train")
    dataset = build_dataset("benv2", own_tree, "train", check="none")
    with pytest.raises(UnreadableSample, match="does not exist"):
        dataset[1]
    with pytest.raises(UserError, match="1 of 7 patches"):  # what is known before training is not left to it
        build_dataset("benv2", own_tree, "train", on_error="replace")
    batch = build_dataset("benv2", own_tree, "train", check="none", on_error="replace").get_batch(np.array([1]))
    assert batch["name"] == [patch_name(4)]
    assert batch["replaced"][0][0] == patch_name(2)


def test_absent_patches_are_left_out_on_request(own_tree: Path) -> None:
    whole = build_dataset("benv2", own_tree, "train")
    assert whole.labels is not None
    labels = dict(zip(whole.names, whole.labels.tolist(), strict=True))
    first = whole.names[0]
    for index in range(2, 5, 2):
        band_path(own_tree, index).unlink()
    lost = {patch_name(2), patch_name(4)}

    part = build_dataset("benv2", own_tree, "train", missing="skip")

    assert list(part.names) == [name for name in whole.names if name not in lost]
    assert len(part) == len(whole) - 2
    assert part.labels is not None
    assert dict(zip(part.names, part.labels.tolist(), strict=True)).items() <= labels.items()
    assert bool(np.isfinite(np.asarray(part[1]["image"])).all())
    shutil.rmtree(own_tree / "_".join(first.split("_")[:5]) / first)
    assert (
        first not in build_dataset("benv2", own_tree, "train", missing="skip").names
    )  # the example of the layout, too
    with pytest.raises(UserError, match="missing must be error or skip"):
        build_dataset("benv2", own_tree, "train", missing="some")


def test_check_looks_at_all_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigearthnet, "CHECK_SAMPLE", 2)
    write_benv2(tmp_path, 5)
    band_path(tmp_path, 2, "VH").unlink()
    assert len(build_dataset("benv2", tmp_path, "train")) == 3  # the sample of first and last does not see it
    with pytest.raises(UserError, match="1 of 3"):
        build_dataset("benv2", tmp_path, "train", check="all")
    with pytest.raises(UserError, match="check must be one of"):
        build_dataset("benv2", tmp_path, "train", check="some")


def test_damaged_patches_are_named(own_tree: Path) -> None:
    from tests.bigearthnet_fixtures import write_tiff

    band_path(own_tree, 0).write_bytes(band_path(own_tree, 0).read_bytes()[:30_000])
    write_tiff(band_path(own_tree, 2), np.zeros((60, 120), np.float32))
    write_tiff(band_path(own_tree, 4), np.full((120, 120), np.nan, np.float32))
    with_inf = patch_image(5)[1]
    with_inf[3, 4], with_inf[5, 6] = np.inf, np.nan
    write_tiff(band_path(own_tree, 5), with_inf)
    dataset = build_dataset("benv2", own_tree, "train")
    for row, message in ((0, "truncated"), (1, "shape 60x120"), (2, "no valid pixel in band VV")):
        with pytest.raises(UnreadableSample, match=message) as caught:
            dataset[row]
        assert caught.value.name == dataset.names[row]
    sample = dataset[3]
    assert int((~sample["valid"]).sum()) == 2
    assert bool(sample["image"][1, 3, 4].isnan())


def test_folder_without_patches(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "metadata.parquet", metadata_rows(range(3)))
    with pytest.raises(UserError, match="holds no Sentinel-1 patches; expected folders"):
        build_dataset("benv2", tmp_path, "train")
    with pytest.raises(UserError, match="neither a folder"):
        build_dataset("benv2", path, "train", metadata=path)


# Version 1: Zarr --------------------------------------------------------------------------------------------------


LABELS_43 = (["Salines", "Salt marshes"], ["Airports"], ["Pastures", "Discontinuous urban fabric", "Bare rock"])


@pytest.fixture(scope="module", params=[2, 3])
def benv1(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benv1")
    store = root / "benv1.zarr"
    patches = [(patch_name(i), patch_image(i), LABELS_43[i % 3]) for i in range(6)]
    assert write_zarr(store, patches, zarr_format=request.param) == 6
    assert write_zarr(store, patches, zarr_format=request.param) == 0  # nothing to do the second time
    for split, rows in (("train", (0, 1, 2)), ("val", (3, 4)), ("test", (5,))):
        write_csv(root / f"benv1_{split}.csv", [[f"S2A_x_{i}", f" {patch_name(i)}"] for i in rows])
    return store


def test_zarr(benv1: Path) -> None:
    dataset = build_dataset("benv1", benv1, "train+val", check="all")
    assert list(dataset.names) == [patch_name(i) for i in range(5)]
    batch = dataset.get_batch(np.array([4, 0]))
    assert np.array_equal(batch["image"][0].numpy(), patch_image(4))
    assert np.array_equal(batch["image"][1].numpy(), patch_image(0))
    assert dataset.labels is not None
    assert [labels.names_of(row) for row in dataset.labels] == [
        ["Coastal wetlands"], [], ["Urban fabric", "Pastures"], ["Coastal wetlands"], [],
    ]  # fmt: skip


def test_zarr_in_worker_processes(benv1: Path) -> None:
    from sarwmix.data.loader import build_loader

    dataset = build_dataset("benv1", benv1, "train")
    dataset[0]
    loader = build_loader(dataset, batch_size=1, shuffle=False, drop_last=False, num_workers=2, timeout=60)
    images = [batch["image"][0].numpy() for batch in loader]
    loader.close()
    assert all(np.array_equal(image, patch_image(i)) for i, image in enumerate(images))


def test_zarr_with_labels_in_the_csv(benv1: Path, tmp_path: Path) -> None:
    rows = [["s1_name", "labels"], *[[patch_name(i), str(LABELS_43[i])] for i in range(3)]]
    dataset = build_dataset("benv1", benv1, "train", metadata=write_csv(tmp_path / "a_train.csv", rows))
    assert dataset.labels is not None
    assert dataset.labels.sum() == 3


def test_damaged_zarr(benv1: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(benv1, tmp_path / "x.zarr"))
    for split in ("train", "val"):
        shutil.copy(benv1.parent / f"benv1_{split}.csv", tmp_path)
    chunks = [p for p in sorted((store / "sentinel1").rglob("*")) if p.is_file() and p.stat().st_size == 57_600]
    vv = {p.relative_to(store / "sentinel1").parts[0]: p for p in chunks if "VV" in p.parts}
    vv[patch_name(0)].unlink()
    vv[patch_name(1)].write_bytes(vv[patch_name(1)].read_bytes()[:100])
    shutil.rmtree(store / "sentinel1" / patch_name(2) / "VH")
    dataset = build_dataset("benv1", store, "train", check="none")
    with pytest.raises(UnreadableSample, match="no valid pixel"):  # a chunk that is not there reads as its fill value
        dataset[0]
    with pytest.raises(UnreadableSample, match="cannot be read"):
        dataset[1]
    with pytest.raises(UnreadableSample, match="not in the store"):
        dataset[2]
    with pytest.raises(UserError, match=f"the first is .*{patch_name(2)}/VH"):
        build_dataset("benv1", store, "train")


def test_missing_chunk_with_another_fill_value(tmp_path: Path) -> None:
    import zarr

    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w").require_group(f"sentinel1/{patch_name(0)}")
    for band in ("VH", "VV"):
        group.create_array(band, shape=(120, 120), chunks=(120, 120), dtype="float32", fill_value=0.0)
    group.attrs["labels"] = ["Pastures"]
    write_csv(tmp_path / "benv1_train.csv", [["x", patch_name(0)]])
    dataset = build_dataset("benv1", tmp_path / "x.zarr", "train")
    with pytest.raises(UnreadableSample, match="fill value"):
        dataset[0]


def zarr_variants(zarr_format: int) -> dict[str, dict[str, Any]]:
    from numcodecs import GZip, Zstd
    from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

    plain: dict[str, dict[str, Any]] = {"default": {}, "none": {"compressors": None}}
    if zarr_format == 2:
        from numcodecs import Blosc

        plain |= {"blosc": {"compressors": Blosc()}, "zstd": {"compressors": Zstd()}, "gzip": {"compressors": GZip()}}
        other: dict[str, dict[str, Any]] = {"fortran": {"order": "F"}}
    else:
        plain |= {"blosc": {"compressors": BloscCodec()}, "gzip": {"compressors": GzipCodec()}}
        other = {"two": {"compressors": [ZstdCodec(), Crc32cCodec()]}, "sharded": {"shards": (120, 120)}}
        other["sharded"]["chunks"] = (60, 60)
    other["chunked"] = {"chunks": (60, 120)}
    other["float64"] = {"dtype": "float64"}
    return {f"plain {name}": settings for name, settings in plain.items()} | other


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_zarr_layout_reads_the_same(zarr_format: int, tmp_path: Path) -> None:
    """Directly where a single chunk allows it, through zarr otherwise."""
    import zarr

    store = tmp_path / "x.zarr"
    root = zarr.open_group(str(store), mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    variants = zarr_variants(zarr_format)
    for number, settings in enumerate(variants.values()):
        group = root.require_group(f"sentinel1/{patch_name(number)}")
        settings = dict(settings)
        dtype = settings.pop("dtype", "float32")
        for channel, band in enumerate(("VH", "VV")):
            options = {"chunks": (120, 120), **settings}
            group.create_array(band, data=patch_image(number)[channel].astype(dtype), **options)
    direct, through = ZarrPatches(store, ("VH", "VV"), 120), ZarrPatches(store, ("VH", "VV"), 120, plain=False)
    out = np.empty((2, 120, 120), np.float32)
    for number, variant in enumerate(variants):
        folder = f"{store}/sentinel1/{patch_name(number)}/VH"
        assert direct._read_plain(patch_name(number), folder, out[0]) == variant.startswith("plain"), variant
        for patches in (direct, through):
            out[...] = 0
            patches.read_into(patch_name(number), out)
            assert np.array_equal(out, patch_image(number)), variant


@pytest.mark.parametrize("codec", ["Blosc", "Zstd", "GZip", "LZ4", "Zlib"])
def test_truncated_compressed_chunk(codec: str, tmp_path: Path) -> None:
    import numcodecs
    import zarr

    store = tmp_path / "x.zarr"
    group = zarr.open_group(str(store), mode="w", zarr_format=2).require_group(f"sentinel1/{patch_name(0)}")
    for channel, band in enumerate(("VH", "VV")):
        compressor = getattr(numcodecs, codec)()
        group.create_array(band, data=patch_image(0)[channel], chunks=(120, 120), compressors=compressor)
    chunk = store / f"sentinel1/{patch_name(0)}/VV/0.0"
    whole = chunk.read_bytes()
    patches, out = ZarrPatches(store, ("VH", "VV"), 120), np.empty((2, 120, 120), np.float32)
    patches.read_into(patch_name(0), out)
    assert np.array_equal(out, patch_image(0))
    for keep in (0, 3, 1000, len(whole) - 1):
        chunk.write_bytes(whole[:keep])
        with pytest.raises(UnreadableSample, match=f"{patch_name(0)}/VV/0.0: cannot be read"):
            patches.read_into(patch_name(0), out)


# Real patches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_index() -> list[dict[str, str]]:
    with (REALDATA / "bigearthnet_s1/index.csv").open() as file:
        return list(csv.DictReader(file))


@needs_realdata
def test_real_patches_are_the_same_from_every_storage(real_index: list[dict[str, str]], tmp_path: Path) -> None:
    from sarwmix.data.io.lmdb import write_lmdb

    rows = [["patch_id", "labels", "split", "country", "s1_name"]]
    rows += [
        [r["v2_patch_id"], str(r["v2_labels19"].split("|")), r["v2_split"], r["country"], r["s1_name"]]
        for r in real_index
    ]
    metadata = write_csv(tmp_path / "m.csv", rows)
    root = REALDATA / "bigearthnet_s1"
    tiff = build_dataset("benv2", root, "train+val+test", metadata=metadata, check="all")
    assert tiff.labels is not None
    v2 = {r["s1_name"]: r for r in real_index}
    for name, row in zip(tiff.names, tiff.labels, strict=True):
        assert sorted(labels.names_of(row)) == sorted(v2[name]["v2_labels19"].split("|"))
    everything = tiff.get_batch(np.arange(len(tiff)))["image"].numpy()
    assert everything.shape == (10, 2, 120, 120)
    assert -25 < everything[:, 0].mean() < everything[:, 1].mean() < -5  # VH first, and weaker than VV

    v1_labels = {r["s1_name"]: r["v1_labels43"].split("|") if r["v1_labels43"] else [] for r in real_index}
    for zarr_format in (2, 3):
        store = tmp_path / f"{zarr_format}.zarr"
        write_zarr(store, [(n, everything[i], v1_labels[n]) for i, n in enumerate(tiff.names)], zarr_format=zarr_format)
        zarr_set = build_dataset("benv1", store, "train+val+test", metadata=metadata)
        assert np.array_equal(zarr_set.get_batch(np.arange(10))["image"].numpy(), everything)
        from_store = build_dataset(
            "benv1", store, "train", metadata=write_csv(tmp_path / "n_train.csv", [[n] for n in tiff.names])
        )
        assert from_store.labels is not None
        for name, row in zip(from_store.names, from_store.labels, strict=True):
            expected = v2[name]["v1_labels19"]
            assert labels.names_of(row) == (expected.split("|") if expected else [])

    write_lmdb(tmp_path / "x.lmdb", tiff.names, lambda name: tiff.read(list(tiff.names).index(name)))
    lmdb_set = build_dataset("benv2", tmp_path / "x.lmdb", "train+val+test", metadata=metadata, check="all")
    assert np.array_equal(lmdb_set.get_batch(np.arange(10))["image"].numpy(), everything)


@needs_realdata
def test_v1_as_geotiff_with_its_json_labels(real_index: list[dict[str, str]], tmp_path: Path) -> None:
    with_json = [row for row in real_index if row["v1_labels43"]]
    names = write_csv(tmp_path / "n_train.csv", [["s1_name"], *[[row["s1_name"]] for row in with_json]])
    dataset = build_dataset("benv1", REALDATA / "bigearthnet_s1", "train", metadata=names, check="all")
    assert dataset.labels is not None
    for labels_of, row in zip(dataset.labels, with_json, strict=True):
        assert labels.names_of(labels_of) == row["v1_labels19"].split("|")


@needs_realdata
def test_official_metadata_counts_and_labels(real_index: list[dict[str, str]]) -> None:
    path = REALDATA / "bigearthnet_metadata/v2/metadata.parquet"
    splits = ("train", "val", "test")
    table = bigearthnet.read_metadata([path], splits)
    assert np.bincount(table.split).tolist() == [237_871, 122_342, 119_825]
    assert table.labels is not None
    wanted = {r["s1_name"]: r for r in real_index if r["v2_file"] == "main"}
    found = 0
    for row, name in enumerate(table.names):
        if name in wanted:
            assert sorted(labels.names_of(table.labels[row])) == sorted(wanted[name]["v2_labels19"].split("|"))
            found += 1
    assert found == len(wanted) == 9
    flagged = path.with_name("metadata_for_patches_with_snow_cloud_or_shadow.parquet")
    both = bigearthnet.read_metadata([path, flagged], splits)
    assert len(both.names) == 549_488
    assert int((~both.flagged).sum()) == 480_038


def test_official_metadata_are_read_without_pandas(demo_root: Path) -> None:
    """Importing pandas costs every start 0.3 s; arrow does without where no value is missing."""
    program = (
        "import sys; from pathlib import Path; from sarwmix.datasets.bigearthnet import read_metadata; "
        f"read_metadata([Path({str(demo_root / 'metadata.parquet')!r})], ('train', 'val')); "
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_parts_by_number_tile_and_country(benv2: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = build_dataset("benv2", benv2, "train+val+test")
    table = pq.read_table(next(benv2.rglob("metadata.parquet")))
    names = table.column("s1_name").to_pylist()
    countries = ["Austria" if number % 2 else "Portugal" for number in range(len(names))]
    pq.write_table(
        table.drop_columns("country").append_column("country", pa.array(countries)), tmp_path / "metadata.parquet"
    )

    def part(split: str = "train+val+test", **options: object) -> list[str]:
        return list(build_dataset("benv2", benv2, split, metadata=tmp_path / "metadata.parquet", **options).names)

    train = list(build_dataset("benv2", benv2, "train").names)
    assert part("train", limit=2) == [train[0], train[-1]]
    of_austria = {name for name, country in zip(names, countries, strict=True) if country == "Austria"}
    assert part(countries="austria") == [name for name in whole.names if name in of_austria]
    tile = whole.names[0].split("_")[5]
    assert part(tiles=tile) == [name for name in whole.names if name.split("_")[5] == tile]
    with pytest.raises(UserError, match="no patch lies in atlantis; the metadata name Austria, Portugal"):
        part(countries="Atlantis")
    with pytest.raises(UserError, match="has none of its .* listed patches in tiles=99XXX"):
        part(tiles="99XXX")
    with pytest.raises(UserError, match="option limit must be a whole number above 0"):
        part(limit=0)
    pq.write_table(table.drop_columns("country"), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match="has no column country"):
        part(countries="Austria")
