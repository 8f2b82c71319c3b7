"""Polarization-aware loss weights from backscatter power (arXiv 2503.01181; JSTARS extension).

With sigma0 = 10**(dB / 10) the linear backscatter of one band, min-max normalised to x in [0, 1] per image::

    w = exp(s * (1 - x))          so that 1 <= w <= e at s = 1; low backscatter (calm water) counts most

``--weight_domain db`` takes x from dB itself, ``--weight_norm dataset`` from a range that all images share, so that
"dark" means the same in each of them. Mode ``noise`` is the inverse error variance of a value in dB instead: with the
mean power m of a neighbourhood and the sensor's noise n, w = (m / (m + n))**2, which falls in the dark.

Everything is batched and runs on the device of its input; nothing here needs gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError

MODES = ("none", "per_channel", "shared_avg", "shared_intensity", "noise")
LEVELS = ("token", "pixel")
DOMAINS = ("linear", "db", "zscore")
NORMS = ("image", "dataset")
RANGES = ("p01-p99", "p01-median")

CELL = 32  # pixels per side of a token cell
EPS = 1e-6
NEIGHBOURHOOD = 9  # pixels per side over which mode noise takes its mean power


@dataclass(frozen=True)
class WeightOptions:
    """The weighting of a run; the field names are the command-line flags without ``weight_``.

    Attributes:
        mode: ``none`` | ``per_channel`` | ``shared_avg`` | ``shared_intensity`` | ``noise``.
        level: ``token`` (averaged over 32 x 32 cells) | ``pixel``.
        domain: ``linear`` (power, from dB before standardisation) | ``db`` (dB itself) | ``zscore`` (from standardised
            values, as released).
        exp_scale: s, not 0; below 0 bright surfaces count more, a control.
        clip: percentile in [0, 50) cut from both ends of the linear power before min-max.
        norm: ``image`` (each image's range) | ``dataset`` (registered percentiles).
        renorm: divide by the image's mean weight.
        range: with norm ``dataset``: ``p01-p99`` | ``p01-median``.
        permute: shuffle the weights over the cells of the image, a placebo with the same distribution of weights.
    """

    mode: str = "per_channel"
    level: str = "token"
    domain: str = "linear"
    exp_scale: float = 1.0
    clip: float = 0.0
    norm: str = "image"
    renorm: bool = False
    range: str = "p01-p99"
    permute: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("level", self.level, LEVELS),
            ("domain", self.domain, DOMAINS),
            ("norm", self.norm, NORMS),
            ("range", self.range, RANGES),
        ):
            if value not in allowed:
                raise UserError(f"--weight_{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
        if not 0.0 < abs(self.exp_scale) < 80.0:
            raise UserError(
                f"--weight_exp_scale is {self.exp_scale}; expected a number between -80 and 80 that is not 0 "
                "(published: 1.0; no weights: --weight_mode none)"
            )
        if not 0.0 <= self.clip < 50.0:
            raise UserError(f"--weight_clip is {self.clip}; expected a percentile from 0 (off) to below 50")
        if self.norm == "dataset" and self.clip > 0:
            raise UserError("--weight_clip has no effect with --weight_norm dataset (a fixed range); drop one of them")
        if self.range != "p01-p99" and self.norm != "dataset":
            raise UserError(f"--weight_range {self.range} is a range of the data set and needs --weight_norm dataset")
        formula = (self.domain, self.exp_scale, self.clip, self.norm)
        if self.mode == "noise" and formula != ("linear", 1.0, 0.0, "image"):
            raise UserError(
                "--weight_mode noise has no range and no exponent; leave out --weight_domain, --weight_exp_scale, "
                "--weight_clip and --weight_norm"
            )
        if self.permute and (self.level != "token" or self.mode == "none"):
            raise UserError("--weight_permute shuffles the weights of cells; it needs weights and --weight_level token")


def compute_weights(
    sar: Tensor,
    *,
    mode: str,
    level: str = "pixel",
    exp_scale: float = 1.0,
    clip: float = 0.0,
    renorm: bool = False,
    valid: Tensor | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
    decibel: bool = False,
    noise: Tensor | None = None,
    all_finite: bool = False,
) -> Tensor:
    """Loss weights of a batch of SAR images.

    Args:
        sar: (..., bands, H, W) decibel-like values: dB for the linear domain, z-scores for the published one.
        mode: see :data:`MODES`. ``shared_avg`` averages the bands' weights, ``shared_intensity`` their linear power
            (the conference paper's W_SAR); both give all bands the same weight. ``noise`` needs ``noise``.
        level: ``pixel``, or ``token``: averaged over 32 x 32 cells per band.
        exp_scale: s of the exponent.
        clip: clamp the linear power of each image to its [clip, 100 - clip] percentiles before min-max.
        renorm: divide by the image's mean weight over bands and valid pixels.
        valid: (..., bands, H, W) bool; by default where ``sar`` is finite. Invalid pixels enter no minimum, maximum,
            percentile or mean and get weight 0. In the shared modes a pixel uses its valid bands.
        limits: fixed (minimum, maximum) per band, each (bands,), instead of each image's own; values outside are
            clamped. Decibel-like, as ``sar``.
        decibel: x from ``sar`` itself instead of from its power.
        noise: noise equivalent power per band, (bands,), linear sigma0.
        all_finite: without ``valid``: whether all values are known to be finite, so that none is looked for.

    Returns:
        Weights like ``sar`` (level pixel) or (..., cells, bands) (level token), float32.

    Raises:
        ValueError: unknown mode or level, shapes that do not fit.
    """
    if mode not in MODES or level not in LEVELS:
        raise ValueError(f"mode {mode!r} / level {level!r}: expected one of {MODES} and one of {LEVELS}")
    if sar.ndim < 3:
        raise ValueError(f"sar has shape {tuple(sar.shape)}, expected (..., bands, H, W)")
    if valid is not None:
        valid = valid.expand_as(sar)
    elif not all_finite and not is_all_finite(sar):
        valid = torch.isfinite(sar)
    if mode == "none":
        weights = torch.ones_like(sar, dtype=torch.float32)
    elif mode == "noise":
        if noise is None:
            raise ValueError("mode 'noise' needs the noise power of each band")
        mean_power = local_mean(as_power(sar), valid)
        weights = (mean_power / (mean_power + noise.to(mean_power).view(-1, 1, 1))).square()
    elif mode == "shared_intensity":
        power = band_mean(without(as_power(sar), valid), valid)
        any_band = None if valid is None else valid.any(dim=-3, keepdim=True)
        if limits is not None:  # the range of the mean power: the mean of the bands' ranges
            limits = (as_power(limits[0]).mean(0, keepdim=True), as_power(limits[1]).mean(0, keepdim=True))
        if decibel:
            power = 10.0 * power.clamp(min=EPS).log10()
            limits = None if limits is None else (10.0 * limits[0].log10(), 10.0 * limits[1].log10())
        weights = exponential_weights(power, any_band, exp_scale, clip, limits).expand_as(sar)
    else:
        level_of = without(sar.float().clone() if decibel else as_power(sar), valid)
        if limits is not None and not decibel:
            limits = (as_power(limits[0]), as_power(limits[1]))
        weights = exponential_weights(level_of, valid, exp_scale, clip, limits)
        if mode == "shared_avg":
            weights = band_mean(weights, valid).expand_as(sar)
    weights = without(weights, valid)
    if renorm:
        image = (-3, -2, -1)
        inside = torch.ones_like(weights) if valid is None else valid.to(weights.dtype)
        mean = weights.sum(dim=image, keepdim=True) / inside.sum(dim=image, keepdim=True).clamp(min=1)
        weights = weights / mean.clamp(min=EPS)
    return token_weights(weights, valid) if level == "token" else weights


def is_all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, where asking costs nothing; False on a GPU, where it would wait for it."""
    # A sum is finite only if its terms are: one pass without a mask.
    return values.device.type == "cpu" and bool(torch.isfinite(values.sum()))


def without(values: Tensor, valid: Tensor | None) -> Tensor:
    """``values`` with 0 where not ``valid``; None means valid everywhere."""
    return values if valid is None else torch.where(valid, values, 0.0)


def as_power(values: Tensor) -> Tensor:
    """10**(values / 10), float32, as one exponential."""
    return (values.float() * (math.log(10.0) / 10.0)).exp_()


def local_mean(power: Tensor, valid: Tensor | None, size: int = NEIGHBOURHOOD) -> Tensor:
    """Mean over the valid pixels of a square around each pixel: (..., H, W) -> the same shape."""

    def average(values: Tensor) -> Tensor:
        flat = values.flatten(0, -3)[:, None]
        pooled = F.avg_pool2d(flat, size, stride=1, padding=size // 2, count_include_pad=valid is not None)
        return pooled.view(values.shape)

    if valid is None:
        return average(power)
    return average(without(power, valid)) / average(valid.to(power.dtype)).clamp(min=EPS)


def band_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid bands of each pixel: (..., bands, H, W) -> (..., 1, H, W), 0 where no band is valid."""
    if valid is None:
        return values.mean(dim=-3, keepdim=True)
    return without(values, valid).sum(dim=-3, keepdim=True) / valid.sum(dim=-3, keepdim=True).clamp(min=1)


def exponential_weights(
    power: Tensor,
    valid: Tensor | None,
    exp_scale: float,
    clip: float,
    limits: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """exp(s * (1 - x)) with x the min-max normalised ``power`` (or dB), (..., bands, H, W)."""
    if limits is not None:
        low, high = (limit.to(power).view(-1, 1, 1) for limit in limits)
    elif clip > 0:
        low, high = percentiles(power, valid, clip)
    else:
        low = (power if valid is None else torch.where(valid, power, torch.inf)).amin(dim=(-2, -1), keepdim=True)
        high = (power if valid is None else torch.where(valid, power, -torch.inf)).amax(dim=(-2, -1), keepdim=True)
    if limits is not None or clip > 0:
        power = torch.maximum(torch.minimum(power, high), low)
    # s * (1 - x) as s - (power - low) * s / (high - low): one pass over the pixels less for each operation saved.
    exponent = (power - low).mul_(-exp_scale / (high - low + EPS)).add_(exp_scale)
    # An image without a single valid pixel has low = inf: its exponent is NaN and its weights are 0, not NaN.
    return without(exponent.exp_(), valid)


def percentiles(power: Tensor, valid: Tensor | None, clip: float) -> tuple[Tensor, Tensor]:
    """The ``clip`` and ``100 - clip`` percentiles (linear interpolation) over valid pixels, each (..., bands, 1, 1)."""
    valid = torch.ones_like(power, dtype=torch.bool) if valid is None else valid
    values = torch.where(valid, power, torch.inf).flatten(-2).sort(dim=-1).values
    count = valid.flatten(-2).sum(dim=-1, keepdim=True)

    def at(percentile: float) -> Tensor:
        position = (count - 1).clamp(min=0) * (percentile / 100.0)
        below = position.floor().long()
        above = torch.minimum(below + 1, (count - 1).clamp(min=0))
        a, b = values.gather(-1, below), values.gather(-1, above)
        return torch.lerp(a, b, (position - below).to(values.dtype))[..., None]

    return at(clip), at(100.0 - clip)


def token_weights(weights: Tensor, valid: Tensor | None) -> Tensor:
    """Mean weight of each 32 x 32 cell over its valid pixels: (..., bands, H, W) -> (..., cells, bands).

    Raises:
        ValueError: an image side that is not a multiple of 32.
    """
    *lead, bands, height, width = weights.shape
    if height % CELL or width % CELL:
        raise ValueError(f"token weights need sides that are multiples of {CELL} px, got {height} x {width}")
    cells = (*lead, bands, height // CELL, CELL, width // CELL, CELL)
    total = weights.reshape(cells).sum(dim=(-3, -1))
    count = CELL**2 if valid is None else valid.reshape(cells).sum(dim=(-3, -1)).clamp(min=1)
    return (total / count).flatten(-2).transpose(-2, -1)


def permute_cells(tokens: Tensor, order: Tensor) -> Tensor:
    """Token weights (..., cells, bands) with cell i given the weight of cell ``order[i]``.

    Cells without a valid pixel have weight 0; they take part with the mean weight of the others, because 0 would take
    valid pixels out of the loss where it lands.
    """
    there = tokens > 0
    mean = tokens.sum(dim=-2, keepdim=True) / there.sum(dim=-2, keepdim=True).clamp(min=1)
    return torch.where(there, tokens, mean).index_select(-2, order.to(tokens.device, non_blocking=True))


def spread_to_pixels(tokens: Tensor, valid: Tensor) -> Tensor:
    """Token weights (..., cells, bands) as a map (..., bands, H, W) that is 0 at invalid pixels."""
    *lead, bands, height, width = valid.shape
    grid = tokens.transpose(-2, -1).reshape(*lead, bands, height // CELL, 1, width // CELL, 1)
    return grid.expand(*lead, bands, height // CELL, CELL, width // CELL, CELL).reshape(valid.shape) * valid
