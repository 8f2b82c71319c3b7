"""Pictures of image pairs: what a wrongly classified pair looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sarwmix.datasets.sen12flood import ZERO_POWER, PairDataset
from sarwmix.figures.base import GREY_DB, NO_DATA, new_figure, save_figure
from sarwmix.sen12flood.metadata import parse_pair_name

SHOWN = 6  # pairs on the picture
SIDE = 384  # pixels of an image on the picture are at most this many; larger images are thinned


def wrong_pairs_figure(path: Path, data: PairDataset, wrong: np.ndarray, flood: np.ndarray, loss: np.ndarray) -> None:
    """Draw wrongly classified pairs, highest loss first: all bands of both dates side by side, and the change in VV.

    Where no pair is wrong, the pairs with the highest loss are drawn, and the heading says so.

    Args:
        path: PNG file.
        data: The split.
        wrong: (N,) bool.
        flood: (N,) probability of flood.
        loss: (N,) loss of each pair.
    """
    from matplotlib import colormaps

    bands = data.spec.bands
    changing = "VV" if "VV" in bands else bands[0]
    count = int(wrong.sum())
    candidates = np.flatnonzero(wrong) if count else np.arange(len(data))
    shown = candidates[np.argsort(-loss[candidates], kind="stable")][:SHOWN]
    rows = len(shown)
    figure = new_figure(13, 0.9 + 2.75 * rows)
    found = f"{count} of {len(data)} pairs of split {data.split} are classified wrongly; drawn: "
    drawn = f"the {rows} of them with the highest loss" if count else f"the {rows} right ones with the highest loss"
    figure.suptitle(
        f"{found}{drawn}\n"
        f"dB, {', '.join(f'{band} {GREY_DB[band][0]:g} to {GREY_DB[band][1]:g}' for band in bands)}; "
        "change from -10 (blue: second image darker) to 10 dB (red); light blue: not covered",
        fontsize=9,
    )
    axes = figure.subplots(rows, 2 * len(bands) + 1, squeeze=False)
    for line in axes:
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    grey = colormaps["gray"].with_extremes(bad=NO_DATA)
    change = colormaps["RdBu_r"].with_extremes(bad=NO_DATA)
    for line, index in zip(axes, shown, strict=True):
        pair = np.empty((2, *data.shape), dtype=np.float32)
        data.read_into(int(index), pair)
        step = max(1, -(-data.size // SIDE))
        db = _db(pair[:, :, ::step, ::step])
        folder, first, second, label = parse_pair_name(data.names[int(index)])
        classes = data.spec.classes
        line[0].set_ylabel(
            f"{folder}: is {classes[label]}\nP(flood) {flood[index]:.3f}\nloss {loss[index]:.2f}", fontsize=8
        )
        for band, name in enumerate(bands):
            low, high = GREY_DB[name]
            for time in (0, 1):
                axis = line[2 * band + time]
                axis.imshow(db[time, band], cmap=grey, vmin=low, vmax=high, interpolation="nearest")
                axis.set_title(f"{name}  {_date((first, second)[time])}", fontsize=8)
        first_db, second_db = db[:, bands.index(changing)]
        line[-1].imshow(second_db - first_db, cmap=change, vmin=-10, vmax=10, interpolation="nearest")
        line[-1].set_title(f"{changing} second - first", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    save_figure(figure, path)


def _db(power: np.ndarray) -> np.ndarray:
    """Linear power -> dB; pixels that are not covered, or invalid, are NaN."""
    usable = np.isfinite(power) & (power > 0)
    return np.where(usable, 10 * np.log10(np.where(usable, power, ZERO_POWER)), np.nan)


def _date(product: str) -> str:
    """Acquisition date and time in a product name, or the name's beginning."""
    for part in product.split("_"):
        if len(part) == 15 and part[8] == "T" and part[:8].isdigit():
            return f"{part[:4]}-{part[4:6]}-{part[6:8]} {part[9:11]}:{part[11:13]}"
    return product[:20]
