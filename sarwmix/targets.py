"""What the decoder is to reconstruct instead of the image itself: less speckle, edges, or orientations.

With `--norm_pix_loss` most of the target's variance is speckle, which nothing can predict. Averaging power over a block
of K x K pixels before dB is taken leaves the texture; ratios of mean power are edges whose false alarms do not depend
on the level (Touzi et al. 1988); histograms of oriented gradients are the target of FG-MAE (arXiv 2310.18653). The
encoder sees the speckled image in all cases, and the loss is the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def multilook(db: Tensor, valid: Tensor | None, looks: int) -> Tensor:
    """Mean power over blocks of ``looks`` x ``looks`` pixels, in dB, at each of their pixels.

    Args:
        db: (B, bands, H, W) dB, finite.
        valid: (B, bands, H, W) bool, or None: all; invalid pixels enter no mean. A block without a valid pixel keeps
            its values, which carry no weight in the loss.
        looks: side of a block, a divisor of H and W.

    Returns:
        (B, bands, H, W) float32 dB.
    """
    power = (db.float() * (math.log(10.0) / 10.0)).exp()
    if valid is None:
        mean = F.avg_pool2d(power, looks)
    else:
        share = F.avg_pool2d(valid.to(power.dtype), looks)
        mean = F.avg_pool2d(torch.where(valid, power, 0.0), looks) / share.clamp(min=1e-6)
    blocks = mean.repeat_interleave(looks, dim=-2).repeat_interleave(looks, dim=-1)
    return torch.where(blocks > 0, 10.0 * blocks.clamp(min=1e-12).log10(), db)


HALF = 4  # px on each side of an edge
BLOCK, BINS = 8, 8  # px of a side of a histogram, and its orientations


def ratio_gradient(db: Tensor) -> Tensor:
    """Strength of edges as ratios of mean power, in dB, (B, bands, H, W) -> the same shape.

    Of each pixel: the means of power L, R over 9 x 4 px to its left and right and U, D above and below it give
    sqrt((10 log10(R / L))^2 + (10 log10(D / U))^2). A ratio does not depend on the level, so that speckle raises it as
    much on land as on water: to 1.3 dB in a flat area of one look, .6 dB of 4.4 looks.
    """
    power = (db.float() * (math.log(10.0) / 10.0)).exp()
    padded = F.pad(power, (HALF,) * 4, mode="replicate")
    height, width = db.shape[-2:]
    beside = F.avg_pool2d(padded, (2 * HALF + 1, HALF), stride=1)
    above = F.avg_pool2d(padded, (HALF, 2 * HALF + 1), stride=1)
    across = (beside[..., HALF + 1 : HALF + 1 + width] / beside[..., :width]).log10()
    down = (above[..., HALF + 1 : HALF + 1 + height, :] / above[..., :height, :]).log10()
    return 10.0 * (across.square() + down.square()).sqrt()


def oriented_gradients(db: Tensor) -> Tensor:
    """Histograms of oriented gradients of dB, (B, bands, H, W) -> the same shape, in [0, 1].

    Central differences; their orientation without sign falls into one of 8 bins, weighted by their size, over blocks of
    8 x 8 px; each histogram has unit length. Column k of a block holds bin k, so that the loss is that of histograms;
    FG-MAE has 9 bins.
    """
    padded = F.pad(db.float(), (1,) * 4, mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    size = (across.square() + down.square()).sqrt()
    angle = torch.atan2(down, across).remainder(math.pi)
    number = (angle * (BINS / math.pi)).long().clamp(max=BINS - 1)
    bins = [F.avg_pool2d(torch.where(number == k, size, 0.0), BLOCK) for k in range(BINS)]
    histograms = F.normalize(torch.stack(bins, dim=-1), dim=-1)  # (B, bands, H / 8, W / 8, 8)
    return histograms.flatten(-2).repeat_interleave(BLOCK, dim=-2)
