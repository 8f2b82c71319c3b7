"""Intervals: clusters are drawn whole, coverage by simulation, differences paired over clusters and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm, t

from sarwmix.data.io.rasters import blocks_of
from sarwmix.data.registry import build_dataset, get_spec
from sarwmix.finetune.probes import FeatureDataset
from sarwmix.synthetic.neighbours import make_neighbour_data, write_geotiff
from sarwmix.tasks.intervals import (
    _margin,
    cluster_draws,
    cluster_numbers,
    difference_of_runs,
    holm,
    metric_intervals,
    paired_difference,
    power_line,
    resolvable,
)
from sarwmix.tasks.metrics import evaluator, multilabel_report
from tests.finetune_fixtures import MemoryDataset
from util.errors import UserError

CHECKED = ("ap_macro", "ap_micro", "f1_macro")


def simulate(
    rng: np.random.Generator, clusters: int, each: int, share: float, shares: Sequence[float] = (0.1, 0.2, 0.4)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores of a split whose clusters have much in common: `share` of the variance of both.

    Returns:
        scores (N, K), truth (N, K), cluster of each sample (N,).
    """
    sizes = rng.poisson(each - 1, clusters) + 1 if each > 1 else np.ones(clusters, dtype=int)
    of = np.repeat(np.arange(clusters), sizes)
    shape = (len(of), len(shares))

    def field() -> np.ndarray:
        common = rng.standard_normal((clusters, len(shares)))[of]
        return np.sqrt(share) * common + np.sqrt(1 - share) * rng.standard_normal(shape)

    truth = field() > norm.ppf(1 - np.asarray(shares))
    return 1 / (1 + np.exp(1 - 1.2 * truth - field())), truth, of


def coverage(
    clusters: int, each: int, share: float, *, runs: int, draws: int, seed: int = 0,
    shares: Sequence[float] = (0.1, 0.2, 0.4),
) -> dict[str, float]:  # fmt: skip
    """Share of simulated splits whose 95 % interval holds the value of a split without end."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    large = [
        multilabel_report(*simulate(rng, 60_000 // each, each, share, shares)[:2], names).scalars for _ in range(4)
    ]
    truth = {name: float(np.mean([one[name] for one in large])) for name in CHECKED}
    hits = dict.fromkeys(CHECKED, 0)
    for _ in range(runs):
        scores, target, of = simulate(rng, clusters, each, share, shares)
        found = metric_intervals(
            evaluator("multilabel", {"scores": scores, "target": target}, 3), cluster_numbers(of, len(of)), draws=draws
        )
        for name in CHECKED:
            hits[name] += found[name][0] <= truth[name] <= found[name][1]
    return {name: count / runs for name, count in hits.items()}


@pytest.mark.parametrize(("clusters", "each", "share"), [(300, 1, 0.0), (30, 20, 0.1)])
def test_intervals_cover_in_a_short_simulation(clusters: int, each: int, share: float) -> None:
    """95 % of 60 splits are 57 +- 2; the full simulation is a slow test."""
    for name, value in coverage(clusters, each, share, runs=60, draws=80).items():
        assert value >= 0.86, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clusters", "each", "share"),
    [(1000, 1, 0.0), (300, 1, 0.0), (150, 1, 0.0), (200, 5, 0.2), (60, 20, 0.2), (30, 20, 0.1), (12, 40, 0.1),
     (18, 8, 0.3)],
)  # fmt: skip
@pytest.mark.parametrize("rarest", [0.1, 0.05])
def test_intervals_cover_what_they_say(clusters: int, each: int, share: float, rarest: float) -> None:
    """The figures stand in docs/finetuning.md."""
    if rarest == 0.05 and clusters * each < 600:
        pytest.skip("fewer than 30 positives")
    shares = (rarest, 2 * rarest, 0.4)
    found = coverage(clusters, each, share, runs=800, draws=200, seed=5, shares=shares)
    print(clusters, each, share, rarest, {name: f"{100 * value:.1f} %" for name, value in found.items()})
    for name, value in found.items():
        assert 0.93 - 0.015 <= value <= 0.97 + 0.015, (name, value)  # two standard errors of 800 splits


def test_clusters_that_are_ignored_give_intervals_that_are_too_narrow() -> None:
    rng = np.random.default_rng(1)
    scores, target, of = simulate(rng, 30, 100, 0.5)
    evaluate = evaluator("multilabel", {"scores": scores, "target": target}, 3)
    width = {}
    for kind, numbers in (("tile", cluster_numbers(None, len(of))), ("cluster", cluster_numbers(of, len(of)))):
        low, high = metric_intervals(evaluate, numbers, draws=200)["ap_macro"]
        width[kind] = high - low
    assert width["cluster"] > 1.5 * width["tile"]


def test_the_estimate_lies_in_the_middle_and_draws_are_reproducible() -> None:
    """Percentiles of the draws would leave it at a tenth to a fifth of the interval."""
    rng = np.random.default_rng(2)
    scores, target, of = simulate(rng, 40, 8, 0.2)
    evaluate = evaluator("multilabel", {"scores": scores, "target": target}, 3)
    numbers, whole = cluster_numbers(of, len(of)), multilabel_report(scores, target, ["a", "b", "c"]).scalars
    found = metric_intervals(evaluate, numbers, draws=100, seed=3)
    assert set(found) == set(whole)
    for name, (low, high) in found.items():
        assert 0.4 < (whole[name] - low) / (high - low) < 0.6, name
    assert metric_intervals(evaluate, numbers, draws=100, seed=3) == found
    assert metric_intervals(evaluate, numbers, draws=100, seed=4) == found  # each cluster is left out once
    assert metric_intervals(evaluate, numbers, draws=10, seed=4) != metric_intervals(evaluate, numbers, draws=10)


def test_a_mean_has_the_textbook_width() -> None:
    values = np.random.default_rng(0).beta(2, 3, 1000)
    (low, high) = metric_intervals(
        lambda counts: {"mean": float(counts @ values / counts.sum())}, np.arange(1000), draws=2000
    )["mean"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1000), rel=0.15)  # 200 groups: 5 %


def test_all_samples_of_a_cluster_are_drawn_together() -> None:
    numbers = cluster_numbers(["b", "a", "b", "c", "a", "b"], 6)
    assert numbers.tolist() == [1, 0, 1, 2, 0, 1]
    for counts in cluster_draws(numbers, 20, 0):
        assert counts[0] == counts[2] == counts[5]
        assert counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3
    # samples that count in nothing make up no cluster
    assert cluster_numbers(["b", "a", "c"], 3, counted=np.array([True, False, True])).tolist() == [0, -1, 1]
    with pytest.raises(ValueError, match="2 clusters are given for 3 samples"):
        cluster_numbers(["a", "b"], 3)


def test_ends_of_the_scale_and_single_clusters() -> None:
    # 20 of 20 right: the exact bound of a proportion, 0.025 ** (1 / 20) = 0.8316
    perfect = {"scores": np.eye(2)[[0, 1] * 10], "target": np.array([0, 1] * 10)}
    low, high = metric_intervals(evaluator("multiclass", perfect, 2), np.arange(20), draws=30)["acc"]
    assert (low, high) == (pytest.approx(0.8316, abs=1e-4), 1.0)
    assert metric_intervals(evaluator("pair", perfect, 2), np.arange(20), draws=30)["acc"] == (low, high)
    assert metric_intervals(evaluator("pair", perfect, 2), np.zeros(20, dtype=np.int64)) == {}
    with pytest.raises(UserError, match="no metrics of task 'other'"):
        evaluator("other", perfect, 2)


def arm(rng: np.random.Generator, seeds: int, of: np.ndarray, common: np.ndarray, level: float, spread: float):  # type: ignore[no-untyped-def]
    """Runs whose value is a mean over samples: what clusters have in common, a seed's own level, and noise."""

    def one() -> np.ndarray:
        return level + common[of] + spread * rng.standard_normal() + 0.05 * rng.standard_normal(len(of))

    values = [one() for _ in range(seeds)]
    return [lambda counts, own=own: {"x": float(counts @ own / counts.sum())} for own in values]


def test_a_difference_by_hand() -> None:
    """Two seeds, no noise: +0.1 and +0.3 in each cluster; the seeds alone decide."""
    of = np.repeat(np.arange(10), 3)
    level = np.linspace(0, 1, 10)[of]

    def runs(*shifts: float):  # type: ignore[no-untyped-def]
        return [lambda counts, s=s: {"x": float(counts @ (level + s) / counts.sum())} for s in shifts]

    found = paired_difference(runs(0.1, 0.3), runs(0.0, 0.0), of, "x", seeds=((1, 2), (2, 1)), draws=50)
    assert found.paired_seeds
    assert (found.n_seeds, found.n_clusters) == (2, 10)
    assert found.estimate == pytest.approx(0.2)
    assert found.sd_seeds == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert found.sd_clusters == pytest.approx(0, abs=1e-6)  # what is hard for both cancels
    half = t.ppf(0.975, 1) * np.std([0.1, 0.3], ddof=1) / np.sqrt(2)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert found.p == pytest.approx(2 * t.sf(0.2 / 0.1, 1))
    assert found.covers == "2 seeds and 10 test clusters"


def test_pairing_over_clusters_takes_out_what_they_have_in_common() -> None:
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(40), 5)
    common = 0.2 * rng.standard_normal(40)
    first, second = arm(rng, 3, of, common, 0.55, 0.0), arm(rng, 3, of, common, 0.5, 0.0)
    difference = paired_difference(first, second, of, "x", draws=100)
    mean = paired_difference(first, (), of, "x", draws=100)
    assert difference.sd_clusters < 0.3 * mean.sd_clusters
    assert difference.low > 0.03
    assert difference.p < 5e-3
    one = paired_difference(first[:1], second[:1], of, "x", draws=100)
    assert np.isnan(one.sd_seeds)
    assert one.covers == "40 test clusters"
    nothing = paired_difference(first[:1], second[:1], np.zeros(200, dtype=np.int64), "x")
    assert np.isnan(nothing.low)
    assert nothing.covers.startswith("nothing")
    with pytest.raises(UserError, match="no test metric 'y'; there is: x"):
        paired_difference(first, second, of, "y")


@pytest.mark.slow
@pytest.mark.parametrize("same_seeds", [False, True])
@pytest.mark.parametrize(("seeds", "clusters", "spread"), [(3, 30, 0.02), (5, 60, 0.0), (1, 40, 0.0), (5, 30, 0.05)])
def test_differences_cover_what_they_say(seeds: int, clusters: int, spread: float, same_seeds: bool) -> None:
    """The true difference is 0.05; clusters favour one arm or the other (deviation 0.05)."""
    rng = np.random.default_rng(7)
    of, hits, runs = np.repeat(np.arange(clusters), 5), 0, 500
    other = range(seeds) if same_seeds else range(100, 100 + seeds)
    for _ in range(runs):
        common, favour = 0.2 * rng.standard_normal((2, clusters)) * ((1,), (0.25,))
        found = paired_difference(
            arm(rng, seeds, of, common + favour, 0.55, spread), arm(rng, seeds, of, common, 0.5, spread), of, "x",
            seeds=(range(seeds), other), draws=150,
        )  # fmt: skip
        hits += found.low <= 0.05 <= found.high
    print(seeds, clusters, spread, same_seeds, f"{100 * hits / runs:.1f} %")
    assert 0.93 - 0.02 <= hits / runs <= 0.97 + 0.02  # two standard errors of 500


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_margins_cover_whatever_the_shares_of_seeds_and_clusters(seeds: int) -> None:
    """From no share of the seeds to all of it, with variances that are only estimated; 3,000 estimates each."""
    rng, runs = np.random.default_rng(3), 3000
    for ratio in (0.0, 0.03, 0.3, 1.0, 3.0, 30.0):
        parts = [(ratio / (1 + ratio), seeds - 1.0), (1 / (1 + ratio), 19.0)]
        error = rng.standard_normal(runs)
        seen = np.stack([part * rng.chisquare(freedom, runs) / freedom for part, freedom in parts], axis=1)
        inside = [abs(e) <= _margin([(v, f) for v, (_, f) in zip(row, parts, strict=True)], 0.05)
                  for e, row in zip(error, seen, strict=True)]  # fmt: skip
        low, high = (0.93, 0.975) if seeds == 2 else (0.94, 0.97)
        assert low - 0.008 <= np.mean(inside) <= high + 0.008, ratio


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([0.01, float("nan")])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_can_be_resolved() -> None:
    # many seeds and clusters: (1.96 + 0.84) standard errors
    assert resolvable(0.1, float("nan"), 1000, 0) == pytest.approx(2.8016 * 0.1 / np.sqrt(1000), rel=2e-3)
    assert resolvable(0.1, 0.1, 1000, 1000) == pytest.approx(2.8016 * 0.1 * np.sqrt(2 / 1000), rel=2e-3)
    assert resolvable(0.04, 0.01, 3, 30) > resolvable(0.04, 0.01, 20, 30)
    assert np.isnan(resolvable(float("nan"), float("nan"), 1, 1))
    of = np.repeat(np.arange(10), 3)
    rng = np.random.default_rng(0)
    runs = arm(rng, 3, of, np.zeros(10), 0.5, 0.1), arm(rng, 3, of, np.zeros(10), 0.5, 0.1)
    text = power_line(paired_difference(*runs, of, "x", draws=50))
    assert "3 seed(s) and 10 clusters resolve" in text
    assert "; 5 seeds" in text


@pytest.mark.parametrize(
    ("dataset", "name", "cluster"),
    [
        ("benv2", "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39", "S1A_IW_GRDH_1SDV_20170613T165043"),
        ("sen12flood", "0012__S1A_a_b__S1B_c__1", "0012"),
        ("sen1floods11", "Sri-Lanka_101973", "Sri-Lanka"),
        ("satlas", "4123_2651", "412_265"),
    ],
)
def test_data_sets_say_what_a_cluster_is(dataset: str, name: str, cluster: str) -> None:
    data = MemoryDataset(2, 2)
    assert data.clusters is None
    data.spec = get_spec(dataset)
    data.names = type(data.names).of([name, "else"])
    assert data.clusters == [cluster, "else"]


def test_blocks_of_the_ground_from_headers(tmp_path: Path) -> None:
    """EuroSAT-SAR and DFC2020 name no place; the files' coordinates do: squares of 10 km."""
    place = {"crs": "EPSG:32633", "pixel": 10.0}
    for name, x in (("a", 500_010.0), ("b", 509_000.0), ("c", 510_000.0)):
        write_geotiff(tmp_path / f"{name}.tif", np.zeros((1, 4, 4), np.float32), origin=(x, 5_000_000.0), **place)
    paths = [tmp_path / f"{name}.tif" for name in "abc"]
    assert blocks_of(paths) == ["32633_50_500", "32633_50_500", "32633_51_500"]
    write_geotiff(tmp_path / "d.tif", np.zeros((1, 4, 4), np.float32), crs="EPSG:4326", origin=(13.3, 45.2), pixel=1e-4)
    assert blocks_of([tmp_path / "d.tif"]) == ["4326_147_501"]  # 13.3 x 11.1, 45.2 x 11.1
    (tmp_path / "e.tif").write_bytes(b"")
    assert blocks_of([*paths, tmp_path / "e.tif"]) is None


@pytest.mark.parametrize("name", ["eurosat_sar", "dfc2020"])
def test_blocks_reach_subsets_caches_and_features(tmp_path: Path, name: str) -> None:
    make_neighbour_data(name, tmp_path / "d", samples=4)
    data = build_dataset(name, tmp_path / "d", "train")
    of = data.clusters
    assert of is not None
    assert data.subset(np.array([2, 0])).clusters == [of[2], of[0]]
    assert FeatureDataset(data, np.zeros((len(data), 2), np.float32)).clusters == of
    assert data.cluster_kind == ("10 km block" if len(set(of)) < len(of) else "image")
    plain = MemoryDataset(2, 2)
    plain.spec = get_spec(name)
    assert plain.clusters is None  # a store of pixels: said as "image"
    assert plain.cluster_kind == "image"


def test_differences_of_finished_runs(tmp_path: Path) -> None:
    """From the files that runs keep: the same numbers as from the arrays; other samples are refused."""
    rng = np.random.default_rng(0)
    scores, truth, of = simulate(rng, 12, 6, 0.3)
    names = np.arange(len(of)).astype(str)
    for name, noise in (("a", 0.0), ("b", 0.3), ("c", 0.3)):
        folder = tmp_path / name
        folder.mkdir()
        noisy = np.clip(scores + noise * rng.standard_normal(scores.shape), 0, 1)
        kept = names[::-1] if name == "c" else names
        np.savez(folder / "predictions_test.npz", names=kept, clusters=of, scores=noisy, target=truth.astype(np.uint8))
        (folder / "metrics.json").write_text('{"task": "multilabel", "classes": ["a", "b", "c"], "results": {}}')
    found = difference_of_runs([tmp_path / "a"], [tmp_path / "b"], "ap_macro", draws=50)
    assert found.n_clusters == 12
    assert found.low < found.estimate < found.high
    expected = multilabel_report(scores, truth, ["a", "b", "c"]).scalars["ap_macro"]
    assert difference_of_runs([tmp_path / "a"], (), "ap_macro", draws=20).estimate == pytest.approx(expected)
    with pytest.raises(UserError, match="tested on different samples"):
        difference_of_runs([tmp_path / "a"], [tmp_path / "c"], "ap_macro")
    (tmp_path / "b" / "predictions_test.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"predictions_test.npz cannot be read .* --eval"):
        difference_of_runs([tmp_path / "a"], [tmp_path / "b"], "ap_macro")
    with pytest.raises(UserError, match="no finished run"):
        difference_of_runs([tmp_path], (), "ap_macro")
