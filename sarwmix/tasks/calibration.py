"""Temperature calibration: one number by which logits are divided, so that a probability says how often it is right.

Fitted on the split that selects (never on test), by the likelihood of its labels (Guo et al. 2017). Order of classes,
average precision and decisions at 0.5 of yes/no labels do not change. Works from probabilities: of a softmax the
logarithms are the logits up to a constant of each sample, of a sigmoid the log-odds are the logits.

Shapes: N samples, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 15
LIMITS = (0.05, 20.0)  # of the temperature
_SMALLEST = 1e-12  # probabilities are kept away from 0 and 1 by this


def at_temperature(scores: np.ndarray, temperature: float, *, exclusive: bool) -> np.ndarray:
    """Probabilities (N, K) at temperature 1 -> those at another one, float64."""
    p = np.clip(np.asarray(scores, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    if exclusive:
        logits = np.log(p) / temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-(np.log(p) - np.log1p(-p)) / temperature))


def likelihood_loss(scores: np.ndarray, target: np.ndarray, *, exclusive: bool) -> float:
    """Mean negative log-likelihood of the labels.

    Args:
        scores: (N, K) probabilities.
        target: (N,) class numbers where exclusive, else (N, K) of 0 and 1.
    """
    p = np.clip(scores, _SMALLEST, 1 - _SMALLEST)
    if exclusive:
        return float(-np.log(p[np.arange(len(p)), target.astype(np.int64)]).mean())
    truth = target > 0.5
    return float(-np.where(truth, np.log(p), np.log1p(-p)).mean())


def fit_temperature(scores: np.ndarray, target: np.ndarray, *, exclusive: bool) -> float:
    """The temperature with the highest likelihood, within `LIMITS`; 1 where there is no sample."""
    from scipy.optimize import minimize_scalar

    if len(scores) == 0:
        return 1.0

    def loss(logarithm: float) -> float:
        changed = at_temperature(scores, float(np.exp(logarithm)), exclusive=exclusive)
        return likelihood_loss(changed, target, exclusive=exclusive)

    found = minimize_scalar(loss, bounds=tuple(np.log(LIMITS)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def expected_calibration_error(scores: np.ndarray, target: np.ndarray, *, exclusive: bool, bins: int = BINS) -> float:
    """Mean distance between confidence and how often it is right, over bins of equal width, weighted by their size.

    Of exclusive classes the confidence is that of the predicted one; of yes/no labels every probability counts.
    """
    p = np.asarray(scores, dtype=np.float64)
    if exclusive:
        confidence, right = p.max(axis=1), (p.argmax(axis=1) == target.astype(np.int64)).astype(np.float64)
    else:
        confidence, right = p.ravel(), (np.asarray(target) > 0.5).astype(np.float64).ravel()
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    sums = np.bincount(number, weights=confidence, minlength=bins)
    hits = np.bincount(number, weights=right, minlength=bins)
    return float(np.abs(sums - hits).sum() / len(confidence))


def calibrate(
    held: dict[str, np.ndarray], test: dict[str, np.ndarray], split: str, *, exclusive: bool
) -> dict[str, Any]:
    """Temperature fitted on one split, and the error of both splits before and after.

    Args:
        held: outputs of the split that selects, with ``scores`` and ``target``.
        test: outputs of the test split.
        split: name of the first.
        exclusive: whether a sample has exactly one class.
    """
    temperature = fit_temperature(held["scores"], held["target"], exclusive=exclusive)

    def error(outputs: dict[str, np.ndarray], value: float) -> float:
        changed = at_temperature(outputs["scores"], value, exclusive=exclusive)
        return expected_calibration_error(changed, outputs["target"], exclusive=exclusive)

    return {
        "temperature": temperature,
        "fitted_on": split,
        "bins": BINS,
        "expected_calibration_error": {
            name: {"before": error(outputs, 1.0), "after": error(outputs, temperature)}
            for name, outputs in ((split, held), ("test", test))
        },
    }
