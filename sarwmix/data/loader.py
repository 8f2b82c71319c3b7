"""Batches of a data set in an order that is a pure function of (seed, epoch), from files, a packed store, or memory.

Order of training batches: ``perm`` is a permutation of all samples drawn from (seed, epoch). Step s of rank r takes
``perm[(s * world + r) * B : (s * world + r + 1) * B]``, so that the union over ranks does not depend on who reads what,
and a step can be entered without reading the ones before it. Evaluation (no shuffling, nothing dropped): rank r takes
samples r, r + world, r + 2 * world, ...: every sample once, none padded.

Three ways to the same batches (equal bit by bit):

* file sources: a torch DataLoader whose workers live as long as the loader; each item is a whole batch;
* sources that fill a batch quickly (packed stores): one reader thread, a ring of reused buffers, no worker process;
* a cache in host or device memory: gather by index.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from sarwmix.data.base import EMPTY_BAND, MAX_TRIES, BatchNames, SarDataset, SharedImages, UnreadableSample
from sarwmix.data.spec import DECIBEL
from util.errors import UserError, lost_worker
from util.log import get_logger
from util.signals import held_signals, ignore_stop_signals

Batch = dict[str, Any]
CACHES = ("none", "host", "device", "device16", "auto")
PREFETCH = 4  # batches read ahead
DEVICE_AHEAD = 2  # batches on their way to the GPU while one is computed
DEVICE_SHARE = 0.45  # of a GPU's memory that cache="auto" gives to the data; the rest is for model and activations
DEVICE_MOST = 0.6  # share of a GPU's memory that may be in use after the data have been put there
_PATIENCE = 10.0  # seconds that a reader thread has to notice that nobody wants its batches
_SAY_EVERY = 20.0  # seconds between two lines while a cache is filled
_CACHE_ROWS = 256  # samples read at once while a cache is filled
_SHARED_ROWS = 32  # ... of images that samples share: these are large


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Order of all samples in an epoch, int64 (count,); the same on every rank."""
    if not shuffle:
        return np.arange(count, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(count).astype(np.int64, copy=False)


class Plan:
    """Which samples each step of one rank takes.

    Args:
        count: Samples in the data set.
        batch_size: Samples of a batch on one rank.
        shuffle: Whether the order is drawn anew each epoch.
        drop_last: True: all ranks make the same number of full steps and the rest of the epoch is left out. False:
            every sample once, sharded without padding.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, count: int, *, batch_size: int, shuffle: bool, drop_last: bool, seed: int, rank: int, world_size: int
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size must be at least 1, not {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if shuffle and not drop_last and world_size > 1:
            raise ValueError("shuffled batches on several ranks need drop_last=True: ranks would make unequal steps")
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        if drop_last:
            self.steps = count // (batch_size * world_size)
            if self.steps == 0:
                raise UserError(
                    f"an epoch has no step: {count} samples are fewer than one batch of {batch_size} on each of "
                    f"{world_size} processes; use a batch size of at most {count // world_size} or more data"
                )
        else:
            mine = len(range(rank, count, world_size))
            self.steps = -(-mine // batch_size)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._lock = threading.Lock()  # a reader thread of an epoch that was left may still ask

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Sample indices of a step, int64 (at most batch_size,)."""
        return self.order_of_rank(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def order_of_rank(self, epoch: int) -> np.ndarray:
        """Sample indices of all steps of this rank, one step after the other."""
        with self._lock:
            if epoch != self._epoch:
                order = epoch_order(self.count, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
                if self.drop_last:
                    used = order[: self.steps * self.world_size * self.batch_size]
                    order = used.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank].reshape(-1)
                else:
                    order = order[self.rank :: self.world_size]
                self._order, self._epoch = np.ascontiguousarray(order), epoch
            return self._order


class Loader:
    """Iterates over the batches of one epoch; see :func:`build_loader`.

    Attributes:
        dataset: The data set.
        plan: Which samples a step takes.
        epoch: The epoch that the next iteration delivers.
        device: Where images and labels are delivered; None: in host memory.
    """

    def __init__(self, dataset: SarDataset, plan: Plan, *, device: torch.device | None = None) -> None:
        self.dataset = dataset
        self.plan = plan
        self.epoch = 0
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration follows."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[Batch]:
        """Batches from ``step`` to the end of the epoch; nothing is read for the steps before.

        Raises:
            UserError: ``step`` is not in the epoch.
        """
        if not 0 <= step <= self.plan.steps:
            raise UserError(f"step {step} is not in an epoch of {self.plan.steps} steps; was the batch size changed?")
        batches = self._batches(self.epoch, step)
        if self.device is None:
            return batches
        if self._stream is None:  # one for all epochs: the allocator keeps memory for each stream that it has seen
            self._stream = torch.cuda.Stream(self.device)
        return _on_device(batches, self._stream, self.device)

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        for number in range(step, self.plan.steps):
            yield self.dataset.get_batch(self.plan.indices(epoch, number))

    def close(self) -> None:
        """End workers and threads; the loader cannot be used afterwards."""


def _on_device(batches: Iterator[Batch], stream: torch.cuda.Stream, device: torch.device) -> Iterator[Batch]:
    """Copy images and labels to a GPU on a stream of their own, some batches ahead of the computation.

    A host buffer is kept until its copy is done; the compute stream waits for the copy of its own batch only.
    """
    ahead: deque[tuple[Batch, Batch, torch.cuda.Event]] = deque()
    copied: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def start() -> bool:
        source = next(batches, None)
        if source is None:
            return False
        batch = dict(source)
        with torch.cuda.stream(stream):
            for key, value in source.items():
                if isinstance(value, torch.Tensor) and key != "index":
                    batch[key] = value.to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        ahead.append((batch, source, done))
        return True

    while len(ahead) < DEVICE_AHEAD and start():
        pass
    while ahead:
        batch, source, done = ahead.popleft()
        copied.append((source, done))
        while copied and copied[0][1].query():
            copied.popleft()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(computing)
        start()
        del source
        yield batch


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def ahead(read: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """``read`` of each item in turn, the next one in a thread while the caller works on the last."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, items[0]) if items else None
        for number in range(len(items)):
            assert pending is not None
            result = pending.result()
            pending = reader.submit(read, items[number + 1]) if number + 1 < len(items) else None
            yield result


class BufferPool:
    """Arrays for batches that are used again as soon as nobody refers to them.

    A tensor made by ``torch.from_numpy`` keeps a reference to its array for as long as any view of its memory lives.
    So an array whose reference count is that of the pool alone is free. A caller who keeps every batch gets a new array
    each time; one who lets go gets the same few again and again.

    Args:
        shape: Shape of an array.
        pin: Use page-locked memory, from which copies to a GPU do not block.
    """

    _FREE = 2  # references while the count is taken: the pool's list and the argument of getrefcount

    def __init__(self, shape: tuple[int, ...], *, pin: bool) -> None:
        self.shape = shape
        self.pin = pin
        self.arrays: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """A float32 array of undefined content."""
        for position in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[position]) == self._FREE:
                return self.arrays[position]
        if self.pin:
            array = torch.empty(self.shape, dtype=torch.float32, pin_memory=True).numpy()
        else:
            array = np.empty(self.shape, dtype=np.float32)
        if len(self.arrays) < PREFETCH + DEVICE_AHEAD + 4:
            self.arrays.append(array)
        return array


class ThreadLoader(Loader):
    """Batches gathered by one background thread into reused buffers; for sources that need no work per sample."""

    def __init__(
        self, dataset: SarDataset, plan: Plan, *, pin_memory: bool, timeout: float, device: torch.device | None = None
    ) -> None:
        super().__init__(dataset, plan, device=device)
        self._pool = BufferPool((plan.batch_size, *dataset.shape), pin=pin_memory)
        self._timeout = timeout

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
        stopped = threading.Event()
        reader = threading.Thread(target=self._read, args=(epoch, step, ready, stopped), name="loader", daemon=True)
        reader.start()
        patience = _PATIENCE
        try:
            while True:
                try:
                    item = ready.get(timeout=self._timeout)
                except queue.Empty:
                    patience = 0.0
                    raise UserError(
                        f"no batch from {self.dataset.source} within {self._timeout:g} s; the storage hangs"
                    ) from None
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
                del item  # the buffer is free once the caller lets go of it
        finally:
            stopped.set()
            reader.join(patience)  # or it might take a buffer at the same moment as the reader of the next epoch

    def _read(
        self, epoch: int, step: int, ready: queue.Queue[Batch | BaseException | None], stopped: threading.Event
    ) -> None:
        try:
            for number in range(step, self.plan.steps):
                if not _put(ready, self._gather(self.plan.indices(epoch, number)), stopped):
                    return
            _put(ready, None, stopped)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that asked for the batch
            _put(ready, error, stopped)

    def _gather(self, indices: np.ndarray) -> Batch:
        array = self._pool.take()
        used, replaced = self.dataset.fill(indices, array[: len(indices)])
        return self.dataset.make_batch(torch.from_numpy(array)[: len(indices)], used, replaced)


def _put(ready: queue.Queue[Any], item: Any, stopped: threading.Event) -> bool:
    """Hand an item over; False when nobody wants it any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


class _Schedule(torch.utils.data.Sampler[np.ndarray]):
    """Yields the index array of each step; persistent workers keep running while epoch and start change."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, start = self.epoch, self.start
        for step in range(start, self.plan.steps):
            yield self.plan.indices(epoch, step)


class _ByBatch(torch.utils.data.Dataset):
    """A data set whose item is a whole batch; errors for the user travel as values, with their message unchanged."""

    def __init__(self, dataset: SarDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: np.ndarray) -> Batch | UserError:
        try:
            return self.dataset.get_batch(indices)
        except UserError as error:
            return error


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # a worker copies bytes; its threads would only take cores from the training process
    ignore_stop_signals()  # sent to a whole job they would end the workers before the run has saved


def _as_is(batch: Any) -> Any:
    return batch


class WorkerLoader(Loader):
    """Batches read by worker processes that live as long as the loader."""

    def __init__(
        self,
        dataset: SarDataset,
        plan: Plan,
        *,
        num_workers: int,
        pin_memory: bool,
        timeout: float,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dataset, plan, device=device)
        self._schedule = _Schedule(plan)
        self._timeout = timeout
        self._workers = torch.utils.data.DataLoader(
            _ByBatch(dataset),
            batch_size=None,
            sampler=self._schedule,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            timeout=timeout,
        )

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        self._schedule.epoch = epoch
        self._schedule.start = step
        with held_signals():
            source = iter(self._workers)
        while True:
            try:
                batch = next(source)
            except StopIteration:
                return
            except RuntimeError as error:
                raise UserError(self._explain(error)) from error
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _explain(self, error: RuntimeError) -> str:
        text = str(error)
        if "timed out" in text:
            return (
                f"no batch from the loader's workers within {self._timeout:g} s; the storage hangs or is too slow "
                "(--num_workers 0 reads in the training process and shows the place)"
            )
        died = lost_worker(text)
        if died is not None:
            return died
        raise error

    def close(self) -> None:
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._workers._iterator = None


# Caches ----------------------------------------------------------------------------------------------------------


class MemoryDataset(SarDataset):
    """A data set whose images have all been read into host memory."""

    gathers = True

    def __init__(self, parent: SarDataset, images: np.ndarray, bad: dict[int, UnreadableSample]) -> None:
        super().__init__(
            parent.spec,
            parent.split,
            parent.statistics,
            parent.names,
            parent.labels,
            on_error=parent.on_error,
            source=parent.source,
        )
        self._shape = parent.shape
        self.images = images
        self.bad = bad
        self.parent_clusters = parent.clusters

    @property
    def clusters(self) -> Sequence[str] | None:
        return self.parent_clusters

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def read_into(self, index: int, out: np.ndarray) -> None:
        for _, error in self.read_many(np.array([index]), out[None]):
            raise error

    def read_many(self, indices: np.ndarray, out: np.ndarray) -> list[tuple[int, UnreadableSample]]:
        np.take(self.images, indices, axis=0, out=out, mode="clip")
        if not self.bad:
            return []
        return [(i, self.bad[int(index)]) for i, index in enumerate(indices) if int(index) in self.bad]


class _RawByBatch(torch.utils.data.Dataset):
    """Images as read, with the errors, for filling a cache."""

    def __init__(self, dataset: SarDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: np.ndarray) -> tuple[torch.Tensor, list[tuple[int, UnreadableSample]]] | UserError:
        images = np.empty((len(indices), *self.dataset.shape), dtype=np.float32)
        try:
            return torch.from_numpy(images), self.dataset.read_many(indices, images)
        except UserError as error:
            return error


_Raw = tuple[torch.Tensor, list[tuple[int, UnreadableSample]]]


def _gathered(dataset: SarDataset, pieces: list[np.ndarray], device: torch.device) -> Iterator[_Raw]:
    """Images of each piece, in one of two buffers in turn; pinned ones are free again when their copy is done."""
    shape = (_CACHE_ROWS, *dataset.shape)
    on_gpu = device.type == "cuda"
    buffers = [torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    for number, piece in enumerate(pieces):
        event = copied[number % 2]
        if event is not None:
            event.synchronize()
        images = buffers[number % 2][: len(piece)]
        yield images, dataset.read_many(piece, images.numpy())
        if on_gpu:  # the caller has asked for the copy by now
            copied[number % 2] = torch.cuda.current_stream(device).record_event()


def _read_all(
    dataset: SarDataset, target: torch.Tensor, *, num_workers: int, timeout: float
) -> dict[int, UnreadableSample]:
    """Fill ``target`` (N, C, H, W) with all images; returns the samples that cannot be read.

    Raises:
        UnreadableSample: One cannot be read and the data set does not replace such samples.
    """
    pieces = [
        np.arange(first, min(first + _CACHE_ROWS, len(dataset)), dtype=np.int64)
        for first in range(0, len(dataset), _CACHE_ROWS)
    ]
    delivered: Iterable[_Raw | UserError]
    if dataset.gathers:
        delivered = _gathered(dataset, pieces, target.device)
    else:
        delivered = torch.utils.data.DataLoader(
            _RawByBatch(dataset),
            batch_size=None,
            sampler=pieces,  # type: ignore[arg-type]  # any iterable of what the data set takes
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            timeout=timeout if num_workers else 0,
        )
    bad: dict[int, UnreadableSample] = {}
    said = time.monotonic()
    with held_signals():
        items = iter(delivered)
    for piece, item in zip(pieces, items, strict=True):
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            get_logger().info("%d of %d samples read", piece[0], len(dataset))
        if isinstance(item, UserError):
            raise item
        images, errors = item
        for position, error in errors:
            if dataset.on_error != "replace":
                raise error
            bad[int(piece[position])] = error
        target[piece[0] : piece[-1] + 1].copy_(images, non_blocking=True)
    return bad


def _read_shared(shared: SharedImages, rows: np.ndarray, target: torch.Tensor) -> np.ndarray:
    """Fill ``target`` (M, C, H, W) with the images of ``rows``; bool (M,): each of their bands has a finite pixel."""
    usable = []
    starts = range(0, len(rows), _SHARED_ROWS)
    pieces = [rows[first : first + _SHARED_ROWS] for first in starts]
    for first, images in zip(starts, ahead(shared.read, pieces), strict=True):
        piece = target[first : first + _SHARED_ROWS]
        piece.copy_(images)
        usable.append(torch.isfinite(piece).flatten(2).any(dim=2).all(dim=1))
    return torch.cat(usable).cpu().numpy()


class EachImageOnce(Loader):
    """Evaluation batches in which an image that samples share comes once, when the first of them needs it.

    A batch holds, beside ``label``, ``name``, ``index`` and ``replaced``: ``rows`` (B, k), the images of each sample;
    ``new_rows`` (M,) and ``images`` (M, C, H, W), those that no batch has brought yet; ``done_rows``, those that no
    later batch needs. A process takes consecutive samples, so that those that share images meet in one.
    """

    def __init__(self, dataset: SarDataset, plan: Plan, shared: SharedImages, *, device: torch.device | None) -> None:
        super().__init__(dataset, plan, device=device)
        self._shared = shared

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        plan, shared = self.plan, self._shared
        mine = np.array_split(np.arange(len(self.dataset)), plan.world_size)[plan.rank]
        batches = [mine[first : first + plan.batch_size] for first in range(0, len(mine), plan.batch_size)][step:]
        seen: set[int] = set()
        fresh = []
        for indices in batches:
            new = [row for row in np.unique(shared.rows[indices]).tolist() if row not in seen]
            seen.update(new)
            fresh.append(np.array(new, dtype=np.int64))
        last = {row: number for number, indices in enumerate(batches) for row in shared.rows[indices].flat}
        images = ahead(shared.read, [rows for rows in fresh if len(rows)])
        for number, (indices, new_rows) in enumerate(zip(batches, fresh, strict=True)):
            rows = shared.rows[indices]
            batch: Batch = {"rows": rows, "new_rows": new_rows, "name": BatchNames(self.dataset.names, indices)}
            batch["done_rows"] = np.array([row for row in np.unique(rows) if last[row] == number], dtype=np.int64)
            batch |= {"index": torch.from_numpy(indices), "replaced": []}
            labels = self.dataset.batch_labels(indices)
            if labels is not None:
                batch["label"] = labels
            if len(new_rows):
                batch["images"] = self._checked(next(images), new_rows, indices)
            yield batch

    def _checked(self, images: torch.Tensor, new_rows: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        """The images, page-locked for a GPU.

        Raises:
            UnreadableSample: one has a band without any finite pixel; names the first sample that it belongs to.
        """
        usable = torch.isfinite(images).flatten(2).any(dim=2).all(dim=1).numpy()
        if not usable.all():
            without = np.isin(self._shared.rows[indices], new_rows[~usable]).any(axis=1)
            raise UnreadableSample(self.dataset.names[int(indices[without][0])], self.dataset.source, EMPTY_BAND)
        return images.pin_memory() if self.device is not None and self.device.type == "cuda" else images


class DeviceLoader(Loader):
    """Batches gathered from images that all lie in the memory of a device (of the host, with device "cpu").

    With `dtype` float16 they are rounded there and delivered as float32.
    """

    def __init__(
        self,
        dataset: SarDataset,
        plan: Plan,
        *,
        device: torch.device,
        num_workers: int,
        timeout: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dataset, plan)
        self.device = device
        shared = dataset.shared_images
        if shared is None:
            self.images = torch.empty((len(dataset), *dataset.shape), dtype=dtype, device=device)
            self.bad = _read_all(dataset, self.images, num_workers=num_workers, timeout=timeout)
            self.places = {"image": np.arange(len(dataset))}
        else:
            rows, places = np.unique(shared.rows, return_inverse=True)
            places = places.reshape(shared.rows.shape)
            self.images = torch.empty((len(rows), *dataset.shape), dtype=dtype, device=device)
            usable = _read_shared(shared, rows, self.images)[places].all(axis=1)
            self.bad = {
                int(i): UnreadableSample(dataset.names[int(i)], dataset.source, EMPTY_BAND)
                for i in np.flatnonzero(~usable)
            }
            if self.bad and dataset.on_error == "raise":
                raise next(iter(self.bad.values()))
            self.places = {key: places[:, number] for number, key in enumerate(shared.keys)}
        self.used = _replacements(len(dataset), self.bad)
        labels = dataset.batch_labels(self.used)
        self.labels = None if labels is None else labels.to(device)

    def iter_from(self, step: int) -> Iterator[Batch]:
        if not 0 <= step <= self.plan.steps:
            raise UserError(f"step {step} is not in an epoch of {self.plan.steps} steps; was the batch size changed?")
        return self._batches(self.epoch, step)

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        # The order of the epoch goes to the device once, so that a step needs no copy at all.
        order = self.plan.order_of_rank(epoch)
        sources = {
            key: torch.from_numpy(np.ascontiguousarray(place[self.used[order]])).to(self.device)
            for key, place in self.places.items()
        }
        places = torch.from_numpy(order).to(self.device)
        size = self.plan.batch_size
        for number in range(step, self.plan.steps):
            piece = slice(number * size, (number + 1) * size)
            batch: Batch = {key: self.images.index_select(0, source[piece]).float() for key, source in sources.items()}
            if self.labels is not None:
                batch["label"] = self.labels.index_select(0, places[piece])
            indices = order[piece]
            used = self.used[indices]
            batch["name"] = BatchNames(self.dataset.names, used)
            batch["index"] = torch.from_numpy(used)
            batch["replaced"] = []
            if self.bad:
                lost = [self.bad[int(i)] for i in indices if int(i) in self.bad]
                batch["replaced"] = [(error.name, f"{error.path}: {error.reason}") for error in lost]
            yield batch


def _replacements(count: int, bad: dict[int, UnreadableSample]) -> np.ndarray:
    """Which sample is delivered for each index: itself, or the next readable one, as SarDataset.fill decides."""
    used = np.arange(count, dtype=np.int64)
    for index, error in bad.items():
        for step in range(1, min(MAX_TRIES, count - 1) + 1):
            if (index + step) % count not in bad:
                used[index] = (index + step) % count
                break
        else:
            raise UnreadableSample(
                error.name, error.path, f"{error.reason}; the next {MAX_TRIES} samples cannot be used either"
            )
    return used


def choose_cache(cache: str, dataset: SarDataset, device: torch.device | None) -> str:
    """Resolve ``"auto"``: the device when it is a GPU and the images take at most 45 % of its memory, else none.

    Raises:
        UserError: ``cache`` is no known choice, needs a device, or does not suit the data set.
    """
    if cache not in CACHES:
        raise UserError(f"cache must be one of {', '.join(CACHES)}, not {cache!r}")
    if cache in ("device", "device16") and device is None:
        raise UserError(f"cache={cache} needs a device")
    if cache == "device16" and dataset.spec.unit != DECIBEL:
        raise UserError(
            f"cache=device16 rounds to float16, which suits dB; images of {dataset.spec.name} are in "
            f"{dataset.spec.unit}: use cache=device"
        )
    plain = isinstance(dataset, SarDataset) and type(dataset).get_batch is SarDataset.get_batch
    shared = dataset.shared_images if isinstance(dataset, SarDataset) else None
    if cache in ("host", "device", "device16") and not plain and (shared is None or cache != "device"):
        raise UserError(f"cache={cache} does not suit {type(dataset).__name__}: its batches are made in its own way")
    size = _cache_bytes(dataset) // (2 if cache == "device16" else 1)
    on_gpu = device is not None and device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (0, 0)
    if cache == "auto":
        # What lies there already (other splits, the model) counts too, so that 40 % stay for the computation.
        fits = size <= DEVICE_SHARE * total and total - free + size <= DEVICE_MOST * total
        return "device" if on_gpu and (plain or shared is not None) and fits else "none"
    if not on_gpu or cache == "host":
        free = _free_host_memory()
    if cache != "none" and size > free:
        raise UserError(
            f"cache={cache} needs {size / 1e9:.1f} GB for {len(dataset)} samples, and {free / 1e9:.1f} GB are free; "
            "use cache=none"
        )
    return cache


def _cache_bytes(dataset: SarDataset) -> int:
    """What the images of a data set take in memory."""
    shared = dataset.shared_images if isinstance(dataset, SarDataset) else None
    images = len(dataset) if shared is None else len(np.unique(shared.rows))
    return 4 * images * int(np.prod(dataset.shape))


def _free_host_memory() -> int:
    """Bytes that can be had without swapping; a very large number where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return sys.maxsize


def build_loader(
    dataset: SarDataset,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 600.0,
    device: torch.device | str | None = None,
    cache: str = "none",
    each_image_once: bool = False,
) -> Loader:
    """Make the loader that suits a data set.

    Args:
        dataset: What is read.
        batch_size: Samples of a batch on one rank.
        shuffle: Draw a new order each epoch (training) or keep the data set's order (evaluation).
        drop_last: See :class:`Plan`.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes for file sources; 0 reads in this process. Packed stores and caches need none.
        pin_memory: Read into page-locked memory, for copies to a GPU that do not block.
        timeout: Seconds to wait for a batch before giving up.
        device: A GPU to which images and labels are copied ahead of time; None or a CPU: they stay in host memory.
        cache: ``"host"``: read all images into this process's memory first; ``"device"``: into the memory of
            ``device``; ``"device16"``: the same, rounded to float16; ``"auto"``: on the device if they take at most
            45 % of a GPU's memory; ``"none"``.
        each_image_once: Evaluation only: deliver images that samples share once, see :class:`EachImageOnce`. Without
            effect where the data set shares none.

    Returns:
        A loader: ``set_epoch(epoch)``, ``len()`` in steps, iteration over batch dicts, ``iter_from(step)``.

    Raises:
        UserError: The batch size leaves no step.
    """
    plan = Plan(
        len(dataset),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    if num_workers < 0:
        raise UserError(f"number of loader workers must be 0 or more, not {num_workers}")
    place = None if device is None else torch.device(device)
    choice = choose_cache(cache, dataset, place)
    size = _cache_bytes(dataset) / 1e9
    if choice in ("device", "device16"):
        assert place is not None
        dtype = torch.float16 if choice == "device16" else torch.float32
        size = size / 2 if choice == "device16" else size
        get_logger().info("reading %d samples (%.2f GB) into the memory of %s", len(dataset), size, place)
        return DeviceLoader(dataset, plan, device=place, num_workers=num_workers, timeout=timeout, dtype=dtype)
    if choice == "host":
        get_logger().info("reading %d samples (%.2f GB) into memory", len(dataset), size)
        images = np.empty((len(dataset), *dataset.shape), dtype=np.float32)
        bad = _read_all(dataset, torch.from_numpy(images), num_workers=num_workers, timeout=timeout)
        dataset = MemoryDataset(dataset, images, bad)
    gpu = place if place is not None and place.type == "cuda" else None
    if each_image_once and dataset.shared_images is not None:
        if shuffle or drop_last:
            raise ValueError("each_image_once is for evaluation: every sample, in the data set's order")
        return EachImageOnce(dataset, plan, dataset.shared_images, device=gpu)
    pin = pin_memory and torch.cuda.is_available()
    if dataset.gathers:
        return ThreadLoader(dataset, plan, pin_memory=pin, timeout=timeout, device=gpu)
    if num_workers == 0:
        return Loader(dataset, plan, device=gpu)
    return WorkerLoader(dataset, plan, num_workers=num_workers, pin_memory=pin, timeout=timeout, device=gpu)
