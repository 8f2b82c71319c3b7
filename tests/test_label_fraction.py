"""Label fractions keep the shares of the label sets and are decided by the seed."""

from __future__ import annotations

import numpy as np
import pytest

from sarwmix.data.fraction import choose_fraction, vanished_classes
from util.errors import UserError


def random_labels(count: int = 2000, classes: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((count, classes)) < np.linspace(0.02, 0.5, classes)).astype(np.uint8)


@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5, 0.33, 1.0])
def test_every_label_set_keeps_its_share(fraction: float) -> None:
    labels = random_labels()
    chosen = choose_fraction(labels, fraction, seed=3)
    assert len(chosen) == round(2000 * fraction)
    assert len(set(chosen.tolist())) == len(chosen)  # without replacement
    assert (np.diff(chosen) > 0).all()
    sets, number = np.unique(labels, axis=0, return_inverse=True)
    for k in range(len(sets)):
        expected = (number == k).sum() * len(chosen) / 2000
        assert abs((number[chosen] == k).sum() - expected) < 1 + 1e-9


def test_rare_label_sets_together_keep_their_share() -> None:
    """Rounding each set by itself would lose all sets of one or two samples."""
    labels = np.array([[int(bit) for bit in f"{i:010b}"] for i in range(1000)], dtype=np.uint8)  # all different
    chosen = choose_fraction(labels, 0.1, seed=0)
    assert len(chosen) == 100
    np.testing.assert_allclose(labels[chosen].mean(axis=0), labels.mean(axis=0), atol=0.15)


def test_the_seed_decides() -> None:
    labels = random_labels()
    first, again, other = (choose_fraction(labels, 0.25, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first) & set(other)) / len(first) == pytest.approx(0.25, abs=0.1)


def test_class_numbers_work_too() -> None:
    labels = np.repeat(np.arange(4), [400, 200, 100, 4])
    chosen = choose_fraction(labels, 0.25, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [100, 50, 25, 1]


def test_classes_that_vanish_are_named() -> None:
    labels = np.zeros((100, 3), dtype=np.uint8)
    labels[:, 0] = 1
    labels[0, 1] = 1
    chosen = np.arange(1, 10)
    assert vanished_classes(labels, chosen, ["often", "once", "never"]) == ("once",)
    assert vanished_classes(np.array([0, 0, 1]), np.array([0]), ["a", "b", "c"]) == ("b",)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="train_frac"):
        choose_fraction(random_labels(), fraction, seed=0)
