"""What the decoder is to reconstruct beside the image itself: backscatter with less speckle.

With `--norm_pix_loss` most of the target's variance is speckle, which nothing can predict. Averaging power over a block
of K x K pixels before dB is taken leaves the texture; the encoder still sees the speckled image.
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
