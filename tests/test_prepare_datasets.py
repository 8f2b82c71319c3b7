"""The command that derives the files in datasets/."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sarwmix.data import labels
from sarwmix.data.io.zarr import write_zarr
from sarwmix.data.registry import build_dataset
from tests.bigearthnet_fixtures import (
    REALDATA,
    metadata_rows,
    needs_realdata,
    patch_image,
    patch_name,
    write_benv2,
    write_parquet,
)
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/prepare_datasets.py"
Command = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process and returns what it printed."""
    spec = importlib.util.spec_from_file_location("prepare_datasets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare_datasets.py", *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def s2_name(index: int) -> str:
    return f"S2A_MSIL2A_20170613T101031_{index}_1"


@pytest.fixture
def v1(tmp_path: Path) -> tuple[Path, Path]:
    """Small official-looking v1 metadata: lists in three compressions and the mapping."""
    folder = tmp_path / "v1"
    folder.mkdir()
    lists = {"train": (0, 3, 1), "val": (2, 5), "test": (4,)}
    text = {split: "\n".join(f" {s2_name(i)} " for i in rows) + "\n\n" for split, rows in lists.items()}
    (folder / "train.csv").write_text(text["train"])
    (folder / "val.csv.bz2").write_bytes(bz2.compress(text["val"].encode()))
    (folder / "test.csv.gz").write_bytes(gzip.compress(text["test"].encode()))
    mapping = folder / "mapping.csv.bz2"
    rows = "s1_name,s2_name\n" + "".join(f"{patch_name(i)},{s2_name(i)}\n" for i in range(8))
    mapping.write_bytes(bz2.compress(rows.encode()))
    return folder, mapping


def rows_of(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def test_committed_label_tables_are_current(run: Command, tmp_path: Path) -> None:
    run("--out", tmp_path)
    for name in ("bigearthnet_classes.csv", "bigearthnet_43_to_19.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "datasets" / name).read_bytes()
    rows = rows_of(tmp_path / "bigearthnet_43_to_19.csv")[1:]
    assert {row[1]: row[3] or None for row in rows} == labels.GROUPING_43
    assert [row[1] for row in rows_of(tmp_path / "bigearthnet_classes.csv")[1:]] == list(labels.CLASSES_19)


def test_datasets_folder_holds_metadata_only() -> None:
    assert not [path for path in (ROOT / "datasets").rglob("*") if path.suffix == ".py"]


def test_v1_lists(run: Command, v1: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--v1_lists", v1[0], "--v1_mapping", v1[1], "--out", out, "--any_count")
    assert rows_of(out / "benv1_train.csv") == [
        ["s2_name", "s1_name"],
        *[[s2_name(i), patch_name(i)] for i in (0, 3, 1)],
    ]
    store = tmp_path / "benv1.zarr"
    patches = [(patch_name(i), patch_image(i), ["Salines", "Airports"][i % 2 : i % 2 + 1]) for i in range(6)]
    write_zarr(store, patches)
    dataset = build_dataset("benv1", store, "train+val", metadata=out, check="all")
    assert list(dataset.names) == [patch_name(i) for i in (0, 3, 1, 2, 5)]

    run("--v1_lists", v1[0], "--v1_mapping", v1[1], "--v1_labels", store, "--out", out, "--any_count")
    assert rows_of(out / "benv1_val.csv")[1:] == [
        [s2_name(2), patch_name(2), "Salines"], [s2_name(5), patch_name(5), "Airports"],
    ]  # fmt: skip
    again = build_dataset("benv1", store, "train+val", metadata=out)
    assert np.array_equal(again.labels, dataset.labels)


def test_v2_check_and_csv(run: Command, tmp_path: Path) -> None:
    root = write_benv2(tmp_path / "tree", 12)
    # Patches that the official file flags are in another file: leave them out here as it does.
    rows = [row for row in metadata_rows(range(12)) if not row["contains_cloud_or_shadow"]]
    metadata = write_parquet(tmp_path / "m.parquet", rows)
    run("--v2_metadata", metadata, "--v2_csv", "--out", tmp_path / "out", "--any_count")
    for split in ("train", "val+test"):
        from_csv = build_dataset("benv2", root, split, metadata=tmp_path / "out")
        from_parquet = build_dataset("benv2", root, split)
        assert from_csv.identity() == from_parquet.identity()
        assert np.array_equal(from_csv.labels, from_parquet.labels)


def test_wrong_counts_are_refused(run: Command, v1: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v1 train\) has 3 patches, expected 269,695"):
        run("--v1_lists", v1[0], "--v1_mapping", v1[1], "--out", tmp_path)
    metadata = write_parquet(tmp_path / "m.parquet", metadata_rows(range(5)))
    with pytest.raises(UserError, match=r"v2 train\) has 3 patches, expected 237,871"):
        run("--v2_metadata", metadata, "--out", tmp_path)


def test_wrong_v1_metadata(run: Command, v1: tuple[Path, Path], tmp_path: Path) -> None:
    folder, mapping = v1

    def prepare() -> str:
        return run("--v1_lists", folder, "--v1_mapping", mapping, "--out", tmp_path / "out", "--any_count")

    train = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(train + "S2A_unknown\n")
    with pytest.raises(UserError, match="row 4: 'S2A_unknown' is not in"):
        prepare()
    (folder / "train.csv").write_text(train + s2_name(0) + "\n")
    with pytest.raises(UserError, match="row 4: .* is also in split 'train'"):
        prepare()
    (folder / "train.csv").write_text(train)
    (folder / "val.csv.bz2").write_bytes(b"BZh9 broken")
    with pytest.raises(UserError, match=r"val.csv.bz2 cannot be read"):
        prepare()
    (folder / "val.csv.bz2").unlink()
    with pytest.raises(UserError, match="has no val.csv"):
        prepare()
    mapping.write_bytes(bz2.compress(b"a,b\n"))
    with pytest.raises(UserError, match="expected s1_name,s2_name"):
        prepare()
    mapping.write_bytes(bz2.compress(b"s1_name,s2_name\nx,y\nx,z\n"))
    with pytest.raises(UserError, match="belongs to two"):
        prepare()


def test_options_that_belong_together(run: Command, tmp_path: Path) -> None:
    for arguments in (("--v1_lists", tmp_path), ("--v1_labels", tmp_path), ("--v2_csv",)):
        with pytest.raises(UserError, match="belong together|give --v1_lists|needs --v2_metadata"):
            run(*arguments, "--out", tmp_path)


def test_other_grouping_is_noticed(run: Command, tmp_path: Path) -> None:
    table = {
        "original_labels": {name: i for i, name in enumerate(labels.CLASSES_43)},
        "BigEarthNet-19_labels": {name: i for i, name in enumerate(labels.CLASSES_19)},
        "label_conversion": [
            [labels.CLASSES_43.index(n) for n, group in labels.GROUPING_43.items() if group == name]
            for name in labels.CLASSES_19
        ],
    }
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table))
    assert "agree" in run("--label_indices", path, "--out", tmp_path)
    moved = [*table["label_conversion"]]  # type: ignore[misc]
    moved[0], moved[1] = [0], [1, 2]
    path.write_text(json.dumps({**table, "label_conversion": moved}))
    with pytest.raises(UserError, match="'Discontinuous urban fabric' belongs to 'Industrial"):
        run("--label_indices", path, "--out", tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="no table of label indices"):
        run("--label_indices", path, "--out", tmp_path)


@pytest.mark.slow
@needs_realdata
def test_official_metadata(tmp_path: Path) -> None:
    """The whole official metadata, as a user runs it; the lists equal those joined independently."""
    folder = REALDATA / "bigearthnet_metadata"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--label_indices", str(folder / "v1/label_indices.json"),
         "--v1_lists", str(folder / "v1"), "--v1_mapping", str(folder / "v1/s1_s2_mapping.csv.bz2"),
         "--v2_metadata", str(folder / "v2/metadata.parquet"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "test 119,825 patches" in done.stdout
    for split, count in (("train", 269_695), ("val", 123_723), ("test", 125_866)):
        ours = (tmp_path / f"benv1_{split}.csv").read_text().split("\n", 1)
        assert ours[0] == "s2_name,s1_name"
        assert ours[1].count("\n") == count
        with gzip.open(folder / f"v1_derived/benv1_{split}.csv.gz", "rt") as file:
            assert file.read() == ours[1]
