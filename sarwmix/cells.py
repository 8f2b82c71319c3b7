"""Cells as targets of reconstruction: with ``norm_pix_loss`` the model predicts a cell's pattern, not its level."""

from __future__ import annotations

from torch import Tensor


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
