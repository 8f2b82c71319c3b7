"""Mixup, CutMix and random erasing on the device, for any soft target: multi-hot, one-hot, pairs of images.

timm's Mixup turns integer classes into one-hot vectors and draws from NumPy's global state, so it can neither take
multi-hot labels nor be replayed after a resume. Here every draw comes from the generator of the training step and the
target is whatever (B, K) matrix of probabilities it is given.

Mixup: Zhang et al., arXiv 1710.09412, lambda ~ Beta(a, a). CutMix: Yun et al., arXiv 1905.04899; its lambda is the area
that is really kept, after the rectangle was clipped at the border. Random erasing: Zhong et al., arXiv 1708.04896.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError

MODES = ("batch", "elem")


@dataclass(frozen=True)
class Mixup:
    """Mixes every sample of a batch with another one of it.

    Attributes:
        mixup: a of mixup's Beta(a, a); 0: no mixup.
        cutmix: a of CutMix's Beta(a, a); 0: no CutMix.
        prob: probability that a batch (mode elem: a sample) is mixed at all.
        switch_prob: probability of CutMix where both are on.
        mode: "batch": one lambda, rectangle and kind for the batch; "elem": drawn for each sample.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is the parameter of a Beta distribution, >= 0: got {getattr(self, name)}")
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mixup {name} is a probability in [0, 1]: got {getattr(self, name)}")
        if self.mode not in MODES:
            raise UserError(f"mixup mode must be one of {', '.join(MODES)}: got {self.mode!r}")

    @property
    def active(self) -> bool:
        """Whether anything is ever mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(
        self, images: tuple[Tensor, ...], target: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Mix a batch: one permutation and one lambda a sample for all its images and its target.

        Args:
            images: float32 tensors (B, C, H, W) of the same B, H and W; a pair sample has two.
            target: (B, K) label probabilities (multi-hot labels as they are).
            generator: CPU generator of this training step.

        Returns:
            Mixed images and target, (B, K).
        """
        if not self.active:
            return images, target
        first = images[0]
        batch, (height, width) = first.shape[0], first.shape[-2:]
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        partner = torch.from_numpy(rng.permutation(batch)).to(first.device, non_blocking=True)
        draws = [self._draw(height, width, rng) for _ in range(batch if self.mode == "elem" else 1)]
        # the label's share is the share of pixels that stayed; for plain mixup that is lambda itself
        shares = [
            keep * (1 - (bottom - top) * (right - left) / (height * width)) for keep, top, bottom, left, right in draws
        ]
        # A few numbers for each draw travel; maps of the image's size are made where the images are.
        plan = torch.tensor([[share, *draw] for share, draw in zip(shares, draws, strict=True)], dtype=torch.float32)
        share, keep, *bounds = plan.to(first.device, non_blocking=True).unbind(1)
        cut = rectangles(torch.stack(bounds), height, width)
        weight = torch.where(cut, 0.0, keep[:, None, None])[:, None]  # (1 or B, 1, H, W)
        share = share[:, None].to(target.dtype)  # (1 or B, 1)
        mixed = tuple(torch.lerp(image[partner], image, weight) for image in images)
        return mixed, target * share + target[partner] * (1 - share)

    def _draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, int, int, int, int]:
        """Share of the own image, and top, bottom, left and right of a rectangle that is all the partner's."""
        if rng.random() >= self.prob:
            return 1.0, 0, 0, 0, 0
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        if not cut:
            return rng.beta(self.mixup, self.mixup), 0, 0, 0, 0
        side = math.sqrt(1 - rng.beta(self.cutmix, self.cutmix))  # side ratio of the rectangle of the partner
        rows = _clipped_span(int(rng.integers(height)), side * height, height)
        columns = _clipped_span(int(rng.integers(width)), side * width, width)
        return 1.0, *rows, *columns


def rectangles(bounds: Tensor, height: int, width: int) -> Tensor:
    """(N, H, W) bool on the device of the bounds, True inside.

    Args:
        bounds: (4, N): top, bottom, left, right in pixels; bottom and right are outside.
        height, width: H, W.
    """
    top, bottom, left, right = bounds
    rows, columns = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])  # (N, H)
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])  # (N, W)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def _clipped_span(centre: int, length: float, limit: int) -> tuple[int, int]:
    half = int(length) // 2
    return max(0, centre - half), min(limit, centre + half)


def smooth_labels(target: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of independent yes/no labels: y -> y (1 - s) + s / 2.

    Every label is a two-class problem of its own, so the mass s is spread over its two outcomes; this works for
    multi-hot and for already mixed targets alike.

    Args:
        target: (B, K) label probabilities.
        smoothing: s in [0, 1).
    """
    return target if smoothing == 0 else target * (1 - smoothing) + 0.5 * smoothing


def random_erase(
    images: tuple[Tensor, ...],
    prob: float,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[Tensor, ...]:
    """Set one rectangle of some samples to 0, the mean of standardised data; the same one in all images of a sample.

    Args:
        images: standardised tensors (B, C, H, W).
        prob: probability that a sample is erased.
        generator: CPU generator of this training step.
        area: range of the rectangle's share of the image.
        aspect: range of its height / width, drawn log-uniformly.
    """
    if prob <= 0:
        return images
    first = images[0]
    batch, (height, width) = first.shape[0], first.shape[-2:]
    chosen, share, ratio, top, left = torch.rand(5, batch, generator=generator, dtype=torch.float64)
    share = area[0] + share * (area[1] - area[0])
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(log_low + ratio * (log_high - log_low))
    tall = (share * ratio).sqrt().clamp(max=1) * height
    wide = (share / ratio).sqrt().clamp(max=1) * width
    tall, wide = tall.round().clamp(min=1), wide.round().clamp(min=1)
    top, left = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
    tall = torch.where(chosen < prob, tall, 0)
    bounds = torch.stack([top, top + tall, left, left + wide]).to(first.device, non_blocking=True)
    erased = rectangles(bounds, height, width)[:, None]  # (B, 1, H, W)
    return tuple(image.masked_fill(erased, 0.0) for image in images)
