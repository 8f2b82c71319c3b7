"""Demo data: same bytes for the same seed, the official layout, and pictures that look like Sentinel-1."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from sarwmix.data.labels import CLASSES_19
from sarwmix.data.registry import build_dataset
from sarwmix.synthetic import benv2 as demo
from util.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PATCHES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "data"
    assert demo.generate(root, patches=PATCHES, seed=3, jobs=2)
    return root


def digest(root: Path) -> str:
    value = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        value.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return value.hexdigest()


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_same_seed_same_bytes_whatever_the_jobs(data: Path, tmp_path: Path) -> None:
    demo.generate(tmp_path / "one", patches=PATCHES, seed=3, jobs=1)
    demo.generate(tmp_path / "other", patches=PATCHES, seed=4, jobs=1)
    assert digest(tmp_path / "one") == digest(data)
    assert digest(tmp_path / "other") != digest(data)


def test_layout_is_that_of_bigearthnet_v2(data: Path) -> None:
    table = pd.read_parquet(data / "metadata.parquet")
    assert list(table.columns) == [
        "patch_id",
        "labels",
        "split",
        "country",
        "s1_name",
        "s2v1_name",
        "contains_seasonal_snow",
        "contains_cloud_or_shadow",
    ]
    assert len(table) == PATCHES
    assert set(table["split"]) == {"train", "validation", "test"}
    assert table["patch_id"].is_unique
    assert table["s1_name"].is_unique
    for name in table["s1_name"]:
        tile, column, row = name.split("_")[-3:]
        for band in ("VH", "VV"):
            path = data / "_".join(name.split("_")[:5]) / name / f"{name}_{band}.tif"
            with rasterio.open(path) as source:
                land = next(one for one in demo.LANDSCAPES if one.tile == tile)
                assert source.crs.to_epsg() == land.epsg
                left, top = land.upper_left
                assert source.transform[:6] == (10, 0, left + 1200 * int(column), 0, -10, top - 1200 * int(row))
                assert source.profile["dtype"] == "float32"
                assert source.nodata is None
                values = source.read()
            assert values.shape == (1, 120, 120)
            assert np.isfinite(values).all()
            assert -50.0 <= values.min() < values.max() < 40.0


def test_splits_are_places_apart(data: Path) -> None:
    table = pd.read_parquet(data / "metadata.parquet")
    product = table["s1_name"].str.split("_").str[:5].str.join("_")
    assert (table.groupby(product)["split"].nunique() == 1).all()


def test_header_equals_the_original_byte_by_byte(realdata: Path) -> None:
    paths = sorted((realdata / "bigearthnet_s1").glob("*/*_VV.tif"))
    assert paths
    for path in paths:
        with rasterio.open(path) as source:
            wanted = demo.geotiff_header(source.crs.to_epsg(), source.transform.c, source.transform.f)
        assert path.read_bytes()[: len(wanted)] == wanted, path.name


def test_tiles_are_named_by_their_place() -> None:
    """The letters of the 100 km square follow from zone, easting and northing (MGRS, WGS 84)."""
    for land in demo.LANDSCAPES:
        zone = int(land.tile[:2])
        assert land.epsg == 32600 + zone
        columns = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")[zone % 3]
        rows = "ABCDEFGHJKLMNPQRSTUV" if zone % 2 else "FGHJKLMNPQRSTUVABCDE"
        easting, top = land.upper_left
        square = columns[round(easting / 1e5) - 1] + rows[round((top - 1e5) / 1e5) % 20]
        assert land.tile[3:] == square, land.name


def test_readable_as_demo_and_as_benv2(data: Path) -> None:
    for name in ("demo", "benv2"):
        dataset = build_dataset(name, data, "train+val+test")
        assert len(dataset) == PATCHES
        sample = dataset[0]
        assert sample["image"].shape == (2, 120, 120)
        table = pd.read_parquet(data / "metadata.parquet").set_index("s1_name")
        present = {CLASSES_19[k] for k in np.flatnonzero(sample["label"].numpy())}
        assert present == set(table.loc[sample["name"], "labels"])


def test_folder_without_demo_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make_demo_data\.py"):
        build_dataset("demo", tmp_path, "train")


def test_speckle_is_gamma_with_the_looks_and_correlation_of_grd() -> None:
    values = demo.speckle(np.random.default_rng(0), (500, 500))
    assert values.mean() == pytest.approx(1.0, abs=0.01)
    assert 4.4 < values.mean() ** 2 / values.var() < 4.9
    # Third central moment of a gamma variable of mean 1 and L looks: 2 / L^2, so skewness = 2 / sqrt(L).
    skewness = float(((values - values.mean()) ** 3).mean() / values.std() ** 3)
    assert skewness == pytest.approx(2 * values.std(), rel=0.1)
    # (1*3 + 3*4 + 4*3 + 3*1) / 36 = 0.833, squared 0.694; (1*2 + 2*3 + 3*2 + 2*1) / 19 = 0.842, squared 0.709
    assert correlation(values[1:], values[:-1]) == pytest.approx(0.694, abs=0.02)
    assert correlation(values[:, 1:], values[:, :-1]) == pytest.approx(0.709, abs=0.02)


def test_labels_follow_from_the_area(data: Path) -> None:
    table = pd.read_parquet(data / "metadata.parquet").set_index("s1_name")
    site = demo._plan(PATCHES, 3)[1]
    _, classes = demo.paint_site(site, 3)
    names = [name for name in table.index if name.endswith(f"_{site.landscape.tile}_{site.column}_{site.row}")]
    share = np.bincount(classes[:120, :120].ravel(), minlength=19) / 120**2
    wanted = {CLASSES_19[k] for k in range(19) if share[k] >= 0.05}
    assert len(names) == 1
    assert set(table.loc[names[0], "labels"]) == wanted


def test_backscatter_is_plausible(data: Path) -> None:
    """VH lies 4 to 10 dB below VV, water is dark, VH over water sits near the noise floor."""
    dark = []
    for site in demo._plan(80, 0)[:6]:
        image, classes = demo.paint_site(site, 0)
        land = classes < demo.INLAND_WATER
        assert 4.0 < float((image[1] - image[0])[land].mean()) < 10.0
        assert -15.0 < float(image[1][land].mean()) < -7.0
        power = 10 ** (image / 10)
        for water in (demo.INLAND_WATER, demo.MARINE_WATER):
            if (classes == water).sum() > 2000:
                means = 10 * np.log10(power[:, classes == water].mean(axis=1))
                dark.append(means)
                assert means[1] < float(image[1][land].mean())
    assert dark
    assert all(-29.0 < vh < -18.0 for vh, _ in dark)


def test_complete_data_are_used_again(data: Path) -> None:
    before = (data / "metadata.parquet").stat().st_mtime_ns
    assert not demo.generate(data, patches=PATCHES, seed=3)
    assert (data / "metadata.parquet").stat().st_mtime_ns == before


def test_other_settings_and_damage_need_overwrite(tmp_path: Path) -> None:
    root = tmp_path / "data"
    demo.generate(root, patches=5, seed=0)
    with pytest.raises(UserError, match="--overwrite"):
        demo.generate(root, patches=5, seed=1)
    victim = next(root.rglob("*_VV.tif"))
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        demo.generate(root, patches=5, seed=0)
    assert demo.generate(root, patches=5, seed=0, overwrite=True)
    assert victim.stat().st_size == 58024
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="left alone"):
            demo.generate(tmp_path, patches=5, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        demo.generate(tmp_path / "file", patches=5, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.txt"]


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.generate(tmp_path / "data", patches=5)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        demo.generate(tmp_path / "data", patches=5, jobs=1)
    assert list(tmp_path.iterdir()) == []


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "big disk")
    demo.generate(tmp_path / "data", patches=5)
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "big disk" / "metadata.parquet").is_file()


def test_two_at_once_leave_one_whole(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda _: demo.generate(tmp_path / "data", patches=5, jobs=1), range(2)))
    assert any(written)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not demo.generate(tmp_path / "data", patches=5)


@pytest.mark.parametrize(("patches", "seed", "jobs"), [(4, 0, 1), (10**7, 0, 1), (5, -1, 1), (5, 0, 0)])
def test_bad_numbers_are_refused(tmp_path: Path, patches: int, seed: int, jobs: int) -> None:
    with pytest.raises(UserError, match="expected"):
        demo.generate(tmp_path / "data", patches=patches, seed=seed, jobs=jobs)
    assert list(tmp_path.iterdir()) == []


def test_places_do_not_overlap() -> None:
    taken: set[tuple[str, int, int]] = set()
    for site in demo._plan(demo.MAXIMUM_PATCHES, 0):
        key = (site.landscape.tile, site.column, site.row)
        assert key not in taken
        assert site.column + 3 <= 90
        assert site.row + 1 <= 90
        taken.add(key)


def test_command_line(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "make_demo_data.py")]
    good = subprocess.run(
        [*script, "--out", str(tmp_path / "d"), "--patches", "5", "--seed", "2", "--jobs", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "5/5 patches" in good.stdout
    bad = subprocess.run(
        [*script, "--out", str(tmp_path / "e"), "--patches", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: patches=1")
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_every_class_is_in_every_split_and_texture_tells_more_than_level(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.preprocessing import StandardScaler

    demo.generate(tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "metadata.parquet").explode("labels")
    counts = pd.crosstab(table["labels"], table["split"])
    assert len(counts) == 19
    assert counts.to_numpy().min() >= 4

    def features(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dataset = build_dataset("demo", tmp_path / "data", split)
        images = np.stack([dataset.read(i) for i in range(len(dataset))])
        level = np.concatenate([images.mean((2, 3)), images.std((2, 3))], axis=1)
        texture = [level, np.percentile(images, [1, 10, 50, 90, 99], axis=(2, 3)).transpose(1, 2, 0).reshape(-1, 10)]
        for _ in range(3):
            texture += [np.abs(np.diff(images, axis=axis)).mean((2, 3)) for axis in (2, 3)]
            images = images.reshape(*images.shape[:2], images.shape[2] // 2, 2, -1, 2).mean((3, 5))
            texture.append(images.std((2, 3)))
        assert dataset.labels is not None
        return level, np.concatenate(texture, axis=1), dataset.labels

    train, test = features("train+val"), features("test")
    scores = []
    for kind in (0, 1):
        scaler = StandardScaler().fit(train[kind])
        precision = []
        for k in range(19):
            model = LogisticRegression(max_iter=2000).fit(scaler.transform(train[kind]), train[2][:, k])
            precision.append(
                average_precision_score(test[2][:, k], model.decision_function(scaler.transform(test[kind])))
            )
        scores.append(float(np.mean(precision)))
    assert scores[0] < 0.5  # mean and deviation of the bands are not enough
    assert scores[1] > scores[0] + 0.15
