"""Arms of an experiment as differences to one of them: a table and a figure, with intervals, Holm's correction, power.

The mean of an arm says little: seeds and clusters move all arms together. What is compared is the difference to the
reference, paired over both (`sarwmix.tasks.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sarwmix.tasks.intervals import Difference, Evaluate, holm, paired_difference, power_line
from util.errors import UserError


@dataclass(frozen=True)
class Compared:
    """One arm.

    Attributes:
        name: of the arm.
        mean: of the metric over its seeds.
        seeds: how many runs it has.
        difference: to the reference; None for the reference itself.
        p: corrected by Holm over the arms that are tested; NaN for those that are not.
    """

    name: str
    mean: float
    seeds: int
    difference: Difference | None
    p: float = math.nan


def correct(arms: Sequence[Compared], untested: Sequence[str] = ()) -> list[Compared]:
    """The arms with p values corrected over all of them but ``untested`` ones (baselines shown beside the others)."""
    tested = [arm for arm in arms if arm.difference is not None and arm.name not in untested]
    corrected = holm([arm.difference.p for arm in tested if arm.difference is not None])
    p_of = dict(zip([arm.name for arm in tested], corrected, strict=True))
    return [Compared(a.name, a.mean, a.seeds, a.difference, p_of.get(a.name, math.nan)) for a in arms]


def cluster_mean(values: np.ndarray) -> Evaluate:
    """A metric that is the mean of one number a cluster, ``values`` (C,)."""

    def evaluate(counts: np.ndarray) -> dict[str, float]:
        return {"mean": float((counts * values).sum() / counts.sum())}

    return evaluate


def compare_arms(
    values: Mapping[str, Mapping[int, np.ndarray]], reference: str, *, untested: Sequence[str] = (), draws: int = 2000
) -> list[Compared]:
    """Arms whose metric is the mean over clusters of one number each.

    Args:
        values: arm -> seed -> (C,) numbers, the clusters in the same order everywhere.
        reference: the arm that the others are compared with.
        untested: arms without a p value.
        draws: resamples of the clusters.

    Raises:
        UserError: the reference has no run.
    """
    if not values.get(reference):
        raise UserError(f"the reference {reference!r} has no finished run; nothing can be compared with it")
    base = values[reference]
    arms = []
    for name, runs in values.items():
        own = sorted(runs)
        difference = None
        if name != reference:
            difference = paired_difference(
                [cluster_mean(runs[seed]) for seed in own],
                [cluster_mean(base[seed]) for seed in sorted(base)],
                np.arange(len(base[sorted(base)[0]])),
                "mean",
                seeds=(own, sorted(base)),
                draws=draws,
            )
        arms.append(Compared(name, float(np.mean([runs[seed].mean() for seed in own])), len(own), difference))
    return correct(arms, untested)


def as_markdown(arms: Sequence[Compared], metric: str, reference: str) -> str:
    """The table, and under it what the intervals cover and which differences the experiment can show."""
    lines = [f"| arm | {metric} | difference to {reference} | 95 % | p (Holm) | seeds |", "|---|---|---|---|---|---|"]
    for arm in arms:
        cells = ["-", "-", "-"]
        if arm.difference is not None:
            d = arm.difference
            cells = [
                f"{d.estimate:+.4f}",
                f"{d.low:+.4f} to {d.high:+.4f}",
                "-" if math.isnan(arm.p) else f"{arm.p:.3f}",
            ]
        lines.append(f"| {arm.name} | {arm.mean:.4f} | {' | '.join(cells)} | {arm.seeds} |")
    tested = [arm.difference for arm in arms if arm.difference is not None and not math.isnan(arm.p)]
    notes = []
    if tested:
        pairing = "paired by seed" if tested[0].paired_seeds else "not paired by seed"
        notes.append(f"Intervals cover {tested[0].covers}; runs are {pairing}.")
        widest = max(tested, key=lambda d: d.high - d.low)
        notes.append(f"Widest interval: {power_line(widest)}")
    return "\n".join([*lines, "", *notes, ""])


def draw(arms: Sequence[Compared], path: str | Path, *, metric: str, reference: str) -> None:
    """Differences with their intervals as a picture; dots without a bar have no interval."""
    from matplotlib.figure import Figure

    from util.files import atomic_write

    shown = [arm for arm in arms if arm.difference is not None]
    figure = Figure(figsize=(7.4, 1.1 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.35", lw=1, zorder=1)
    for row, arm in enumerate(shown):
        d = arm.difference
        assert d is not None
        tested = not math.isnan(arm.p)
        colour = "#1f4e79" if tested else "0.55"
        if math.isfinite(d.low):
            axes.plot([d.low, d.high], [row, row], color=colour, lw=2.2, solid_capstyle="butt", zorder=2)
        axes.plot(d.estimate, row, "o", color=colour, ms=6, zorder=3)
    axes.set_yticks(range(len(shown)), [arm.name for arm in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"difference in {metric} to “{reference}”, with 95 % interval")
    axes.grid(axis="x", color="0.9", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with atomic_write(Path(path)) as stream:
        figure.savefig(stream, format="png", dpi=150)
