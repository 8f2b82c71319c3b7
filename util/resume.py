"""Continuing a run: which file, whether it belongs to this run, and where to go on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import find_latest, load_checkpoint, resolve_resume, set_aside, taking_apart
from util.distributed import Processes
from util.errors import UserError
from util.log import get_logger
from util.seeding import set_rng_state

_ABSENT = "(not stored)"
# Settings of pretraining that came later: what checkpoints without them were trained with.
_BEFORE = {"range": "p01-p99", "permute": False, "target": "image", "target_looks": 1}


# Entries that earlier checkpoints do not have; they cannot be compared there.
_LATER = {"data": ("labels_sha256",), "recipe": ("amp",)}


@dataclass(frozen=True)
class Batch:
    """Samples of a step."""

    batch_size: int  # of one process and forward pass
    accum_iter: int
    world_size: int
    lr: float  # peak learning rate that goes with it

    @property
    def per_step(self) -> int:
        """Samples that all processes take in one forward pass."""
        return self.batch_size * self.world_size

    @property
    def effective(self) -> int:
        """Samples of an optimizer step."""
        return self.per_step * self.accum_iter

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {**asdict(self), "effective": self.effective}

    def steps_like(self, saved: Any) -> bool:
        """Whether a step of the run that stored `saved` takes as many samples."""
        return isinstance(saved, Mapping) and self.per_step == saved.get("batch_size", 0) * saved.get("world_size", 0)


def new_run_id() -> str:
    """Identity of a run that starts afresh: tells its checkpoints from those of an older run in the same folder."""
    return os.urandom(8).hex()


def find_checkpoint(resume: str, output_dir: str | os.PathLike[str], processes: Processes) -> Path | None:
    """The file that `--resume` means, the same on all processes: rank 0 looks for it and verifies it for all."""
    found = resolve_resume(resume, output_dir) if processes.is_main else None
    name = processes.broadcast_object(str(found) if found is not None else "")
    return Path(name) if name else None


def load_verified(path: Path, processes: Processes) -> dict[str, Any]:
    """Load the file that `find_checkpoint` returned; its hash was checked by rank 0."""
    checkpoint = load_checkpoint(path, verify=False)
    processes.barrier()
    return checkpoint


def differences(saved: Any, current: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (place, saved, current) for each value that differs; keys only the checkpoint has are ignored."""
    if isinstance(current, Mapping):
        saved = saved if isinstance(saved, Mapping) else {}
        for key, value in current.items():
            yield from differences(saved.get(key, _ABSENT), value, f"{where}.{key}" if where else str(key))
    elif isinstance(current, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or list(saved) != list(current):
            yield where, saved, current
    elif saved != current:
        yield where, saved, current


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, path: str, allow_mismatch: bool) -> None:
    """Compare what defines a run (data, model, weighting, schedule) with the checkpoint that shall continue it.

    Args:
        saved: the checkpoint.
        current: the same keys as this command would store them.
        path: of the checkpoint, for messages.
        allow_mismatch: warn instead of refusing.

    Raises:
        UserError: something differs; each difference is named.
    """
    found = [f"{where}: checkpoint {old!r}, now {new!r}" for where, old, new in differences(saved, current)]
    if not found:
        return
    text = "; ".join(found)
    if not allow_mismatch:
        raise UserError(
            f"{path} belongs to another run: {text}. Use the settings of the checkpoint, or --allow_mismatch to "
            "continue all the same; to start a new run from its weights use --finetune instead of --resume"
        )
    get_logger().warning("resuming a different run (--allow_mismatch): %s", text)


def _comparable(run: Mapping[str, Any], checkpoint: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The run's description as the checkpoint would put it.

    A peak rate given by --lr may be the one that followed from --blr before: so a run keeps its rate when the batch
    changes. Checkpoints of other tools say nothing about the recipe, older ones nothing about the selection.
    """
    optional = ("recipe", "selection")
    wanted = {name: value for name, value in run.items() if name not in optional or name in checkpoint}
    for name, later in _LATER.items():
        entries, before = wanted.get(name), checkpoint.get(name)
        if isinstance(entries, Mapping) and isinstance(before, Mapping):
            wanted[name] = {key: value for key, value in entries.items() if key not in later or key in before}
    schedule, saved, old = wanted.get("schedule"), checkpoint.get("schedule"), checkpoint.get("batch")
    if isinstance(schedule, Mapping) and isinstance(saved, Mapping) and isinstance(old, Mapping):
        same_rate = math.isclose(batch.lr, float(old.get("lr", 0.0)), rel_tol=1e-3)  # as the messages print it
        if same_rate and schedule.get("lr") is not None:
            wanted["schedule"] = {**schedule, "lr": saved.get("lr"), "blr": saved.get("blr")}
    return wanted


def restore_rng(checkpoint: Mapping[str, Any], processes: Processes) -> None:
    """Bring the global generators back, when the run has as many processes as before.

    Training steps do not depend on them (see `util.seeding`); whatever else draws numbers does.
    """
    states = checkpoint.get("rng")
    if isinstance(states, Mapping) and len(states) == processes.world_size and processes.rank in states:
        set_rng_state(states[processes.rank])


def resume_position(checkpoint: Mapping[str, Any], *, batch: Batch, steps: int) -> tuple[int, int]:
    """Where a resumed run continues.

    With the same batch and number of processes: exactly where the checkpoint stands. With others the position in the
    epoch is kept in samples and rounded down to a whole optimizer step, so that nothing is left out and less than one
    effective batch is seen twice; what changes is said.

    Args:
        checkpoint: its `epoch`, `step`, `sampler` and `batch` are read.
        batch: of this run.
        steps: forward passes of an epoch in this run.

    Returns:
        (epoch, forward passes of it already done).
    """
    epoch, step = int(checkpoint["epoch"]) + 1, int(checkpoint.get("step", 0))
    old = checkpoint.get("batch")
    if not isinstance(old, Mapping):
        return epoch, step
    changed = {
        name: (old.get(name), value)
        for name, value in batch.as_dict().items()
        if name != "lr" and old.get(name) != value
    }
    if not changed:
        return epoch, step
    log = get_logger()
    log.warning(
        "resuming with %s; effective batch %s -> %d, peak lr %.4g -> %.4g (without --lr: lr = blr * effective / 256; "
        "give --lr to keep the old one)",
        ", ".join(f"{name} {new} instead of {was}" for name, (was, new) in changed.items() if name != "effective"),
        old.get("effective"),
        batch.effective,
        float(old.get("lr", 0.0)),
        batch.lr,
    )
    seen = int(checkpoint.get("sampler", {}).get("samples", 0))
    step = min(seen // batch.effective * batch.accum_iter, steps)
    if seen:
        log.warning("%d samples of epoch %d were done; %d are done again", seen, epoch, seen - step * batch.per_step)
    return epoch, step


def share_of_counts(parts: Mapping[int, Mapping[str, Any]], processes: Processes) -> dict[str, Any]:
    """What this process has counted, from what each process of the checkpoint had counted.

    With another number of processes than before sums are spread evenly, so that totals and means stay what they were.

    Args:
        parts: by rank what `util.training.Trainer.state` gave; may be empty (older checkpoints).
        processes: those of this run.

    Returns:
        ``sums`` and ``counts`` (None when there are none), and ``bad_samples``.
    """
    world = processes.world_size

    def total(kind: str) -> dict[str, float] | None:
        if not parts:
            return None
        if len(parts) == world:
            return dict(parts[processes.rank][kind])
        names = {name for part in parts.values() for name in part[kind]}
        return {name: sum(part[kind].get(name, 0.0) for part in parts.values()) / world for name in names}

    mine = [part for rank, part in parts.items() if rank % world == processes.rank]
    bad = [(str(name), str(reason)) for part in mine for name, reason in part["bad_samples"]]
    return {"sums": total("sums"), "counts": total("counts"), "bad_samples": bad}


@dataclass(frozen=True)
class Resumed:
    """Where a run stands after `resume_run`, or at its start."""

    epoch: int = 0
    step: int = 0  # forward passes of the epoch already done
    path: Path | None = None  # the checkpoint
    run_id: str = field(default_factory=new_run_id)
    lineage: tuple[str, ...] = ()  # identities of the runs that it continues
    skipped: int = 0  # steps that were not finite
    bad_samples: list[tuple[str, str]] = field(default_factory=list)  # of this process
    sums: Mapping[str, float] | None = None  # of this process, over the steps of the epoch already done
    counts: Mapping[str, float] | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)  # the checkpoint without what has been restored

    def at_epoch(self, epoch: int) -> Resumed:
        """The same at the start of another epoch."""
        return replace(self, epoch=epoch, step=0, sums=None, counts=None)

    @property
    def runs(self) -> tuple[str, ...]:
        """This run and those that it continues."""
        return (*self.lineage, self.run_id)


# Files of a run that go with its checkpoints when a new run takes the folder.
_OF_RUN = ("args.json", "passport.json", "log.txt", "metrics.json", "metrics_eval.json", "pictures")


def start_afresh(output_dir: str | os.PathLike[str], processes: Processes, *, test_run: bool) -> Resumed:
    """A new run; the checkpoints of an earlier one in the folder are moved aside, not overwritten.

    Args:
        output_dir: the run's folder.
        processes: all; rank 0 moves.
        test_run: a trial, which must not push a real run aside.

    Raises:
        UserError: a trial in the folder of a run.
    """
    if processes.is_main:
        folder = Path(output_dir)
        latest = find_latest(folder) if test_run else None
        if latest is not None and not load_checkpoint(latest, verify=False).get("test_run"):
            raise UserError(
                f"{folder} holds the checkpoints of a run; give --test_run another --output_dir, so that they stay"
            )
        aside = set_aside(folder, _OF_RUN)
        if aside is not None:
            get_logger().warning(
                "%s held the checkpoints of an earlier run, which are now in %s; --resume auto would have continued it",
                folder,
                aside,
            )
    return Resumed(run_id=processes.broadcast_object(new_run_id()))


def resume_run(
    path: Path,
    run: Mapping[str, Any],
    *,
    processes: Processes,
    load_model: Callable[[dict[str, Any]], None],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    batch: Batch,
    steps: int,
    allow_mismatch: bool,
    is_branch: bool = False,
) -> Resumed:
    """Bring a run back to where a checkpoint stands.

    It stays the same run, whose newest checkpoint is the one with the most progress, unless it starts from an older one
    or counts its steps in another way: then what follows is a new run, and what the old one did later is left behind.

    Args:
        path: what `find_checkpoint` returned.
        run: what defines this run, see `check_same_run`.
        processes: those that train together.
        load_model: gets the checkpoint and puts its weights into the model, or refuses them.
        optimizer, scaler: restored in place.
        batch, steps: see `resume_position`.
        allow_mismatch: see `check_same_run`.
        is_branch: whether newer checkpoints of the run may exist (the path was given by hand).

    Raises:
        UserError: the checkpoint belongs to another run.
    """
    checkpoint = load_verified(path, processes)
    with taking_apart(path):
        if isinstance(checkpoint.get("weighting"), Mapping):
            checkpoint["weighting"] = {**_BEFORE, **checkpoint["weighting"]}
        check_same_run(checkpoint, _comparable(run, checkpoint, batch), path=str(path), allow_mismatch=allow_mismatch)
        load_model(checkpoint)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, entries in optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.numel() not in (1, parameter.numel()):
                    raise ValueError(f"the optimizer's {name} has shape {tuple(value.shape)}")
        if scaler is not None and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        restore_rng(checkpoint, processes)
        epoch, step = resume_position(checkpoint, batch=batch, steps=steps)
        get_logger().info("resumed %s: epoch %d, step %d", path, epoch, step)
        run_id, lineage = str(checkpoint.get("run_id") or ""), tuple(checkpoint.get("lineage", ()))
        is_new = is_branch or not run_id or not batch.steps_like(checkpoint.get("batch"))
        resumed = Resumed(
            epoch=epoch,
            step=step,
            path=path,
            run_id=run_id,
            lineage=lineage,
            skipped=int(checkpoint.get("skipped_steps", 0)),
            **share_of_counts(checkpoint.get("counted", {}), processes),
            # Model and optimizer would stay in memory a second time.
            entries={name: value for name, value in checkpoint.items() if name not in ("model", "optimizer")},
        )
    if not is_new:
        return resumed
    lineage = (*lineage, run_id) if run_id else lineage
    return replace(resumed, lineage=lineage, run_id=processes.broadcast_object(new_run_id()))
