"""Metrics against an independent float64 computation from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from sarwmix.tasks.metrics import (
    MultilabelResampler,
    SortedAveragePrecision,
    metric_table,
    multilabel_report,
)
from util.errors import UserError


def plain_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """sum over distinct thresholds of (recall step) * precision, written as loops over the definition."""
    positives = truth.sum()
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = float((chosen & truth).sum())
        recall, precision = hits / positives, hits / chosen.sum()
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


def plain_metrics(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    predicted = scores > 0.5
    columns = range(scores.shape[1])

    def f1_precision(t: np.ndarray, p: np.ndarray) -> tuple[float, float]:
        hit, wrong, missed = float((t & p).sum()), float((~t & p).sum()), float((t & ~p).sum())
        f1 = 2 * hit / (2 * hit + wrong + missed) if hit + wrong + missed else 0.0
        return f1, hit / (hit + wrong) if hit + wrong else 0.0

    by_class = [f1_precision(truth[:, k], predicted[:, k]) for k in columns]
    pooled = f1_precision(truth.ravel(), predicted.ravel())
    return {
        "ap_macro": float(
            np.mean([plain_average_precision(scores[:, k], truth[:, k]) for k in columns if truth[:, k].any()])
        ),
        "ap_micro": plain_average_precision(scores.ravel(), truth.ravel()),
        "f1_macro": float(np.mean([f for f, _ in by_class])),
        "f1_micro": pooled[0],
        "precision_macro": float(np.mean([p for _, p in by_class])),
        "precision_micro": pooled[1],
    }


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels; by turns with ties, absent classes, classes that everybody has, a single sample."""
    rng = np.random.default_rng(seed)
    samples = 1 if seed % 5 == 0 else int(rng.integers(2, 60))
    classes = int(rng.integers(1, 8))
    scores = rng.random((samples, classes))
    if seed % 3 == 0:
        scores = np.round(scores * 4) / 4  # ties, also exactly at the threshold
    truth = rng.random((samples, classes)) < rng.random(classes)
    if seed % 2 == 0 and classes > 1:
        truth[:, 0] = False
        truth[0, 1] = True
    truth[0, -1] = True
    return scores, truth


@pytest.mark.parametrize("seed", range(40))
def test_metrics_follow_their_definitions(seed: int) -> None:
    scores, truth = random_case(seed)
    names = [f"class {k}" for k in range(truth.shape[1])]
    report = multilabel_report(scores, truth.astype(np.uint8), names)
    expected = plain_metrics(scores, truth)
    assert set(report.scalars) == set(expected)
    for name, value in expected.items():
        assert report.scalars[name] == pytest.approx(value, abs=1e-12), name
    assert report.absent == tuple(name for name, has in zip(names, truth.any(axis=0), strict=True) if not has)
    for k, row in enumerate(report.per_class):
        assert row["class"] == names[k]
        assert row["support"] == truth[:, k].sum()
        if truth[:, k].any():
            assert row["ap"] == pytest.approx(plain_average_precision(scores[:, k], truth[:, k]), abs=1e-12)
        else:
            assert row["ap"] is None


def test_order_of_samples_does_not_matter() -> None:
    scores, truth = random_case(7)
    order = np.random.default_rng(0).permutation(len(scores))
    names = [str(k) for k in range(truth.shape[1])]
    first, second = (multilabel_report(scores[o], truth[o], names).scalars for o in (slice(None), order))
    assert first == pytest.approx(second, abs=1e-12)


def test_a_split_without_any_label_is_refused() -> None:
    with pytest.raises(UserError, match="none of the 3 samples of this split has a label"):
        multilabel_report(np.full((3, 2), 0.4), np.zeros((3, 2)), ["a", "b"])


def test_scores_that_are_not_finite_or_do_not_fit_are_programming_errors() -> None:
    with pytest.raises(ValueError, match="NaN"):
        multilabel_report(np.array([[np.nan]]), np.array([[1]]), ["a"])
    with pytest.raises(ValueError, match="do not fit"):
        multilabel_report(np.zeros((2, 2)), np.zeros((2, 2)), ["a"])


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_weighted_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random(200) * 30) / 30
    truth = rng.random(200) < 0.2
    counts = rng.integers(0, 4, 200)
    assert SortedAveragePrecision(scores, truth)(counts) == pytest.approx(
        average_precision_score(truth, scores, sample_weight=counts), abs=1e-12
    )


def test_a_resample_equals_the_report_of_the_repeated_samples() -> None:
    scores, truth = random_case(13)
    names = [str(k) for k in range(truth.shape[1])]
    counts = np.random.default_rng(5).integers(0, 3, len(scores))
    counts[0] = 1
    repeated = np.repeat(np.arange(len(scores)), counts)
    assert MultilabelResampler(scores, truth)(counts) == pytest.approx(
        multilabel_report(scores[repeated], truth[repeated], names).scalars, abs=1e-12
    )


def test_table_has_macro_and_micro_columns() -> None:
    scores, truth = random_case(7)
    report = multilabel_report(scores, truth, [str(k) for k in range(truth.shape[1])])
    lines = metric_table(report.scalars).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["Metric", "Macro", "Micro"]
    assert [line.split("|")[0].strip() for line in lines[2:]] == ["Average precision", "F1", "Precision"]
    assert f"{report.scalars['f1_micro']:.4f}" in lines[3]
