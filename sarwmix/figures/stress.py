"""Picture of a stress test: score against dose, one panel for each fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.figures.base import BLUE, GREY, VERMILION, new_figure, save_figure

COLUMNS, PANEL = 4, (3.3, 2.6)


def stress_figure(
    path: str | Path,
    panels: Sequence[Mapping[str, Any]],
    *,
    clean: float,
    metric: str,
    title: str,
) -> Path:
    """Draw the panels, all on the same scale, with the score of the images as read as a line.

    Args:
        path: PNG to write.
        panels: each with ``name``, ``axis`` (dose with its unit), ``doses``, ``scores``, ``low`` and ``high`` (ends of
            the 95 % interval of the change, NaN where unknown), ``none`` (the dose without effect) and ``labels``
            (names of doses that are no quantity, else empty).
        clean: score of the images as read.
        metric: its name.
        title: heading.
    """
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(PANEL[0] * columns + 0.4, PANEL[1] * lines + 0.8)
    figure.suptitle(title, fontsize=10, weight="bold")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for one in axes[len(panels) :]:
        one.set_axis_off()
    for number, (one, panel) in enumerate(zip(axes, panels, strict=False)):
        scores = np.asarray(panel["scores"], dtype=np.float64)
        ends = np.asarray([panel["low"], panel["high"]], dtype=np.float64) + clean
        margin = np.nan_to_num(np.abs(ends - scores))
        one.axhline(clean, color=GREY, linestyle="--", linewidth=1.0, zorder=1)
        style = {"color": BLUE, "capsize": 2, "elinewidth": 1.0}
        if panel["labels"]:
            places = np.arange(len(scores))
            one.errorbar(places, scores, margin, fmt="o", markersize=4.5, **style)
            one.set_xticks(places, panel["labels"], fontsize=8)
            one.set_xlim(-0.6, len(scores) - 0.4)
        else:
            doses = np.asarray(panel["doses"], dtype=np.float64)
            order = np.argsort([*doses, panel["none"]])
            one.plot(np.append(doses, panel["none"])[order], np.append(scores, clean)[order], color=BLUE, linewidth=1.2)
            one.errorbar(doses, scores, margin, fmt="o", markersize=3.5, **style)
            one.plot([panel["none"]], [clean], "D", color=VERMILION, markersize=5, zorder=3)
        one.set_title(panel["name"].replace("_", " "), fontsize=9)
        one.set_xlabel(panel["axis"], fontsize=8)
        if number % columns == 0:
            one.set_ylabel(metric, fontsize=8.5)
        one.tick_params(labelsize=8)
        one.grid(alpha=0.25)
    figure.text(0.01, 0.01, "Dashed line and red diamond: images as read. Bars: 95 % interval of the change over "
                "clusters of the split.", fontsize=7.5)  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    return save_figure(figure, path)
