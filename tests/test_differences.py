"""Arms as differences: by hand, Holm over the tested ones, coverage by simulation, and a picture that is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sarwmix.reports.differences import as_markdown, compare_arms, draw
from util.errors import UserError


def experiment(rng: np.random.Generator, *, seeds: int, clusters: int, effect: float) -> dict:
    """Two arms that share what clusters and seeds do to both; the second is better by ``effect``."""
    of_cluster, of_seed = rng.normal(0, 0.1, clusters), rng.normal(0, 0.02, seeds)
    of_effect, of_run = rng.normal(effect, 0.02, clusters), rng.normal(0, 0.02, (2, seeds))
    noise = rng.normal(0, 0.02, (2, seeds, clusters))
    return {
        name: {
            s: 0.6 + of_cluster + of_seed[s] + of_run[arm, s] + noise[arm, s] + (of_effect if arm else 0)
            for s in range(seeds)
        }
        for arm, name in enumerate(("none", "better"))
    }


def test_by_hand() -> None:
    values = {
        "none": {1: np.array([0.5, 0.7]), 2: np.array([0.6, 0.6])},
        "other": {1: np.array([0.6, 0.7]), 2: np.array([0.7, 0.8])},
        "random": {1: np.array([0.4, 0.4]), 2: np.array([0.4, 0.4])},
    }
    arms = {arm.name: arm for arm in compare_arms(values, "none", untested=["random"])}
    assert arms["none"].difference is None
    assert arms["other"].difference is not None
    assert arms["other"].difference.estimate == pytest.approx(0.1)
    assert arms["other"].difference.paired_seeds
    assert arms["other"].difference.n_clusters == 2
    assert arms["other"].p == pytest.approx(arms["other"].difference.p)  # the only one that is tested
    assert np.isnan(arms["random"].p)
    text = as_markdown(list(arms.values()), "AP", "none")
    assert "| other | 0.7000 | +0.1000 |" in text
    assert "2 seeds and 2 test clusters; runs are paired by seed" in text
    with pytest.raises(UserError, match="reference"):
        compare_arms(values, "plain")


@pytest.mark.parametrize(("seeds", "clusters"), [(3, 10), (6, 10)])
def test_intervals_of_differences_cover(seeds: int, clusters: int) -> None:
    """Where the truth is known; 95 % is wanted, and this form gives a little more."""
    rng, inside, rounds = np.random.default_rng(5), 0, 60
    for _ in range(rounds):
        drawn = experiment(rng, seeds=seeds, clusters=clusters, effect=0.03)
        difference = compare_arms(drawn, "none", draws=200)[1].difference
        assert difference is not None
        inside += difference.low <= 0.03 <= difference.high
    assert 0.91 <= inside / rounds <= 1.0


def test_holm_counts_all_tested_arms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = experiment(rng, seeds=4, clusters=8, effect=0.2)
    values |= {f"arm {k}": experiment(rng, seeds=4, clusters=8, effect=0.0)["none"] for k in range(4)}
    arms = compare_arms(values, "none")
    better = arms[1]
    assert better.difference is not None
    assert better.p == pytest.approx(min(1.0, 5 * better.difference.p), rel=1e-6)
    draw(arms, tmp_path / "d.png", metric="AP", reference="none")
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
