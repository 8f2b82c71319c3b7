"""Batched transforms on the device: dB patches as read -> standardised model input and loss weights.

Order: fill invalid pixels with the band mean, resize (bilinear), flip, take loss weights from dB
(`--weight_domain linear`), standardise to z-scores. Data sets whose images are clipped to a range instead
(`Preprocessing.normalisation`) are scaled before they are resized. One call handles a whole batch; nothing loops over
samples. Crops and windows of label maps follow those of their images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sarwmix.preprocessing import Preprocessing
from sarwmix.targets import multilook, oriented_gradients, ratio_gradient
from sarwmix.weighting import CELL, WeightOptions, compute_weights, is_all_finite, permute_cells, spread_to_pixels


class SarBatch(NamedTuple):
    """A transformed batch.

    Attributes:
        images: (B, bands, S, S) float32 z-score; invalid pixels are 0, the band mean.
        weights: loss weights, (B, cells, bands) or (B, bands, S, S) with 0 at invalid pixels; None if not asked for.
        db: (B, bands, S, S) float32 dB after resize and flips, invalid pixels at the band mean.
        valid: (B, bands, S, S) bool; None when every pixel is known to be valid.
        num_invalid: int64 scalar on the device, invalid pixels as read.
        target: (B, bands, S, S) what is to be reconstructed, see `SarTransform.target_of`; None: the images themselves.
    """

    images: Tensor
    weights: Tensor | None
    db: Tensor
    valid: Tensor | None
    num_invalid: Tensor
    target: Tensor | None = None


def draw_flips(batch: int, generator: torch.Generator) -> Tensor:
    """(B, 2) bool on the CPU: horizontal and vertical flip of each sample, each with probability 1/2."""
    return torch.rand(batch, 2, generator=generator) < 0.5


def apply_flips(images: Tensor, flips: Tensor) -> Tensor:
    """Flip columns where ``flips[:, 0]`` and rows where ``flips[:, 1]``. (B, C, H, W) -> the same shape.

    ``flips`` stays on the CPU: so the number of flipped samples is known without waiting for a GPU.
    """
    if images.device.type == "cpu":  # image by image: several times quicker than gathering the flipped ones
        flipped = torch.empty_like(images)
        for target, image, (columns, rows) in zip(flipped, images, flips.tolist(), strict=True):
            target.copy_(image.flip([axis for axis, wanted in ((-1, columns), (-2, rows)) if wanted]))
        return flipped
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


CROP_AREA = (0.08, 1.0)  # share of the image that a random crop covers
CROP_RATIO = (3 / 4, 4 / 3)  # its width by its height
QUANTILES = (0.01, 0.99)


def draw_crops(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random crops as (B, 4) float32 on the CPU: left, top, width, height in whole pixels.

    Area uniform in `CROP_AREA`, logarithm of the side ratio uniform in `CROP_RATIO`, place uniform; a side that would
    leave the image is shortened to it.
    """
    draws = torch.rand(batch, 4, generator=generator)
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * draws[:, 0])
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = torch.exp(low + (high - low) * draws[:, 1])
    wide = torch.sqrt(area * ratio).round().clamp(1, width)
    tall = torch.sqrt(area / ratio).round().clamp(1, height)
    left = (draws[:, 2] * (width - wide + 1)).floor()
    top = (draws[:, 3] * (height - tall + 1)).floor()
    return torch.stack([left, top, wide, tall], dim=1)


def crop_and_resize(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """(B, C, H, W) and crops (B, 4) of `draw_crops` -> (B, C, size, size), bilinear, each crop on its own."""
    height, width = images.shape[-2:]
    left, top, wide, tall = crops.to(images.device, images.dtype, non_blocking=True).unbind(1)
    steps = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size
    # Centres half a pixel inside the crop at most: nothing is taken from beyond its edge.
    x = torch.minimum(torch.maximum(left[:, None] + wide[:, None] * steps, left[:, None] + 0.5),
                      (left + wide)[:, None] - 0.5)  # fmt: skip
    y = torch.minimum(torch.maximum(top[:, None] + tall[:, None] * steps, top[:, None] + 0.5),
                      (top + tall)[:, None] - 0.5)  # fmt: skip
    x, y = 2 * x / width - 1, 2 * y / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def draw_windows(batch: int, height: int, width: int, size: int, generator: torch.Generator) -> Tensor:
    """(B, 2) int64 on the CPU: top and left of a random window of `size` pixels within the image (0 where it is not
    larger than the window)."""
    draws = torch.rand(batch, 2, generator=generator)
    room = torch.tensor([max(height - size, 0) + 1, max(width - size, 0) + 1])
    return (draws * room).floor().long()


def cut_windows(maps: Tensor, corners: Tensor, size: int) -> Tensor:
    """(B, ..., H, W) and corners (B, 2) -> (B, ..., min(size, H), min(size, W))."""
    height, width = maps.shape[-2:]
    tall, wide = min(size, height), min(size, width)
    corners = corners.to(maps.device, non_blocking=True)
    rows = corners[:, 0, None] + torch.arange(tall, device=maps.device)  # (B, tall)
    columns = corners[:, 1, None] + torch.arange(wide, device=maps.device)
    between = [1] * (maps.ndim - 3)
    rows = rows.view(len(maps), *between, tall, 1).expand(*maps.shape[:-2], tall, width)
    cut = torch.gather(maps, -2, rows)
    columns = columns.view(len(maps), *between, 1, wide).expand(*maps.shape[:-2], tall, wide)
    return torch.gather(cut, -1, columns)


def starts(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis, one every `stride`; the last one ends with the image."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, stride), length - tile]


def blend_weights(side: int) -> np.ndarray:
    """Weights of a window that fall smoothly to almost 0 at its edges, (side, side) float32: squared sines."""
    line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    return np.outer(line, line).astype(np.float32)


class SarTransform:
    """Resize, flip, weight and standardise batches of one data set.

    Args:
        size: side of the model input in pixels.
        mean, std: per band, dB.
        weighting: None leaves ``weights`` out (fine-tuning, evaluation).
        range_db: registered low and high percentiles per band in dB; needed for ``--weight_norm dataset``.
        noise_db: noise equivalent sigma0 per band in dB; needed for ``--weight_mode noise``.
        target: what is reconstructed: ``image`` | ``gradient`` | ``hog``.
        target_looks: with ``image``: side of the blocks over which its power is averaged; 1: single pixels.
        preprocessing: normalisation and geometry; None: z-score and resize.
        all_finite: every pixel is valid, see `SarDataset.all_finite`; a GPU then saves the passes over masks.
    """

    def __init__(
        self,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        weighting: WeightOptions | None = None,
        range_db: tuple[Sequence[float], Sequence[float]] | None = None,
        noise_db: Sequence[float] | None = None,
        target: str = "image",
        target_looks: int = 1,
        preprocessing: Preprocessing | None = None,
        all_finite: bool = False,
    ) -> None:
        self.all_finite = all_finite
        self.size = size
        self.weighting = weighting
        self.preprocessing = preprocessing or Preprocessing()
        if weighting is not None and self.preprocessing != Preprocessing():
            raise ValueError("loss weights are defined for z-scores of resized images only")
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._quantiles = torch.tensor(QUANTILES)
        self._noise: Tensor | None = None
        self._range: tuple[Tensor, Tensor] | None = None
        self.target = target
        self.target_looks = target_looks
        if weighting is not None and weighting.mode == "noise":
            if noise_db is None:
                raise ValueError("weight_mode 'noise' needs noise_db, the noise of each band in dB")
            self._noise = 10.0 ** (torch.tensor(noise_db, dtype=torch.float32) / 10.0)
        if weighting is not None and weighting.norm == "dataset":
            if range_db is None:
                raise ValueError("weight_norm 'dataset' needs range_db, the registered percentiles in dB")
            low, high = (torch.tensor(limit, dtype=torch.float32) for limit in range_db)
            if weighting.domain == "zscore":
                low, high = ((limit - self._mean.flatten()) / self._std.flatten() for limit in (low, high))
            self._range = (low, high)

    def to_device(self, device: torch.device) -> None:
        """Move the constants; called by ``__call__`` when the batch lives elsewhere."""
        self._mean, self._std, self._quantiles = (t.to(device) for t in (self._mean, self._std, self._quantiles))
        if self._range is not None:
            self._range = (self._range[0].to(device), self._range[1].to(device))
        if self._noise is not None:
            self._noise = self._noise.to(device)

    def draw_order(self, generator: torch.Generator) -> Tensor | None:
        """(cells,) on the CPU: from which cell each one takes its weight (``--weight_permute``); None: its own."""
        if self.weighting is None or not self.weighting.permute:
            return None
        return torch.randperm((self.size // CELL) ** 2, generator=generator)

    def standardise(self, db: Tensor) -> Tensor:
        """dB -> z-score."""
        return (db - self._mean) / self._std

    def to_db(self, images: Tensor) -> Tensor:
        """z-score -> dB."""
        return images * self._std + self._mean

    @property
    def evaluation_size(self) -> int:
        """Side to which an image is resized in evaluation, before its centre is cut out."""
        return round(self.size * 8 / 7) if self.preprocessing.geometry == "resized_crop" else self.size

    def scale(self, filled: Tensor, image: Tensor) -> Tensor:
        """Images to [0, 1] as `Preprocessing.normalisation` says; z-scores are taken later, they stay as they are.

        Args:
            filled: (B, bands, H, W) with the band mean at invalid pixels.
            image: the same with NaN or infinity there.
        """
        how = self.preprocessing
        if how.clip is not None:
            black, white = how.clip
            return (filled.clamp(black, white) - black) / (white - black)
        if how.normalisation == "quantiles":
            pixels = torch.where(torch.isfinite(image), image, torch.nan).flatten(2)
            # one image at a time: torch's quantile takes 16 million values at most
            limits = torch.stack([torch.nanquantile(one, self._quantiles, dim=1) for one in pixels])  # (B, 2, bands)
            limits = torch.where(torch.isfinite(limits), limits, self._mean.flatten())
            low, high = limits[:, 0, :, None, None], limits[:, 1, :, None, None]
            clipped = torch.maximum(torch.minimum(filled, high), low)
            return ((clipped - (self._mean - 2 * self._std)) / (4 * self._std)).clamp(0, 1)
        return filled

    def model_input(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, bands, H, W) as read -> (B, bands, S, S), augmented where a generator is given.

        Args:
            image: NaN or infinity marks invalid pixels.
            generator: CPU generator of the training step; None: evaluation.
        """
        if generator is None:
            return self(image).images
        if self.preprocessing.geometry != "resized_crop":
            return self(image, draw_flips(len(image), generator)).images
        if image.device != self._mean.device:
            self.to_device(image.device)
        crops = draw_crops(len(image), image.shape[-2], image.shape[-1], generator)
        flips = draw_flips(len(image), generator)
        flips[:, 1] = False  # rows keep their order
        filled = torch.where(torch.isfinite(image), image, self._mean)
        images = apply_flips(crop_and_resize(self.scale(filled, image), crops, self.size), flips)
        return self.standardise(images) if self.preprocessing.normalisation == "zscore" else images

    def __call__(self, image: Tensor, flips: Tensor | None = None, order: Tensor | None = None) -> SarBatch:
        """Transform a batch.

        Args:
            image: (B, bands, H, W) dB; NaN or infinity marks invalid pixels.
            flips: (B, 2) bool on the CPU, from :func:`draw_flips`, or None.
            order: of the cells' weights, from :meth:`draw_order`, or None.
        """
        if image.device != self._mean.device:
            self.to_device(image.device)
        valid: Tensor | None = None
        scaled: Tensor | None = None
        zscore = self.preprocessing.normalisation == "zscore"
        if self.all_finite or is_all_finite(image):
            num_invalid = torch.zeros((), dtype=torch.int64)
            db = self._resize(image)
            scaled = None if zscore else self._resize(self.scale(image, image))
        else:
            valid = torch.isfinite(image)
            num_invalid = valid.numel() - valid.sum()
            filled = torch.where(valid, image, self._mean)
            db = self._resize(filled)
            scaled = None if zscore else self._resize(self.scale(filled, image))
            # A resized pixel is valid when all pixels it was interpolated from are.
            valid = self._resize(valid.to(torch.float32)) > 1.0 - 1e-4
            db = torch.where(valid, db, self._mean)
        if flips is not None:
            db = apply_flips(db, flips)
            scaled = None if scaled is None else apply_flips(scaled, flips)
            valid = None if valid is None else apply_flips(valid, flips)
        images = self.standardise(db) if scaled is None else scaled
        target = self.target_of(db, valid)
        return SarBatch(images, self._weights(db, images, valid, order), db, valid, num_invalid, target)

    def target_of(self, db: Tensor, valid: Tensor | None) -> Tensor | None:
        """What is to be reconstructed of (B, bands, S, S) dB: the same shape, or None: the images.

        Multilooked images are z-scores; gradients are dB in units of the band's deviation; histograms are as they are.
        """
        if self.target == "gradient":
            return ratio_gradient(db) / self._std
        if self.target == "hog":
            return oriented_gradients(db)
        return None if self.target_looks == 1 else self.standardise(multilook(db, valid, self.target_looks))

    def _resize(self, images: Tensor) -> Tensor:
        """Resize as evaluation does, and cut out the centre where the geometry says so."""
        images = resize(images, self.evaluation_size)
        start = (self.evaluation_size - self.size) // 2
        return images[..., start : start + self.size, start : start + self.size] if start else images

    def _weights(self, db: Tensor, images: Tensor, valid: Tensor | None, order: Tensor | None) -> Tensor | None:
        options = self.weighting
        if options is None or (options.mode == "none" and valid is None):
            return None
        weights = compute_weights(
            images if options.domain == "zscore" else db,
            mode=options.mode,
            level=options.level,
            exp_scale=options.exp_scale,
            clip=options.clip,
            renorm=options.renorm,
            valid=valid,
            limits=self._range,
            decibel=options.domain == "db",
            noise=self._noise,
            all_finite=valid is None,
        )
        if order is not None:
            weights = permute_cells(weights, order)
        if valid is not None and options.level == "token":
            weights = spread_to_pixels(weights, valid)  # invalid pixels inside a cell must not count
        return weights


def transform_of(data: Mapping[str, Any], *, size: int) -> SarTransform:
    """The transform that a checkpoint's `data` entry describes.

    Args:
        data: with `statistics` and, where it is not z-score and resize, `preprocessing`.
        size: side of the model input.
    """
    return SarTransform(
        size=size,
        mean=data["statistics"]["mean"],
        std=data["statistics"]["std"],
        preprocessing=Preprocessing.from_dict(data.get("preprocessing")),
    )
