"""check_data finds, by name, what is put into copies of good patches."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from sarwmix.checks.samples import Examination, Finding, compare_tables, examine
from sarwmix.synthetic import benv2 as demo
from scripts import check_data
from util.errors import UserError

OFFICIAL = ["patch_id", "labels", "split", "country", "s1_name", "s2v1_name", "contains_seasonal_snow",
            "contains_cloud_or_shadow"]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    demo.generate(root, patches=10, seed=1, jobs=1)
    return root


@pytest.fixture
def real(tmp_path: Path, realdata: Path) -> Path:
    """Copies of the ten real patches in the layout of v2, with the official rows of the eight main ones."""
    root = tmp_path / "real"
    table = pd.read_csv(realdata / "bigearthnet_s1" / "index.csv").fillna("")
    rows = []
    for row in table.itertuples():
        target = root / "_".join(row.s1_name.split("_")[:5]) / row.s1_name
        shutil.copytree(realdata / "bigearthnet_s1" / row.s1_name, target)
        rows.append(
            {
                "patch_id": row.v2_patch_id,
                "labels": str(row.v2_labels19).split("|"),
                "split": row.v2_split,
                "country": row.country,
                "s1_name": row.s1_name,
                "s2v1_name": row.s2v1_name,
                "contains_seasonal_snow": False,
                "contains_cloud_or_shadow": False,
            }
        )
    pd.DataFrame(rows, columns=OFFICIAL).to_parquet(root / "metadata.parquet")
    return root


def names_of(root: Path) -> list[str]:
    return list(pd.read_parquet(root / "metadata.parquet")["s1_name"])


def tif(root: Path, name: str, band: str) -> Path:
    return root / "_".join(name.split("_")[:5]) / name / f"{name}_{band}.tif"


def change(path: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
    with rasterio.open(path, "r+") as file:
        file.write(function(file.read(1)).astype(np.float32), 1)


def finding(found: Examination, topic: str) -> Finding:
    matching = [one for one in found.findings if one.topic == topic]
    assert len(matching) == 1, [one.text() for one in found.findings]
    return matching[0]


def damage(root: Path) -> dict[str, str]:
    """All the troubles at once, each in a patch of its own: topic -> name."""
    names = names_of(root)
    swapped, linear, short, block, wrong, twice, gone = names[:7]
    vh, vv = tif(root, swapped, "VH"), tif(root, swapped, "VV")
    vh.rename(vh.with_suffix(".x"))
    vv.rename(vh)
    vh.with_suffix(".x").rename(vv)
    for band in ("VH", "VV"):
        change(tif(root, linear, band), lambda values: 10 ** (values / 10))
        change(tif(root, block, band), lambda values: np.where(np.arange(120)[:, None] < 20, np.nan, values))
    path = tif(root, short, "VV")
    path.write_bytes(path.read_bytes()[:20_000])
    tif(root, gone, "VH").unlink()
    table = pd.read_parquet(root / "metadata.parquet")
    row = table.index[table["s1_name"] == wrong][0]
    table.at[row, "labels"] = ["Arable lnd"]
    table = pd.concat([table, table[table["s1_name"] == twice]], ignore_index=True)
    table.to_parquet(root / "metadata.parquet")
    return {
        "swapped bands": swapped,
        "linear instead of dB": linear,
        "unreadable": short,
        "invalid pixels": block,
        "unknown label": wrong,
        "duplicated name": twice,
        "missing": gone,
    }


def check_all_found(found: Examination, expected: dict[str, str]) -> None:
    for topic in ("swapped bands", "linear instead of dB", "duplicated name"):
        assert finding(found, topic).names == (expected[topic],)
    for topic, words in (("unreadable", "truncated"), ("missing", "does not exist")):
        (text,) = finding(found, topic).names
        assert text.startswith(expected[topic])
        assert words in text
    assert finding(found, "invalid pixels").names == (f"{expected['invalid pixels']} (2400 VH, 2400 VV)",)
    assert finding(found, "unknown label").names == (f"{expected['unknown label']} ('Arable lnd')",)
    assert len(found.errors()) == 6


def test_good_data_have_no_error(data: Path) -> None:
    found = examine("demo", data)
    assert found.errors() == []
    assert sum(found.counts.values()) == 10
    assert set(found.counts) == {"train", "val", "test"}
    assert {one.topic for one in found.findings} <= {"class without sample", "other mean", "other deviation"}


def test_every_trouble_is_named_in_the_demo_data(data: Path) -> None:
    expected = damage(data)
    check_all_found(examine("demo", data), expected)


def test_every_trouble_is_named_in_real_patches(real: Path) -> None:
    assert examine("benv2", real).errors() == []
    expected = damage(real)
    found = examine("benv2", real)
    check_all_found(found, expected)
    assert "officially 237,871" in " ".join(one.text() for one in found.findings)


def test_a_single_linear_band_is_named(data: Path) -> None:
    name = names_of(data)[3]
    change(tif(data, name, "VV"), lambda values: 10 ** (values / 10))
    assert finding(examine("demo", data), "linear instead of dB").names == (f"{name} (VV)",)


def test_a_band_without_a_valid_pixel_is_named(data: Path) -> None:
    name = names_of(data)[2]
    change(tif(data, name, "VH"), lambda values: values * np.nan)
    (text,) = finding(examine("demo", data), "unreadable").names
    assert "no valid pixel in band VH" in text
    assert f"{tif(data, name, 'VH').parent}:" in text


def test_wrong_label_and_split_against_the_official_table(real: Path, realdata: Path) -> None:
    table = pd.read_parquet(real / "metadata.parquet")
    changed, moved = names_of(real)[0], names_of(real)[3]
    table.at[0, "labels"] = ["Marine waters"]
    table.loc[table["s1_name"] == moved, "split"] = "train"
    table.to_parquet(real / "metadata.parquet")
    official = realdata / "bigearthnet_metadata" / "v2" / "metadata.parquet"
    found = examine("benv2", real, reference=official)
    wrong = finding(found, "wrong label").names
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{changed} (Marine waters instead of Arable land")
    assert finding(found, "wrong split").names == (moved,)
    # The snow patch is not in the official main table.
    assert len(finding(found, "unknown name").names) == 1


def test_compare_tables_counts_only_differences() -> None:
    table = pd.DataFrame(
        {"s1_name": ["a", "b"], "labels": [["Pastures"], ["Mixed forest", "Pastures"]], "split": ["train", "test"]}
    )
    other = table.assign(labels=[["Pastures"], ["Pastures", "Mixed forest"]])
    assert compare_tables(table, other, "t") == []


def test_wrong_label_inside_a_store_does_not_hide_the_pixels(tmp_path: Path) -> None:
    import zarr

    root = tmp_path / "b.zarr"
    group = zarr.open_group(str(root), mode="w", zarr_format=2)
    rng = np.random.default_rng(0)
    for number in range(9):
        name = f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_0_{number}"
        patch = group.create_group(f"sentinel1/{name}")
        for band, level in (("VH", -19.0), ("VV", -12.0)):
            pixels = rng.normal(level, 3, (120, 120)).astype(np.float32)
            pixels[: 10 * (number == 4)] = np.nan
            patch.create_array(band, shape=pixels.shape, dtype="f4", chunks=pixels.shape)[:] = pixels
        patch.attrs["labels"] = ["Pasture" if number in (1, 7) else "Pastures"]
        with (tmp_path / f"benv1_{('train', 'val', 'test')[number // 3]}.csv").open("a") as file:
            file.write(f"x,{name}\n")
    found = examine("benv1", root)
    opened = [one.message for one in found.findings if one.topic == "cannot be opened"]
    assert len(opened) == 2
    assert "33UUP_0_1: unknown label 'Pasture'" in opened[0]
    assert "33UUP_0_7: unknown label 'Pasture'" in opened[1]
    assert found.counts == {"train": 3, "val": 3, "test": 3}
    assert finding(found, "invalid pixels").names[0].endswith("33UUP_0_4 (1200 VH, 1200 VV)")


def test_equal_and_constant_images(data: Path) -> None:
    names = names_of(data)
    for band in ("VH", "VV"):
        shutil.copyfile(tif(data, names[0], band), tif(data, names[1], band))
    change(tif(data, names[2], "VV"), lambda values: np.full_like(values, -10.0))
    found = examine("demo", data)
    assert set(finding(found, "equal images").names) == set(names[:2])
    assert finding(found, "constant image").names == (names[2],)


def test_nothing_readable(data: Path) -> None:
    for name in names_of(data):
        tif(data, name, "VH").write_bytes(b"")
    found = examine("demo", data)
    assert len(finding(found, "unreadable").names) == 10
    assert found.moments is not None
    assert found.moments.samples == 0


def test_other_statistics_warn(data: Path) -> None:
    for name in names_of(data):
        for band in ("VH", "VV"):
            change(tif(data, name, band), lambda values: values + 6.0)
    topics = [one.topic for one in examine("demo", data).findings]
    assert topics.count("other mean") == 2


def test_jobs_and_sample(data: Path, demo_root: Path) -> None:
    one = examine("demo", demo_root, sample=70, jobs=1)
    two = examine("demo", demo_root, sample=70, jobs=2)  # two pieces of work, 64 and 6 samples
    assert one.moments is not None
    assert two.moments is not None
    assert one.facts is not None
    assert one.moments.samples == 70
    assert len(np.unique(one.facts.index)) == 70
    assert one.moments.mean.tobytes() == two.moments.mean.tobytes()
    assert [finding.text() for finding in one.findings] == [finding.text() for finding in two.findings]


def test_scenes_left_out_are_reported(realdata: Path) -> None:
    found = examine("s1_scenes", realdata / "sen1floods11")
    assert finding(found, "scene left out").names == ("Paraguay_34417_S1Hand: no valid pixel (all no-data)",)
    assert len(finding(found, "file left out").names) == 12
    assert finding(found, "invalid pixels").names[0].startswith("Nigeria_812045_S1Hand_r360_c360 (185 VH")
    assert found.errors() == []


def test_wrong_unit_of_scenes_is_a_finding(realdata: Path) -> None:
    found = examine("s1_scenes", realdata / "ssl4eo_s12" / "s1", options={"unit": "linear"})
    assert "give unit=dB" in finding(found, "cannot be opened").message


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, arguments)])
    return check_data.main()


def test_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dataset", "demo", "--data_path", data, "--jobs", 1, "--out")
    assert run(monkeypatch, *arguments, tmp_path / "good") == 0
    pictures = {path.name for path in (tmp_path / "good").iterdir()}
    assert pictures == {"report.json", "histogram.png", "labels.png", "contact_sheet.png"}
    monkeypatch.setattr(check_data, "draw", lambda *_: [])  # once is enough
    assert run(monkeypatch, *arguments, tmp_path / "strict", "--strict") == check_data.FOUND
    expected = damage(data)
    capsys.readouterr()
    assert run(monkeypatch, *arguments, tmp_path / "bad") == check_data.FOUND
    shown = capsys.readouterr().out
    assert all(name in shown for name in expected.values())
    report = json.loads((tmp_path / "bad" / "report.json").read_text())
    assert {one["topic"] for one in report["findings"]} >= set(expected)


def test_wrong_usage_is_refused_before_anything_is_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sarwmix.checks.samples.read_samples", lambda *_, **__: pytest.fail("was read"))
    arguments = ("--dataset", "demo", "--data_path", data, "--out")
    with pytest.raises(UserError, match="no option 'metadta'.*did you mean 'metadata'"):
        run(monkeypatch, *arguments, tmp_path / "out", "--data_option", "metadta=x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        run(monkeypatch, *arguments, tmp_path / "file" / "out")
    for flag in ("--seed", "--sample"):
        with pytest.raises(SystemExit) as leaving:
            run(monkeypatch, *arguments, tmp_path / "out", flag, -1)
        assert leaving.value.code == 2


def test_no_data_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ("--dataset", "benv2", "--out", tmp_path / "out", "--data_path")
    assert run(monkeypatch, *arguments, tmp_path / "empty") == check_data.FOUND
    with pytest.raises(UserError, match="does not exist"):
        run(monkeypatch, *arguments, tmp_path / "nowhere")
    with pytest.raises(UserError, match="--reference"):
        run(monkeypatch, *arguments, tmp_path / "empty", "--reference", tmp_path / "nowhere.parquet")
