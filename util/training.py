"""The training epoch that pretraining and fine-tuning share: accumulation, faults, and the sums for the log."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.cuda_graph import StepGraphs
from util.distributed import Processes, average_gradients, data_parallel, has_running_statistics, share_parameters
from util.errors import NonFiniteError, UserError
from util.files import WriteError, write_json
from util.log import Progress, get_logger
from util.optim import gradient_norm
from util.resume import Resumed
from util.schedule import set_learning_rate

SMALLEST_SCALE = 1.0  # of float16 losses; it starts at 65,536 and is halved at each step with an overflow
SYNC_EVERY = 20  # steps between looks at device values; each look waits for the device once

# A step in two parts. From a batch and its number: what goes into the model, nested tuples of tensors on the device and
# plain values, and counts to be summed over the epoch. From that: the loss, alone or as the first of several numbers
# that are logged; this may run as a CUDA graph, so it looks at no value and draws from the device's generator only.
Prepare = Callable[[dict[str, Any], int], tuple[Any, Mapping[str, Tensor]]]
LossOf = Callable[[Any], Tensor]


def sync_interval(device: torch.device) -> int:
    """Steps between looks at device values; on the CPU looking costs nothing."""
    return 1 if device.type == "cpu" else SYNC_EVERY


def arrange(model: nn.Module, processes: Processes, *, cuda_graph: bool) -> tuple[nn.Module, StepGraphs | None]:
    """How a model is trained by these processes: (model to call, graphs of its steps or None).

    With graphs the model stays bare; :class:`Trainer` averages gradients after each launch, since communication that
    DistributedDataParallel starts in the middle of a backward pass cannot be recorded everywhere.

    Raises:
        UserError: no CUDA device, or running statistics that several processes would have to share in each step.
    """
    if not cuda_graph:
        return data_parallel(model, processes), None
    if processes.device.type != "cuda":
        raise UserError(f"--cuda_graph needs a CUDA device, this run computes on {processes.device}; leave it out")
    if processes.world_size > 1 and has_running_statistics(model):
        raise UserError(
            "--cuda_graph on several processes does not go with BatchNorm, whose statistics they share in each step; "
            "leave it out, or use one process"
        )
    share_parameters(model, processes)
    return model, StepGraphs(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def bare(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@dataclass
class BadSamples:
    """Counts unreadable samples that were replaced while training, and stops when there are too many.

    Attributes:
        limit: how many a process tolerates per run.
        found: (name, reason) of each, in order.
    """

    limit: int
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, replaced: Sequence[tuple[str, str]]) -> None:
        """Record a batch's replaced samples.

        Raises:
            UserError: the limit is exceeded; names the latest.
        """
        for name, reason in replaced:
            self.found.append((name, reason))
            count = len(self.found)
            get_logger().warning(
                "unreadable sample %d of at most %d, replaced: %s: %s", count, self.limit, name, reason
            )
            if len(self.found) > self.limit:
                raise UserError(
                    f"{len(self.found)} unreadable samples, more than --max_bad_samples {self.limit}; the last one: "
                    f"{name}: {reason}. Repair or remove these files, or raise the limit"
                )


class FiniteGuard:
    """Finds non-finite losses and gradients without waiting for the device at every step.

    A bad update never reaches the weights: fused AdamW skips a step whose ``found_inf`` is set, on the device. Flags of
    the last steps are read every :data:`SYNC_EVERY` steps (every step on the CPU, where reading costs nothing).
    """

    def __init__(self, allowed: int, skipped: int = 0) -> None:
        self.allowed = allowed
        self.skipped = skipped
        self._recent: deque[tuple[Tensor, list[tuple[Tensor, list[str]]], int]] = deque()

    def watch(self, losses: Sequence[tuple[Tensor, list[str]]], norm: Tensor, step: int) -> Tensor:
        """Flag a step before the optimizer runs.

        Args:
            losses: loss and sample names of each batch of the step.
            norm: of the gradients, the same on all processes.
            step: number of its last batch.

        Returns:
            ``found_inf``: 1.0 when the step must be skipped.
        """
        bad = (~torch.isfinite(norm)).to(torch.float32)
        self._recent.append((bad, [(torch.isfinite(loss.detach()), names) for loss, names in losses], step))
        return bad

    def check(self, all_gather: Callable[[Any], list[Any]], dump: Callable[[dict[str, Any]], str]) -> None:
        """Look at the flags collected since the last call.

        Gradients are averaged over processes, so all of them see the same bad steps and stop together.

        Args:
            all_gather: gathers a plain value from every process.
            dump: writes the facts to a file and returns its path.

        Raises:
            NonFiniteError: more bad steps than allowed.
        """
        if not self._recent:
            return
        bad = torch.stack([flag for flag, *_ in self._recent]).tolist()
        for (_, batches, step), is_bad in zip(self._recent, bad, strict=True):
            if not is_bad:
                continue
            self.skipped += 1
            names = [name for _, own in batches for name in own]
            lost = [name for finite, own in batches if not bool(finite) for name in own]
            everywhere = all_gather({"lost": lost, "names": names})
            culprits = [part["lost"] for part in everywhere]
            # Where every loss is finite and a gradient is not, any sample of the step may be the cause.
            groups = culprits if any(culprits) else [part["names"] for part in everywhere]
            suspects = sorted({name for group in groups for name in group})
            facts = {"step": step, "loss_finite": not lost, "names": names, "culprits_by_rank": culprits}
            get_logger().warning("step %d: gradients are not finite; the update was skipped", step)
            if self.skipped > self.allowed:
                path = dump(facts)
                shown = ", ".join(suspects[:8]) + (f" and {len(suspects) - 8} more" if len(suspects) > 8 else "")
                raise NonFiniteError(
                    f"loss or gradients are not finite at step {step} ({self.skipped} such steps, --skip_nonfinite "
                    f"{self.allowed}); samples of that batch: {shown}; facts written to {path}. The weights before the "
                    f"step are intact. Look at these samples, lower --lr, or set --clip_grad"
                )
        self._recent.clear()


def accumulation_group(step: int, steps: int, accum_iter: int) -> tuple[bool, bool, int]:
    """Where a batch lies in its accumulation group: (first, last, size of the group).

    The last group of an epoch is shorter when ``steps`` is not a multiple of ``accum_iter``; nothing is dropped.
    """
    first = step % accum_iter == 0
    group_start = step - step % accum_iter
    size = min(accum_iter, steps - group_start)
    return first, step - group_start == size - 1, size


@dataclass
class EpochResult:
    """What an epoch leaves behind.

    Attributes:
        stats: plain numbers for ``log.txt``.
        finished: False when it was asked to stop early.
        steps_done: batches consumed, for a checkpoint in mid-epoch.
    """

    stats: dict[str, float]
    finished: bool
    steps_done: int


class _Sums:
    """Sums of this process over an epoch; those on the device are read now and then.

    Args:
        device: where losses are computed.
        sums, counts: what `as_dicts` gave when the epoch was left in the middle.
    """

    DEVICE = ("loss", "losses", "norm", "norms", "overflows")  # finite losses, number; the same of norms; other norms
    HOST = ("samples", "seconds", "waited")

    def __init__(
        self, device: torch.device, sums: Mapping[str, float] | None = None, counts: Mapping[str, float] | None = None
    ) -> None:
        sums = sums or dict.fromkeys(self.DEVICE + self.HOST, 0.0)
        self.steps = torch.tensor([sums[name] for name in self.DEVICE], device=device, dtype=torch.float64)
        self.samples, self.seconds, self.waited = (sums[name] for name in self.HOST)
        self.counts = {name: self._scalar(value) for name, value in (counts or {}).items()}

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.steps.device, dtype=torch.float64)

    def mean_loss(self) -> float:
        """Of the finite ones; waits for the device."""
        return float(self.steps[0] / self.steps[1].clamp(min=1))

    def mean_norm(self) -> float:
        """Of the finite ones, before clipping; waits for the device."""
        return float(self.steps[2] / self.steps[3].clamp(min=1))

    def add(self, loss: Tensor, counts: Mapping[str, Tensor], beside: Sequence[tuple[str, Tensor]] = ()) -> None:
        """A batch; ``beside`` are numbers that are averaged like the loss."""
        finite = torch.isfinite(loss)  # the log shows what was learned from; other steps are counted apart
        self.steps[0] += torch.where(finite, loss, 0.0)
        self.steps[1] += finite
        for name, value in [*counts.items(), *((name, torch.where(finite, x, 0.0)) for name, x in beside)]:
            if name not in self.counts:
                self.counts[name] = self._scalar(0.0)
            self.counts[name] += value

    def add_norm(self, norm: Tensor) -> None:
        """An optimizer step."""
        finite = torch.isfinite(norm)
        self.steps[2] += torch.where(finite, norm, 0.0)
        self.steps[3] += finite
        self.steps[4] += ~finite

    def plain_counts(self) -> dict[str, float]:
        """Counts as numbers; waits for the device, once."""
        values = torch.stack(list(self.counts.values())).tolist() if self.counts else []
        return dict(zip(self.counts, values, strict=True))

    def as_dicts(self) -> dict[str, dict[str, float]]:
        """Plain values: sums, and counts that the caller named."""
        host = {name: float(getattr(self, name)) for name in self.HOST}
        return {
            "sums": dict(zip(self.DEVICE, self.steps.tolist(), strict=True)) | host,
            "counts": self.plain_counts(),
        }


class _Waits:
    """Seconds in which the device had nothing to do because the next batch was not there.

    On a CPU that is the time until the loader answers. A GPU is given work many steps ahead, so that the host may wait
    long while the GPU computes: what counts is the time on the GPU between two marks in its queue, one set before the
    loader is asked and one after it has answered. Without a wait the second follows the first at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._asked: Any = 0.0
        self._pairs: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._asked = self._mark()

    def __exit__(self, *error: object) -> None:
        self._pairs.append((self._asked, self._mark()))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        pairs, self._pairs = self._pairs, []
        if not self._on_gpu:
            return sum(after - before for before, after in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in pairs) / 1e3


class Trainer:
    """A model in training, with all that an optimizer step needs beside the loss.

    Args:
        model: bare, or wrapped in DistributedDataParallel.
        optimizer: of its parameters.
        processes: those that train together.
        output_dir: the run's folder; facts about a step that is not finite go there.
        lr_at: learning rate at a fractional epoch.
        accum_iter: batches of an optimizer step.
        clip_grad: largest gradient norm; None: any.
        amp_dtype: autocast type; None trains in float32.
        scaler: only for float16.
        skip_nonfinite: steps with a loss or gradient that is not finite that are left out before the run is stopped.
        max_bad_samples: unreadable samples that a process replaces before the run is stopped.
        resumed: where the run stands: its counts go on, and the sums of an epoch that was left in the middle.
        graphs: run forward and backward passes as CUDA graphs; the model is bare then, whatever the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        processes: Processes,
        output_dir: str | os.PathLike[str],
        lr_at: Callable[[float], float],
        accum_iter: int = 1,
        clip_grad: float | None = None,
        amp_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip_nonfinite: int = 0,
        max_bad_samples: int = 0,
        resumed: Resumed | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        resumed = resumed or Resumed()
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.processes = processes
        self.device = processes.device
        self.guard = FiniteGuard(skip_nonfinite, resumed.skipped)
        self.bad_samples = BadSamples(max_bad_samples, list(resumed.bad_samples))
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._folder = Path(output_dir)
        self._lr_at = lr_at
        self._accum_iter = accum_iter
        self._clip_grad = clip_grad
        self._amp_dtype = amp_dtype
        self._sums = _Sums(self.device, resumed.sums, resumed.counts)
        self._waits = _Waits(self.device)
        self._graphs = graphs

    def autocast(self) -> torch.autocast:
        """The run's precision, for the forward pass. A graph casts weights where they are used: nothing outside of it
        may be kept for the next step."""
        used, cached = self._amp_dtype is not None, self._graphs is None
        return torch.autocast(self.device.type, self._amp_dtype, enabled=used, cache_enabled=cached)

    def run_epoch(
        self,
        batches: Iterable[dict[str, Any]],
        prepare: Prepare,
        loss_of: LossOf,
        *,
        epoch: int,
        steps: int,
        start_step: int = 0,
        progress: Progress,
        on_step: Callable[[int], bool] = lambda steps_done: False,
        beside: Sequence[str] = (),
    ) -> EpochResult:
        """Train for one epoch, or what is left of it.

        Args:
            batches: from ``start_step`` on; dicts with ``name`` and ``replaced``.
            prepare: inputs of a batch, see :data:`Prepare`; names of counts become names in the log.
            loss_of: forward pass of such inputs, see :data:`LossOf`; called with autocast on.
            steps: batches of a whole epoch.
            on_step: called after each optimizer step with the batches done; True ends the epoch (signals, limits).
            beside: names of the numbers after the loss where ``loss_of`` gives several; their means are logged.

        Raises:
            NonFiniteError: see :class:`FiniteGuard`.
            UserError: too many unreadable samples.
        """
        self.model.train()
        if start_step == 0:
            self._sums = _Sums(self.device)
        sums, sync_every = self._sums, sync_interval(self.device)
        if start_step and not set(beside) <= set(sums.counts):  # begun by a version that did not log them
            beside = ()
        began, before = time.perf_counter(), sums.seconds
        seen, lr = 0, self._lr_at(epoch + 1) if start_step == steps else 0.0
        group: list[tuple[Tensor, list[str]]] = []  # loss and names of each batch of the optimizer step
        steps_done, stop = start_step, False
        iterator = iter(batches)

        for step in range(start_step, steps):
            with self._waits:
                batch = next(iterator)
            self.bad_samples.add(batch["replaced"])
            first, last, group_size = accumulation_group(step, steps, self._accum_iter)
            if first:
                lr = self._lr_at(epoch + step / steps)
                set_learning_rate(self.optimizer, lr)
                self.optimizer.zero_grad(set_to_none=True)
                group = []
            inputs, counts = prepare(batch, step)
            if self._graphs is None:
                with self._apart() if not last else contextlib.nullcontext():
                    values = self._forward_and_backward(loss_of, inputs, group_size)
            else:
                work = partial(self._graph_work, loss_of)
                values = self._graphs.run(work, (inputs, group_size), first=first, last=last)
                if last:
                    average_gradients(self._parameters, self.processes)

            loss = values[0] if values.ndim else values
            group.append((loss, batch["name"]))
            sums.add(loss, counts, [(name, values[n]) for n, name in enumerate(beside, 1)])
            sums.samples += len(batch["name"])
            sums.seconds = before + time.perf_counter() - began
            seen += len(batch["name"]) * self.processes.world_size
            steps_done = step + 1
            if last:
                sums.add_norm(self.update(group, step))
                if steps_done % sync_every == 0:
                    self.check()
                    sums.waited += self._waits.take()
                stop = on_step(steps_done)
            if steps_done == steps or (progress.wants and steps_done % sync_every == 0):
                progress.update(steps_done, samples=seen, values={"loss": sums.mean_loss(), "lr": lr})
            if stop:
                break
        progress.close()
        self.check()
        sums.waited += self._waits.take()
        sums.seconds = before + time.perf_counter() - began
        return EpochResult(self._stats(lr, beside), finished=steps_done == steps, steps_done=steps_done)

    def _forward_and_backward(self, loss_of: LossOf, inputs: Any, group_size: int) -> Tensor:
        """Add a batch's gradients to those of its accumulation group; returns what ``loss_of`` gave."""
        with self.autocast():
            values = loss_of(inputs)
        scaled = (values[0] if values.ndim else values) / group_size
        (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        return values.detach()

    def _graph_work(self, loss_of: LossOf, inputs: tuple[Any, int]) -> Tensor:
        return self._forward_and_backward(loss_of, *inputs)

    def update(self, losses: Sequence[tuple[Tensor, list[str]]], step: int) -> Tensor:
        """Unscale, measure, clip, update. Returns the gradient norm before clipping.

        Args:
            losses, step: see `FiniteGuard.watch`.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self._parameters)
        if self._clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_grad, norm)
        if self.scaler is not None:
            # Overflow of float16 gradients is expected now and then: the scaler skips the step and lowers its scale. A
            # loss that is not finite is a fault all the same, on whichever process it appears.
            worst = torch.stack([loss for loss, _ in losses]).sum()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(worst)
            self.guard.watch(losses, worst, step)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = self.guard.watch(losses, norm, step)  # type: ignore[attr-defined]
            self.optimizer.step()
        return norm

    def check(self) -> None:
        """Look at the steps since the last look; see `FiniteGuard.check`.

        Raises:
            NonFiniteError: too many bad steps, or float16 gradients that overflow at any scale.
        """
        self.guard.check(self.processes.all_gather_objects, self._dump)
        if self.scaler is not None and self.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(
                f"float16 gradients are not finite even at a loss scale of {self.scaler.get_scale():.2g}; the weights "
                "are those before these steps. Use --amp bf16 or off, lower --lr, or set --clip_grad"
            )

    def state(self) -> dict[str, Any]:
        """What this process has counted so far, in plain values for a checkpoint; all processes call it together."""
        self.check()
        self._sums.waited += self._waits.take()
        return {**self._sums.as_dicts(), "bad_samples": [list(item) for item in self.bad_samples.found]}

    def _dump(self, facts: dict[str, Any]) -> str:
        """Write the facts about a step that was not finite; returns the file's path, or why there is none."""
        path = self._folder / f"nonfinite_rank{self.processes.rank}.json"
        try:
            write_json(path, facts)
        except WriteError as error:  # the message about the step must not be lost to a full disk
            return f"nothing ({error})"
        return str(path)

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay in their process: they travel once per optimizer step, not once per batch."""
        alone = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if alone else contextlib.nullcontext()  # type: ignore[operator]

    def _stats(self, lr: float, beside: Sequence[str]) -> dict[str, float]:
        sums, processes = self._sums, self.processes
        seconds = max(sums.seconds, 1e-9)
        counts = sums.plain_counts()
        per_loss = {name: counts.pop(name) / max(float(sums.steps[1]), 1.0) for name in beside if name in counts}
        counts["unreadable_samples"] = float(len(self.bad_samples.found))
        if self.scaler is not None:  # the same on all processes, as gradients are
            counts["overflowed_steps"] = float(sums.steps[4]) / processes.world_size
        per_loss |= {"train_loss": sums.mean_loss(), "data_wait": sums.waited / seconds}
        mean = processes.all_reduce_mean(per_loss)
        return {
            "train_loss": mean.pop("train_loss"),
            "train_lr": lr,
            "grad_norm": sums.mean_norm(),
            "images_per_s": sums.samples * processes.world_size / seconds,
            "data_wait": mean.pop("data_wait"),
            **mean,
            **processes.all_reduce_sum(counts),
            "skipped_steps": float(self.guard.skipped),
            "seconds": seconds,
        }
