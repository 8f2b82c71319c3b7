"""BigEarthNet-S1 folders to LMDB and CSV: identical values by name, resumed runs, damaged files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from sarwmix.data.registry import build_dataset
from sarwmix.synthetic.neighbours import make_neighbour_data
from scripts import list_acquisitions, pack_dataset
from tests.bigearthnet_fixtures import REALDATA, needs_realdata
from util.errors import UserError


def run(monkeypatch: pytest.MonkeyPatch, module: object, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["script", *(str(word) for word in args)])
    module.main()  # type: ignore[attr-defined]


@needs_realdata
def test_real_patches_to_lmdb_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    source = REALDATA / "bigearthnet_s1"
    with (source / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_split: dict[str, list[str]] = {}
    for row in rows:
        if row["v1_split"] in ("train", "val", "test") and (source / row["s1_name"]).is_dir():
            by_split.setdefault(row["v1_split"], []).append(row["s1_name"])
    for split, names in by_split.items():
        lines = "".join(f"{name},{name},\"['Arable land']\"\n" for name in names)
        (tmp_path / f"benv1_{split}.csv").write_text("s2_name,s1_name,labels\n" + lines)
    lists = f"metadata={tmp_path}/benv1_{{split}}.csv"
    splits = "+".join(by_split)
    command = ("--dataset", "benv1", "--data_path", source, "--format", "lmdb", "--out", tmp_path / "lmdb")
    for expected in (f"{len(sum(by_split.values(), []))} written now", "0 written now"):
        run(monkeypatch, pack_dataset, *command, "--splits", splits, "--data_option", lists)
        assert expected in capsys.readouterr().out
    for split, names in by_split.items():
        options = {"metadata": f"{tmp_path}/benv1_{{split}}.csv"}
        first = build_dataset("benv1", source, split, **options)
        second = build_dataset("benv1", tmp_path / "lmdb", split, **options)
        assert list(second.names) == names
        for index in range(len(first)):
            assert np.array_equal(first.read(index), second.read(index))


@needs_realdata
def test_acquisitions_of_real_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sub" / "acquisitions.csv"
    run(monkeypatch, list_acquisitions, "--data_path", REALDATA / "bigearthnet_s1", "--out", out)
    with out.open() as file:
        rows = {row["s1_name"]: row for row in csv.DictReader(file)}
    row = rows["S1A_IW_GRDH_1SDV_20180204T043253_35VPK_57_38"]
    assert row["acquisition_time"] == "2018-02-04T04:32:53"
    assert row["scene"] == "S1A_IW_GRDH_1SDV_20180204T043253_20180204T043318_020452_022F7E_8893"
    assert row["s2_name"] == "S2B_MSIL2A_20180204T94161_57_38"


def test_acquisitions_of_scene_folders_and_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_neighbour_data("benv2", tmp_path / "data", samples=3)
    root, out = tmp_path / "data" / "BigEarthNet-S1", tmp_path / "a.csv"
    run(monkeypatch, list_acquisitions, "--data_path", root, "--out", out)
    assert len(out.read_text().splitlines()) == 8
    damaged = next(iter(root.rglob("*_0_3_labels_metadata.json")))
    damaged.write_text("{")
    with pytest.raises(UserError, match=f"{damaged.name} cannot be used.*--skip_bad"):
        run(monkeypatch, list_acquisitions, "--data_path", root, "--out", out)
    run(monkeypatch, list_acquisitions, "--data_path", root, "--out", out, "--skip_bad")
    assert len(out.read_text().splitlines()) == 7
    assert "left out" in capsys.readouterr().out
    damaged.unlink()
    run(monkeypatch, list_acquisitions, "--data_path", root, "--out", out)
    assert len(out.read_text().splitlines()) == 7
    said = capsys.readouterr().out
    assert f"warning: 1 patch folders have no *_labels_metadata.json and are left out: {damaged.parent.name}\n" in said
    assert said.endswith("a.csv: 6 patches, 1 left out\n")
    for path in root.rglob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no usable .*\(7 patch folders have none, 0 files are damaged"):
        run(monkeypatch, list_acquisitions, "--data_path", root, "--out", out)
    with pytest.raises(UserError, match="holds no"):
        run(monkeypatch, list_acquisitions, "--data_path", root.parent / "BigEarthNet-S2", "--out", out)
