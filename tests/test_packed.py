"""Packed store: contents, equality with the source, interruption, damage, and the command."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sarwmix.data import packed, registry
from sarwmix.data.base import SarDataset, UnreadableSample
from sarwmix.data.packed import DamagedStore, PackedDataset, pack, read_manifest, verify_store
from sarwmix.data.registry import build_dataset
from tests.bigearthnet_fixtures import patch_name, write_benv2, write_tiff
from util.errors import UserError
from util.locks import FolderLock

ROOT = Path(__file__).resolve().parents[1]
COUNT = 24


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benv2(tmp_path_factory.mktemp("tree"), COUNT)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 rows, so that a few patches make several blocks, the last one short."""
    monkeypatch.setattr(packed, "BLOCK_ROWS", 4)
    monkeypatch.setattr(packed, "_PIECE_ROWS", 3)


def open_splits(root: Path, *splits: str, **options: Any) -> list[SarDataset]:
    return [build_dataset("benv2", root, split, **options) for split in splits or ("train", "val", "test")]


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store in blocks of 4 rows; do not write into it."""
    store = tmp_path_factory.mktemp("finished") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "BLOCK_ROWS", 4)
        pack(open_splits(tree), store)
    return store


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test", "train+val", "test+train", "train+test"])
def test_equal_to_the_source(tree: Path, finished: Path, split: str) -> None:
    source, store = build_dataset("benv2", tree, split), build_dataset("benv2", finished, split)
    assert isinstance(store, PackedDataset)
    assert store.all_finite  # counted when it was packed
    assert not source.all_finite  # nobody knows
    assert store.identity() == source.identity()
    indices = np.random.default_rng(0).permutation(len(source))
    ours, theirs = store.get_batch(indices), source.get_batch(indices)
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["label"], theirs["label"])
    assert ours["name"] == theirs["name"]
    assert torch.equal(store[1]["image"], source[1]["image"])
    assert np.array_equal(store.read(2), source.read(2))


def test_files_are_plain_arrays(tree: Path, finished: Path) -> None:
    """As documented, a store can be read with numpy alone."""
    manifest = json.loads((finished / "manifest.json").read_text())
    images = np.load(finished / "images.npy", mmap_mode="r")
    assert list(images.shape) == manifest["shape"]
    assert images.dtype == np.float32
    assert images.flags.c_contiguous
    offsets, text = np.load(finished / "offsets.npy"), np.load(finished / "names.npy")
    names = [text[a:b].tobytes().decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    splits = np.load(finished / "split.npy")
    for code, split in enumerate(manifest["splits"]):
        source = build_dataset("benv2", tree, split)
        rows = np.flatnonzero(splits == code)
        assert [names[r] for r in rows] == list(source.names)
        assert np.array_equal(np.load(finished / "labels.npy")[rows], source.labels)
        assert np.array_equal(images[rows[0]], source.read(0))
    assert (np.load(finished / "invalid.npy") == 0).all()
    assert str(tree) not in (finished / "manifest.json").read_text()


def test_survives_pickling(finished: Path) -> None:
    dataset = build_dataset("benv2", finished, "train")
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0]["image"], dataset[0]["image"])
    assert len(pickle.dumps(dataset)) < 50_000


def test_float16(tree: Path, tmp_path: Path) -> None:
    pack(open_splits(tree, "train"), tmp_path / "half", dtype="float16")
    source, store = build_dataset("benv2", tree, "train"), build_dataset("benv2", tmp_path / "half", "train")
    ours, theirs = store.get_batch(np.arange(5))["image"], source.get_batch(np.arange(5))["image"]
    assert ours.dtype == torch.float32
    assert (tmp_path / "half/images.npy").stat().st_size < 0.51 * len(source) * 115_200
    for below, error in ((16, 2**-8), (32, 2**-7), (64, 2**-6)):  # half the spacing of float16 numbers
        assert float((ours - theirs).abs()[theirs.abs() < below].max()) <= error
    assert float(theirs.abs().max()) < 64


def test_repacking_a_store(finished: Path, tmp_path: Path) -> None:
    pack(open_splits(finished), tmp_path / "again")
    before, after = content(finished), content(tmp_path / "again")
    for name in before:
        if name != "manifest.json":
            assert before[name] == after[name]


def test_subset_of_a_store_keeps_its_rows(finished: Path) -> None:
    dataset = build_dataset("benv2", finished, "val+train")
    part = dataset.subset(np.array([5, 0]))
    assert part.gathers
    assert torch.equal(part[0]["image"], dataset[5]["image"])


def test_wrong_requests(finished: Path, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds data set 'benv2', not 'benv1'.*--dataset benv2"):
        build_dataset("benv1", finished, "train")
    with pytest.raises(UserError, match="option 'metadata' has no effect on the packed store.*pack_dataset"):
        build_dataset("benv2", finished, "train", metadata="x")
    with pytest.raises(UserError, match="check must be one of"):
        build_dataset("benv2", finished, "train", check="maybe")
    pack(open_splits(tree, "train"), tmp_path / "s")
    with pytest.raises(UserError, match="no split 'val'; it has: train"):
        build_dataset("benv2", tmp_path / "s", "train+val")


# Invalid and unreadable ------------------------------------------------------------------------------------------


def band_path(root: Path, index: int) -> Path:
    name = patch_name(index)
    return root / "_".join(name.split("_")[:5]) / name / f"{name}_VV.tif"


@pytest.fixture
def spoilt(tree: Path, tmp_path: Path) -> Path:
    """A tree with a truncated patch (2), one without a valid pixel (5) and one with some invalid pixels (4)."""
    root = Path(shutil.copytree(tree, tmp_path / "spoilt"))
    band_path(root, 2).write_bytes(b"II*")
    write_tiff(band_path(root, 5), np.full((120, 120), np.nan, np.float32))
    band = np.full((120, 120), -10.0, np.float32)
    band[0, :7], band[1, 0] = np.nan, np.inf
    write_tiff(band_path(root, 4), band)
    return root


def test_unreadable_sample_stops_packing_by_name(spoilt: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        with pytest.raises(UserError, match=rf"{patch_name(2)} cannot be used.*--mark_unreadable"):
            pack(open_splits(spoilt), tmp_path / f"s{jobs}", jobs=jobs)
        with pytest.raises(DamagedStore, match="unfinished.*same pack_dataset command"):
            build_dataset("benv2", tmp_path / f"s{jobs}", "train")


def test_marked_samples_behave_as_in_the_source(spoilt: Path, tmp_path: Path) -> None:
    result = pack(open_splits(spoilt), tmp_path / "s", mark_unreadable=True)
    assert sorted(result.manifest.unreadable) == sorted([patch_name(2), patch_name(5)])
    names = list(build_dataset("benv2", tmp_path / "s", "train+val+test", on_error="replace").names)
    invalid = np.load(tmp_path / "s/invalid.npy")
    assert {names[i]: int(invalid[i]) for i in np.flatnonzero(invalid)} == {
        patch_name(2): -1, patch_name(4): 8, patch_name(5): -1,
    }  # fmt: skip
    strict = build_dataset("benv2", tmp_path / "s", "train")
    with pytest.raises(UnreadableSample, match=f"{patch_name(2)} cannot be used.*truncated"):
        strict.get_batch(np.arange(3))
    with pytest.raises(UnreadableSample):
        strict.read(1)
    store = build_dataset("benv2", tmp_path / "s", "train", on_error="replace")
    source = build_dataset("benv2", spoilt, "train", on_error="replace", check="none")
    ours, theirs = store.get_batch(np.arange(len(store))), source.get_batch(np.arange(len(store)))
    assert torch.equal(torch.nan_to_num(ours["image"], 99), torch.nan_to_num(theirs["image"], 99))
    assert torch.equal(ours["index"], theirs["index"])
    assert [name for name, _ in ours["replaced"]] == [name for name, _ in theirs["replaced"]] != []
    verify_store(tmp_path / "s")


# Interruption ----------------------------------------------------------------------------------------------------


class Stops(SarDataset):
    """Delivers the samples of another data set and stops at one of them."""

    def __init__(self, parent: SarDataset, at: int) -> None:
        super().__init__(parent.spec, parent.split, parent.statistics, parent.names, parent.labels)
        self.parent = parent
        self.at = at

    def read_into(self, index: int, out: np.ndarray) -> None:
        if index == self.at:
            raise KeyboardInterrupt
        self.parent.read_into(index, out)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_interrupted_packing_goes_on_with_the_same_bytes(tree: Path, tmp_path: Path, jobs: int) -> None:
    pack(open_splits(tree, "train"), tmp_path / "whole")
    dataset = build_dataset("benv2", tree, "train")
    with pytest.raises(KeyboardInterrupt):
        pack([Stops(dataset, 9)], tmp_path / "s")
    journal = tmp_path / "s" / packed.JOURNAL
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as file:
        file.write('{"block": 2, "crc')  # a line that was cut off
    result = pack([dataset], tmp_path / "s", jobs=jobs)
    assert (result.packed_blocks, result.kept_blocks) == (2, 2)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "s")]
    assert manifests[0] == manifests[1]
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_blocks_lost_by_a_power_failure_are_written_again(tree: Path, tmp_path: Path) -> None:
    dataset = build_dataset("benv2", tree, "train")
    with pytest.raises(KeyboardInterrupt):
        pack([Stops(dataset, 9)], tmp_path / "s")
    with (tmp_path / "s/images.npy").open("r+b") as file:
        file.seek(5000)
        file.write(bytes(1000))
    assert pack([dataset], tmp_path / "s").kept_blocks == 1
    verify_store(tmp_path / "s")


def test_killed_command_goes_on_with_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while two processes pack, twice, then to the end."""
    command = f"""
import sys, time
from sarwmix.data import packed
from sarwmix.data import registry
from sarwmix.datasets.bigearthnet import GeoTiffTree
packed.BLOCK_ROWS, packed._PIECE_ROWS = 2, 1
read = GeoTiffTree.read_into
def slow(self, name, out):
    time.sleep(0.02)
    read(self, name, out)
GeoTiffTree.read_into = slow
packed.pack([registry.build_dataset("benv2", {str(tree)!r}, s) for s in ("train", "test")], sys.argv[1], jobs=2)
"""

    def start(store: Path) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", command, str(store)]
        return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(packed, "BLOCK_ROWS", 2)
    pack(open_splits(tree, "train", "test"), tmp_path / "whole")
    store = tmp_path / "s"
    kills = 0
    for blocks in (2, 4):
        process = start(store)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            journal = store / packed.JOURNAL
            if journal.exists() and len(journal.read_bytes().splitlines()) >= blocks:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait(60)
    assert kills == 2
    assert not read_manifest(store).complete
    last = start(store)
    assert last.wait(60) == 0, last.stderr.read() if last.stderr else ""
    assert content(store) == content(tmp_path / "whole")


def test_finished_store_is_left_alone(tree: Path, tmp_path: Path) -> None:
    pack(open_splits(tree, "train"), tmp_path / "s")
    before = content(tmp_path / "s")
    result = pack(open_splits(tree, "train"), tmp_path / "s")
    assert result.packed_blocks == 0
    assert content(tmp_path / "s") == before


def test_other_content_is_not_overwritten_unasked(tree: Path, tmp_path: Path) -> None:
    pack(open_splits(tree, "train"), tmp_path / "s")
    for change in ({"dtype": "float16"}, {}):
        splits = ("train",) if change else ("train", "val")
        with pytest.raises(UserError, match="other content.*--overwrite"):
            pack(open_splits(tree, *splits), tmp_path / "s", **change)
    pack(open_splits(tree, "train", "val"), tmp_path / "s", overwrite=True)
    assert read_manifest(tmp_path / "s").splits == ("train", "val")
    verify_store(tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        pack(open_splits(tree, "train"), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_changed_labels_are_other_content(tree: Path, tmp_path: Path) -> None:
    datasets = open_splits(tree, "train")
    pack(datasets, tmp_path / "s")
    assert datasets[0].labels is not None
    datasets[0].labels = 1 - datasets[0].labels
    with pytest.raises(UserError, match="other content"):
        pack(datasets, tmp_path / "s")


def test_only_one_process_packs(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_LOCK_WAIT", 0.2)
    with (
        FolderLock(tmp_path / "s", "packing"),
        pytest.raises(UserError, match=r"written by process \d+ on .*, packing"),
    ):
        pack(open_splits(tree, "train"), tmp_path / "s")


def test_samples_in_two_splits_and_full_disks(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is in two splits"):
        pack(open_splits(tree, "train", "train"), tmp_path / "s")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="not enough space.*float16"):
        pack(open_splits(tree, "train"), tmp_path / "s")


class Dies(Stops):
    def read_into(self, index: int, out: np.ndarray) -> None:
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.parent.read_into(index, out)


def test_dead_packing_process_is_an_error_and_can_be_continued(tree: Path, tmp_path: Path) -> None:
    dataset = build_dataset("benv2", tree, "train")
    with pytest.raises(UserError, match="a packing process died"):
        pack([Dies(dataset, 9)], tmp_path / "s", jobs=2)
    pack([dataset], tmp_path / "s", jobs=2)
    verify_store(tmp_path / "s")


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_damaged_block_is_named(store: Path) -> None:
    flip(store / "images.npy", 128 + 9 * 115_200 + 77)  # row 9 lies in block 2
    with pytest.raises(DamagedStore, match=r"block 2 of 6 \(rows 8 to 11\) differs"):
        verify_store(store)
    with pytest.raises(DamagedStore, match="block 2 of 6"):
        build_dataset("benv2", store, "train", check="all")
    flip(store / "images.npy", 128 + 20)
    with pytest.raises(DamagedStore, match="block 0 of 6 .* and 1 more blocks"):
        verify_store(store)
    with pytest.raises(DamagedStore, match="block 0"):  # opening looks at the first and the last block
        build_dataset("benv2", store, "train")


def test_repair_writes_damaged_blocks_only(tree: Path, store: Path, finished: Path) -> None:
    flip(store / "images.npy", 128 + 9 * 115_200 + 77)
    result = pack(open_splits(tree), store, repair=True)
    assert (result.packed_blocks, result.kept_blocks) == (1, 5)
    assert content(store) == content(finished)
    with (store / "images.npy").open("r+b") as file:
        file.truncate(10 * 115_200)
    assert pack(open_splits(tree), store, repair=True).packed_blocks == 4
    assert content(store) == content(finished)


@pytest.mark.parametrize("name", ["names.npy", "offsets.npy", "split.npy", "labels.npy", "invalid.npy"])
def test_damaged_index_is_refused(store: Path, name: str) -> None:
    flip(store / name, 130)
    with pytest.raises(DamagedStore, match=f"{name} differs"):
        build_dataset("benv2", store, "train", check="none")
    (store / name).unlink()
    with pytest.raises(DamagedStore, match=f"{name} cannot be read"):
        build_dataset("benv2", store, "train", check="none")


def test_truncated_and_foreign_images_are_refused(store: Path) -> None:
    with (store / "images.npy").open("r+b") as file:
        file.truncate(128 + 9 * 115_200 + 5)
    with pytest.raises(DamagedStore, match=r"block 2 \(rows from 8\) and what follows are missing"):
        build_dataset("benv2", store, "train", check="none")
    np.save(store / "images.npy", np.zeros((3, 2, 4, 4), np.float32))
    with pytest.raises(DamagedStore, match="not the array"):
        build_dataset("benv2", store, "train")
    (store / "images.npy").unlink()
    with pytest.raises(DamagedStore, match="cannot be read"):
        build_dataset("benv2", store, "train")


@pytest.mark.parametrize(
    "change",
    [{"format": "sarwmix-packed/9"}, {"shape": [0, 2, 120, 120]}, {"shape": "x"}, {"dtype": "int8"}, {"blocks": []},
     {"splits": None}, {"bands": ["VV", "VH"]}, {"block_rows": 0}],
)  # fmt: skip
def test_damaged_manifest_is_refused(store: Path, change: dict[str, Any]) -> None:
    path = store / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedStore, match="damaged|format|other bands"):
        build_dataset("benv2", store, "train")


def test_no_manifest(store: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(DamagedStore, match="no packed store"):
        verify_store(store)
    (store / "manifest.json").write_text("{")
    assert not registry.is_packed(store)


# The command -----------------------------------------------------------------------------------------------------


Command = Callable[..., str]


def pack_train(tree: Path, folder: Path) -> Path:
    pack(open_splits(tree, "train"), folder / "train_only")
    return folder / "train_only"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process and returns what it printed."""
    spec = importlib.util.spec_from_file_location("pack_dataset", ROOT / "scripts/pack_dataset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["pack_dataset.py", *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_command_packs_verifies_and_refuses(tree: Path, tmp_path: Path, run: Command) -> None:
    store = tmp_path / "s"
    source = ("--dataset", "benv2", "--data_path", tree)
    printed = run(*source, "--out", store, "--jobs", 2, "--verify")
    assert "train+val+test" in printed
    assert "agree with their checksums" in printed
    flip(store / "images.npy", 128 + 9)
    assert "1 blocks written, 5 kept" in run(*source, "--out", store, "--repair", "--verify")
    with pytest.raises(UserError, match="--dataset and --data_path are needed"):
        run("--out", store)
    broken = Path(shutil.copytree(tree, tmp_path / "broken"))
    band_path(broken, 3).unlink()
    with pytest.raises(UserError, match="listed but absent"):  # a split that is there but wrong is not left out
        run("--dataset", "benv2", "--data_path", broken, "--out", tmp_path / "t")
    part = pack_train(tree, tmp_path)
    assert "left out test" in run("--dataset", "benv2", "--data_path", part, "--out", tmp_path / "u")
    with pytest.raises(UserError, match="no option 'metdata'"):
        run(*source, "--out", store, "--data_option", "metdata=x")
    with pytest.raises(UserError, match="--repair is for --format packed"):
        run(*source, "--out", store, "--format", "lmdb", "--repair")
    flip(store / "images.npy", 128 + 9)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/pack_dataset.py"), "--out", str(store), "--verify"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "block 0 of 6" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["lmdb", "zarr2", "zarr3"])
def test_command_writes_other_formats(tree: Path, tmp_path: Path, form: str, run: Command) -> None:
    target = tmp_path / f"x.{form}"
    arguments = ("--dataset", "benv2", "--data_path", tree, "--out", target, "--format", form, "--splits", "val")
    assert "4 patches, 4 written now" in run(*arguments)
    assert "4 patches, 0 written now, 4 were there" in run(*arguments)
    source = build_dataset("benv2", tree, "val")
    other = build_dataset("benv2", target, "val", metadata=tree / "metadata.parquet", check="all")
    assert torch.equal(other.get_batch(np.arange(4))["image"], source.get_batch(np.arange(4))["image"])
    if form != "lmdb":
        names = tmp_path / "n_train.csv"
        names.write_text("\n".join(source.names) + "\n")
        assert np.array_equal(build_dataset("benv1", target, "train", metadata=names).labels, source.labels)


@pytest.mark.slow
def test_delivery_is_much_quicker_than_opening_files(tree: Path, tmp_path: Path) -> None:
    """On one core from memory: at least 40 times opening two GeoTIFFs with rasterio."""
    import rasterio

    pack(open_splits(tree), tmp_path / "s")
    source = build_dataset("benv2", tree, "train+val+test")
    store = build_dataset("benv2", tmp_path / "s", "train+val+test")
    paths = [source.patches.folder(name) + f"/{name}_{band}.tif" for name in source.names for band in ("VH", "VV")]  # type: ignore[attr-defined]
    indices = np.resize(np.arange(len(store)), 256)
    out = np.empty((256, 2, 120, 120), np.float32)
    ratios = []
    for _ in range(5):  # interleaved, so that other work on the machine meets both
        start = time.process_time()
        for path in paths:
            with rasterio.open(path) as file:
                file.read(1)
        files = (time.process_time() - start) / len(store)
        start = time.process_time()
        for _ in range(20):
            store.get_batch(indices, out)
        ratios.append(files / ((time.process_time() - start) / (20 * 256)))
    print("times quicker:", [round(ratio) for ratio in ratios])
    assert sorted(ratios)[2] >= 40


def test_demo_data_can_be_packed(demo_root: Path, tmp_path: Path) -> None:
    spec = registry.get_spec("demo")
    splits = [build_dataset("demo", demo_root, split) for split in spec.splits]
    pack(splits, tmp_path / "demo", jobs=2)
    source, store = build_dataset("demo", demo_root, "train+val"), build_dataset("demo", tmp_path / "demo", "train+val")
    assert store.identity() == source.identity()
    assert torch.equal(store.get_batch(np.arange(8))["image"], source.get_batch(np.arange(8))["image"])
    assert store.statistics == source.statistics


def test_training_is_the_same_from_every_storage(
    demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same seed: files and a cached store give equal losses and equal weights, with the real command."""
    import main_pretrain
    from util.checkpoint import load_checkpoint
    from util.files import read_jsonl

    pack([build_dataset("demo", demo_root, split) for split in ("train", "val")], tmp_path / "store")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small gains nothing from a second one
    found = []
    for number, (path, cache) in enumerate([(demo_root, "none"), (tmp_path / "store", "device")]):
        out = tmp_path / f"run{number}"
        arguments = ["--dataset", "demo", "--data_path", str(path), "--cache", cache, "--output_dir", str(out)]
        arguments += [
            "--model",
            "mixmim_tiny",
            "--batch_size",
            "4",
            "--num_workers",
            "0",
            "--epochs",
            "2",
            "--test_run",
        ]
        monkeypatch.setattr(sys, "argv", ["main_pretrain.py", *arguments, "--warmup_epochs", "1", "--lr", "1e-3"])
        main_pretrain.main()
        losses = [row["train_loss"] for row in read_jsonl(out / "log.txt")]
        found.append((losses, load_checkpoint(out / "checkpoint.pth")["model"]))
    torch.set_num_threads(threads)
    for losses, model in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(value, found[0][1][key]) for key, value in model.items())
