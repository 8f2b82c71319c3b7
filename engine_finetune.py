"""One epoch of fine-tuning, one exact evaluation, one pass for features; what a label needs is up to its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sarwmix.data.base import SarDataset
from sarwmix.mixup import Mixup, random_erase
from sarwmix.tasks.base import Predictor, Prepared, Task
from sarwmix.transforms import SarTransform
from util.errors import UserError
from util.log import Progress
from util.seeding import seed_step, step_generator
from util.training import EpochResult, Trainer, bare

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
    trainer: Trainer,
    batches: Iterable[dict[str, Any]],
    *,
    task: Task,
    transform: SarTransform | None,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    steps: int,
    start_step: int = 0,
    progress: Progress,
    on_step: Callable[[int], bool] = lambda steps_done: False,
) -> EpochResult:
    """Fine-tune or probe for one epoch, or what is left of it.

    Flips, mixing, erasing and drop path are pure functions of (seed, epoch, step, rank), so that a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        trainer: of a model that takes the task's inputs and returns logits.
        batches: from ``start_step`` on.
        task: kind of label: inputs, targets, loss.
        transform: device transform; None where the batches hold cached features.
        augmentation: what is done beyond flips.
        seed: of all draws.
        epoch, steps, start_step, progress, on_step: see `util.training.Trainer.run_epoch`; errors, too.
    """
    device, rank = trainer.device, trainer.processes.rank

    def prepare(batch: dict[str, Any], step: int) -> tuple[Any, dict[str, Tensor]]:
        seed_step(seed, epoch, step, rank)  # drop path draws from the global generators
        flips = step_generator(seed, epoch, step, rank, "flips")
        prepared = task.prepare(batch, transform, device=device, generator=flips)
        return augment(task, prepared, augmentation, step_generator(seed, epoch, step, rank, "augment")), {}

    def loss_of(inputs: tuple[tuple[Tensor, ...], Tensor]) -> Tensor:
        images, target = inputs
        logits = trainer.model(*images)
        with torch.autocast(device.type, enabled=False):
            return task.loss(logits.float(), target, smoothing=augmentation.smoothing)

    return trainer.run_epoch(
        batches, prepare, loss_of, epoch=epoch, steps=steps, start_step=start_step, progress=progress, on_step=on_step
    )


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
        skipped: names of samples that count nothing, because their image has no valid pixel.
        clusters: what each sample belongs to, N names; None: each is on its own.
    """

    split: str
    outputs: dict[str, np.ndarray]
    names: Sequence[str]
    skipped: tuple[str, ...] = ()
    clusters: Sequence[str] | None = None


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
    whole: SarDataset | None = None,
) -> Evaluation:
    """Run the model over a split, every sample exactly once, whatever the number of processes.

    Args:
        model: bare or wrapped; wrapped models are unwrapped, since the shares of the processes may differ in length.
        loader: this process's share of the split, without padding; dicts with `index`.
        split: the split's name, for messages.
        names: names of all samples of the split.
        all_gather: a small plain value of all processes, in rank order.
        all_gather_arrays: arrays of different lengths of all processes, in rank order.
        whole: the split, where results are final, see `Task.predict`.

    Returns:
        The outputs of all samples, the same on every process.

    Raises:
        UserError: outputs that are not finite; names the samples.
    """
    predictor = Predictor(bare(model), device, amp_dtype)
    indices: list[Tensor] = []
    kept: list[dict[str, Tensor]] = []
    for index, part in task.predict(predictor, loader, transform, device=device, whole=whole):
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
    skipped = np.flatnonzero(outputs.pop("skipped", np.empty(0)))
    return Evaluation(split, outputs, names, tuple(names[int(i)] for i in skipped))


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
    predictor = Predictor(bare(model), device, amp_dtype)
    indices, kept = [], []
    for batch, found in task.run(predictor, loader, transform, device=device, features=True):
        indices.append(batch["index"])
        kept.append({"features": found})
    features = gather_in_order(
        indices, kept, count=len(names), split=split, all_gather=all_gather, all_gather_arrays=all_gather_arrays
    )["features"]
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(f"features of {len(bad)} samples of split {split} are not finite, first: {names[int(bad[0])]}")
    return features
