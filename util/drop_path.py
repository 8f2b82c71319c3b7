"""Stochastic depth (arXiv 1603.09382): whole residual branches are left out at random in training."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_drop_path(x: Tensor, blocks: int, rate: float) -> list[Tensor | None]:
    """Factors of each block's two branches, (2, B, 1, 1): 0 with the block's rate, else 1 / (1 - rate).

    Rates grow linearly from 0 at the first block, whose factors are None, to `rate` at the last. One draw for all
    blocks, not two a block: each would be a launch of its own.

    Args:
        x: (B, ...) input of the first block; tells batch, device and type.
        blocks: how many there are.
        rate: of the last; 0 leaves nothing out, and all factors are None.
    """
    if rate == 0.0 or blocks == 1:
        return [None] * blocks
    keep = 1 - rate * torch.arange(1, blocks, device=x.device) / (blocks - 1)
    keep = keep.view(-1, 1, 1, 1, 1).expand(-1, 2, x.shape[0], 1, 1)
    return [None, *(torch.bernoulli(keep) / keep).to(x.dtype).unbind()]
