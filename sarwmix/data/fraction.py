"""Parts of a labelled training split: without replacement, stratified on the label sets, decided by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sarwmix.data.base import SarDataset
from util.errors import UserError
from util.files import atomic_write
from util.log import get_logger


def label_rows(labels: np.ndarray) -> np.ndarray:
    """Labels as rows that are equal where the label sets are: (N, K) as it is, (N,) class numbers as (N, 1)."""
    return labels if labels.ndim == 2 else labels[:, None]


def choose_fraction(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Choose a fraction of the samples so that every label set keeps its share.

    The samples are ordered by label set (sets in random order, and samples at random inside a set), and every
    (1/fraction)-th is taken from a random start: a set of n samples gives floor or ceil of n * fraction, also where
    that is below one, so that the many rare combinations keep their share together.

    Args:
        labels: (N, K) multi-hot or (N,) class numbers.
        fraction: in (0, 1].
        seed: decides the choice.

    Returns:
        Chosen positions in increasing order, int64 (max(1, round(N * fraction)),).

    Raises:
        UserError: the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--train_frac must lie in (0, 1], got {fraction}")
    count = len(labels)
    wanted = max(1, round(count * fraction))
    rng = np.random.default_rng([seed, 0x5EED])
    shuffled = rng.permutation(count)
    _, number = np.unique(label_rows(labels)[shuffled], axis=0, return_inverse=True)
    # Sets in random order: sorted neighbours alternate in one label, and equal steps would beat with that.
    number = rng.permutation(int(number.max()) + 1)[number.ravel()]
    by_set = shuffled[np.argsort(number, kind="stable")]  # stable: the random order inside a set stays
    picks = np.floor((np.arange(wanted) + rng.random()) * count / wanted).astype(np.int64)
    return np.sort(by_set[np.minimum(picks, count - 1)])


def vanished_classes(labels: np.ndarray, chosen: np.ndarray, classes: Sequence[str]) -> tuple[str, ...]:
    """Classes with samples in the split but none among the chosen ones."""
    if labels.ndim == 2:
        before, after = labels.sum(axis=0) > 0, labels[chosen].sum(axis=0) > 0
    else:
        before = np.bincount(labels, minlength=len(classes)) > 0
        after = np.bincount(labels[chosen], minlength=len(classes)) > 0
    return tuple(name for name, had, has in zip(classes, before, after, strict=True) if had and not has)


def take_fraction(dataset: SarDataset, fraction: float, *, seed: int, ids_file: Path) -> SarDataset:
    """The chosen part of a training split; its sample names are written to a file, lost classes are warned about.

    Args:
        dataset: labelled split.
        fraction: in (0, 1].
        seed: decides the choice.
        ids_file: gets one name a line. Every process may write it: the content is the same.

    Raises:
        UserError: no labels.
    """
    strata = dataset.strata()
    chosen = choose_fraction(strata, fraction, seed=seed)
    lost = () if dataset.labels is None else vanished_classes(dataset.labels, chosen, dataset.spec.classes)
    if lost:
        get_logger().warning("--train_frac %g leaves no training sample of: %s", fraction, "; ".join(lost))
    part = dataset.subset(chosen)
    with atomic_write(ids_file, "w") as stream:
        stream.write("".join(f"{name}\n" for name in part.names))
    return part
