"""A training run from its first step to its last: what pretraining and fine-tuning have in common.

    run = TrainingRun(args, identity, ...)      # what the run is
    run.begin(load_model)                       # continue the checkpoint that --resume means, or start afresh
    run.arm()                                   # optimizer steps and savings
    for epoch in run.epochs(loader):
        result = run.train(train_one_epoch, loader, epoch, ...)
        if result is None:                      # asked to stop, and saved
            break
        ...                                     # evaluate, log
        run.save(epoch, names, last=...)

What is saved is enough to go on at any step with the same numbers (`util.saving`, `util.resume`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.args import args_to_dict
from util.distributed import Processes, setup_processes
from util.files import make_directory, write_json
from util.log import EpochLog, Progress, ScalarWriter, format_duration, get_logger, memory_mib, setup_logging
from util.passport import write_passport
from util.precision import precision
from util.resume import Batch, Resumed, find_checkpoint, resume_run, start_afresh
from util.saving import RunSaver
from util.schedule import check_schedule, effective_batch, learning_rate, scaled_lr
from util.seeding import seed_everything
from util.training import EpochResult, Trainer, arrange

TEST_RUN_STEPS = 3
TEST_RUN_EPOCHS = 2


def plan_batch(args: argparse.Namespace, world_size: int) -> Batch:
    """Samples of a step and the peak learning rate that goes with them: --lr, or --blr * effective batch / 256.

    Raises:
        UserError: a rate or a schedule that makes no sense.
    """
    effective = effective_batch(args.batch_size, args.accum_iter, world_size)
    lr = scaled_lr(args.blr, effective) if args.lr is None else args.lr
    check_schedule(lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs)
    return Batch(args.batch_size, args.accum_iter, world_size, lr)


def schedule_of(args: argparse.Namespace) -> dict[str, Any]:
    """The schedule as checkpoints keep it: not the peak rate, which follows from it and the effective batch, and that
    may change when a run is resumed."""
    return {name: getattr(args, name) for name in ("epochs", "warmup_epochs", "lr", "blr", "min_lr")}


def start_processes(args: argparse.Namespace, choose_folder: Callable[[], str] | None = None) -> Processes:
    """Meet the other processes, open the log in the run's folder, and seed everything.

    Args:
        args: flags of an entry script.
        choose_folder: names another --output_dir; rank 0 is asked, for all.
    """
    processes = setup_processes(
        device=args.device,
        dist_url=args.dist_url,
        port=args.port,
        world_size=args.world_size,
        dist_on_itp=args.dist_on_itp,
        hang_timeout=args.hang_timeout,
    )
    if choose_folder is not None:
        args.output_dir = str(processes.broadcast_object(choose_folder() if processes.is_main else None))
    setup_logging(args.output_dir, rank=processes.rank)
    seed_everything(args.seed)
    return processes


class TrainingRun:
    """A run in its folder.

    Attributes:
        folder: of the run.
        is_main: whether this process writes.
        resumed: where it goes on; after `begin`.
        trainer, saver: after `arm`.
        end: number of the epoch behind the last one that is trained; may be lowered.
    """

    trainer: Trainer
    saver: RunSaver

    def __init__(
        self,
        args: argparse.Namespace,
        identity: Mapping[str, Any],
        *,
        group: Processes,
        everyone: Processes,
        model: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        steps: int,
        amp: str,
        passport: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            args: flags that both entry scripts have.
            identity: what makes it this run (data, model, schedule, recipe, seed ...): a checkpoint that says otherwise
                is not continued.
            group: processes that train together.
            everyone: all processes of the command; the same, or more where each works alone on cached features.
            model: what checkpoints hold.
            module: what is trained: the model, or a part of it.
            optimizer: of the module's parameters.
            batch: of `plan_batch`.
            steps: forward passes of an epoch.
            amp: value of --amp.
            passport: of `util.passport`; goes into the folder and into checkpoints.
        """
        self.args, self.identity = args, dict(identity)
        self._passport = dict(passport or {})
        self.group, self.everyone, self.is_main = group, everyone, everyone.is_main
        self.folder: Path = make_directory(args.output_dir)
        self._model, self._module, self._optimizer, self._batch = model, module, optimizer, batch
        self.steps = min(TEST_RUN_STEPS, steps) if args.test_run else steps
        self._amp_dtype, self._scaler = precision(amp, everyone.device)
        self.resumed, self._step, self.end = Resumed(), 0, 0
        self.began = time.monotonic()

    def begin(
        self, load_model: Callable[[dict[str, Any], str], None], start: Callable[[], object] = lambda: None
    ) -> Resumed:
        """Continue the checkpoint that --resume means, or start afresh; what lay in the folder is then moved aside.

        Args:
            load_model: gets a checkpoint and its path, and puts its weights into the model, or refuses them.
            start: brings a fresh run to its initial weights.

        Raises:
            UserError: the checkpoint belongs to another run.
        """
        args = self.args
        path = find_checkpoint(args.resume, self.folder, self.everyone)
        if path is not None:
            resumed = resume_run(
                path,
                self.identity,
                processes=self.group,
                load_model=lambda checkpoint: load_model(checkpoint, str(path)),
                optimizer=self._optimizer,
                scaler=self._scaler,
                batch=self._batch,
                steps=self.steps,
                allow_mismatch=args.allow_mismatch,
                is_branch=args.resume != "auto",
            )
            # where each process trains alone, all must still be one run
            resumed = replace(resumed, run_id=self.everyone.broadcast_object(resumed.run_id))
        else:
            start()
            resumed = start_afresh(self.folder, self.everyone, test_run=args.test_run)
        if args.start_epoch is not None:
            resumed = resumed.at_epoch(args.start_epoch)
        self.resumed, self._step = resumed, resumed.step
        self.end = min(args.epochs, args.stop_epoch or args.epochs)
        if args.test_run:
            self.end = min(self.end, resumed.epoch + TEST_RUN_EPOCHS)
        if self.is_main:
            write_json(self.folder / "args.json", args_to_dict(args))
            self._passport = write_passport(self.folder, self._passport, resumed=resumed.path is not None)
        return resumed

    def arm(self, facts: Mapping[str, Any] | None = None, changing: Callable[[], dict[str, Any]] = dict) -> None:
        """Make what takes steps and what saves.

        Args:
            facts: further entries of checkpoints.
            changing: more of them, asked at each save (best scores).
        """
        args = self.args
        trained, graphs = arrange(self._module, self.group, cuda_graph=args.cuda_graph)
        self.trainer = Trainer(
            trained,
            self._optimizer,
            processes=self.group,
            output_dir=self.folder,
            lr_at=partial(
                learning_rate,
                lr=self._batch.lr,
                min_lr=args.min_lr,
                warmup_epochs=args.warmup_epochs,
                epochs=args.epochs,
            ),
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            amp_dtype=self._amp_dtype,
            scaler=self._scaler,
            skip_nonfinite=args.skip_nonfinite,
            max_bad_samples=args.max_bad_samples,
            resumed=self.resumed,
            graphs=graphs,
        )
        self.began = time.monotonic()
        self.saver = RunSaver(
            self.folder,
            processes=self.group,
            is_main=self.is_main,
            keep=args.keep_checkpoints,
            minutes=args.save_minutes,
            hang_timeout=args.hang_timeout,
            seed=args.seed,
            batch=self._batch,
            resumed=self.resumed,
            fixed={**self.identity, "args": args_to_dict(args), "passport": self._passport, **(facts or {})},
            model=self._model,
            trainer=self.trainer,
            changing=changing,
        )

    @property
    def seconds(self) -> float:
        """Since `arm`."""
        return time.monotonic() - self.began

    def epochs(self, loader: Any) -> Iterator[int]:
        """Numbers of the epochs that are left, until the last one or until the run has stopped on request.

        Args:
            loader: of the training samples (`sarwmix.data.loader`); draws a new order for each epoch.
        """
        for epoch in range(self.resumed.epoch, self.end):
            loader.set_epoch(epoch)
            yield epoch
            self._step = 0  # only the first epoch may begin in its middle
            if self.saver.stopped or epoch + 1 >= self.end:
                return

    def train(
        self, train_one_epoch: Callable[..., EpochResult], loader: Any, epoch: int, *, title: str, **inputs: Any
    ) -> EpochResult | None:
        """Train an epoch, or what is left of it.

        Args:
            train_one_epoch: of the engine.
            loader: of the training samples.
            epoch: from `epochs`.
            title: of the progress line.
            inputs: what the engine wants beside.

        Returns:
            What it gave; None where the run was asked to stop inside it and has been saved.
        """
        result = train_one_epoch(
            self.trainer,
            self.saver.watch(loader.iter_from(self._step)),
            seed=self.args.seed,
            epoch=epoch,
            steps=self.steps,
            start_step=self._step,
            progress=Progress(self.steps, title=title, start=self._step, enabled=self.is_main),
            on_step=partial(self.saver.after_step, epoch, self.steps),
            **inputs,
        )
        if result.finished:
            return result
        self.saver.save_and_stop(epoch - 1, result.steps_done)
        return None

    def save(self, epoch: int, names: Sequence[str], *, last: bool, recent: bool = True) -> None:
        """Save under these names after an epoch, if there are any, and stop where that was asked for.

        Args:
            epoch: the finished one.
            names: files.
            last: whether none follows; then everything is on disk when this returns.
            recent: whether the file also counts as the newest state of the run.
        """
        if names:
            self.saver.save(epoch, 0, names, recent=recent, wait=last)
        if self.saver.stopping and not last:
            self.saver.save_and_stop(epoch, 0)

    def close(self) -> bool:
        """Wait for the disk; whether the run stopped on request, before its end."""
        if not self.saver.stopped:
            self.saver.close()
        return self.saver.stopped


class EpochNotes:
    """A line an epoch of pretraining: in log.txt, in TensorBoard, and on the console with the time that is left."""

    def __init__(self, run: TrainingRun, log_dir: str | None) -> None:
        self._run, first = run, run.resumed.epoch
        self._log = EpochLog(run.folder, start_epoch=first) if run.is_main else None
        self._scalars = ScalarWriter(
            (log_dir or run.folder / "tensorboard") if run.is_main else None,
            start=1000 * first if run.resumed.path is not None else None,
        )

    def write(self, epoch: int, stats: Mapping[str, float]) -> None:
        """
        Args:
            epoch: the finished one.
            stats: what its training gave.
        """
        run, done = self._run, epoch + 1
        record = {"epoch": epoch, **stats, "memory_mib": max(memory_mib())}
        if self._log is not None:
            self._log.write(record)
        shown = {name: value for name, value in record.items() if name == "train_loss" or name.endswith("_error")}
        self._scalars.add(1000 * epoch, {**shown, "lr": record["train_lr"]})
        left = run.seconds / (done - run.resumed.epoch) * (run.end - done)
        get_logger().info(
            "Epoch %d/%d  loss %.4f  unweighted %.4f  lr %.3g  %.1f images/s  ETA %s",
            done,
            run.end,
            record["train_loss"],
            record.get("plain_error", float("nan")),
            record["train_lr"],
            record["images_per_s"],
            format_duration(left),
        )

    def close(self) -> None:
        self._scalars.close()
