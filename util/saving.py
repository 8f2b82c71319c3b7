"""When a run saves itself: at epochs, every so many minutes inside one, and when it is asked to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import FORMAT, CheckpointManager
from util.distributed import Processes
from util.files import write_json
from util.seeding import rng_state
from util.signals import StopRequest


class RunSaver:
    """Puts the state of a training run together and hands it to the checkpoint manager of rank 0.

    Every process calls the same methods at the same steps; only rank 0 writes.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        processes: Processes,
        is_main: bool,
        keep: int,
        minutes: float,
        seed: int,
        fixed: Mapping[str, Any],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        changing: Callable[[], dict[str, Any]],
    ) -> None:
        """
        Args:
            output_dir: the run's folder.
            processes: those that train together.
            is_main: whether this process writes.
            keep: how many files stay in `recent/`.
            minutes: save in mid-epoch when the last save is older; 0: never.
            seed: of the sampler.
            fixed: what identifies the run (data, model, schedule, args, ...).
            model, optimizer, scaler: what is saved; the model unwrapped.
            changing: further entries, asked at each save (best scores, counts).
        """
        self._folder = Path(output_dir)
        self._processes = processes
        self._is_main = is_main
        self._manager = CheckpointManager(output_dir, keep=keep) if is_main else None
        self._minutes = minutes
        self._seed = seed
        self._fixed = dict(fixed)
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._changing = changing
        self._stop = StopRequest().install()
        self._last = time.monotonic()

    def save(self, epoch: int, step: int, names: Sequence[str], *, recent: bool = True, wait: bool = False) -> None:
        """Save with `epoch` finished and `step` steps of the next one done; see `CheckpointManager.save`."""
        rng = dict(enumerate(self._processes.all_gather_objects(rng_state())))
        if recent:
            self._last = time.monotonic()
        if self._manager is None:
            return
        state = {
            "format": FORMAT,
            **self._fixed,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler is not None else {},
            "epoch": epoch,
            "step": step,
            "rng": rng,
            "sampler": {"seed": self._seed, "epoch": epoch + 1, "position": step},
            **self._changing(),
        }
        self._manager.save(state, names=names, recent=recent, wait=wait)

    def after_step(self, epoch: int, steps: int, steps_done: int) -> bool:
        """Agree with the others after step `steps_done` of `steps` in `epoch`: save when it is time; True: stop now."""
        due = self._minutes > 0 and time.monotonic() - self._last > 60 * self._minutes
        stop, due_now = self._processes.maximum([int(self._stop.requested), int(due and self._is_main)])
        if due_now and not stop and steps_done < steps:
            self.save(epoch - 1, steps_done, [])
        return bool(stop)

    def dump(self, facts: dict[str, Any]) -> str:
        """Write the facts about a step that was not finite; returns the file's path."""
        path = self._folder / f"nonfinite_rank{self._processes.rank}.json"
        write_json(path, facts)
        return str(path)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._stop.restore()
        if self._manager is not None:
            self._manager.close()
