"""Order, sharding and resuming of batches; workers, reader thread, caches; equal batches from every source."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sarwmix.data import loader as loading
from sarwmix.data import registry
from sarwmix.data.base import SarDataset, UnreadableSample
from sarwmix.data.loader import (
    BufferPool,
    DeviceLoader,
    Loader,
    Plan,
    ThreadLoader,
    WorkerLoader,
    build_loader,
    epoch_order,
)
from sarwmix.data.packed import pack
from tests.bigearthnet_fixtures import write_benv2
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SPEC = registry.get_spec("benv2")


class Numbers(SarDataset):
    """Image i is the constant i."""

    def __init__(
        self, count: int, *, bad: tuple[int, ...] = (), gathers: bool = False, on_error: str = "raise"
    ) -> None:
        labels = np.zeros((count, 19), dtype=np.uint8)
        labels[np.arange(count), np.arange(count) % 19] = 1
        super().__init__(
            SPEC, "train", registry.BENV2_STATISTICS, [f"p_{i}" for i in range(count)], labels, on_error=on_error
        )
        self.bad = bad
        self.gathers = gathers
        self.reads = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return 2, 4, 4

    def read_into(self, index: int, out: np.ndarray) -> None:
        self.reads += 1
        if index in self.bad:
            raise UnreadableSample(self.names[index], f"{index}.tif", "truncated")
        out[...] = index


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"num_workers": 2, "timeout": 60},
    "thread": {"gathers": True},
    "host": {"cache": "host"},
    "device": {"cache": "device", "device": "cpu"},
}
KINDS = {"plain": Loader, "workers": WorkerLoader, "thread": ThreadLoader, "host": ThreadLoader, "device": DeviceLoader}


def make(kind: str, count: int = 23, *, bad: tuple[int, ...] = (), on_error: str = "raise", **options: Any) -> Loader:
    settings = {**OPTIONS[kind], **options}
    dataset = Numbers(count, bad=bad, gathers=bool(settings.pop("gathers", False)), on_error=on_error)
    settings = {"batch_size": 4, "shuffle": True, "drop_last": True, "seed": 5, **settings}
    loader = build_loader(dataset, **settings)
    assert type(loader) is KINDS[kind]
    return loader


def indices(loader: Loader, step: int = 0) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader.iter_from(step)]


@pytest.mark.parametrize("kind", OPTIONS)
def test_order_is_the_documented_one(kind: str) -> None:
    loader = make(kind)
    assert len(loader) == 5
    for epoch in (0, 3, 0):
        loader.set_epoch(epoch)
        order = epoch_order(23, seed=5, epoch=epoch, shuffle=True)
        assert sorted(order) == list(range(23))
        batches = list(loader)
        assert [b["index"].tolist() for b in batches] == order[:20].reshape(5, 4).tolist()
        for batch in batches:
            assert batch["image"][:, 1, 2, 3].tolist() == batch["index"].tolist()
            assert batch["label"].argmax(1).tolist() == [i % 19 for i in batch["index"].tolist()]
            assert batch["name"] == [f"p_{i}" for i in batch["index"].tolist()]
            assert batch["replaced"] == []
            assert batch["image"].dtype == torch.float32
    loader.close()


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed=s, epoch=e, shuffle=True)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    # The order is part of the contract of resumed runs: it must not change from version to version.
    assert epoch_order(10, seed=0, epoch=0, shuffle=True).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@pytest.mark.parametrize("kind", OPTIONS)
def test_resume_in_the_middle_reads_nothing_before(kind: str) -> None:
    loader = make(kind)
    loader.set_epoch(2)
    whole = indices(loader)
    if kind in ("plain", "thread"):
        loader.dataset.reads = 0  # type: ignore[attr-defined]
    assert indices(loader, 3) == whole[3:]
    if kind in ("plain", "thread"):
        assert loader.dataset.reads == 8  # type: ignore[attr-defined]
    assert indices(loader, 5) == []
    with pytest.raises(UserError, match="step 6 is not in an epoch of 5"):
        loader.iter_from(6)
    loader.close()


@pytest.mark.parametrize("kind", OPTIONS)
def test_leaving_an_epoch_early(kind: str) -> None:
    loader = make(kind)
    for _ in range(3):
        for batch in loader:
            assert len(batch["index"]) == 4
            break
    loader.set_epoch(1)
    order = epoch_order(23, seed=5, epoch=1, shuffle=True)
    assert indices(loader) == order[:20].reshape(5, 4).tolist()
    loader.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_steps_of_all_ranks_are_one_permutation(world: int) -> None:
    options = {"batch_size": 3, "shuffle": True, "drop_last": True, "seed": 1, "world_size": world}
    plans = [Plan(23, rank=rank, **options) for rank in range(world)]  # type: ignore[arg-type]
    steps = 23 // (3 * world)
    perm = epoch_order(23, seed=1, epoch=4, shuffle=True)
    for rank, plan in enumerate(plans):
        assert plan.steps == steps
        for s in range(steps):
            start = (s * world + rank) * 3
            assert plan.indices(4, s).tolist() == perm[start : start + 3].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_sees_each_sample_once(world: int, batch_size: int) -> None:
    seen = []
    for rank in range(world):
        loader = make("plain", shuffle=False, drop_last=False, batch_size=batch_size, rank=rank, world_size=world)
        mine = [i for batch in indices(loader) for i in batch]
        assert mine == list(range(rank, 23, world))
        seen += mine
    assert sorted(seen) == list(range(23))


def test_more_ranks_than_samples() -> None:
    assert indices(make("plain", count=2, shuffle=False, drop_last=False, rank=2, world_size=3)) == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_short_last_batch(kind: str) -> None:
    loader = make(kind, shuffle=False, drop_last=False)
    batches = list(loader)
    assert [len(b["image"]) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert batches[-1]["image"][:, 0, 0, 0].tolist() == [20, 21, 22]
    loader.close()


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(UserError, match=r"no step: 23 samples are fewer than one batch of 24.*at most 23"):
        make("plain", batch_size=24)
    with pytest.raises(UserError, match="at most 11"):
        make("plain", batch_size=12, world_size=2)
    with pytest.raises(UserError, match="at least 1"):
        make("plain", batch_size=0)
    with pytest.raises(ValueError, match="drop_last"):
        make("plain", drop_last=False, world_size=2)
    with pytest.raises(ValueError, match="rank 2"):
        make("plain", rank=2, world_size=2)
    with pytest.raises(UserError, match="workers"):
        make("plain", num_workers=-1)
    with pytest.raises(UserError, match="cache must be one of"):
        make("plain", cache="disk")
    with pytest.raises(UserError, match="needs a device"):
        make("plain", cache="device", device=None)


def test_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_free_host_memory", lambda: 2900)
    for kind in ("host", "device"):
        with pytest.raises(UserError, match=f"cache={kind} needs 0.0 GB for 23 samples.*use cache=none"):
            make(kind)
    monkeypatch.setattr(loading, "_free_host_memory", lambda: 23 * 2 * 4 * 4 * 4)
    make("host")


class OwnBatches(Numbers):
    def get_batch(self, indices: np.ndarray, out: np.ndarray | None = None) -> dict[str, Any]:
        return {"index": torch.from_numpy(indices), "own": True}


def test_data_sets_with_own_batches_are_not_cached() -> None:
    dataset = OwnBatches(8)
    loader = build_loader(dataset, batch_size=2, shuffle=False, drop_last=False, cache="auto", device="cpu")
    assert all(batch["own"] for batch in loader)
    with pytest.raises(UserError, match="cache=host does not suit OwnBatches"):
        build_loader(dataset, batch_size=2, shuffle=False, drop_last=False, cache="host")


@pytest.mark.parametrize("kind", OPTIONS)
def test_unreadable_samples(kind: str) -> None:
    with pytest.raises(UnreadableSample, match="p_7 cannot be used: 7.tif: truncated"):  # noqa: PT012
        stopping = make(kind, bad=(7, 8))
        list(stopping)
    loader = make(kind, bad=(7, 8), on_error="replace", shuffle=False)
    batch = list(loader)[1]
    assert batch["index"].tolist() == [4, 5, 6, 9]
    assert batch["name"][-1] == "p_9"
    assert batch["label"].argmax(1).tolist() == [4, 5, 6, 9]
    assert batch["image"][-1].unique().tolist() == [9]
    assert batch["replaced"] == [("p_7", "7.tif: truncated")]
    loader.close()


@pytest.mark.parametrize("kind", ["plain", "host", "device"])
def test_nine_bad_neighbours(kind: str) -> None:
    with pytest.raises(UnreadableSample, match="next 8 samples"):  # noqa: PT012
        loader = make(kind, bad=tuple(range(3, 12)), on_error="replace", shuffle=False)
        list(loader)


# Buffers and threads ---------------------------------------------------------------------------------------------


def test_buffers_are_used_again_only_when_free() -> None:
    pool = BufferPool((2, 3), pin=False)
    first = pool.take()
    address = first.ctypes.data
    held = torch.from_numpy(first)[:1]
    del first
    assert pool.take().ctypes.data != address
    view = held.reshape(-1)
    del held
    assert pool.take().ctypes.data != address
    del view
    assert address in {pool.arrays[0].ctypes.data}
    assert pool.take().ctypes.data == address


def test_thread_reuses_buffers_and_keeps_held_batches() -> None:
    loader = make("thread", count=400)
    addresses = set()
    for batch in loader:
        addresses.add(batch["image"].data_ptr())
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()
        del batch
    assert len(addresses) <= 10
    kept = list(loader)  # a hundred batches held at once keep their content
    for batch in kept:
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()


def test_thread_ends_with_its_iteration() -> None:
    import threading

    loader = make("thread", count=400)
    for _ in range(5):
        iterator = iter(loader)
        next(iterator)
        del iterator
        gc.collect()
    end = time.monotonic() + 5
    while any(t.name == "loader" for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(t.name == "loader" for t in threading.enumerate())


class Slow(Numbers):
    def read_into(self, index: int, out: np.ndarray) -> None:
        time.sleep(3)
        super().read_into(index, out)


@pytest.mark.parametrize("kind", ["thread", "workers"])
def test_hanging_storage_is_an_error_in_bounded_time(kind: str) -> None:
    dataset = Slow(4, gathers=kind == "thread")
    loader = build_loader(
        dataset, batch_size=1, shuffle=False, drop_last=False, num_workers=1 if kind == "workers" else 0, timeout=0.5
    )
    start = time.monotonic()
    with pytest.raises(UserError, match="within 0.5 s; the storage hangs"):
        list(loader)
    assert time.monotonic() - start < 3
    loader.close()


class Deadly(Numbers):
    def read_into(self, index: int, out: np.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_an_error() -> None:
    loader = build_loader(Deadly(8), batch_size=2, shuffle=False, drop_last=False, num_workers=1, timeout=30)
    with pytest.raises(UserError, match="worker died"):
        list(loader)
    loader.close()


def test_a_stuck_worker_does_not_keep_a_program_that_fails() -> None:
    """Workers leave SIGTERM to the parent; when the parent itself sends it they end."""
    code = (
        "from tests.test_loader import *\n"
        "class Stuck(Numbers):\n"
        "    def read_into(self, index, out): time.sleep(600)\n"
        "list(build_loader(Stuck(8), batch_size=1, shuffle=False, drop_last=False, num_workers=1, timeout=0.5))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the storage hangs" in done.stderr


def test_workers_stay_from_epoch_to_epoch() -> None:
    loader = make("workers")

    def children() -> set[int]:
        assert isinstance(loader, WorkerLoader)
        return {worker.pid for worker in loader._workers._iterator._workers}  # type: ignore[union-attr]

    list(loader)
    first = children()
    loader.set_epoch(1)
    list(loader)
    assert children() == first
    loader.close()


# Sources ---------------------------------------------------------------------------------------------------------


def test_every_way_gives_the_same_batches(tmp_path: Path) -> None:
    """Same seed: GeoTIFF, packed store and caches deliver bit-equal batches, with and without workers."""
    root = write_benv2(tmp_path / "tree", 20)
    pack([registry.build_dataset("benv2", root, split) for split in ("train", "val")], tmp_path / "store")

    def batches(path: Path, **options: Any) -> list[dict[str, Any]]:
        dataset = registry.build_dataset("benv2", path, "train+val")
        loader = build_loader(dataset, batch_size=4, shuffle=True, drop_last=True, seed=3, **options)
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found += list(loader)
        loader.close()
        return found

    expected = batches(root)
    assert len(expected) == 6
    ways = [
        (root, {"num_workers": 2, "timeout": 60}),
        (root, {"cache": "host"}),
        (root, {"cache": "device", "device": "cpu"}),
        (root, {"cache": "auto", "device": "cpu"}),
        (root, {"cache": "host", "num_workers": 2, "timeout": 60}),
        (tmp_path / "store", {}),
        (tmp_path / "store", {"cache": "host"}),
        (tmp_path / "store", {"cache": "device", "device": "cpu"}),
    ]
    for path, options in ways:
        for ours, theirs in zip(batches(path, **options), expected, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["label"], theirs["label"])
            assert torch.equal(ours["index"], theirs["index"])
            assert ours["name"] == theirs["name"]


def test_packed_samples_open_no_file(tmp_path: Path) -> None:
    """Counted with an audit hook in a process of its own: an epoch from a packed store opens nothing."""
    root = write_benv2(tmp_path / "tree", 20)
    pack([registry.build_dataset("benv2", root, "train")], tmp_path / "store")
    code = f"""
import sys
from sarwmix.data.registry import build_dataset
from sarwmix.data.loader import build_loader
dataset = build_dataset("benv2", {str(tmp_path / "store")!r}, "train")
loader = build_loader(dataset, batch_size=2, shuffle=True, drop_last=True)
list(loader)
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event in ("open", "os.open") else None)
loader.set_epoch(1)
print(len(list(loader)), len(opened))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "0"]


class FakeEvent:
    """Stands for a CUDA event: records what waits for what."""

    log: ClassVar[list[str]] = []

    def record(self, stream: object) -> None:
        FakeEvent.log.append("copy")

    def query(self) -> bool:
        return True


class FakeStream:
    made: ClassVar[int] = 0

    def __init__(self, device: object = None) -> None:
        FakeStream.made += 1

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        FakeEvent.log.append("wait")


def test_copies_run_ahead_of_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of copies and waits, without a GPU; values on a GPU are compared in the test below."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    computing = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    FakeEvent.log, FakeStream.made = [], 0
    loader = make("thread")
    loader.device = torch.device("cpu")
    seen = []
    for batch in loader:
        FakeEvent.log.append("step")
        seen.append(batch["index"].tolist())
    loader.device = None
    assert seen == indices(loader)
    # Two copies are under way before the first step, and each step starts one more.
    copy, wait, step = "copy", "wait", "step"
    assert FakeEvent.log == [copy, copy] + [wait, copy, step] * 3 + [wait, step] * 2
    loader.device = torch.device("cpu")
    for batch in loader:  # leaving early ends the reader thread too
        assert len(batch["index"]) == 4
        break
    assert FakeStream.made == 1  # for all epochs: the allocator keeps memory apart for each stream


def test_names_of_a_batch_are_decoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_benv2(tmp_path / "tree", 6)
    pack([registry.build_dataset("benv2", root, "train")], tmp_path / "store")
    data = registry.build_dataset("benv2", tmp_path / "store", "train")
    decoded = []
    get = type(data.names).__getitem__
    monkeypatch.setattr(type(data.names), "__getitem__", lambda self, i: decoded.append(i) or get(self, i))
    for cache in ("none", "device"):
        loader = build_loader(data, batch_size=3, shuffle=True, drop_last=True, device="cpu", cache=cache)
        batches = list(loader)
        assert [len(batch["name"]) for batch in batches] == [3] * len(loader)
        assert decoded == []
        names = [data.names[int(i)] for i in batches[0]["index"]]
        assert batches[0]["name"] == names
        assert batches[0]["name"][1] == names[1]
        assert pickle.loads(pickle.dumps(batches[0]["name"])) == names
        decoded.clear()


def test_half_precision_copy_on_the_device(tmp_path: Path) -> None:
    """Half the memory, the same batches to half a step of float16 (2^-7 dB below |32| dB, 2^-6 beyond); dB alone."""
    root = write_benv2(tmp_path / "tree", 6)
    data = registry.build_dataset("benv2", root, "train")
    options = {"batch_size": 3, "shuffle": True, "drop_last": True, "device": "cpu"}
    exact, rounded = (build_loader(data, cache=cache, **options) for cache in ("device", "device16"))
    assert rounded.images.element_size() * 2 == exact.images.element_size()
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours["image"].dtype == torch.float32
        torch.testing.assert_close(ours["image"], theirs["image"], rtol=2**-11, atol=0, equal_nan=True)
        assert not torch.equal(ours["image"], theirs["image"])
    other = copy.copy(data)
    other.spec = types.SimpleNamespace(name="optical", unit="reflectance x 1e4")  # type: ignore[assignment]
    with pytest.raises(UserError, match="cache=device16 rounds to float16, which suits dB"):
        build_loader(other, cache="device16", **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_delivery_is_bit_equal(tmp_path: Path) -> None:
    root = write_benv2(tmp_path / "tree", 20)
    pack([registry.build_dataset("benv2", root, "train")], tmp_path / "store")
    for path in (root, tmp_path / "store"):
        dataset = registry.build_dataset("benv2", path, "train")
        expected = list(build_loader(dataset, batch_size=2, shuffle=True, drop_last=True, seed=3))
        for cache in ("none", "auto", "device", "host"):
            loader = build_loader(
                dataset, batch_size=2, shuffle=True, drop_last=True, seed=3, device="cuda", cache=cache, pin_memory=True
            )
            for _ in range(3):
                for ours, theirs in zip(loader, expected, strict=True):
                    assert ours["image"].is_cuda
                    assert torch.equal(ours["image"].cpu(), theirs["image"])
                    assert torch.equal(ours["label"].cpu(), theirs["label"])
                    assert ours["name"] == theirs["name"]


# Memory ----------------------------------------------------------------------------------------------------------


class Index(SarDataset):
    """An index of 480,000 rows with tiny images."""

    def __init__(self, count: int) -> None:
        names = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{i}_{i % 97}" for i in range(count)]
        super().__init__(SPEC, "train", registry.BENV2_STATISTICS, names, np.zeros((count, 19), np.uint8))

    @property
    def shape(self) -> tuple[int, int, int]:
        return 2, 2, 2

    def read_into(self, index: int, out: np.ndarray) -> None:
        out[...] = len(self.names[index])


def private_bytes(pid: int) -> int:
    """Memory that a process does not share: what copy-on-write costs."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


@pytest.mark.slow
def test_memory_of_eight_workers_stays_flat() -> None:
    loader = build_loader(Index(480_000), batch_size=256, shuffle=True, drop_last=True, num_workers=8, timeout=300)
    assert isinstance(loader, WorkerLoader)
    sizes = []
    for step, _ in enumerate(loader):
        if step % 400 == 100:
            workers = loader._workers._iterator._workers  # type: ignore[union-attr]
            sizes.append(sum(private_bytes(worker.pid) for worker in workers))
    loader.close()
    print("private MiB of 8 workers:", [size // 2**20 for size in sizes])
    assert len(sizes) == 5
    assert max(sizes) - sizes[0] < 8 * 4 * 2**20  # an index copied into each worker would be 8 * 30 MiB
