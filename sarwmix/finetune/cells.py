"""The dense probe: logistic regression on the tokens of single cells, with whole clusters left out.

A vector pooled over a tile knows little of a flood that covers a part of it; its cells do. Each cell of 32 x 32 px is a
sample: its features are those of all stages of the encoder averaged over it, its label the class of its pixels.

Shapes: N images, M cells, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 32
IGNORED = 255
L2 = 1e-4
"""Half of the factor of the squared weights in the loss, for standardised features; the same for all runs."""


def cell_features(maps: Sequence[Tensor], grid: int) -> Tensor:
    """Maps of an encoder's stages (N, C_i, h_i, w_i) -> features of the cells, (N * grid * grid, sum of C_i)."""
    pooled = [F.adaptive_avg_pool2d(stage.float(), grid) for stage in maps]
    return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2).flatten(0, 1)


def cell_shares(labels: np.ndarray, positive: int = 1, *, cell: int = CELL) -> np.ndarray:
    """Share of each cell's counted pixels that are of a class; NaN in a cell of which less than half is counted.

    Args:
        labels: (N, H, W) class numbers, 255 where a pixel does not count.
        positive: the class.
        cell: side of a cell in pixels.

    Returns:
        (N * cells,) float64, cells row-major.
    """
    count, height, width = labels.shape
    cells = labels.reshape(count, height // cell, cell, width // cell, cell).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(-1, cell * cell)
    counted = (cells != IGNORED).sum(axis=1)
    with np.errstate(invalid="ignore"):
        share = (cells == positive).sum(axis=1) / counted
    return np.where(2 * counted >= cell * cell, share, np.nan)


def fit_logistic(
    features: np.ndarray, target: np.ndarray, start: np.ndarray, *, l2: float = L2, steps: int = 60
) -> np.ndarray:
    """Weights and bias (D + 1,) of a logistic regression by L-BFGS.

    Args:
        features: (M, D) float32, standardised.
        target: (M,) of 0 and 1.
        start: (D + 1,) where the search begins.
        l2: weight decay.
        steps: iterations at most.
    """
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        own = weights[:-1].astype(np.float32)
        scores = (features @ own).astype(np.float64) + weights[-1]
        rest = (1 / (1 + np.exp(-np.clip(scores, -60, 60))) - target) / len(target)
        value = np.mean(np.logaddexp(0, scores) - target * scores) + l2 / 2 * (weights[:-1] @ weights[:-1])
        slope = (rest.astype(np.float32) @ features).astype(np.float64) + l2 * weights[:-1]
        return float(value), np.append(slope, rest.sum())

    found: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": steps}).x
    return found


def leave_clusters_out(features: np.ndarray, target: np.ndarray, clusters: np.ndarray, *, l2: float = L2) -> np.ndarray:
    """Score of each cell by a regression that saw no cell of its cluster, (M,) float64.

    Args:
        features: (M, D).
        target: (M,) of 0 and 1.
        clusters: (M,) name or number of each cell's cluster.
        l2: weight decay.
    """
    scale = np.maximum(features.std(axis=0), 1e-6)
    inputs = np.ascontiguousarray((features - features.mean(axis=0)) / scale, dtype=np.float32)
    # Where all clusters lead is a start near to where all but one lead; the minimum does not depend on it.
    start = fit_logistic(inputs, target, np.zeros(inputs.shape[1] + 1), l2=l2, steps=150)
    scores = np.empty(len(target))
    for cluster in np.unique(clusters):
        left_out = clusters == cluster
        weights = fit_logistic(inputs[~left_out], target[~left_out], start, l2=l2)
        scores[left_out] = inputs[left_out] @ weights[:-1] + weights[-1]
    return scores


def precision_by_cluster(
    scores: np.ndarray, target: np.ndarray, clusters: np.ndarray, *, least: int = 20
) -> dict[str, float]:
    """Average precision within each cluster that has at least ``least`` cells of both kinds."""
    from sklearn.metrics import average_precision_score

    found = {}
    for cluster in np.unique(clusters):
        own = clusters == cluster
        if min(target[own].sum(), (1 - target[own]).sum()) >= least:
            found[str(cluster)] = float(average_precision_score(target[own], scores[own]))
    return found
