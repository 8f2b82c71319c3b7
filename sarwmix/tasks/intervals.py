"""How sure a metric or a difference is: resampling of whole clusters, paired over runs, with seeds taken into account.

Patches of one scene, place or event resemble each other, so that resampling single patches gives intervals that are far
too narrow. A data set says which samples belong together; clusters are drawn with replacement, all of their samples at
once. For a single metric each cluster is left out in turn instead (a jackknife; at most 200 groups of clusters): that
repeats no sample, which average precision would reward. Its pseudo-values give a standard error on the logit scale and,
by their kurtosis, how many degrees of freedom that has: few where few clusters hold the positives of a rare class. The
interval is the estimate -+ t of so many degrees times the error. Coverage is measured by `tests/test_intervals.py` and
stands in docs/finetuning.md.

A difference between two arms is computed on the same clusters for all of their runs in each draw, so that what is hard
for both cancels; the spread over seeds is added to it.

Shapes: N samples, C clusters, D draws, S runs (seeds) of an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.tasks.metrics import evaluator
from util.arrays import load_npz
from util.errors import UserError
from util.files import read_json

Evaluate = Callable[[np.ndarray], Mapping[str, float]]
"""How often each sample counts, (N,) -> metric -> value; NaN where a metric is undefined."""
DRAWS = 400
GROUPS = 200
"""Of clusters, left out in turn; more would cost more and change little."""
POWER = 0.8


def cluster_numbers(
    clusters: Sequence[Any] | np.ndarray | None, count: int, *, counted: np.ndarray | None = None
) -> np.ndarray:
    """Clusters as numbers from 0, int64 (N,).

    Args:
        clusters: name or number of each sample's cluster; None: each sample is one.
        count: number of samples N.
        counted: which samples count in the metrics at all, (N,) bool; the others get -1 and make up no cluster.

    Raises:
        ValueError: another number of clusters than samples.
    """
    if counted is not None:
        numbers = np.full(count, -1, dtype=np.int64)
        own = None if clusters is None else np.asarray(clusters)[counted]
        numbers[counted] = cluster_numbers(own, int(counted.sum()))
        return numbers
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise ValueError(f"{len(clusters)} clusters are given for {count} samples")
    return np.unique(np.asarray(clusters), return_inverse=True)[1].astype(np.int64)


def cluster_draws(numbers: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sample counts in each resample, int64 (N,): C clusters are drawn with replacement."""
    rng = np.random.default_rng(seed)
    clusters = int(numbers.max()) + 1
    for _ in range(draws):
        yield np.bincount(rng.integers(0, clusters, size=clusters), minlength=clusters)[numbers]


def left_out(numbers: np.ndarray, groups: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sample counts, int64 (N,), when each group of clusters is left out in turn; samples at -1 never.

    Args:
        numbers: cluster of each sample, (N,).
        groups: at most so many; clusters are dealt to them at random where there are more.
        seed: of the dealing.
    """
    clusters = int(numbers.max()) + 1
    of = np.arange(clusters)
    if clusters > groups:
        of = np.random.default_rng(seed).permutation(clusters) % groups
    for group in range(min(groups, clusters)):
        kept = (of != group).astype(np.int64)
        yield np.where(numbers >= 0, kept[numbers], 0)


def metric_intervals(
    evaluate: Evaluate,
    numbers: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics of one run; they cover what other clusters of the same kind would have given.

    Args:
        evaluate: metrics of a resampled split.
        numbers: cluster of each sample, (N,), from `cluster_numbers`.
        draws: groups that are left out in turn, at most `GROUPS`; every cluster is one where there are fewer.
        seed: of the dealing of clusters to groups; the same seed gives the same intervals.

    Returns:
        metric -> (low, high); without the metrics that are undefined in half of the groups, and empty where there are
        fewer than two clusters.
    """
    clusters = int(numbers.max()) + 1
    if clusters < 2:
        return {}
    whole = evaluate(np.ones(len(numbers), dtype=np.int64))
    found_by: dict[str, list[float]] = {name: [] for name in whole}
    for counts in left_out(numbers, max(2, min(draws, GROUPS)), seed):
        for name, value in evaluate(counts).items():
            found_by[name].append(value)
    found = {}
    for name, values in found_by.items():
        defined = np.asarray(values)[np.isfinite(values)]
        if 2 * len(defined) > len(values) and len(defined) > 1 and np.isfinite(whole[name]):
            found[name] = _between_0_and_1(whole[name], defined, clusters)
    return found


def _between_0_and_1(value: float, without: np.ndarray, clusters: int) -> tuple[float, float]:
    """Interval of a fraction, symmetric in the logit, from its values without one of G groups each, (G,)."""
    from scipy.special import expit, logit
    from scipy.stats import t

    groups = len(without)
    if value <= 0 or value >= 1 or float(np.ptp(without)) < 1e-12:
        # every group gives the same: the exact bound of a proportion of C that is 0 or 1
        bound = 1 - 0.025 ** (1 / clusters)
        return (max(0.0, value - bound), min(1.0, value + bound))
    # A group that holds all that is right or wrong would be infinitely far on the logit scale.
    near = logit(np.clip(without, 0.25 * value, 1 - 0.25 * (1 - value)))
    pull = (groups - 1) * (near.mean() - near)
    error = float(np.sqrt((pull**2).sum() / (groups * (groups - 1))))
    # Var(s^2) = sigma^4 (kurtosis - 1) / G against 2 sigma^4 / f of a chi-square with f degrees of freedom
    kurtosis = float((pull**4).mean() / (pull**2).mean() ** 2)
    freedom = max(1.5, min(groups - 1.0, 2 * groups / max(kurtosis - 1, 1e-9)))
    half = float(t.ppf(0.975, freedom)) * error
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


@dataclass(frozen=True)
class Predictions:
    """What a finished run kept of its test samples.

    Attributes:
        names: sample names, (N,).
        numbers: cluster of each sample, (N,).
        evaluate: metrics of a resampled split.
    """

    names: np.ndarray
    numbers: np.ndarray
    evaluate: Evaluate


def read_predictions(folder: str | Path, *, split: str = "test") -> Predictions:
    """Read `predictions_<split>.npz` of a finished run or evaluation.

    Args:
        folder: of the run.
        split: whose predictions.

    Raises:
        UserError: the files are not there, are damaged, or of an unknown data set.
    """
    from sarwmix.data import registry

    folder = Path(folder)
    results = next((folder / name for name in ("metrics.json", "metrics_eval.json") if (folder / name).is_file()), None)
    if results is None:
        raise UserError(f"{folder} holds no finished run: metrics.json is missing")
    content = read_json(results)
    file = folder / f"predictions_{split}.npz"
    try:
        arrays = load_npz(file)
        outputs = {name: value for name, value in arrays.items() if name not in ("prediction", "loss")}
        task = content.get("task") or registry.get_spec(str(content["dataset"])).task
        names = outputs.pop("names")
        clusters = outputs.pop("clusters", None)
        counted = np.asarray(outputs["confusion"].sum(axis=(1, 2)) > 0) if "confusion" in outputs else None
        evaluate = evaluator(task, outputs, len(content["classes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); evaluate the checkpoint again: main_finetune.py --eval --resume CKPT"
        ) from error
    return Predictions(names, cluster_numbers(clusters, len(names), counted=counted), evaluate)


def difference_of_runs(
    first: Sequence[str | Path],
    second: Sequence[str | Path],
    metric: str,
    *,
    seeds: tuple[Sequence[int], Sequence[int]] | None = None,
    draws: int = DRAWS,
) -> Difference:
    """`paired_difference` of finished runs by their folders; samples are paired by name.

    Args:
        first: folders of the arm's runs.
        second: folders of the arm that it is compared with; empty: the mean of `first` alone.
        metric: name of a test metric.
        seeds: seeds of the runs of both arms, see `paired_difference`.
        draws: number of resamples.

    Raises:
        UserError: runs that were tested on different samples, or whose predictions are not there.
    """
    read = [[read_predictions(folder) for folder in arm] for arm in (first, second)]
    whole = read[0][0]
    for run, folder in zip([*read[0], *read[1]], [*first, *second], strict=True):
        if not np.array_equal(run.names, whole.names):
            raise UserError(f"{first[0]} and {folder} were tested on different samples; they cannot be paired")
    arms = [[run.evaluate for run in arm] for arm in read]
    return paired_difference(arms[0], arms[1], whole.numbers, metric, seeds=seeds, draws=draws)


@dataclass(frozen=True)
class Difference:
    """A mean over runs, or the difference of two such means, with what it can vary by.

    Attributes:
        estimate: difference of the means over runs, in the metric's own unit.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval; NaN, as `low`, where neither seeds nor clusters can be compared.
        p: two-sided p value of "no difference".
        sd_seeds: standard deviation over seeds; NaN where an arm has one run.
        sd_clusters: standard deviation that one cluster contributes; NaN with fewer than two clusters.
        n_seeds: runs of the smaller arm.
        n_clusters: clusters of the test split.
        paired_seeds: whether the runs were paired by seed.
    """

    estimate: float
    low: float
    high: float
    p: float
    sd_seeds: float
    sd_clusters: float
    n_seeds: int
    n_clusters: int
    paired_seeds: bool = False

    @property
    def covers(self) -> str:
        """What the interval covers, in words."""
        parts = [f"{self.n_seeds} seeds"] if np.isfinite(self.sd_seeds) else []
        parts += [f"{self.n_clusters} test clusters"] if np.isfinite(self.sd_clusters) else []
        return " and ".join(parts) or "nothing: one run and one cluster"


def paired_difference(
    first: Sequence[Evaluate],
    second: Sequence[Evaluate],
    numbers: np.ndarray,
    metric: str,
    *,
    seeds: tuple[Sequence[int], Sequence[int]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Mean metric of one arm minus that of another, paired over clusters, samples and, where they agree, seeds.

    The variance has two parts. That of the clusters comes from draws in which all runs see the same clusters. That of
    the seeds is the variance of the runs' values; what runs owe to single clusters is in both, which makes the interval
    a little wide where runs differ by clusters alone. With three seeds an interval is wide, as it must be.

    Args:
        first: metrics of each run of the arm.
        second: the same of the arm that it is compared with, on the same samples; empty: the mean of `first` alone.
        numbers: cluster of each sample, (N,).
        metric: name of the metric.
        seeds: seeds of the runs of both arms; runs are paired by seed where both have the same ones, once each.
        draws: number of resamples D.
        seed: seed of the resampling.

    Raises:
        UserError: a metric that a run does not have.
    """
    arms = [list(first), list(second)] if second else [list(first)]
    paired = seeds is not None and bool(second) and sorted(seeds[0]) == sorted(set(seeds[1])) == sorted(seeds[1])
    if paired and seeds is not None:
        arms = [[runs[place] for place in np.argsort(own)] for runs, own in zip(arms, seeds, strict=True)]
    clusters = int(numbers.max()) + 1
    once = np.ones(len(numbers), dtype=np.int64)
    values = [np.array([_value(run, once, metric) for run in runs]) for runs in arms]  # (S,) of each arm
    drawn: list[np.ndarray] = [np.empty((0, len(runs))) for runs in arms]  # (D, S) of each arm
    if clusters > 1:
        each = [[[_value(run, counts, metric) for run in runs] for runs in arms]
                for counts in cluster_draws(numbers, draws, seed)]  # fmt: skip
        kept = [row for row in each if np.isfinite(np.concatenate(row)).all()]
        drawn = [np.array([row[arm] for row in kept]).reshape(-1, len(runs)) for arm, runs in enumerate(arms)]
    if paired:  # one arm of differences from here on
        values, drawn = [values[0] - values[1]], [drawn[0] - drawn[1]]
    signs = (1.0, -1.0)
    estimate = float(sum(sign * own.mean() for sign, own in zip(signs, values, strict=False)))
    n_seeds = min(len(own) for own in values)

    # the clusters' part: the spread of the whole difference over draws
    of_clusters = np.nan
    if len(drawn[0]) > 1:
        whole = sum(sign * own.mean(axis=1) for sign, own in zip(signs, drawn, strict=False))
        of_clusters = float(np.var(whole, ddof=1)) * clusters / (clusters - 1)
    # the seeds' part: their spread on the split as it is
    of_seeds = sum(float(np.var(own, ddof=1)) / len(own) for own in values) if n_seeds > 1 else np.nan
    parts = [(of_clusters, float(clusters - 1))] if np.isfinite(of_clusters) else []
    parts += [(of_seeds, _freedom(values))] if n_seeds > 1 else []
    half = _margin(parts, 0.05) if parts else np.nan
    return Difference(
        estimate,
        float(estimate - half),
        float(estimate + half),
        _p_value(estimate, parts),
        float(np.sqrt(of_seeds * n_seeds)),
        float(np.sqrt(of_clusters * clusters)),
        n_seeds,
        clusters,
        paired,
    )


def _value(run: Evaluate, counts: np.ndarray, metric: str) -> float:
    found = run(counts)
    if metric not in found:
        raise UserError(f"no test metric {metric!r}; there is: {', '.join(found)}")
    return float(found[metric])


def _margin(parts: Sequence[tuple[float, float]], level: float) -> float:
    """Half of the interval of the given level for a sum of parts (variance, degrees of freedom).

    Satterthwaite's formula alone is too narrow where the part with few degrees of freedom leads (two seeds: 87 %
    instead of 95), the parts' own margins, squared and added, are too wide where it does not (99 %). Their squares are
    mixed by the share of that part: 93 to 97.5 % with two seeds, 94.5 to 97 % with more, whatever the shares.
    """
    from scipy.stats import t

    known = [(part, freedom) for part, freedom in parts if part > 0]
    if not known:
        return 0.0
    whole = sum(part for part, _ in known)
    joint = whole**2 / sum(part**2 / freedom for part, freedom in known)
    share = min(known, key=lambda one: one[1])[0] / whole
    added = sum(part * t.isf(level / 2, freedom) ** 2 for part, freedom in known)
    together = whole * t.isf(level / 2, joint) ** 2
    return float(np.sqrt(share * added + (1 - share) * together))


def _p_value(estimate: float, parts: Sequence[tuple[float, float]]) -> float:
    """The level at which the interval just reaches 0; NaN where nothing is known."""
    if not parts:
        return float("nan")
    low, high = 0.0, 1.0
    for _ in range(60):  # the margin falls from infinity at 0 to nothing at 1
        level = (low + high) / 2
        low, high = (level, high) if _margin(parts, level) > abs(estimate) else (low, level)
    return high


def _freedom(values: Sequence[np.ndarray]) -> float:
    """Degrees of freedom of the mean of one arm, or of a difference of two (Welch)."""
    parts = [float(np.var(own, ddof=1)) / len(own) for own in values]
    doubt = sum(part**2 / (len(own) - 1) for part, own in zip(parts, values, strict=True))
    return sum(parts) ** 2 / doubt if doubt > 0 else float(min(len(own) for own in values) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down method, in the given order; NaN stays and counts not."""
    p = np.asarray(p_values, dtype=np.float64)
    out = np.full(len(p), np.nan)
    order = [int(i) for i in np.argsort(p) if np.isfinite(p[i])]
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, float(p[i]) * (len(order) - rank)))
        out[i] = highest
    return [float(value) for value in out]


def resolvable(sd_seeds: float, sd_clusters: float, seeds: int, clusters: int) -> float:
    """Smallest true difference that is found in 80 % of such experiments at the 5 % level.

    Args:
        sd_seeds: standard deviation over seeds; NaN: not known, left out.
        sd_clusters: standard deviation that one cluster contributes; NaN: left out.
        seeds: runs of each arm.
        clusters: clusters of the test split.
    """
    parts = [(sd**2 / count, float(count - 1)) for sd, count in ((sd_seeds, seeds), (sd_clusters, clusters))
             if np.isfinite(sd) and count > 1]  # fmt: skip
    if not parts:
        return float("nan")
    return _margin(parts, 0.05) + _margin(parts, 2 * (1 - POWER))


def power_line(difference: Difference, *, seeds: Sequence[int] = (3, 5, 10, 20)) -> str:
    """One sentence: which differences such experiments can show, now and with more seeds."""
    known = (("over seeds", difference.sd_seeds), ("a cluster", difference.sd_clusters))
    sds = [f"{name} {value:.4f}" for name, value in known if np.isfinite(value)]
    if not sds:
        return "One run and one cluster: nothing tells how large a difference must be."

    def of(count: int) -> str:
        return f"{resolvable(difference.sd_seeds, difference.sd_clusters, count, difference.n_clusters):.4f}"

    text = f"With these standard deviations ({', '.join(sds)}), {difference.n_seeds} seed(s) and "
    text += f"{difference.n_clusters} clusters resolve {of(difference.n_seeds)} (80 % power at 5 %)"
    more = [f"{count} seeds {of(count)}" for count in seeds if count > difference.n_seeds]
    return text + (f"; {', '.join(more)}." if more and np.isfinite(difference.sd_seeds) else ".")
