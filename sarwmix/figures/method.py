"""The drawing of the method: two patches, the mask, the mixed input, and the weights of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sarwmix.figures.base import BLUE, GREY_DB, ORANGE, PathLike, new_figure, save_figure, show_image
from sarwmix.weighting import CELL, compute_weights


def method_figure(path: PathLike, pair: np.ndarray, mask: np.ndarray, *, band: str) -> Path:
    """Draw mixing and weighting.

    Args:
        path: PNG to write.
        pair: (2, 1, H, W) dB, sample and partner; sides are multiples of 32 px.
        mask: (cells,) of 0 and 1, row by row; 1 shows the partner.
        band: name of the band, for the scale.
    """
    side = pair.shape[-1]
    cells = side // CELL
    partner = np.kron(mask.reshape(cells, cells), np.ones((CELL, CELL))) > 0
    mixed = np.where(partner, pair[1, 0], pair[0, 0])
    db = torch.from_numpy(pair[:1])
    power = (10 ** (db / 10))[0, 0].numpy()
    pixel = compute_weights(db, mode="per_channel")[0, 0].numpy()
    token = compute_weights(db, mode="per_channel", level="token")[0, :, 0].reshape(cells, cells).numpy()
    grey = GREY_DB.get(band, (-30.0, 0.0))

    figure = new_figure(13.0, 6.9)
    upper = [
        (pair[0, 0], "sample i", "gray", grey, f"{band}, dB"),
        (pair[1, 0], "partner B - 1 - i", "gray", grey, f"{band}, dB"),
        (mask.reshape(cells, cells), "mask m: one for the batch", "gray_r", (0, 1), "0 own, 1 partner (hidden)"),
        (mixed, "mixed input", "gray", grey, f"{band}, dB"),
    ]
    lower = [
        (power, "linear backscatter", "gray", (0.0, float(np.percentile(power, 99))), "sigma0 (linear)"),
        (pixel, "weight, pixel by pixel", "cividis", (1.0, float(np.e)), "w"),
        (np.kron(token, np.ones((CELL, CELL))), "weight, averaged over cells", "cividis", (1.0, float(np.e)), "w"),
    ]
    for row, panels in enumerate((upper, lower)):
        for column, (image, title, colours, limits, label) in enumerate(panels):
            axes = figure.add_axes((0.03 + 0.245 * column, 0.575 - 0.5 * row, 0.205, 0.37))
            show_image(axes, image, colours, limits)
            axes.set_title(title, fontsize=11)
            bar = figure.add_axes((0.03 + 0.245 * column, 0.545 - 0.5 * row, 0.205, 0.016))
            _scale(figure, bar, axes, label)
            if title == "mixed input":
                _outline(axes, mask.reshape(cells, cells))
    curve = figure.add_axes((0.80, 0.12, 0.175, 0.325))
    x = np.linspace(0, 1, 101)
    curve.plot(x, np.exp(1 - x), color=BLUE, linewidth=2)
    curve.set_title("w = exp(s (1 - x)), s = 1", fontsize=11)
    curve.set_xlabel("x: min-max normalised sigma0", fontsize=8)
    curve.set_ylabel("w", fontsize=9)
    curve.annotate("dark: calm water", (0.02, np.e), (0.2, 2.55), fontsize=8, arrowprops={"arrowstyle": "->"})
    curve.annotate("bright: walls", (0.98, 1.0), (0.42, 1.15), fontsize=8, arrowprops={"arrowstyle": "->"})
    curve.grid(alpha=0.3)
    curve.tick_params(labelsize=8)
    return save_figure(figure, path)


def _scale(figure: Any, bar: Any, axes: Any, label: str) -> None:
    ticks = [0, 1] if label.startswith("0 ") else None
    colours = figure.colorbar(axes.images[0], cax=bar, orientation="horizontal", ticks=ticks)
    colours.set_label(label, fontsize=8, labelpad=1)
    bar.tick_params(labelsize=7, pad=1)


def _outline(axes: Any, mask: np.ndarray) -> None:
    """Frame each cell by where it comes from: blue the sample, orange its partner."""
    from matplotlib.patches import Rectangle

    for row, column in np.ndindex(mask.shape):
        colour = ORANGE if mask[row, column] else BLUE
        corner = (column * CELL + 0.5, row * CELL + 0.5)
        axes.add_patch(Rectangle(corner, CELL - 2, CELL - 2, fill=False, edgecolor=colour, linewidth=1.8))
    axes.set_title("mixed input (blue: sample, orange: partner)", fontsize=9)
