"""One epoch of pretraining, and the reconstruction of a batch for pictures."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models_mixmim import MixMIM
from sarwmix.transforms import SarBatch, SarTransform, draw_flips
from util.errors import NonFiniteError, UserError
from util.log import Progress, get_logger
from util.optim import gradient_norm
from util.schedule import set_learning_rate
from util.seeding import step_generator

SYNC_EVERY = 20  # steps between looks at device values; each look waits for the device once


def sync_interval(device: torch.device) -> int:
    """Steps between looks at device values; on the CPU looking costs nothing."""
    return 1 if device.type == "cpu" else SYNC_EVERY


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


@dataclass
class EpochResult:
    """What an epoch leaves behind.

    Attributes:
        stats: plain numbers for ``log.txt``.
        finished: False when ``should_stop`` ended the epoch early.
        steps_done: batches consumed, for a checkpoint in mid-epoch.
    """

    stats: dict[str, float]
    finished: bool
    steps_done: int


class FiniteGuard:
    """Finds non-finite losses and gradients without waiting for the device at every step.

    A bad update never reaches the weights: fused AdamW skips a step whose ``found_inf`` is set, on the device. Flags of
    the last steps are read every :data:`SYNC_EVERY` steps (every step on the CPU, where reading costs nothing).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, allowed: int, device: torch.device) -> None:
        self.optimizer = optimizer
        self.allowed = allowed
        self.skipped = 0
        self.device = device
        self._recent: deque[tuple[Tensor, Tensor, list[str], int]] = deque()

    def watch(self, loss: Tensor, norm: Tensor, names: list[str], step: int) -> Tensor:
        """Flag a step before the optimizer runs. Returns ``found_inf`` (1.0 when the step must be skipped)."""
        bad = (~torch.isfinite(norm)).to(torch.float32)
        self._recent.append((bad, torch.isfinite(loss.detach()), names, step))
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
        for (_, finite_loss, names, step), is_bad in zip(self._recent, bad, strict=True):
            if not is_bad:
                continue
            self.skipped += 1
            mine = [] if bool(finite_loss) else names
            culprits = all_gather(mine)
            facts = {"step": step, "loss_finite": bool(finite_loss), "names": names, "culprits_by_rank": culprits}
            suspects = sorted({name for group in culprits for name in group}) or names
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


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    *,
    transform: SarTransform,
    device: torch.device,
    epoch: int,
    steps: int,
    start_step: int = 0,
    lr_at: Callable[[float], float],
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    accum_iter: int = 1,
    mask_ratio: float = 0.5,
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

    Randomness (mask, flips) is a pure function of (seed, epoch, step, rank), so resuming repeats nothing and skips
    nothing.

    Args:
        model: :class:`MixMIM`, bare or wrapped in DistributedDataParallel.
        loader: batches from ``start_step`` on; dicts with ``image`` (B, bands, H, W) dB, ``name``, ``replaced``.
        steps: batches of a whole epoch.
        lr_at: learning rate at a fractional epoch.
        amp_dtype: autocast type; None trains in float32.
        scaler: only for float16.
        on_step: called after each optimizer step with the batches done; True ends the epoch (signals, step limits).

    Raises:
        NonFiniteError: see :class:`FiniteGuard`.
        UserError: too many unreadable samples.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Sum of finite losses, their number, sum of gradient norms, optimizer steps; on the device, read now and then.
    totals = torch.zeros(4, device=device, dtype=torch.float64)
    invalid = torch.zeros((), device=device, dtype=torch.int64)
    images_seen, waited, learning_rate = 0, 0.0, 0.0
    sync_every = sync_interval(device)
    began = time.perf_counter()
    names_of_group: list[str] = []
    steps_done, stop = start_step, False
    iterator = iter(loader)

    for step in range(start_step, steps):
        asked = time.perf_counter()
        batch = next(iterator)
        waited += time.perf_counter() - asked
        bad_samples.add(batch["replaced"])
        first, last, group_size = accumulation_group(step, steps, accum_iter)
        if first:
            learning_rate = lr_at(epoch + step / steps)
            set_learning_rate(optimizer, learning_rate)
            optimizer.zero_grad(set_to_none=True)
            names_of_group = []
        names_of_group += batch["name"]

        image = batch["image"].to(device, non_blocking=True)
        flips = draw_flips(image.shape[0], step_generator(seed, epoch, step, rank, "flips"))
        sar = transform(image, flips)
        mask = draw_mask(model, mask_ratio, step_generator(seed, epoch, step, rank, "mask"))
        # Gradients travel between processes once per optimizer step, not once per batch.
        with contextlib.ExitStack() as alone:
            if not last and isinstance(model, nn.parallel.DistributedDataParallel):
                alone.enter_context(model.no_sync())
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = model(sar.images, sar.weights, mask=mask).loss
            scaled = loss / group_size
            (scaled if scaler is None else scaler.scale(scaled)).backward()

        finite = torch.isfinite(loss.detach())  # the log shows what was learned from; other steps are counted apart
        totals[0] += torch.where(finite, loss.detach(), 0.0)
        totals[1] += finite
        invalid += sar.num_invalid
        images_seen += image.shape[0] * world_size
        steps_done = step + 1
        if last:
            norm = optimizer_step(optimizer, parameters, loss, scaler, clip_grad, guard, names_of_group, step)
            totals[2] += norm
            totals[3] += 1
            if steps_done % sync_every == 0:
                guard.check(all_gather, dump)
            stop = on_step(steps_done)
        if steps_done == steps or (progress.wants and steps_done % sync_every == 0):
            values = {"loss": float(totals[0] / totals[1].clamp(min=1)), "lr": learning_rate}
            progress.update(steps_done, samples=images_seen, values=values)
        if stop:
            break
    progress.close()

    guard.check(all_gather, dump)
    elapsed = max(time.perf_counter() - began, 1e-9)
    mean = all_reduce_mean(
        {
            "train_loss": float(totals[0] / totals[1].clamp(min=1)),
            "invalid_pixels": float(invalid),
            "unreadable_samples": float(len(bad_samples.found)),
            "data_wait": waited / elapsed,
        }
    )
    stats = {
        "train_loss": mean["train_loss"],
        "train_lr": learning_rate,
        "grad_norm": float(totals[2] / totals[3].clamp(min=1)),
        "images_per_s": images_seen / elapsed,
        "data_wait": mean["data_wait"],
        "invalid_pixels": mean["invalid_pixels"] * world_size,
        "unreadable_samples": mean["unreadable_samples"] * world_size,
        "skipped_steps": float(guard.skipped),
        "seconds": elapsed,
    }
    return EpochResult(stats, finished=steps_done == steps, steps_done=steps_done)


def bare(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def draw_mask(model: nn.Module, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """The batch's cell mask on the CPU, see :meth:`MixMIM.draw_mask`."""
    inner = bare(model)
    assert isinstance(inner, MixMIM)
    return inner.draw_mask(mask_ratio, generator)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    loss: Tensor,
    scaler: torch.amp.GradScaler | None,
    clip_grad: float | None,
    guard: FiniteGuard,
    names: list[str],
    step: int,
) -> Tensor:
    """Unscale, measure, clip, update. Returns the gradient norm before clipping (0 where it is not finite)."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = gradient_norm(parameters)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    if scaler is not None:
        # Overflow of float16 gradients is expected now and then: the scaler skips the step and lowers its scale. A loss
        # that is not finite is a fault all the same, on whichever process it appears.
        worst = loss.detach().clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(worst)
        guard.watch(loss, worst, names, step)
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = guard.watch(loss, norm, names, step)  # type: ignore[attr-defined]
        optimizer.step()
    return torch.nan_to_num(norm, nan=0.0, posinf=0.0)


@dataclass
class Reconstruction:
    """Arrays for pictures, all numpy; dB maps are (B, bands, H, W).

    Attributes:
        original, mixed, reconstruction: dB; ``mixed`` shows the partner in masked cells, ``reconstruction`` the model's
            answer in the cells where the sample was hidden and the sample itself elsewhere.
        mask: (cells,) 1 = hidden (partner shown).
        weights: the run's loss weights as a map; ones without weighting.
        names: of the samples.
        loss: of this batch.
    """

    original: np.ndarray
    mixed: np.ndarray
    reconstruction: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    names: list[str]
    loss: float


@torch.no_grad()
def reconstruct(model: MixMIM, batch: dict[str, Any], *, transform: SarTransform, mask: Tensor) -> Reconstruction:
    """Reconstruct one batch.

    With ``norm_pix_loss`` the model predicts standardised cells; they are brought back with the mean and deviation of
    the true cell. Only hidden cells are shown as reconstructed: the others are never trained in this pass.
    """
    model.eval()
    device = model.mask_token.device
    sar: SarBatch = transform(batch["image"].to(device))
    out = model(sar.images, sar.weights, mask=mask, return_pred=True)
    hidden = out.mask > 0.5
    cells = model.cells_of(sar.images)
    rec = out.pred[: sar.images.shape[0]].float()
    if model.norm_pix_loss:
        valid = None if sar.valid is None else model.cells_of(sar.valid)
        _, mean, std = model.normalise_cells(cells, valid)
        rec = rec * std + mean
    shown = torch.where(hidden[None, :, None], rec, cells)
    mixed = torch.where(hidden[None, :, None], cells.flip(0), cells)
    weights = torch.ones_like(sar.images) if sar.weights is None else sar.weights
    if weights.ndim == 3:
        weights = model.images_of(weights.repeat(1, 1, cells.shape[-1] // weights.shape[-1]))

    def as_db(z: Tensor) -> np.ndarray:
        return transform.to_db(model.images_of(z)).cpu().numpy()

    return Reconstruction(
        original=sar.db.cpu().numpy(),
        mixed=as_db(mixed),
        reconstruction=as_db(shown),
        mask=out.mask.cpu().numpy(),
        weights=weights.cpu().numpy(),
        names=list(batch["name"]),
        loss=float(out.loss),
    )
