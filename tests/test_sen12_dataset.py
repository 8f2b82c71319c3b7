"""The data set of pairs: both layouts alike, units, splits, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sen12_fixtures import SIZE, make_raw, run

from sarwmix.data.base import UnreadableSample
from sarwmix.data.loader import build_loader
from sarwmix.data.registry import build_dataset, get_spec
from sarwmix.datasets.sen12flood import PairDataset, held_out_sequences, power_to_db
from sarwmix.sen12flood.layout import PairRow, npy_header
from sarwmix.synthetic.sen12flood import DemoOptions
from util.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tree in both layouts; do not change it."""
    base = tmp_path_factory.mktemp("sen12_dataset")
    raw = make_raw(base, DemoOptions(train=4, test=1, frames=4, size=SIZE, seed=3, swath_edges=0.3))
    for layout in ("npy", "store"):
        run(raw, base / layout, layout=layout)
    return {layout: base / layout / "out" for layout in ("npy", "store")}


@pytest.fixture
def npy(prepared: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared["npy"], tmp_path / "npy"))


@pytest.fixture
def store(prepared: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared["store"], tmp_path / "store"))


def open_pairs(path: Path, split: str = "train", **options: object) -> PairDataset:
    data = build_dataset("sen12flood", path, split, **options)
    assert isinstance(data, PairDataset)
    return data


# Samples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test", "train+test"])
def test_layouts_give_the_same_samples(prepared: dict[str, Path], split: str) -> None:
    one, other = (open_pairs(prepared[layout], split) for layout in ("npy", "store"))
    assert one.identity() == other.identity()
    assert len(one) == len(other) > 0
    for index in range(len(one)):
        a, b = one[index], other[index]
        assert a.keys() == b.keys() == {"image1", "image2", "valid1", "valid2", "label", "name"}
        assert a["name"] == b["name"]
        assert a["label"] == b["label"]
        for key in ("image1", "image2", "valid1", "valid2"):
            assert torch.equal(a[key], b[key]), key
        assert a["image1"].shape == (2, SIZE, SIZE)
        assert a["image1"].dtype == torch.float32
        assert a["label"].dtype == torch.int64
        assert int(a["label"]) == int(a["name"][-1])
    batch_a, batch_b = (data.get_batch(np.array([2, 0, 1])) for data in (one, other))
    for key in ("image1", "image2", "label", "index"):
        assert torch.equal(batch_a[key], batch_b[key])
    assert batch_a["name"] == batch_b["name"] == [one[i]["name"] for i in (2, 0, 1)]


@pytest.mark.parametrize("layout", ["npy", "store"])
def test_sample_equals_the_file(prepared: dict[str, Path], layout: str) -> None:
    data = open_pairs(prepared[layout])
    sample = data[-1]
    array = np.load(prepared["npy"] / "train" / f"{sample['name']}.npy")
    np.testing.assert_array_equal(sample["image1"].numpy(), array[0])
    np.testing.assert_array_equal(sample["image2"].numpy(), array[1])


@pytest.mark.parametrize("layout", ["npy", "store"])
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_delivers_every_pair_once(prepared: dict[str, Path], layout: str, workers: int) -> None:
    data = open_pairs(prepared[layout])
    loader = build_loader(data, batch_size=3, shuffle=False, drop_last=False, num_workers=workers)
    batches = list(loader)
    loader.close()
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(len(data)))
    assert all(torch.equal(b["image2"][0], data[int(b["index"][0])]["image2"]) for b in batches)
    assert [b["replaced"] for b in batches] == [[]] * len(batches)


def test_subsets_keep_their_kind(prepared: dict[str, Path]) -> None:
    data = open_pairs(prepared["store"])
    part = data.subset(np.array([3, 1]))
    assert isinstance(part, PairDataset)
    assert [part[i]["name"] for i in range(2)] == [data[3]["name"], data[1]["name"]]
    assert torch.equal(part[0]["image1"], data[3]["image1"])
    assert part.rows.tolist() == data.rows[[3, 1]].tolist()
    assert part.labels is not None
    assert data.labels is not None
    assert part.labels.tolist() == data.labels[[3, 1]].tolist()


def test_registry_entry() -> None:
    spec = get_spec("sen12flood")
    assert (spec.task, spec.bands, spec.classes) == ("pair", ("VH", "VV"), ("no flood", "flood"))
    assert spec.statistics[spec.default_statistics].mean == (-19.2309, -12.5951)  # BENv1, as the contract says


def test_a_folder_without_manifest_is_read_by_its_names(npy: Path, prepared: dict[str, Path]) -> None:
    for name in ("manifest.json", "pairs.csv", "images.csv", "sequences.csv"):
        (npy / name).unlink()
    (npy / "train" / ".hidden.npy").write_bytes(b"")
    data, known = open_pairs(npy), open_pairs(prepared["npy"])
    assert sorted(data.names) == sorted(known.names)
    assert data.shape == (2, SIZE, SIZE)
    (npy / "train" / "strange.npy").write_bytes(b"")
    with pytest.raises(UserError, match="'strange' is not of the form <folder>__<fileA>__<fileB>__<0 or 1>"):
        open_pairs(npy)


# Decibel ------------------------------------------------------------------------------------------------------------


def test_power_to_db_by_hand() -> None:
    power = torch.tensor([1.0, 0.01, 0.0, 1e-7, -0.5, float("nan"), float("inf")])
    db = power_to_db(power)
    torch.testing.assert_close(db[:4], torch.tensor([0.0, -20.0, -60.0, -70.0]), rtol=0, atol=1e-4)
    assert torch.isnan(db[4:]).all()


# Splits -------------------------------------------------------------------------------------------------------------


def fake_pairs(flooded: int, dry: int) -> list[PairRow]:
    pairs = []
    for number in range(flooded + dry):
        for label in (0, 1) if number < flooded else (0,):
            name = f"{number:04d}__a__b{label}__{label}"
            pairs.append(PairRow("train", name, f"{number:04d}", "a", f"b{label}", label, -1, -1))
    return pairs


def test_held_out_sequences_are_whole_and_stratified() -> None:
    held = held_out_sequences(fake_pairs(20, 10), 0.2)
    assert len(held) == 4 + 2
    assert len([f for f in held if int(f) < 20]) == 4
    assert held == held_out_sequences(list(reversed(fake_pairs(20, 10))), 0.2)
    # More of it keeps what was held out before: the order follows from the ids.
    assert held < held_out_sequences(fake_pairs(20, 10), 0.5)
    assert len(held_out_sequences(fake_pairs(2, 0), 0.01)) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0])
def test_fractions_that_make_no_sense(fraction: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        held_out_sequences(fake_pairs(4, 4), fraction)


def test_too_few_sequences_to_hold_out() -> None:
    with pytest.raises(UserError, match="leaves none to train or to select; expected at least two"):
        held_out_sequences(fake_pairs(1, 5), 0.5)


@pytest.mark.parametrize("layout", ["npy", "store"])
def test_val_is_part_of_train_and_test_is_untouched(prepared: dict[str, Path], layout: str) -> None:
    whole = set(open_pairs(prepared[layout]).names)
    train, val = (set(open_pairs(prepared[layout], split, val_frac=0.5).names) for split in ("train", "val"))
    assert train
    assert val
    assert train | val == whole
    assert not train & val
    assert not {n.split("__")[0] for n in train} & {n.split("__")[0] for n in val}
    assert list(open_pairs(prepared[layout], "test", val_frac="0.5").names) == list(
        open_pairs(prepared[layout], "test").names
    )


def test_val_needs_a_fraction(prepared: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has no validation split; --val_frac 0.1 holds out"):
        open_pairs(prepared["npy"], "val")
    with pytest.raises(UserError, match="val_frac is a number between 0 and 1, got 'much'"):
        open_pairs(prepared["npy"], "val", val_frac="much")


# Damage -------------------------------------------------------------------------------------------------------------


def first_file(npy: Path) -> Path:
    return npy / "train" / f"{open_pairs(npy).names[0]}.npy"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_header((2, 2, 8, 8)) + bytes(1024), r"holds float32 of shape \(2, 2, 8, 8\), expected float32 of shape"),
        (b"not an array", "is no readable .npy file"),
        (b"", "is no readable .npy file"),
        (npy_header((2, 2, SIZE, SIZE)) + bytes(100), "is truncated: 100 of 65536 bytes"),
        (None, "does not exist"),
    ],
)
def test_bad_pair_files_are_named_with_advice(npy: Path, content: bytes | None, message: str) -> None:
    path = first_file(npy)
    path.unlink() if content is None else path.write_bytes(content)
    data = open_pairs(npy)
    with pytest.raises(UnreadableSample, match=f"{message}.*run scripts/prepare_sen12flood.sh again") as caught:
        data[0]
    assert str(path) in str(caught.value)
    batch = open_pairs(npy, on_error="replace").get_batch(np.array([0, 1]))
    assert batch["replaced"][0][0] == data.names[0]
    assert batch["index"].tolist() == [1, 1]


def test_float64_pairs_are_refused(npy: Path) -> None:
    np.save(first_file(npy), np.zeros((2, 2, SIZE, SIZE)))
    with pytest.raises(UnreadableSample, match="holds float64 of shape"):
        open_pairs(npy)[0]


def test_an_image_without_any_finite_pixel_is_refused(npy: Path) -> None:
    array = np.load(first_file(npy))
    array[1, 0] = np.nan
    np.save(first_file(npy), array)
    with pytest.raises(UnreadableSample, match="without any finite pixel"):
        open_pairs(npy)[0]
    array[1, 0, 0, 0] = 1.0
    np.save(first_file(npy), array)
    sample = open_pairs(npy)[0]
    assert int(sample["valid2"][0].sum()) == 1


def test_damaged_stores_are_refused(store: Path) -> None:
    images = store / "images.npy"
    data = images.read_bytes()
    images.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"holds float32 of shape .* in \d+ bytes, expected float32 of shape"):
        open_pairs(store)
    images.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read .* with --overwrite"):
        open_pairs(store)
    images.write_bytes(data)
    table = (store / "pairs.csv").read_text()
    lines = table.splitlines()
    (store / "pairs.csv").write_text("\n".join([lines[0], lines[1].rsplit(",", 1)[0] + ",999"]) + "\n")
    with pytest.raises(UserError, match="names rows that"):
        open_pairs(store)
    (store / "pairs.csv").write_text("\n".join(lines[:2])[:-3] + "\n")
    with pytest.raises(UserError, match="line 2"):
        open_pairs(store)
    (store / "pairs.csv").unlink()
    with pytest.raises(UserError, match="pairs.csv cannot be read"):
        open_pairs(store)


def test_unfinished_and_empty_folders_are_refused(store: Path, tmp_path: Path) -> None:
    content = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**content, "status": "in progress"}))
    with pytest.raises(UserError, match=r"is an unfinished preparation \(in progress\); run the same command again"):
        open_pairs(store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no prepared SEN12-FLOOD"):
        open_pairs(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        open_pairs(tmp_path / "nowhere")


def test_kept_intermediate_store_can_be_read(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, DemoOptions(train=1, test=1, frames=3, size=32, swath_edges=0))
    run(raw, tmp_path, size=32, keep_intermediate=True)
    kept = open_pairs(tmp_path / "work" / "sen12flood_work" / "aligned")
    assert torch.equal(kept[0]["image1"], open_pairs(tmp_path / "out")[0]["image1"])


# Bands and batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npy", "store"])
@pytest.mark.parametrize("bands", ["VV,VH", "VV", "VH"])
def test_bands_are_chosen_and_ordered_by_name(prepared: dict[str, Path], layout: str, bands: str) -> None:
    usual, chosen = open_pairs(prepared[layout]), open_pairs(prepared[layout], bands=bands)
    places = [("VH", "VV").index(band) for band in bands.split(",")]
    assert chosen.shape == (len(places), SIZE, SIZE)
    assert chosen.statistics.mean == tuple(usual.statistics.mean[place] for place in places)
    expected, found = (data.get_batch(np.array([1, 0])) for data in (usual, chosen))
    for key in ("image1", "image2"):
        assert torch.equal(found[key], expected[key][:, places])
        assert torch.equal(chosen[2][key], usual[2][key][places])
        assert not torch.equal(expected[key][:, 0], expected[key][:, 1])
    single, all_bands = chosen.single_images(), usual.single_images()
    np.testing.assert_array_equal(single.read(1), all_bands.read(1)[places])
    if layout == "store":
        rows = chosen.rows[:2, 0]
        assert torch.equal(chosen.read_rows(rows), usual.read_rows(rows)[:, places])
        assert torch.equal(usual.read_rows(rows)[0], usual[0]["image1"])


@pytest.mark.parametrize("layout", ["npy", "store"])
def test_both_images_of_a_batch_are_contiguous(prepared: dict[str, Path], layout: str) -> None:
    data = open_pairs(prepared[layout])
    buffer = np.full((2, 2, 2, SIZE, SIZE), np.nan, dtype=np.float32)
    for batch in (data.get_batch(np.array([1, 0])), data.get_batch(np.array([1, 0]), buffer)):
        assert batch["image1"].is_contiguous()
        assert batch["image2"].is_contiguous()
        assert torch.equal(batch["image1"][0], data[1]["image1"])
        assert torch.equal(batch["image2"][1], data[0]["image2"])
    assert torch.equal(torch.from_numpy(buffer[1]), batch["image2"])
