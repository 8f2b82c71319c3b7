"""Reconstruction errors without weights: numbers by which two weightings of the loss can be compared.

They are logged beside the loss, which is not comparable between weightings: means over valid pixels of all cells, and
of the darkest and the brightest tenth of a batch's cells (by their mean z-score over the bands), where weightings by
backscatter differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("plain_error", "dark_error", "bright_error")


def plain_errors(level: Tensor, error: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean error a valid pixel: of all cells, of the darkest and of the brightest tenth of them.

    Args:
        level, error, pixels: (cells,) sums over valid pixels of what is seen and of the error; number of these pixels.
    """
    mean, count = level / pixels.clamp(min=1), max(1, round(len(level) / 10))
    found = [error.sum() / pixels.sum().clamp(min=1)]
    for sign in (-1.0, 1.0):  # cells without a valid pixel come last in either order
        chosen = torch.where(pixels > 0, sign * mean, -torch.inf).topk(count).indices
        found.append(error[chosen].sum() / pixels[chosen].sum().clamp(min=1))
    return found[0], found[1], found[2]
