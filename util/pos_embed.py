"""Position tables: the fixed 2-D sine/cosine table of MAE, and bicubic resizing of learned or fixed tables."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util.errors import UserError


def _sincos_1d(channels: int, positions: np.ndarray) -> np.ndarray:
    """(M,) positions -> (M, channels) float64: sines in the first half, cosines in the second."""
    omega = 1.0 / 10000 ** (np.arange(channels // 2, dtype=np.float64) / (channels / 2.0))
    angle = np.einsum("m,d->md", positions.reshape(-1), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_table(channels: int, grid: int) -> Tensor:
    """Fixed 2-D sine/cosine position table (MAE, arXiv 2111.06377).

    Computed in float64, rounded to float32 once. The first half of the channels codes the column, the second half the
    row; positions are row-major.

    Args:
        channels: length of a position vector; a multiple of 4.
        grid: cells per side.

    Returns:
        (1, grid * grid, channels) float32.
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4 (sine and cosine of two axes), got {channels}")
    rows, columns = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64), indexing="ij")
    table = np.concatenate([_sincos_1d(channels // 2, columns), _sincos_1d(channels // 2, rows)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


def _side(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{what} has {count} entries, which is not a square; it cannot be resized")
    return side


def _resize_square(table: Tensor, new_side: int, what: str) -> Tensor:
    """(S*S, C) -> (new_side*new_side, C), bicubic, corners not aligned."""
    side = _side(table.shape[0], what)
    if side == new_side:
        return table
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(new_side * new_side, -1).to(table.dtype)


def resize_position_table(table: Tensor, tokens: int) -> Tensor:
    """Resize an absolute position table.

    Args:
        table: (1, T, C), row-major over a square grid.
        tokens: number of tokens wanted (a square number).

    Returns:
        (1, tokens, C).

    Raises:
        UserError: a grid is not square.
    """
    return _resize_square(table[0], _side(tokens, "the position table"), "the position table")[None]


def resize_relative_bias(table: Tensor, entries: int) -> Tensor:
    """Resize a relative-position bias table.

    Args:
        table: ((2w-1)^2, heads) for windows of w x w tokens.
        entries: (2w'-1)^2 for the window wanted.

    Returns:
        (entries, heads).

    Raises:
        UserError: a table is not square.
    """
    what = "the relative-position bias table"
    return _resize_square(table, _side(entries, what), what)
