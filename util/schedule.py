"""Learning-rate schedule: linear warm-up, then half a cosine, evaluated at every iteration (MAE, arXiv 2111.06377)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from util.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def effective_batch(batch_size: int, accum_iter: int, world_size: int) -> int:
    """Samples per optimizer step: `batch_size` per process x accumulated batches x processes."""
    return batch_size * accum_iter * world_size


def scaled_lr(blr: float, effective: int) -> float:
    """Linear scaling rule: lr = blr * effective batch / 256. Example: 1.5e-4 * 2048 / 256 = 1.2e-3."""
    return blr * effective / 256


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch.

    Args:
        epoch: epochs done so far, with fraction: epoch + step / steps_per_epoch. At 0 with warm-up the result is 0.
        lr: peak value, reached at the end of the warm-up.
        min_lr: value at the end.
        warmup_epochs: length of the linear warm-up from 0.
        epochs: planned length. Training may stop earlier (`--stop_epoch`) without changing the plan.

    Returns:
        The learning rate; `min_lr` from `epochs` on.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch >= epochs:
        return min_lr
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def check_schedule(*, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> None:
    """Refuse a schedule that makes no sense before training starts.

    Raises:
        UserError: a value is out of range.
    """
    if epochs <= 0:
        raise UserError(f"--epochs must be positive, got {epochs}")
    if not 0 <= warmup_epochs <= epochs:
        raise UserError(
            f"--warmup_epochs {warmup_epochs} does not fit --epochs {epochs}: "
            "the learning rate would never reach its peak; use fewer warm-up epochs"
        )
    if lr <= 0 or not math.isfinite(lr):
        raise UserError(f"the learning rate must be positive and finite, got {lr}; check --lr or --blr")
    if not 0 <= min_lr <= lr:
        raise UserError(f"--min_lr {min_lr} must lie between 0 and the peak learning rate {lr}")


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the rate of every parameter group to `value`, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
