"""The probe of cells: shares by hand, the regression against scikit-learn, clusters that are left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sarwmix.finetune.cells import (
    cell_features,
    cell_shares,
    fit_logistic,
    leave_clusters_out,
    precision_by_cluster,
)


def test_shares_by_hand() -> None:
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, :2, 2:] = [[1, 255], [1, 1]]  # 3 of 3 counted
    labels[0, 2:, :2] = [[1, 0], [0, 0]]
    labels[0, 2:, 2:] = [[255, 255], [255, 1]]  # less than half is counted
    got = cell_shares(labels, cell=2)
    assert got[:3].tolist() == [0, 1, 0.25]
    assert np.isnan(got[3])


def test_features_are_means_over_cells_row_by_row() -> None:
    fine, coarse = torch.randn(3, 2, 8, 8), torch.randn(3, 5, 4, 4)
    got = cell_features([fine, coarse], 4)
    assert got.shape == (48, 7)
    torch.testing.assert_close(got[16 + 6, :2], fine[1, :, 2:4, 4:6].mean((1, 2)))  # image 1, row 1, column 2
    torch.testing.assert_close(got[16 + 6, 2:], coarse[1, :, 1, 2])


def test_regression_equals_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 6)).astype(np.float32)
    target = (inputs[:, 0] - inputs[:, 3] + rng.normal(size=400) > 0.3).astype(float)
    ours = fit_logistic(inputs, target, np.zeros(7), l2=1e-2, steps=500)
    theirs = LogisticRegression(C=1 / (1e-2 * 400), tol=1e-8, max_iter=1000).fit(inputs, target)
    np.testing.assert_allclose(ours[:6], theirs.coef_[0], atol=2e-3)
    assert ours[6] == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_a_cluster_is_scored_without_its_own_labels() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(600, 4))
    clusters = np.repeat([0, 1, 2], 200)
    target = (features[:, 0] > 0).astype(float)
    scores = leave_clusters_out(features, target, clusters)
    assert min(precision_by_cluster(scores, target, clusters).values()) > 0.98
    turned = target.copy()
    turned[clusters == 2] = 1 - turned[clusters == 2]  # labels of cluster 2 must not reach its own scores
    other = leave_clusters_out(features, turned, clusters)
    np.testing.assert_allclose(other[clusters == 2], scores[clusters == 2], rtol=0.2, atol=0.5)
    assert precision_by_cluster(other, turned, clusters)["2"] < 0.4


def test_clusters_with_few_of_a_kind_have_no_precision() -> None:
    target = np.array([1.0] * 19 + [0.0] * 100 + [1.0] * 30 + [0.0] * 30)
    clusters = np.repeat([0, 1], [119, 60])
    assert set(precision_by_cluster(target + 0.0, target, clusters)) == {"1"}
