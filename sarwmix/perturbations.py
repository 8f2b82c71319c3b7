"""What may be wrong with a Sentinel-1 image, in doses: for tests of how much a trained model bears.

Images are (B, bands, H, W) in dB, NaN at invalid pixels, which stay invalid. What is random depends on the seed, the
number of the sample and the perturbation alone, not on batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BORDER_DB, BORDER_SPREAD_DB = -40.0, 3.0  # remains of the zero-padded edge of a product, far below any noise floor
Apply = Callable[[Tensor, float, np.ndarray, Sequence[float], int], Tensor]


@dataclass(frozen=True)
class Perturbation:
    """One kind of fault.

    Attributes:
        name: of the fault, also in files.
        axis: what the dose is, with its unit.
        doses: of the usual test, without the dose that changes nothing.
        apply: (images dB, dose, sample numbers (B,), band means dB, seed) -> images dB.
        none: the dose that changes nothing.
        labels: names of doses that are no quantity; empty: they are one.
    """

    name: str
    axis: str
    doses: tuple[float, ...]
    apply: Apply
    none: float = 0.0
    labels: tuple[str, ...] = ()

    def label(self, dose: float) -> str:
        """The dose in words."""
        return self.labels[int(dose) - 1] if self.labels and dose >= 1 else f"{dose:g}"


def speckle(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Multiply power by unit-mean Gamma noise of variance `dose`, which is 1 / looks; independent of pixel and band."""
    if dose == 0:
        return images
    looks, noise = 1.0 / dose, np.empty(images.shape, dtype=np.float32)
    for row, number in zip(noise, numbers.tolist(), strict=True):
        row[...] = np.random.default_rng([seed, int(number), 1]).standard_gamma(looks, row.shape) / looks
    # single looks may draw a power of almost nothing: 1e-6 of the mean, 60 dB, is the floor
    return images + 10.0 * torch.log10(torch.from_numpy(noise).clamp(min=1e-6)).to(images.device)


def calibration(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Add `dose` dB to all bands."""
    return images + dose


def swapped_bands(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Bands in reverse order."""
    return images.flip(1) if dose else images


def incidence_ramp(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Add a slope over the columns that falls by `dose` dB from the first to the last and is 0 in the middle."""
    width = images.shape[-1]
    steps = torch.arange(width, device=images.device, dtype=images.dtype)
    return images + dose * (0.5 - steps / max(width - 1, 1))


def border_noise(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Replace a strip along one side, `dose` of the area, by values of -40 +- 3 dB; the side goes round by sample."""
    out = images.clone()
    height, width = images.shape[-2:]
    tall, wide = round(dose * height), round(dose * width)
    for image, number in zip(out, numbers.tolist(), strict=True):
        side = (image[:, :, :wide], image[:, :tall], image[:, :, width - wide :], image[:, height - tall :])
        strip = side[int(number) % 4]  # a view: what is written lands in the image
        drawn = np.random.default_rng([seed, int(number), 2]).normal(BORDER_DB, BORDER_SPREAD_DB, tuple(strip.shape))
        strip.copy_(torch.where(torch.isnan(strip), strip, torch.from_numpy(drawn).to(strip)))
    return out


def missing_band(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Band number `dose`, counted from 1, is its training mean everywhere, as fine-tuning fills what is invalid."""
    if not dose:
        return images
    out, band = images.clone(), int(dose) - 1
    out[:, band] = torch.where(torch.isnan(out[:, band]), out[:, band], float(means[band]))
    return out


def resolution(images: Tensor, dose: float, numbers: np.ndarray, means: Sequence[float], seed: int) -> Tensor:
    """Average power over blocks of `dose` x `dose` pixels; every pixel gets the mean of the valid ones of its block."""
    side = int(dose)
    if side <= 1:
        return images
    valid = torch.isfinite(images)
    power = torch.where(valid, 10.0 ** (images / 10.0), 0.0)
    # both are means over the same block, cut by the edge or not: their ratio is the mean over its valid pixels
    total, count = (F.avg_pool2d(x, side, ceil_mode=True) for x in (power, valid.to(power.dtype)))
    blocks = 10.0 * torch.log10(total / count.clamp(min=1e-12))
    wide = blocks.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return torch.where(valid, wide[..., : images.shape[-2], : images.shape[-1]], images)


def perturbations(bands: Sequence[str]) -> tuple[Perturbation, ...]:
    """All that make sense for these bands, which must be in dB."""
    found = [
        Perturbation("speckle", "variance of the extra speckle (1 / looks)", (0.0625, 0.125, 0.25, 0.5, 1.0), speckle),
        Perturbation("calibration", "calibration offset, dB", (-3, -2, -1, -0.5, 0.5, 1, 2, 3), calibration),
        Perturbation("incidence_ramp", "slope across the image, dB", (1, 2, 4, 8), incidence_ramp),
        Perturbation("border_noise", "share of the image in border noise", (0.05, 0.1, 0.2, 0.4), border_noise),
        Perturbation("resolution", "side of the averaged block, pixels", (2, 4, 8), resolution, none=1.0),
    ]
    if len(bands) > 1:
        lost = tuple(f"no {band}" for band in bands)
        numbers = tuple(float(k + 1) for k in range(len(bands)))
        found.append(Perturbation("missing_band", "band set to its mean", numbers, missing_band, labels=lost))
        order = ",".join(reversed(bands)) if len(bands) < 4 else "reversed"
        found.append(Perturbation("swapped_bands", "order of the bands", (1.0,), swapped_bands, labels=(order,)))
    return tuple(found)
