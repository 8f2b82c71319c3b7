"""One epoch of pretraining, and the reconstruction of a batch for pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models_mixmim import MixMIM
from sarwmix.cells import normalise_cells, spread
from sarwmix.models.mae import MaskedViT
from sarwmix.plain_errors import NAMES
from sarwmix.sizes import CELL_STRIDE
from sarwmix.transforms import SarBatch, SarTransform, draw_flips
from util.log import Progress
from util.seeding import step_generator
from util.training import EpochResult, Trainer, bare


def train_one_epoch(
    trainer: Trainer,
    batches: Iterable[dict[str, Any]],
    *,
    transform: SarTransform,
    mask_ratio: float = 0.5,
    seed: int,
    epoch: int,
    steps: int,
    start_step: int = 0,
    progress: Progress,
    on_step: Callable[[int], bool] = lambda steps_done: False,
) -> EpochResult:
    """Pretrain for one epoch, or what is left of it.

    Randomness (mask, flips) is a pure function of (seed, epoch, step, rank), so resuming repeats nothing and skips
    nothing.

    Args:
        trainer: of a `MixMIM` or a `MaskedViT`.
        batches: from ``start_step`` on; dicts with ``image`` (B, bands, H, W) dB, ``name``, ``replaced``.
        transform: device transform with weighting.
        mask_ratio: share of the cells that show the partner, or of the patches that are hidden.
        seed: of masks and flips.
        epoch, steps, start_step, progress, on_step: see `util.training.Trainer.run_epoch`; errors, too.
    """
    device, rank = trainer.device, trainer.processes.rank
    inner = bare(trainer.model)
    assert isinstance(inner, MixMIM | MaskedViT)

    def prepare(batch: dict[str, Any], step: int) -> tuple[Any, dict[str, Tensor]]:
        image = batch["image"].to(device, non_blocking=True)
        flips = draw_flips(image.shape[0], step_generator(seed, epoch, step, rank, "flips"))
        sar = transform(image, flips, transform.draw_order(step_generator(seed, epoch, step, rank, "weights")))
        mask = inner.draw_mask(mask_ratio, step_generator(seed, epoch, step, rank, "mask"), samples=len(image))
        inputs = (sar.images, sar.weights, inner.prepare_mask(mask), sar.target)
        return inputs, {"invalid_pixels": sar.num_invalid}

    def loss_of(inputs: tuple[Tensor, Tensor | None, Any, Tensor | None]) -> Tensor:
        images, weights, mask, target = inputs
        return trainer.model(images, weights, mask=mask, target=target).losses

    return trainer.run_epoch(
        batches,
        prepare,
        loss_of,
        epoch=epoch,
        steps=steps,
        start_step=start_step,
        progress=progress,
        on_step=on_step,
        beside=NAMES,
    )


@dataclass
class Reconstruction:
    """Arrays for pictures, all numpy; dB maps are (B, bands, H, W).

    Attributes:
        original, mixed, reconstruction: dB; ``mixed`` shows the partner in masked cells (a plain autoencoder has none:
            the data set's mean), ``reconstruction`` the model's
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
def reconstruct(
    model: MixMIM | MaskedViT, batch: dict[str, Any], *, transform: SarTransform, mask: Tensor
) -> Reconstruction:
    """Reconstruct one batch.

    With ``norm_pix_loss`` the model predicts standardised cells; they are brought back with the mean and deviation of
    the true cell. Only hidden cells are shown as reconstructed: the others are never trained in this pass.
    """
    model.eval()
    device = model.mask_token.device
    sar: SarBatch = transform(batch["image"].to(device))
    out = model(sar.images, sar.weights, mask=mask, return_pred=True, target=sar.target)
    hidden = out.mask.view(-1) > 0.5  # one mask for all samples
    cells = model.cells_of(sar.images)
    goal = cells if sar.target is None else model.cells_of(sar.target)
    rec = out.pred[: sar.images.shape[0]].float()
    if model.norm_pix_loss:
        valid = None if sar.valid is None else model.cells_of(sar.valid)
        _, mean, std = normalise_cells(goal, valid)
        rec = rec * std + mean
    shown = torch.where(hidden[None, :, None], rec, cells)
    partner = cells.flip(0) if isinstance(model, MixMIM) else torch.zeros_like(cells)  # z-score 0: the mean of the data
    mixed = torch.where(hidden[None, :, None], partner, cells)
    weights = torch.ones_like(sar.images) if sar.weights is None else sar.weights
    if weights.ndim == 3:
        weights = spread(weights, CELL_STRIDE)

    def as_db(z: Tensor) -> np.ndarray:
        return transform.to_db(model.images_of(z)).cpu().numpy()

    return Reconstruction(
        original=sar.db.cpu().numpy(),
        mixed=as_db(mixed),
        reconstruction=as_db(shown),
        mask=hidden.float().cpu().numpy(),
        weights=weights.cpu().numpy(),
        names=list(batch["name"]),
        loss=float(out.loss),
    )
