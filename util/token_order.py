"""Orders of tokens on a grid, and which row of a bias table a pair of tokens uses."""

from __future__ import annotations

import torch
from torch import Tensor


def morton_order(side: int) -> Tensor:
    """Row-major indices of a ``side`` x ``side`` square in Z-order, row bit lowest.

    The first four entries of any aligned 2 x 2 group are (0,0), (1,0), (0,1), (1,1): the order in which patch merging
    concatenates. ``side`` must be a power of two. Returns int64 (side * side,).
    """
    order = torch.zeros(1, 1, dtype=torch.long)  # maps (row, col) -> z position, built by doubling
    size = 1
    while size < side:
        quarter = size * size
        order = torch.cat(
            [
                torch.cat([order, order + 2 * quarter], dim=1),
                torch.cat([order + quarter, order + 3 * quarter], dim=1),
            ],
            dim=0,
        )
        size *= 2
    return torch.argsort(order.flatten())


def token_order(side: int, tile: int) -> Tensor:
    """Row-major indices of a ``side`` x ``side`` grid, tile by tile, Z-order inside each tile. int64 (side * side,)."""
    grid = torch.arange(side * side).view(side // tile, tile, side // tile, tile).permute(0, 2, 1, 3)
    return grid.reshape(-1, tile * tile)[:, morton_order(tile)].flatten()


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window, row-major. int64 (window**2, window**2)."""
    rows, cols = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    d_row = rows[:, None] - rows[None, :] + window - 1
    d_col = cols[:, None] - cols[None, :] + window - 1
    return d_row * (2 * window - 1) + d_col
