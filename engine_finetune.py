"""One epoch of fine-tuning, one exact evaluation, one pass for features; what a label needs is up to its task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from engine_pretrain import (
    BadSamples,
    EpochResult,
    FiniteGuard,
    accumulation_group,
    bare,
    optimizer_step,
    sync_interval,
)
from sarwmix.mixup import Mixup, random_erase
from sarwmix.tasks import Predictor, Prepared, Task
from sarwmix.transforms import SarTransform
from util.errors import UserError
from util.log import Progress
from util.schedule import set_learning_rate
from util.seeding import seed_step, step_generator

GatherArrays = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training batch beyond the random flips.

    Attributes:
        mixup: mixing of samples and labels.
        erase_prob: probability that a sample loses a random rectangle.
        smoothing: label smoothing.
    """

    mixup: Mixup = field(default_factory=Mixup)
    erase_prob: float = 0.0
    smoothing: float = 0.0


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    *,
    task: Task,
    transform: SarTransform | None,
    augmentation: Augmentation,
    device: torch.device,
    epoch: int,
    steps: int,
    start_step: int = 0,
    lr_at: Callable[[float], float],
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    accum_iter: int = 1,
    clip_grad: float | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    guard: FiniteGuard,
    bad_samples: BadSamples,
    all_gather: Callable[[Any], list[Any]],
    all_reduce_mean: Callable[[dict[str, float]], dict[str, float]],
    dump: Callable[[dict[str, Any]], str],
    progress: Progress,
    on_step: Callable[[int], bool] = lambda steps_done: False,
) -> EpochResult:
    """Train for one epoch, or what is left of it.

    Flips, mixing, erasing and drop path are pure functions of (seed, epoch, step, rank), so that a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        model: takes the task's inputs, returns logits; bare or wrapped in DistributedDataParallel.
        loader: batches from ``start_step`` on.
        transform: device transform; None where the batches hold cached features.
        steps: batches of a whole epoch.
        lr_at: learning rate at a fractional epoch.
        amp_dtype: autocast type; None trains in float32.
        scaler: only for float16.
        on_step: called after each optimizer step with the batches done; True ends the epoch.

    Raises:
        NonFiniteError: see `FiniteGuard`.
        UserError: too many unreadable samples.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Sum of finite losses, their number, sum of gradient norms, optimizer steps; on the device, read now and then.
    totals = torch.zeros(4, device=device, dtype=torch.float64)
    sync_every = sync_interval(device)
    samples_seen, learning_rate = 0, 0.0
    names: list[str] = []
    steps_done, stop = start_step, False
    began = time.perf_counter()
    iterator = iter(loader)

    for step in range(start_step, steps):
        batch = next(iterator)
        bad_samples.add(batch["replaced"])
        first, last, group_size = accumulation_group(step, steps, accum_iter)
        if first:
            learning_rate = lr_at(epoch + step / steps)
            set_learning_rate(optimizer, learning_rate)
            optimizer.zero_grad(set_to_none=True)
            names = []
        names += batch["name"]

        seed_step(seed, epoch, step, rank)  # drop path draws from the global generators
        flips = step_generator(seed, epoch, step, rank, "flips")
        prepared = task.prepare(batch, transform, device=device, generator=flips)
        draws = step_generator(seed, epoch, step, rank, "augment")
        inputs, target = augment(task, prepared, augmentation, draws)
        # Gradients travel between processes once per optimizer step, not once per batch.
        apart = isinstance(model, nn.parallel.DistributedDataParallel) and not last
        together = cast(nn.parallel.DistributedDataParallel, model).no_sync() if apart else contextlib.nullcontext()
        with together:
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(*inputs)
            loss = task.loss(logits.float(), target, smoothing=augmentation.smoothing)
            scaled = loss / group_size
            (scaled if scaler is None else scaler.scale(scaled)).backward()

        finite = torch.isfinite(loss.detach())  # the log shows what was learned from; other steps are counted apart
        totals[0] += torch.where(finite, loss.detach(), 0.0)
        totals[1] += finite
        samples_seen += len(target) * world_size
        steps_done = step + 1
        if last:
            totals[2] += optimizer_step(optimizer, parameters, loss, scaler, clip_grad, guard, names, step)
            totals[3] += 1
            if steps_done % sync_every == 0:
                guard.check(all_gather, dump)
            stop = on_step(steps_done)
        if steps_done == steps or (progress.wants and steps_done % sync_every == 0):
            values = {"loss": float(totals[0] / totals[1].clamp(min=1)), "lr": learning_rate}
            progress.update(steps_done, samples=samples_seen, values=values)
        if stop:
            break
    progress.close()

    guard.check(all_gather, dump)
    elapsed = max(time.perf_counter() - began, 1e-9)
    train_loss = float(totals[0] / totals[1].clamp(min=1))
    mean = all_reduce_mean({"train_loss": train_loss, "unreadable_samples": float(len(bad_samples.found))})
    stats = {
        "train_loss": mean["train_loss"],
        "train_lr": learning_rate,
        "grad_norm": float(totals[2] / totals[3].clamp(min=1)),
        "images_per_s": samples_seen / elapsed,
        "unreadable_samples": mean["unreadable_samples"] * world_size,
        "skipped_steps": float(guard.skipped),
        "train_seconds": elapsed,
    }
    return EpochResult(stats, finished=steps_done == steps, steps_done=steps_done)


def augment(
    task: Task, prepared: Prepared, augmentation: Augmentation, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Erase and mix a prepared batch; the target becomes soft only where something is mixed."""
    inputs, target = random_erase(prepared.inputs, augmentation.erase_prob, generator), prepared.target
    if augmentation.mixup.active:
        inputs, target = augmentation.mixup(inputs, task.soft_target(target), generator)
    return inputs, target


@dataclass(frozen=True)
class Evaluation:
    """Outputs of a model for all samples of a split, in the order of the data set.

    Attributes:
        split: the split's name.
        outputs: what the task keeps of each sample, arrays (N, ...).
        names: N sample names.
    """

    split: str
    outputs: dict[str, np.ndarray]
    names: Sequence[str]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: Task,
    transform: SarTransform | None,
    device: torch.device,
    split: str,
    names: Sequence[str],
    all_gather: Callable[[Any], list[Any]],
    all_gather_arrays: GatherArrays,
    amp_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Run the model over a split, every sample exactly once, whatever the number of processes.

    Args:
        model: bare or wrapped; wrapped models are unwrapped, since the shares of the processes may differ in length.
        loader: this process's share of the split, without padding; dicts with `index`.
        split: the split's name, for messages.
        names: names of all samples of the split.
        all_gather: a small plain value of all processes, in rank order.
        all_gather_arrays: arrays of different lengths of all processes, in rank order.

    Returns:
        The outputs of all samples, the same on every process.

    Raises:
        UserError: outputs that are not finite; names the samples.
    """
    predictor = Predictor(bare(model), device, amp_dtype)
    indices: list[Tensor] = []
    kept: list[dict[str, Tensor]] = []
    for index, part in task.predict(predictor, loader, transform, device=device):
        indices.append(index)
        kept.append(part)
    outputs = gather_in_order(
        indices, kept, count=len(names), split=split, all_gather=all_gather, all_gather_arrays=all_gather_arrays
    )
    for key, values in outputs.items():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            shown = ", ".join(names[int(i)] for i in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            raise UserError(
                f"the model's {key} are NaN or infinite for {len(bad)} of {len(names)} samples of split {split}: "
                f"{shown}. If these are all samples, the weights are damaged (lower --lr and train again); if they are "
                "a few, look at their pixels; --amp off rules out the precision"
            )
    return Evaluation(split, outputs, names)


def gather_in_order(
    indices: Sequence[Tensor],
    kept: Sequence[Mapping[str, Tensor]],
    *,
    count: int,
    split: str,
    all_gather: Callable[[Any], list[Any]],
    all_gather_arrays: GatherArrays,
) -> dict[str, np.ndarray]:
    """Bring the outputs of all processes together, in sample order, and check that each sample counts exactly once.

    Args:
        indices: sample numbers of each batch of this process; none at all where there are more processes than samples.
        kept: outputs of each batch.
        count: N, samples of the split.
        split: for messages.
        all_gather, all_gather_arrays: see `evaluate`.

    Raises:
        RuntimeError: a sample is missing or appears twice.
    """
    index = np.concatenate([np.asarray(i, dtype=np.int64) for i in indices]) if indices else np.empty(0, np.int64)
    everywhere = np.concatenate(all_gather_arrays(index))
    order = np.argsort(everywhere, kind="stable")
    if not np.array_equal(everywhere[order], np.arange(count)):
        found, times = np.unique(everywhere, return_counts=True)
        raise RuntimeError(
            f"split {split} has {count} samples, {len(found)} different ones were evaluated "
            f"({int((times > 1).sum())} more than once)"
        )
    mine = {key: torch.cat([part[key] for part in kept]).cpu().numpy() for key in kept[0]} if kept else {}
    # Rank 0 has the first sample; a process without any learns from it what the arrays look like.
    form = all_gather({key: (values.dtype.str, values.shape[1:]) for key, values in mine.items()})[0]
    out = {}
    for key, (dtype, shape) in form.items():
        values = mine[key] if kept else np.empty((0, *shape), dtype=dtype)
        out[key] = np.concatenate(all_gather_arrays(values))[order]
    return out


@torch.no_grad()
def extract_features(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: Task,
    transform: SarTransform,
    device: torch.device,
    split: str,
    names: Sequence[str],
    all_gather: Callable[[Any], list[Any]],
    all_gather_arrays: GatherArrays,
    amp_dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Pooled features of every sample of a split from the frozen encoder: (N, D) float32, in the data set's order.

    Args: as for `evaluate`; the model's `forward_features` is used.

    Raises:
        UserError: features that are not finite; names a sample.
    """
    inner: Any = bare(model).eval()
    indices, kept = [], []
    for batch in loader:
        prepared = task.prepare(batch, transform, device=device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            features = inner.forward_features(*prepared.inputs)
        indices.append(batch["index"])
        kept.append({"features": features.float()})
    features = gather_in_order(
        indices, kept, count=len(names), split=split, all_gather=all_gather, all_gather_arrays=all_gather_arrays
    )["features"]
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(f"features of {len(bad)} samples of split {split} are not finite, first: {names[int(bad[0])]}")
    return features
