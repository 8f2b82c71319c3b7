"""The neighbouring data sets on generated data: content, splits, bands, and every kind of bad input by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sarwmix.checks.samples import examine
from sarwmix.data.base import UnreadableSample
from sarwmix.data.fraction import take_fraction
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import Grid, band_numbers, plain_band_name, read_raster
from sarwmix.data.registry import build_dataset, get_spec
from sarwmix.data.spec import EmptySplit
from sarwmix.datasets.dfc2020 import label_table
from sarwmix.synthetic.neighbours import make_neighbour_data
from util.errors import UserError
from util.log import get_logger

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata" / "sen1floods11"
HAND = "data/flood_events/HandLabeled"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the generated data of a data set; made once."""
    done: dict[str, Path] = {}

    def get(dataset: str) -> Path:
        if dataset not in done:
            done[dataset] = tmp_path_factory.mktemp("made") / dataset
            make_neighbour_data(dataset, done[dataset], samples=3)
        return done[dataset]

    return get


@pytest.fixture
def copy(made: Any, tmp_path: Path) -> Any:
    """A copy that may be damaged; links keep it cheap."""

    def get(dataset: str) -> Path:
        return Path(shutil.copytree(made(dataset), tmp_path / dataset))

    return get


def rewrite(path: Path, change: Any, **profile: object) -> None:
    """Change the pixels (and the profile) of a raster."""
    import rasterio

    with rasterio.open(path) as source:
        values, settings, names = source.read(), source.profile, source.descriptions
    values = change(values)
    settings.update(count=len(values), height=values.shape[1], width=values.shape[2], **profile)
    path.unlink()
    with rasterio.open(path, "w", **settings) as target:
        target.write(values)
        for number, name in enumerate(names[: len(values)], start=1):
            if name:
                target.set_band_description(number, name)


# Registry --------------------------------------------------------------------------------------------------------


def test_band_sets_have_the_sizes_of_the_contract() -> None:
    sizes = {name: len(get_spec("benv2", name).bands) for name in get_spec("benv2").band_sets}
    assert sizes == {"s1": 2, "s2": 10, "all": 12, "s1_full": 2, "s2_full": 12, "all_full": 14}
    assert len(get_spec("sen1floods11", "s1s2").bands) == 15
    assert get_spec("benv2", "s1") == get_spec("benv2")


def test_bands_by_name_in_any_order() -> None:
    spec = get_spec("benv2", "VV,B04,VH")
    assert spec.bands == ("VV", "B04", "VH")
    assert spec.units == ("dB", "reflectance x 1e4", "dB")
    assert spec.unit == "dB and reflectance x 1e4"
    assert spec.statistics["reben"].mean == (-12.6439, 588.4096, -19.3526)
    assert set(spec.statistics) == {"reben"}  # the others know Sentinel-1 only
    assert set(get_spec("benv2", "VV").statistics) == {"benv2", "reben", "benv1"}
    with pytest.raises(UserError, match=r"has no band B13.*s2: B02, B03.*VH, VV, B01"):
        get_spec("benv2", "B04,B13")
    with pytest.raises(UserError, match="cannot give a band twice"):
        get_spec("benv2", "VV,VV")
    with pytest.raises(UserError, match="has no band B04"):
        get_spec("eurosat_sar", "B04")


def test_checkpoints_name_the_preprocessing_only_where_it_is_unusual(made: Any) -> None:
    data = build_dataset("dfc2020", made("dfc2020"), "train", bands="VV,VH")
    facts = data.provenance()
    assert facts["bands"] == ["VV", "VH"]
    assert facts["preprocessing"] == {"normalisation": "clip", "clip": [-25.0, 0.0], "geometry": "window"}
    assert json.loads(json.dumps(facts)) == facts
    assert "preprocessing" not in build_dataset("benv2", made("benv2"), "train").provenance()


def test_band_names_of_files() -> None:
    assert [plain_band_name(text) for text in ("B1", "b8a", "B08A", "Sigma0_VV_dB", "x", "VV VH")] == [
        "B01", "B8A", "B8A", "VV", None, None,
    ]  # fmt: skip
    assert band_numbers(("VH", "VV"), ("VV", "VH"), ("VV", "VH")) == [1, 0]
    assert band_numbers(("", ""), ("VH", "VV"), ("VV", "VH")) == [1, 0]
    with pytest.raises(GeoTiffError, match="has no band VH"):
        band_numbers(("VV", "angle"), ("VV", "VH"), ("VV", "VH"))
    with pytest.raises(GeoTiffError, match=r"has 3 band\(s\) without names, expected 2: VV, VH"):
        band_numbers(("", "", ""), ("VV",), ("VV", "VH"))


def test_grids_are_compared_with_room_for_rounding() -> None:
    grid = Grid(512, 512, "EPSG:4326", (1e-4, 0, 5.0, 0, -1e-4, 9.0))
    assert grid.difference(Grid(512, 512, "EPSG:4326", (1.00001e-4, 0, 5.00001, 0, -1e-4, 9.0))) is None
    assert "corner" in (grid.difference(Grid(512, 512, "EPSG:4326", (1e-4, 0, 5.001, 0, -1e-4, 9.0))) or "")
    assert "pixels" in (grid.difference(Grid(256, 512, "EPSG:4326", grid.transform)) or "")


# EuroSAT-SAR -----------------------------------------------------------------------------------------------------


def test_eurosat_splits_are_stratified_and_follow_the_seed(made: Any, tmp_path: Path) -> None:
    root = tmp_path / "eurosat"
    make_neighbour_data("eurosat_sar", root, samples=10)
    train, test = (build_dataset("eurosat_sar", root, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 20)
    assert train.labels is not None
    assert np.bincount(train.labels).tolist() == [8] * 10
    assert not set(train.names) & set(test.names)
    again = build_dataset("eurosat_sar", root, "test", seed=1)
    assert set(again.names) != set(test.names)
    val = build_dataset("eurosat_sar", root, "val", val_frac=0.25)
    rest = build_dataset("eurosat_sar", root, "train", val_frac=0.25)
    assert (len(val), len(rest)) == (20, 60)
    assert set(val.names) | set(rest.names) == set(train.names)
    with pytest.raises(EmptySplit, match="--val_frac 0.1"):
        build_dataset("eurosat_sar", root, "val")
    with pytest.raises(UserError, match="val_frac must be a share"):
        build_dataset("eurosat_sar", root, "train", val_frac=2)


def test_eurosat_bands_by_name_or_order(copy: Any) -> None:
    root = copy("eurosat_sar")
    data = build_dataset("eurosat_sar", root, "train")
    first = data.read(0)
    stored = read_raster(root / f"{data.names[0]}.tif")
    assert np.array_equal(first, stored.values[[1, 0]])  # VV, VH in the file; VH, VV delivered
    assert np.array_equal(build_dataset("eurosat_sar", root, "train", bands="VV,VH").read(0), stored.values)
    rewrite(root / f"{data.names[0]}.tif", lambda values: values[:1])
    with pytest.raises(UnreadableSample, match=r"has no band VH"):
        data.read(0)
    rewrite(root / f"{data.names[1]}.tif", lambda values: values[:, :60])
    with pytest.raises(UnreadableSample, match="has 60x64 pixels, expected 64x64"):
        data.read(1)
    path = root / f"{data.names[2]}.tif"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UnreadableSample, match="cannot be read"):
        data.read(2)


def test_eurosat_layout(copy: Any) -> None:
    root = copy("eurosat_sar")
    (root / "Forest").rename(root / "Wald")
    with pytest.raises(UserError, match="without Forest and with Wald besides"):
        build_dataset("eurosat_sar", root, "train")


# DFC2020 ---------------------------------------------------------------------------------------------------------


def test_dfc_label_tables() -> None:
    dfc, igbp = label_table("dfc", no_savanna=False), label_table("igbp", no_savanna=False)
    assert dfc == {0: 255, **{value: value - 1 for value in range(1, 11)}}
    # the contract: 0->0, 1-5->1, 6-7->2, 8-9->3, 10->4, 11->5, 12->6, 13->7, 14->6, 15->8, 16->9, 17->10; minus 1
    groups = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]
    assert igbp == {value: group - 1 if group else 255 for value, group in enumerate(groups)}
    without = label_table("igbp", no_savanna=True)
    assert without[8] == without[9] == 255
    assert [without[value] for value in (7, 10, 17)] == [1, 2, 8]


def test_both_label_sets_of_dfc_agree_on_generated_data(made: Any) -> None:
    root = made("dfc2020")
    dfc, igbp = (build_dataset("dfc2020", root, "train+test", label_set=kind) for kind in ("dfc", "igbp"))
    for index in range(len(dfc)):
        first, second = (data.get_batch(np.array([index]))["label"].numpy() for data in (dfc, igbp))
        assert np.array_equal(first, second)
        assert (first[0, :4] == 255).all()
    assert dfc.identity() != igbp.identity()
    fewer = build_dataset("dfc2020", root, "test", no_savanna="true")
    assert len(fewer.spec.classes) == 9
    assert "savanna" not in fewer.spec.classes
    label = fewer.get_batch(np.array([0]))["label"].numpy()
    assert label[label != 255].max() == 8
    assert len(build_dataset("dfc2020", root, "val", val_frac=0.4)) == 1


def test_mixed_label_sets_are_refused_by_their_values(copy: Any) -> None:
    root = copy("dfc2020")
    for season in ("ROIs0000_autumn", "ROIs0000_winter"):
        for place in (root / season).glob("dfc_*"):
            for path in place.glob("*.tif"):
                other = place.parent / place.name.replace("dfc_", "lc_") / path.name.replace("_dfc_", "_lc_")
                values = read_raster(path).values, read_raster(other).values
                rewrite(path, lambda _, new=values[1][:1]: new)
                rewrite(other, lambda _, new=values[0]: new)
    with pytest.raises(UserError, match=r"holds the value 17, but --label_set dfc knows 0 to 10.*IGBP"):
        build_dataset("dfc2020", root, "train")
    with pytest.raises(UserError, match="hold no value above 10.*Use --label_set dfc"):
        build_dataset("dfc2020", root, "train", label_set="igbp")
    unchecked = build_dataset("dfc2020", root, "train", check="none")
    with pytest.raises(UnreadableSample, match=r"label value\(s\) .*expected 0, 1.*IGBP numbers"):
        unchecked.get_batch(np.array([0]))
    with pytest.raises(UserError, match="--label_set is 'modis'"):
        build_dataset("dfc2020", root, "train", label_set="modis")


def test_dfc_evaluates_on_one_folder_alone(copy: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = copy("dfc2020")
    alone = build_dataset("dfc2020", root, "test")
    assert not caplog.records
    for kind in ("s1_0", "dfc_0"):
        for folder in ("ROIs0000_validation", "ROIs0000_test"):
            shutil.copytree(root / kind, root / folder / kind)
    next((root / "ROIs0000_test/s1_0").iterdir()).unlink()
    with caplog.at_level("WARNING", logger=get_logger().name):
        get_logger().addHandler(caplog.handler)
        test = build_dataset("dfc2020", root, "test")
        get_logger().removeHandler(caplog.handler)
    assert [name.partition("/")[0] for name in test.names] == ["s1_0"] * len(alone)
    said = "\n".join(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert f"{len(alone)} patches of ./s1_0; {len(alone)} of ROIs0000_validation/s1_0 are left out" in said
    assert f"; {len(alone) - 1} of ROIs0000_test/s1_0 are left out ({len(alone) - 1} of them have the same" in said
    chosen = build_dataset("dfc2020", root, "test", test_folder="ROIs0000_test")
    assert len(chosen) == len(alone) - 1
    assert all(name.startswith("ROIs0000_test/") for name in chosen.names)
    assert not any("s1_0" in name for name in build_dataset("dfc2020", root, "train").names)
    shutil.rmtree(root / "ROIs0000_test")
    with pytest.raises(UserError, match=r"'ROIs0000_test'; .* in \., ROIs0000_validation \(\. is"):
        build_dataset("dfc2020", root, "test", test_folder="ROIs0000_test")


def test_dfc_layout(tmp_path: Path, copy: Any) -> None:
    with pytest.raises(UserError, match="does not hold DFC2020"):
        build_dataset("dfc2020", tmp_path, "train")
    root = copy("dfc2020")
    data = build_dataset("dfc2020", root, "train")
    label = Path(data.label_path(data.names[0]))  # type: ignore[attr-defined]
    rewrite(label, lambda values: values[:, :128])
    with pytest.raises(UnreadableSample, match="different grids: 256x256 pixels against 128x256"):
        data.get_batch(np.array([0]))
    label.unlink()
    with pytest.raises(UnreadableSample, match="file does not exist"):
        data.get_batch(np.array([0]))


# Sen1Floods11 ----------------------------------------------------------------------------------------------------


def test_floods_in_the_official_layout(made: Any) -> None:
    root = made("sen1floods11")
    counts = {split: len(build_dataset("sen1floods11", root, split)) for split in get_spec("sen1floods11").splits}
    assert counts == {"train": 3, "val": 2, "test": 2, "bolivia": 1}
    both = build_dataset("sen1floods11", root, "train", bands="s1s2")
    batch = both.get_batch(np.array([0]))
    name = both.names[0]
    sar = read_raster(root / HAND / f"S1Hand/{name}_S1Hand.tif").floats()
    assert np.array_equal(batch["image"][0, :2].numpy(), sar[[1, 0]], equal_nan=True)
    optical = read_raster(root / HAND / f"S2Hand/{name}_S2Hand.tif").values
    assert np.array_equal(batch["image"][0, 2:].numpy(), optical.astype(np.float32))
    assert set(np.unique(batch["label"])) == {0, 1, 255}
    part = take_fraction(both, 0.5, seed=0, ids_file=root.parent / "ids.txt")
    assert len(part) == 2
    assert "label" in part.get_batch(np.array([0]))


def test_bad_flood_chips_are_named(copy: Any) -> None:
    root = copy("sen1floods11")
    data = build_dataset("sen1floods11", root, "train")
    folder = root / HAND
    rewrite(folder / f"S1Hand/{data.names[0]}_S1Hand.tif", lambda values: np.full_like(values, np.nan))
    with pytest.raises(UnreadableSample, match=rf"no valid pixel.*skip={data.names[0]}"):
        data.get_batch(np.array([0]))
    assert len(build_dataset("sen1floods11", root, "train", skip=data.names[0])) == 2
    rewrite(folder / f"LabelHand/{data.names[1]}_LabelHand.tif", lambda values: values + 5)
    with pytest.raises(UnreadableSample, match=r"label value\(s\) 4, 5, 6; expected -1, 0, 1"):
        data.get_batch(np.array([1]))
    path = folder / f"LabelHand/{data.names[2]}_LabelHand.tif"
    import rasterio

    with rasterio.open(path) as source:
        moved = source.transform @ source.transform.translation(3, 0) if hasattr(source.transform, "__matmul__") \
            else source.transform * source.transform.translation(3, 0)  # fmt: skip
    rewrite(path, lambda values: values, transform=moved)
    with pytest.raises(UnreadableSample, match="different grids: corner"):
        data.get_batch(np.array([2]))
    path.unlink()
    with pytest.raises(UserError, match="1 of 3 chips .* have no file"):
        build_dataset("sen1floods11", root, "train")
    assert len(build_dataset("sen1floods11", root, "train", missing="skip")) == 2
    with pytest.raises(UserError, match="no list of split 'train'"):
        build_dataset("sen1floods11", root, "train", lists=str(root))
    with pytest.raises(UserError, match="does not hold Sen1Floods11"):
        build_dataset("sen1floods11", root / "splits", "train")


@pytest.mark.skipif(not REALDATA.is_dir(), reason="../shared/realdata is not beside the checkout")
def test_real_chips_are_read_and_the_empty_one_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("India_900498\nNigeria_812045\nParaguay_34417\nSpain_7370579\n")
    data = build_dataset("sen1floods11", REALDATA, "test", lists=str(tmp_path))
    batch = data.get_batch(np.array([0, 1]))
    assert (batch["label"][0] == 1).sum() == 123_953
    invalid = ~np.isfinite(batch["image"][1].numpy())
    assert invalid.sum() == 1158
    with pytest.raises(UnreadableSample, match="sample Paraguay_34417 cannot be used.*all NaN"):
        data.get_batch(np.array([2]))
    (tmp_path / "test.txt").write_text("Spain_7370579_S1Hand.tif,Spain_7370579_LabelHand.tif\n")
    both = build_dataset("sen1floods11", REALDATA, "test", lists=str(tmp_path), bands="s1s2")
    means = both.read(0).mean(axis=(1, 2))
    assert means[0] < means[1] < 0
    assert means[2:5] == pytest.approx([1483.0, 1270.4, 1269.8], abs=0.1)


# Satlas ----------------------------------------------------------------------------------------------------------


def test_satlas(copy: Any) -> None:
    root = copy("satlas")
    data = build_dataset("satlas", root, "train")
    batch = data.get_batch(np.array([0]))
    assert batch["image"].shape == (1, 9, 512, 512)
    assert 100 < float(batch["image"].nanmean()) < 5000
    label = batch["label"].numpy()
    assert (label[:, :, :8] == 255).all()
    assert set(np.unique(label)) == {0, 1, 2, 3, 4, 255}
    assert data.folders == ["S2B_MSIL1C_20221230T180749_N0509_R041_T13UCR_20221230T195817"]  # type: ignore[attr-defined]
    names = list(data.names)
    assert len(build_dataset("satlas", root, "val", val_frac=0.4)) == 1
    (root / f"static/{names[0]}/land_cover.png").unlink()
    with pytest.raises(UserError, match="1 of 3 tiles.*missing=skip"):
        build_dataset("satlas", root, "train")
    assert len(build_dataset("satlas", root, "train", missing="skip")) == 2
    rewrite(root / f"static/{names[1]}/land_cover.png", lambda values: values + 20)
    with pytest.raises(UnreadableSample, match="expected 0, 1, 2"):
        data.get_batch(np.array([1]))
    with pytest.raises(UserError, match="does not hold Satlas"):
        build_dataset("satlas", root / "static", "train")
    (root / "metadata/train_lowres.json").write_text("{}x")
    with pytest.raises(UserError, match="no JSON list"):
        build_dataset("satlas", root, "train")


# BigEarthNet v2 with Sentinel-2 ----------------------------------------------------------------------------------


def test_reben_bands_are_enlarged_by_nearest_neighbour(made: Any) -> None:
    root = made("benv2")
    data = build_dataset("benv2", root, "train", bands="all_full")
    image, name = data.read(1), data.names[1]
    folder = next((root / "BigEarthNet-S2").glob("*")) / f"{next((root / 'BigEarthNet-S2').glob('*')).name}_0_1"
    for band, factor in (("B02", 1), ("B05", 2), ("B09", 6)):
        stored = read_raster(folder / f"{folder.name}_{band}.tif").values[0].astype(np.float32)
        assert np.array_equal(image[data.spec.bands.index(band)], np.kron(stored, np.ones((factor, factor))))
    sar = build_dataset("benv2", root, "train")
    assert sar.names[1] == name
    assert np.array_equal(sar.read(1), image[:2])
    assert build_dataset("benv2", root / "BigEarthNet-S2", "train", bands="s2", metadata=root / "metadata.parquet")


def test_reben_lmdb_holds_the_same_values(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lmdb
    from safetensors.numpy import load

    from scripts import pack_dataset

    root = made("benv2")
    command = ["pack", "--dataset", "benv2", "--data_path", str(root), "--format", "lmdb", "--out", str(tmp_path / "x")]
    # Twice, the second time with more bands: records that lack some are written again.
    for bands in ("all", "all_full"):
        monkeypatch.setattr("sys.argv", [*command, "--data_option", f"bands={bands}"])
        pack_dataset.main()
        assert "written now, 0 were there" in capsys.readouterr().out
    with lmdb.open(str(tmp_path / "x"), readonly=True, lock=False) as store, store.begin() as reading:
        records = {key.decode(): load(bytes(value)) for key, value in reading.cursor()}
    sar = next(record for key, record in records.items() if key.startswith("S1"))
    optical = next(record for key, record in records.items() if key.startswith("S2"))
    assert {key: value.dtype.name for key, value in sar.items()} == {"VH": "float32", "VV": "float32"}
    assert [optical[band].shape for band in ("B02", "B05", "B09")] == [(120, 120), (60, 60), (20, 20)]
    assert optical["B02"].dtype == np.uint16
    for bands in ("all_full", "s2", "s1", "B09,VV"):
        options = {"metadata": root / "metadata.parquet", "bands": bands}
        first = build_dataset("benv2", root, "train+val+test", **options)
        second = build_dataset("benv2", tmp_path / "x", "train+val+test", **options)
        for index in range(len(first)):
            assert np.array_equal(first.read(index), second.read(index))


def test_reben_bad_input(copy: Any, tmp_path: Path) -> None:
    import pandas as pd

    root = copy("benv2")
    data = build_dataset("benv2", root, "train", bands="s2", check="none")
    broken = next((root / "BigEarthNet-S2").rglob("*_0_0_B08.tif"))
    rewrite(broken, lambda values: values[:, :100, :100])
    with pytest.raises(UnreadableSample, match="has shape 100x100, expected 120, 60 or 20 px"):
        data.read(0)
    broken.unlink()
    with pytest.raises(UserError, match="1 of 3 patches looked for are listed but absent"):
        build_dataset("benv2", root, "train", bands="s2")
    shutil.rmtree(root / "BigEarthNet-S2")
    with pytest.raises(UserError, match="no Sentinel-2 patches for the bands B02"):
        build_dataset("benv2", root, "train", bands="s2")
    table = pd.read_parquet(root / "metadata.parquet").drop(columns="patch_id")
    table.to_parquet(tmp_path / "without.parquet")
    with pytest.raises(UserError, match="no column patch_id"):
        build_dataset("benv2", root, "train", bands="s2", metadata=tmp_path / "without.parquet")


# Generator and check ---------------------------------------------------------------------------------------------


def test_generator_repeats_and_refuses(made: Any, tmp_path: Path) -> None:
    make_neighbour_data("dfc2020", tmp_path / "a", samples=3)
    for path in (tmp_path / "a").rglob("*.tif"):
        assert path.read_bytes() == (made("dfc2020") / path.relative_to(tmp_path / "a")).read_bytes()
    assert make_neighbour_data("dfc2020", tmp_path / "a", samples=3) == 3
    with pytest.raises(UserError, match="holds other files"):
        make_neighbour_data("dfc2020", tmp_path / "a", samples=4)
    with pytest.raises(UserError, match="3 or more"):
        make_neighbour_data("dfc2020", tmp_path / "b", samples=2)


@pytest.mark.parametrize("dataset", ["eurosat_sar", "dfc2020", "sen1floods11", "satlas", "benv2"])
def test_data_check_finds_nothing_wrong_with_generated_data(made: Any, dataset: str) -> None:
    found = examine(dataset, made(dataset))
    assert [finding.text() for finding in found.errors()] == []
    assert found.facts is not None
    assert len(found.facts.index) == sum(found.counts.values())
    if dataset == "sen1floods11":
        assert found.classes["train"]["water"] > 100_000  # pixels


def test_data_check_names_bad_chips(copy: Any) -> None:
    root = copy("sen1floods11")
    chip = build_dataset("sen1floods11", root, "train").names[0]
    rewrite(root / HAND / f"LabelHand/{chip}_LabelHand.tif", lambda values: values + 5)
    found = examine("sen1floods11", root)
    assert [(one.topic, one.names[0].split()[0]) for one in found.errors()] == [("unreadable", chip)]


def test_packed_stores_keep_the_bands_and_hold_no_label_maps(made: Any, tmp_path: Path) -> None:
    from sarwmix.data.packed import pack

    source = build_dataset("benv2", made("benv2"), "train", bands="all")
    pack([source], tmp_path / "packed")
    packed = build_dataset("benv2", tmp_path / "packed", "train", bands="all")
    assert np.array_equal(packed.get_batch(np.arange(3))["image"], source.get_batch(np.arange(3))["image"])
    with pytest.raises(UserError, match=r"bands VH, VV, B02.* asked for VH, VV in dB.*--bands"):
        build_dataset("benv2", tmp_path / "packed", "train")
    with pytest.raises(UserError, match="holds no label maps"):
        pack([build_dataset("dfc2020", made("dfc2020"), "train")], tmp_path / "maps")


def test_pretraining_refuses_reflectances(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import main_pretrain

    monkeypatch.setattr("sys.argv", ["x", "--dataset", "satlas", "--data_path", str(made("satlas"))])
    with pytest.raises(UserError, match="the bands of 'satlas' are in reflectance"):
        main_pretrain.open_data(main_pretrain.get_parser().parse_args())
    monkeypatch.setattr("sys.argv", ["x", "--dataset", "dfc2020", "--data_path", str(made("dfc2020"))])
    assert len(main_pretrain.open_data(main_pretrain.get_parser().parse_args())) == 3


def test_statistics_of_reflectances(made: Any) -> None:
    from sarwmix.checks.statistics import compute_moments

    data = build_dataset("benv2", made("benv2"), "train", bands="VV,B04")
    found = compute_moments(data).statistics("here")
    pixels = np.stack([data.read(index) for index in range(len(data))])
    for band in range(2):
        values = pixels[:, band].astype(np.float64)
        assert found.mean[band] == pytest.approx(values.mean(), rel=1e-5)
        assert found.p99[band] == pytest.approx(np.percentile(values, 99), rel=0.01)


def test_eurosat_published_lists(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    root, lists = tmp_path / "eurosat", tmp_path / "lists"
    make_neighbour_data("eurosat_sar", root, samples=100)
    files = sorted(path for path in root.rglob("*.tif"))
    numbers = list(range(len(files)))
    _, tested = train_test_split(
        numbers, train_size=0.8, stratify=[path.parent.name for path in files], random_state=42
    )
    test = build_dataset("eurosat_sar", root, "test", lists="fgmae")
    assert set(test.names) == {f"{files[number].parent.name}/{files[number].stem}" for number in tested}
    assert not set(test.names) & set(build_dataset("eurosat_sar", root, "train", lists="fgmae").names)
    lists.mkdir()
    for part, some in (("train", files[:6]), ("val", files[6:8]), ("test", files[8:])):
        text = "\n".join(path.stem + ".jpg" for path in some)
        (lists / f"eurosat-{part}.txt").write_bytes(text.encode("utf-16"))
    val = build_dataset("eurosat_sar", root, "val", lists=str(lists))
    assert list(val.names) == [f"{path.parent.name}/{path.stem}" for path in files[6:8]]
    (lists / "eurosat-val.txt").write_text(files[0].stem)
    with pytest.raises(UserError, match="is in train and again in val"):
        build_dataset("eurosat_sar", root, "test", lists=str(lists))
