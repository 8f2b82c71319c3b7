"""Classification metrics over a whole split, computed once from gathered float64 scores.

Everything here is plain numpy and scikit-learn: no process groups, no batches. The engine hands over the scores of all
samples in data-set order, so the numbers cannot depend on the number of processes or on the batch size.

Shapes: N samples, K classes. ``scores`` are probabilities in [0, 1]; a class is predicted where its score is > 0.5
(a sigmoid of exactly 0.5, i.e. a logit of 0, is "absent").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, precision_score

from util.errors import UserError

THRESHOLD = 0.5


@dataclass(frozen=True)
class Report:
    """Metrics of one split.

    Attributes:
        scalars: metric name -> value, what is logged, compared and selected on.
        per_class: one row a class with ``class``, ``support`` and the class's own metrics (None: undefined).
        absent: classes without a positive sample in the split; left out of macro AP.
        intervals: metric name -> (low, high), 95 % interval, see `sarwmix.tasks.intervals`; empty unless asked for.
    """

    scalars: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)
    absent: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        out: dict[str, Any] = {"scalars": dict(self.scalars)}
        if self.per_class:
            out["per_class"] = [dict(row) for row in self.per_class]
        out["absent_classes"] = list(self.absent)
        if self.intervals:
            out["intervals_95"] = {name: list(pair) for name, pair in self.intervals.items()}
        return out


def multilabel_report(scores: np.ndarray, target: np.ndarray, classes: Sequence[str]) -> Report:
    """Average precision, F1 and precision, macro and micro, and the same per class.

    Args:
        scores: (N, K) probabilities.
        target: (N, K) of 0 and 1.
        classes: K class names.

    Raises:
        UserError: no sample, or no positive label at all (average precision is undefined).
        ValueError: shapes that do not fit, scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(target) > 0.5
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != len(classes):
        raise ValueError(f"scores {scores.shape} and target {truth.shape} do not fit {len(classes)} classes")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    if not truth.any():
        raise UserError(
            f"none of the {len(truth)} samples of this split has a label, so that average precision is undefined; "
            "check the labels of the data set (or use a larger part of the split)"
        )
    predicted = scores > THRESHOLD
    support = truth.sum(axis=0)
    present = support > 0
    class_ap = [
        float(average_precision_score(truth[:, k], scores[:, k])) if present[k] else None for k in range(len(classes))
    ]
    # one column at a time: given a single column, scikit-learn's multi-label averages would count "absent" as a class
    class_f1 = [float(f1_score(truth[:, k], predicted[:, k], zero_division=0)) for k in range(len(classes))]
    class_precision = [
        float(precision_score(truth[:, k], predicted[:, k], zero_division=0)) for k in range(len(classes))
    ]
    scalars = {
        "ap_macro": float(np.mean([ap for ap in class_ap if ap is not None])),
        "ap_micro": float(average_precision_score(truth.ravel(), scores.ravel())),
        "f1_macro": float(np.mean(class_f1)),
        "f1_micro": float(f1_score(truth.ravel(), predicted.ravel(), zero_division=0)),
        "precision_macro": float(np.mean(class_precision)),
        "precision_micro": float(precision_score(truth.ravel(), predicted.ravel(), zero_division=0)),
    }
    per_class = [
        {
            "class": name,
            "support": int(support[k]),
            "predicted": int(predicted[:, k].sum()),
            "ap": class_ap[k],
            "f1": class_f1[k],
            "precision": class_precision[k],
        }
        for k, name in enumerate(classes)
    ]
    absent = tuple(name for name, here in zip(classes, present, strict=True) if not here)
    return Report(scalars=scalars, per_class=per_class, absent=absent)


class SortedAveragePrecision:
    """Average precision of fixed scores under changing sample weights: sorted once, then one pass per call.

    AP = sum_n (R_n - R_{n-1}) P_n over the distinct thresholds in decreasing order, as scikit-learn defines it; samples
    with equal scores enter together.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """
        Args:
            scores: (M,) float.
            truth: (M,) bool.
        """
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.truth = truth[self.order].astype(np.float64)
        # last position of each run of equal scores
        self.ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)

    def __call__(self, weights: np.ndarray) -> float:
        """AP with sample weights (M,); NaN where the weighted sample has no positive."""
        ranked = weights[self.order].astype(np.float64)
        hits = np.cumsum(ranked * self.truth)[self.ends]
        seen = np.cumsum(ranked)[self.ends]
        if not len(hits) or hits[-1] == 0:
            return float("nan")
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        return float(np.sum(np.diff(hits, prepend=0.0) * precision) / hits[-1])


class MultilabelResampler:
    """The six scalars of `multilabel_report` for a resampled split given by how often each sample was drawn."""

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        predicted = scores > THRESHOLD
        self.columns = scores.shape[1]
        self.by_class = [SortedAveragePrecision(scores[:, k], truth[:, k]) for k in range(self.columns)]
        self.pooled = SortedAveragePrecision(scores.ravel(), truth.ravel())
        self.hit = (predicted & truth).astype(np.float64)  # (N, K)
        self.predicted = predicted.astype(np.float64)
        self.truth = truth.astype(np.float64)

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        weights = counts.astype(np.float64)
        class_ap = np.array([ap(weights) for ap in self.by_class])
        hit, predicted, truth = weights @ self.hit, weights @ self.predicted, weights @ self.truth

        def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
            return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)

        total_hit, total_predicted, total_truth = hit.sum(), predicted.sum(), truth.sum()
        defined = class_ap[np.isfinite(class_ap)]
        return {
            "ap_macro": float(defined.mean()) if len(defined) else float("nan"),
            "ap_micro": self.pooled(np.repeat(weights, self.columns)),
            "f1_macro": float(ratio(2 * hit, predicted + truth).mean()),
            "f1_micro": float(ratio(2 * total_hit[None], (total_predicted + total_truth)[None])[0]),
            "precision_macro": float(ratio(hit, predicted).mean()),
            "precision_micro": float(ratio(total_hit[None], total_predicted[None])[0]),
        }


def class_accuracy(
    truth: np.ndarray, predicted: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> dict[str, float]:
    """Share of samples that are right, and its mean over the classes that have samples.

    Args:
        truth: (N,) class numbers.
        predicted: (N,) class numbers.
        classes: K.
        counts: How often each sample counts, (N,); once by default.
    """
    weight = np.ones(len(truth)) if counts is None else counts.astype(np.float64)
    right = np.bincount(truth, weight * (truth == predicted), minlength=classes)
    support = np.bincount(truth, weight, minlength=classes)
    present = support > 0
    return {"acc": float(right.sum() / weight.sum()), "aacc": float((right[present] / support[present]).mean())}


def pair_metrics(truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of class 1; 0 where nothing was predicted or is there to find.

    Args:
        truth: (N,) of 0 and 1.
        predicted: (N,) of 0 and 1.
        counts: How often each sample counts, (N,); once by default.
    """
    weight = np.ones(len(truth)) if counts is None else counts.astype(np.float64)
    truth, predicted = truth.astype(bool), predicted.astype(bool)
    hits = float(weight[truth & predicted].sum())
    found, wanted = float(weight[predicted].sum()), float(weight[truth].sum())
    return {
        "acc": float(weight[truth == predicted].sum()) / float(weight.sum()),
        "precision": hits / found if found else 0.0,
        "recall": hits / wanted if wanted else 0.0,
        "f1": 2 * hits / (found + wanted) if found + wanted else 0.0,
    }


def confusion_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Metrics of one confusion matrix (K, K), rows are true classes.

    The mean IoU goes over the classes that are there or were claimed, the macro averages over those that are there.
    Precision of a class never claimed is 0. Without any pixel all is NaN.
    """
    counts = confusion.astype(np.float64)
    hits, truth, claimed = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    union = truth + claimed - hits
    nan = np.full(len(hits), np.nan)
    iou = np.divide(hits, union, out=nan.copy(), where=union > 0)
    f1 = np.divide(2 * hits, truth + claimed, out=nan.copy(), where=union > 0)
    precision = np.divide(hits, claimed, out=np.zeros(len(hits)), where=claimed > 0)
    recall = np.divide(hits, truth, out=nan.copy(), where=truth > 0)
    total, present = counts.sum(), truth > 0
    if total == 0:
        names = ("iou", "f1", "precision", "recall") if len(hits) == 2 else ()
        return dict.fromkeys(("miou", "accuracy", *names), float("nan"))
    values = {"miou": float(np.nanmean(iou)), "accuracy": float(hits.sum() / total)}
    if len(hits) == 2:
        # nothing to find and nothing claimed: a perfect score would be as wrong as none; 0 as scikit-learn has it
        values |= {
            "iou": float(np.nan_to_num(iou[1])),
            "f1": float(np.nan_to_num(f1[1])),
            "precision": float(precision[1]),
            "recall": float(np.nan_to_num(recall[1])),
        }
    else:
        values |= {
            "f1_macro": float(f1[present].mean()),
            "precision_macro": float(precision[present].mean()),
            "recall_macro": float(recall[present].mean()),
        }
    return values


def evaluator(task: str, outputs: Mapping[str, np.ndarray], classes: int) -> Callable[[np.ndarray], dict[str, float]]:
    """The scalars of a split (without its loss) as a function of how often each sample counts, (N,).

    Args:
        task: name of the task: ``multilabel``, ``multiclass``, ``pair`` or ``segmentation``.
        outputs: what evaluation keeps of each sample, as in ``predictions_test.npz``.
        classes: number of classes K.

    Raises:
        UserError: no such task.
    """
    if task == "segmentation":
        flat = outputs["confusion"].astype(np.int64).reshape(-1, classes * classes)
        return lambda counts: confusion_metrics((counts @ flat).reshape(classes, classes))
    scores, target = np.asarray(outputs["scores"], dtype=np.float64), np.asarray(outputs["target"])
    if task == "multilabel":
        return MultilabelResampler(scores, target > 0.5)
    truth, predicted = target.astype(np.int64), scores.argmax(axis=1)
    if task == "multiclass":
        return lambda counts: class_accuracy(truth, predicted, classes, counts)
    if task == "pair":
        return lambda counts: pair_metrics(truth, predicted, counts)
    raise UserError(f"there are no metrics of task {task!r}; expected multilabel, multiclass, pair or segmentation")


def metric_table(scalars: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None) -> str:
    """The ``Metric | Macro | Micro`` table of average precision, F1 and precision as text."""
    intervals = intervals or {}

    def cell(name: str) -> str:
        text = f"{scalars[name]:.4f}"
        if name in intervals:
            low, high = intervals[name]
            text += f" [{low:.4f}, {high:.4f}]"
        return text

    rows = [("Metric", "Macro", "Micro")]
    for title, stem in (("Average precision", "ap"), ("F1", "f1"), ("Precision", "precision")):
        rows.append((title, cell(f"{stem}_macro"), cell(f"{stem}_micro")))
    return align_table(rows)


def value_table(titles: Mapping[str, str], report: Report) -> str:
    """A line for each scalar that the report has, with its interval where there is one; titles by scalar name."""
    rows = [("Metric", "Value")]
    for name, title in titles.items():
        if name not in report.scalars:
            continue
        text = f"{report.scalars[name]:.4f}"
        if name in report.intervals:
            low, high = report.intervals[name]
            text += f" [{low:.4f}, {high:.4f}]"
        rows.append((title, text))
    return align_table(rows)


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text with aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(lines)
