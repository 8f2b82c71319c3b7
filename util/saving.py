"""When a run saves itself: at epochs, every so many minutes inside one, and when it is asked to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from util.checkpoint import FORMAT, CheckpointManager
from util.distributed import FlagExchange, Processes
from util.log import get_logger
from util.resume import Batch, Resumed
from util.seeding import rng_state
from util.signals import StopRequest
from util.training import Trainer
from util.watchdog import Watchdog

T = TypeVar("T")


class RunSaver:
    """Puts the state of a training run together and hands it to the checkpoint manager of rank 0.

    Every process calls the same methods at the same steps; only rank 0 writes. It also listens to stop requests and
    ends the job when a process hangs.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        processes: Processes,
        is_main: bool,
        keep: int,
        minutes: float,
        hang_timeout: float,
        seed: int,
        batch: Batch,
        resumed: Resumed,
        fixed: Mapping[str, Any],
        model: torch.nn.Module,
        trainer: Trainer,
        changing: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """
        Args:
            output_dir: the run's folder.
            processes: those that train together.
            is_main: whether this process writes.
            keep: how many files stay in `recent/`.
            minutes: save in mid-epoch when the last save is older; 0: never.
            hang_timeout: seconds without progress after which the job is ended; 0: never.
            seed: of the sampler.
            batch: samples of a step; tells where a resumed run with another batch or other processes continues.
            resumed: where the run stands; a kill may have kept names from the checkpoint it continues, which get them.
            fixed: what identifies the run (data, model, schedule, args, ...).
            model: whose weights are saved, unwrapped.
            trainer: whose optimizer, scaler and counts are saved.
            changing: further entries, asked at each save (best scores).
        """
        self._folder = Path(output_dir)
        self._processes = processes
        self._manager = CheckpointManager(output_dir, keep=keep) if is_main else None
        self._minutes = minutes
        self._seed = seed
        self._batch = batch
        self._fixed = {
            **fixed,
            "run_id": resumed.run_id,
            "lineage": list(resumed.lineage),
            "world_size": processes.world_size,
        }
        self._model, self._trainer = model, trainer
        self._changing = changing
        self._stop = StopRequest().install()
        self._flags = FlagExchange(processes, 2)
        self._watchdog = Watchdog(processes, limit=hang_timeout)
        self._last = time.monotonic()
        self.stopping = False  # all processes have agreed to stop
        self.stopped = False  # ... and have saved
        if self._manager is not None and resumed.path is not None:
            self._manager.renew_names(resumed.path, resumed.entries.get("names", ()))

    def watch(self, batches: Iterator[T], *, alone: bool = False) -> Iterator[T]:
        """Pass batches on, ending the job when a process hangs; see `Watchdog.watch`."""
        return self._watchdog.watch(batches, alone=alone)

    def save(self, epoch: int, step: int, names: Sequence[str], *, recent: bool = True, wait: bool = False) -> None:
        """Save with `epoch` finished and `step` steps of the next one done; see `CheckpointManager.save`."""
        with self._watchdog.paused():
            own = {"rng": rng_state(), "counted": self._trainer.state()}
            everywhere = self._processes.all_gather_objects(own)
            scaler = self._trainer.scaler
            if recent:
                self._last = time.monotonic()
            if self._manager is not None:
                state = {
                    "format": FORMAT,
                    **self._fixed,
                    "model": self._model.state_dict(),
                    "optimizer": self._trainer.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else {},
                    "epoch": epoch,
                    "step": step,
                    **{name: {rank: part[name] for rank, part in enumerate(everywhere)} for name in own},
                    "skipped_steps": self._trainer.guard.skipped,
                    "sampler": {
                        "seed": self._seed,
                        "epoch": epoch + 1,
                        "position": step,
                        "samples": step * self._batch.per_step,
                    },
                    "batch": self._batch.as_dict(),
                    "names": list(names),
                    **self._changing(),
                }
                self._manager.save(state, names=names, recent=recent, wait=wait)
            self._processes.barrier()  # rank 0 may have waited for its previous write; nobody shall be blamed for that

    def after_step(self, epoch: int, steps: int, steps_done: int) -> bool:
        """Agree with the others after step `steps_done` of `steps` in `epoch`: save when it is time; True: stop now.

        With several processes the decision is one step old: it travels while the next step computes.
        """
        due = (
            self._manager is not None
            and self._minutes > 0
            and time.monotonic() - self._last > 60 * self._minutes
            and not self._manager.busy
        )
        stop, due_now = self._flags.post([int(self._stop.requested), int(due)])
        self.stopping = self.stopping or bool(stop)
        if steps_done == steps:
            return False  # the epoch is complete; whoever runs the epochs looks at `stopping`
        if due_now and not self.stopping:
            self.save(epoch - 1, steps_done, [])
        return self.stopping

    def save_and_stop(self, epoch: int, steps_done: int) -> None:
        """Save a run that was asked to stop, with `epoch` finished and `steps_done` steps of the next one done."""
        self.save(epoch, steps_done, ["checkpoint.pth"], wait=True)
        self.stopped = True
        get_logger().info(
            "stopped on request: %d epochs and %d steps done; --resume auto continues", epoch + 1, steps_done
        )
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            WriteError: the last checkpoint could not be written.
        """
        self._watchdog.close()
        self._flags.collect()
        self._stop.restore()
        if self._manager is not None:
            self._manager.close()
