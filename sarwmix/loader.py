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

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sarwmix.datasets import SarDataset, UnreadableSample
from util.errors import UserError

Batch = dict[str, Any]
PREFETCH = 4  # batches read ahead


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

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Sample indices of a step, int64 (at most batch_size,)."""
        if epoch != self._epoch:
            self._order = epoch_order(self.count, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            self._epoch = epoch
        if self.drop_last:
            first = (step * self.world_size + self.rank) * self.batch_size
            return self._order[first : first + self.batch_size]
        return self._order[self.rank :: self.world_size][step * self.batch_size : (step + 1) * self.batch_size]


class Loader:
    """Iterates over the batches of one epoch; see :func:`build_loader`.

    Attributes:
        dataset: The data set.
        plan: Which samples a step takes.
        epoch: The epoch that the next iteration delivers.
    """

    def __init__(self, dataset: SarDataset, plan: Plan) -> None:
        self.dataset = dataset
        self.plan = plan
        self.epoch = 0

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
        return self._batches(self.epoch, step)

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        for number in range(step, self.plan.steps):
            yield self.dataset.get_batch(self.plan.indices(epoch, number))

    def close(self) -> None:
        """End workers and threads; the loader cannot be used afterwards."""


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


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)  # a worker copies bytes; its threads would only take cores from the training process


def _as_is(batch: Any) -> Any:
    return batch


class WorkerLoader(Loader):
    """Batches read by worker processes that live as long as the loader."""

    def __init__(
        self, dataset: SarDataset, plan: Plan, *, num_workers: int, pin_memory: bool, timeout: float
    ) -> None:
        super().__init__(dataset, plan)
        self._schedule = _Schedule(plan)
        self._timeout = timeout
        self._workers = torch.utils.data.DataLoader(
            _ByBatch(dataset),
            batch_size=None,
            sampler=self._schedule,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            worker_init_fn=_one_thread,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            timeout=timeout,
        )

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        self._schedule.epoch = epoch
        self._schedule.start = step
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
        if "exited unexpectedly" in text or "killed by signal" in text:
            return f"a loader worker died ({text.splitlines()[0]}); often memory ran out: use fewer --num_workers"
        raise error

    def close(self) -> None:
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._workers._iterator = None


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
        num_workers: Worker processes for file sources; 0 reads in this process.
        pin_memory: Deliver page-locked tensors, for copies to a GPU that do not block.
        timeout: Seconds to wait for a worker's batch before giving up.

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
    if num_workers == 0:
        return Loader(dataset, plan)
    return WorkerLoader(dataset, plan, num_workers=num_workers, pin_memory=pin_memory, timeout=timeout)


__all__ = ["Batch", "Loader", "Plan", "UnreadableSample", "build_loader", "epoch_order"]
