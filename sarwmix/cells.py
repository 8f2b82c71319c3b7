"""Square cells of an image as targets of reconstruction, and the weighted loss on them (arXiv 2503.01181).

With ``norm_pix_loss`` the model predicts a cell's pattern, not its level. P = side * side * bands values of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarwmix.plain_errors import plain_errors


def cut(images: Tensor, side: int) -> Tensor:
    """(B, bands, H, W) -> (B, L, P), cells of ``side`` px row-major, last axis ordered row, column, band."""
    batch, bands, height, width = images.shape
    rows, cols = height // side, width // side
    grid = images.reshape(batch, bands, rows, side, cols, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, -1)


def join(cells: Tensor, side: int, bands: int) -> Tensor:
    """Inverse of :func:`cut` for square images."""
    batch, count = cells.shape[:2]
    rows = round(count**0.5)
    grid = cells.reshape(batch, rows, rows, side, side, bands)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, bands, rows * side, rows * side)


def spread(values: Tensor, side: int) -> Tensor:
    """One value a cell and band, (B, L, bands) -> a map of it, (B, bands, H, W)."""
    return join(values.repeat(1, 1, side**2), side, values.shape[-1])


def weighted_errors(rec: Tensor, target: Tensor, weights: Tensor | None, *, standardise: bool) -> Tensor:
    """(4,): the mean of weight * squared error over valid pixels, then `sarwmix.plain_errors.NAMES`, without gradient.

    Args:
        rec, target: (B, L, P) what was predicted and what it should be, z-score.
        weights: (B, L, P); 0 marks what does not count, in neither numerator nor denominator. None: 1 everywhere.
        standardise: each cell of the target first (``norm_pix_loss``).
    """
    valid = torch.ones_like(target) if weights is None else (weights > 0).to(target.dtype)
    level, pixels = (target * valid).sum(-1), valid.sum(-1)  # (B, L) each
    if standardise:
        target, _, _ = normalise_cells(target, None if weights is None else weights > 0)
    error = (rec - target) ** 2
    loss = error.mean() if weights is None else (weights * error).sum() / (weights > 0).sum().clamp(min=1)
    sums = (error.detach() * valid).sum(-1).flatten()
    return torch.stack([loss, *plain_errors(level.flatten(), sums, pixels.flatten())])


def normalise_cells(target: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Standardise each cell: (normalised, mean, standard deviation).

    Args:
        target: (B, L, P).
        valid: (B, L, P) bool; invalid values do not enter mean and variance.
    """
    if valid is None:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
    else:
        count = valid.sum(dim=-1, keepdim=True)
        mean = (target * valid).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        var = (((target - mean) * valid) ** 2).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    std = (var + 1e-6).sqrt()
    return (target - mean) / std, mean, std
