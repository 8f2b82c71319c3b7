"""Batched transforms on the device: dB patches as read -> standardised model input and loss weights.

Order, for every data set: fill invalid pixels with the band mean, resize (bilinear), flip, take loss weights from dB
(`--weight_domain linear`), standardise to z-scores. One call handles a whole batch; nothing loops over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarwmix.weighting import WeightOptions, compute_weights, is_all_finite, spread_to_pixels


class SarBatch(NamedTuple):
    """A transformed batch.

    Attributes:
        images: (B, bands, S, S) float32 z-score; invalid pixels are 0, the band mean.
        weights: loss weights, (B, cells, bands) or (B, bands, S, S) with 0 at invalid pixels; None if not asked for.
        db: (B, bands, S, S) float32 dB after resize and flips, invalid pixels at the band mean.
        valid: (B, bands, S, S) bool; None when every pixel is known to be valid.
        num_invalid: int64 scalar on the device, invalid pixels as read.
    """

    images: Tensor
    weights: Tensor | None
    db: Tensor
    valid: Tensor | None
    num_invalid: Tensor


def draw_flips(batch: int, generator: torch.Generator) -> Tensor:
    """(B, 2) bool on the CPU: horizontal and vertical flip of each sample, each with probability 1/2."""
    return torch.rand(batch, 2, generator=generator) < 0.5


def apply_flips(images: Tensor, flips: Tensor) -> Tensor:
    """Flip columns where ``flips[:, 0]`` and rows where ``flips[:, 1]``. (B, C, H, W) -> the same shape.

    ``flips`` stays on the CPU: so the number of flipped samples is known without waiting for a GPU.
    """
    for column, axis in ((0, -1), (1, -2)):
        chosen = flips[:, column].nonzero().flatten().to(images.device, non_blocking=True)
        images = images.index_copy(0, chosen, images.index_select(0, chosen).flip(axis))
    return images


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resize to ``size`` x ``size``; antialiased only when it shrinks (for enlarging the two are equal)."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    shrink = size < height or size < width
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrink)


class SarTransform:
    """Resize, flip, weight and standardise batches of one data set.

    Args:
        size: side of the model input in pixels.
        mean, std: per band, dB.
        weighting: None leaves ``weights`` out (fine-tuning, evaluation).
        linear_range_db: registered (1 %, 99 %) percentiles per band in dB; needed for ``--weight_norm dataset``.
    """

    def __init__(
        self,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        weighting: WeightOptions | None = None,
        linear_range_db: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.size = size
        self.weighting = weighting
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._range: tuple[Tensor, Tensor] | None = None
        if weighting is not None and weighting.norm == "dataset":
            if linear_range_db is None:
                raise ValueError("weight_norm 'dataset' needs linear_range_db, the registered percentiles in dB")
            low, high = (10.0 ** (torch.tensor(limit, dtype=torch.float32) / 10.0) for limit in linear_range_db)
            self._range = (low, high)

    def to_device(self, device: torch.device) -> None:
        """Move the constants; called by ``__call__`` when the batch lives elsewhere."""
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        if self._range is not None:
            self._range = (self._range[0].to(device), self._range[1].to(device))

    def standardise(self, db: Tensor) -> Tensor:
        """dB -> z-score."""
        return (db - self._mean) / self._std

    def to_db(self, images: Tensor) -> Tensor:
        """z-score -> dB."""
        return images * self._std + self._mean

    def __call__(self, image: Tensor, flips: Tensor | None = None) -> SarBatch:
        """Transform a batch.

        Args:
            image: (B, bands, H, W) dB; NaN or infinity marks invalid pixels.
            flips: (B, 2) bool on the CPU, from :func:`draw_flips`, or None.
        """
        if image.device != self._mean.device:
            self.to_device(image.device)
        valid: Tensor | None = None
        if is_all_finite(image):
            num_invalid = torch.zeros((), dtype=torch.int64)
            db = resize(image, self.size)
        else:
            valid = torch.isfinite(image)
            num_invalid = valid.numel() - valid.sum()
            db = resize(torch.where(valid, image, self._mean), self.size)
            # A resized pixel is valid when all pixels it was interpolated from are.
            valid = resize(valid.to(torch.float32), self.size) > 1.0 - 1e-4
            db = torch.where(valid, db, self._mean)
        if flips is not None:
            db = apply_flips(db, flips)
            valid = None if valid is None else apply_flips(valid, flips)
        images = self.standardise(db)
        return SarBatch(images, self._weights(db, images, valid), db, valid, num_invalid)

    def _weights(self, db: Tensor, images: Tensor, valid: Tensor | None) -> Tensor | None:
        options = self.weighting
        if options is None or (options.mode == "none" and valid is None):
            return None
        weights = compute_weights(
            db if options.domain == "linear" else images,
            mode=options.mode,
            level=options.level,
            exp_scale=options.exp_scale,
            clip=options.clip,
            renorm=options.renorm,
            valid=valid,
            linear_range=self._range,
        )
        if valid is not None and options.level == "token":
            weights = spread_to_pixels(weights, valid)  # invalid pixels inside a cell must not count
        return weights
