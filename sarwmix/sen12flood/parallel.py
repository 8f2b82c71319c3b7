"""Run independent tasks in processes that never outlive their parent, with progress and clear errors."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from util.errors import UserError
from util.log import Progress

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _watch_parent(parent: int) -> None:
    """End this worker soon after its parent is gone (kill -9): nobody else would stop it from writing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def storage_error(where: str, error: OSError) -> UserError:
    """What a failed system call means for the user."""
    if error.errno in FULL:
        return UserError(
            f"{where}: cannot write {error.filename or 'the output'}: the disk is full ({error.strerror}). Files "
            "written so far are whole; free space and run the same command again: it continues"
        )
    return UserError(f"{where}: {error}; put it right and run the same command again: it continues")


def run_stage(
    title: str,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    jobs: int,
    weights: Sequence[int] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for all tasks, heaviest first.

    Args:
        title: Name of the stage, for the progress display.
        function: A module-level function.
        tasks: Argument tuples.
        jobs: Number of processes; 1 runs everything here.
        weights: Cost of each task, in the unit that the progress counts; 1 each by default.

    Yields:
        (index of the task, its result), in the order of completion.

    Raises:
        UserError: The disk is full, or a worker was killed.
    """
    weights = [1] * len(tasks) if weights is None else list(weights)
    order = sorted(range(len(tasks)), key=lambda i: -weights[i])
    progress = Progress(sum(weights), title=f"{title:<5}")
    done = 0
    try:
        for index, result in _results(function, tasks, order, jobs):
            done += weights[index]
            progress.update(done)
            yield index, result
    except OSError as error:
        raise storage_error(title.strip(), error) from error
    finally:
        progress.close()


def _results(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], order: list[int], jobs: int
) -> Iterator[tuple[int, Any]]:
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        for index in order:
            yield index, function(*tasks[index])
        return
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    # fork starts at once, but copies a process with running threads badly: torch has such threads.
    method = "spawn" if "torch" in sys.modules or not hasattr(os, "fork") else "fork"
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context(method), initializer=_watch_parent, initargs=(os.getpid(),)
    )
    remaining = iter(order)
    running: dict[Future[Any], int] = {}
    try:
        while True:
            for index in itertools.islice(remaining, 2 * jobs - len(running)):
                running[pool.submit(function, *tasks[index])] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; run the same command again with fewer --jobs: "
            "it continues where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
