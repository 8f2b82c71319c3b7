"""LMDB of safetensors: reading, resumable writing, damaged records."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest
from safetensors.numpy import load, save

from sarwmix.data.base import UnreadableSample
from sarwmix.data.io import lmdb as lmdb_source
from sarwmix.data.io.lmdb import LmdbPatches, parse_header, write_lmdb
from sarwmix.data.loader import build_loader
from sarwmix.data.registry import build_dataset
from tests.bigearthnet_fixtures import metadata_rows, patch_image, patch_name, write_parquet
from util.errors import UserError

NAMES = [patch_name(i) for i in range(6)]


def read_patch(name: str) -> np.ndarray:
    return patch_image(NAMES.index(name))


def put(path: Path, name: str, record: bytes) -> None:
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.put(name.encode(), record)


def read(path: Path, name: str) -> np.ndarray:
    out = np.empty((2, 120, 120), dtype=np.float32)
    LmdbPatches(path, ("VH", "VV"), 120).read_into(name, out)
    return out


def test_written_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    assert write_lmdb(tmp_path / "a", NAMES, read_patch) == 6
    with lmdb.open(str(tmp_path / "a"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert [key.decode() for key, _ in transaction.cursor()] == sorted(NAMES)
        tensors = load(transaction.get(NAMES[2].encode()))
    assert set(tensors) == {"VH", "VV"}
    assert tensors["VH"].dtype == np.float32
    assert np.array_equal(tensors["VV"], patch_image(2)[1])


def test_writing_resumes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_source, "_COMMIT_EVERY", 2)
    monkeypatch.setattr(lmdb_source, "_FIRST_MAP_SIZE", 1 << 18)  # too small at first: the map must grow
    asked = []

    def stops(name: str) -> np.ndarray:
        asked.append(name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read_patch(name)

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(tmp_path / "a", NAMES, stops)
    seen: list[int] = []
    assert write_lmdb(tmp_path / "a", reversed(NAMES), stops, progress=seen.append) == 4
    assert sorted(asked[4:]) == sorted(NAMES[2:])
    assert seen[-1] == 6
    for i, name in enumerate(NAMES):
        assert np.array_equal(read(tmp_path / "a", name), patch_image(i))


def test_records_that_lack_a_band_are_written_again(tmp_path: Path) -> None:
    def optical(name: str, bands: int) -> np.ndarray:
        values = np.arange(bands, dtype=np.float32)[:, None, None] + NAMES.index(name)
        return np.broadcast_to(values, (bands, 120, 120)).copy()

    def write(names: list[str], *bands: str) -> int:
        return write_lmdb(tmp_path / "a", names, lambda name: optical(name, len(bands)), bands=bands, native=True)

    put(tmp_path / "a", NAMES[5], save({"B02": np.zeros((120, 120), np.float32)})[:-8])  # cut short
    assert write(NAMES[:2], "B02", "B03") == 2
    assert write(NAMES, "B03", "B02", "B01") == 6
    assert write(NAMES, "B03", "B01") == 0
    assert write(NAMES[:1], "B11") == 1
    with lmdb.open(str(tmp_path / "a"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        first, last = (load(transaction.get(NAMES[i].encode())) for i in (0, 5))
    assert set(first) == {"B01", "B02", "B03", "B11"}
    assert set(last) == {"B01", "B02", "B03"}
    assert [int(last[band][0, 0]) for band in ("B03", "B02", "B01")] == [5, 6, 7]


def test_other_types_and_order_of_tensors(tmp_path: Path) -> None:
    image = patch_image(1)
    put(tmp_path / "a", NAMES[0], save({"VV": image[1].astype(np.float64), "VH": image[0], "extra": np.zeros(3)}))
    put(tmp_path / "a", NAMES[1], save({"VV": image[1], "VH": image[0]}))
    for name in NAMES[:2]:
        assert np.array_equal(read(tmp_path / "a", name), image)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "truncated"),
        (b"\x00" * 4, "truncated"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "truncated"),
        ((4).to_bytes(8, "little") + b"nope" + b"\x00" * 100, "no safetensors record"),
        (save({"VH": np.zeros((120, 120), np.float32)}), "no tensor 'VV'"),
        (save({b: np.zeros((60, 120), np.float32) for b in ("VH", "VV")}), r"shape \(60, 120\)"),
        (save({b: np.zeros((120, 120), np.float32) for b in ("VH", "VV")})[:-8], "no safetensors|truncated"),
        (save({b: np.zeros((120, 120), bool) for b in ("VH", "VV")}), "type BOOL"),
    ],
)
def test_damaged_records_are_named(record: bytes, message: str, tmp_path: Path) -> None:
    put(tmp_path / "a", NAMES[0], record)
    with pytest.raises(UnreadableSample, match=message):
        read(tmp_path / "a", NAMES[0])


def test_truncated_record_after_a_good_one(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a", NAMES[:1], read_patch)
    good = save({"VH": patch_image(0)[0], "VV": patch_image(0)[1]})
    put(tmp_path / "a", NAMES[1], good[:-8])
    patches = LmdbPatches(tmp_path / "a", ("VH", "VV"), 120)
    out = np.empty((2, 120, 120), dtype=np.float32)
    patches.read_into(NAMES[0], out)
    with pytest.raises(UnreadableSample, match="truncated"):
        patches.read_into(NAMES[1], out)
    with pytest.raises(UnreadableSample, match="not in the LMDB"):
        patches.read_into(NAMES[2], out)


def test_header_offsets_are_checked() -> None:
    def header(start: int, end: int, shape: str = "[2, 2]") -> bytes:
        return f'{{"VH": {{"dtype": "F32", "shape": {shape}, "data_offsets": [{start}, {end}]}}}}'.encode()

    assert parse_header(header(0, 16), 16) == {"VH": ("<f4", (2, 2), 0, 16)}
    for bad in (header(0, 20), header(8, 24), header(-4, 12), header(16, 0)):
        with pytest.raises(ValueError):
            parse_header(bad, 16)


def test_data_set_with_workers(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a", NAMES, read_patch)
    metadata = write_parquet(tmp_path / "metadata.parquet", metadata_rows(range(6)))
    dataset = build_dataset("benv2", tmp_path / "a", "train", metadata=metadata, check="all")
    dataset[0]
    loader = build_loader(dataset, batch_size=1, shuffle=False, drop_last=False, num_workers=2, timeout=60)
    names = []
    for batch in loader:
        names += batch["name"]
        assert np.array_equal(batch["image"][0].numpy(), read_patch(batch["name"][0]))
    loader.close()
    assert names == [patch_name(i) for i in (0, 2, 4, 5)]


def test_labels_are_not_needed_for_pretraining(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a", NAMES, read_patch)
    metadata = tmp_path / "names_train.csv"
    metadata.write_text("\n".join(NAMES))
    with pytest.raises(UserError, match="has labels for .* or labels=none for pretraining"):
        build_dataset("benv1", tmp_path / "a", "train", metadata=metadata)
    dataset = build_dataset("benv1", tmp_path / "a", "train", metadata=metadata, labels="none")
    assert dataset.labels is None
    assert "label" not in dataset.get_batch(np.arange(6))
    with pytest.raises(UserError, match="labels must be needed or none"):
        build_dataset("benv1", tmp_path / "a", "train", metadata=metadata, labels="maybe")


def test_no_lmdb(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no database")
    with pytest.raises(UserError, match="is no LMDB"):
        LmdbPatches(tmp_path, ("VH", "VV"), 120)


def test_several_splits_share_one_file(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a", NAMES, read_patch)
    metadata = write_parquet(tmp_path / "metadata.parquet", metadata_rows(range(6)))
    first = build_dataset("benv2", tmp_path / "a", "train", metadata=metadata)
    second = build_dataset("benv2", tmp_path / "a", "test", metadata=metadata)
    for _ in range(2):
        assert np.array_equal(first[0]["image"].numpy(), patch_image(0))
        assert np.array_equal(second[0]["image"].numpy(), patch_image(3))
