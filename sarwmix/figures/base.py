"""Pictures as PNG: reconstructions, contact sheets, histograms, curves and figures of merit.

Conventions: backscatter in dB on a fixed grey scale for each band, so that pictures compare; no-data is light blue;
every colour bar has a unit; colours are distinguishable with colour-vision deficiency (Okabe and Ito 2008; cividis).
Arrays come in as numpy, and a file appears whole or not at all.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from util.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY_DB: dict[str, tuple[float, float]] = {"VH": (-30.0, -5.0), "VV": (-25.0, 0.0)}
"""Black and white of each band, dB: calm water to walls."""
ERROR_DB = (0.0, 8.0)
"""Scale of the absolute error, dB."""
NO_DATA = "#a6cee3"
NOT_SHOWN = "#f4f4f4"
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)  # Okabe and Ito
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
GREY, LIGHT, OTHER = "#999999", "#dddddd", "#bbbbbb"
MAP_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, BLACK, GREY, "#882255", "#117733", "#ffffff")
"""Classes of a label map that have no colour by their name; two classes are drawn in light grey and blue."""
CLASS_COLOURS = {
    "water": BLUE, "forest": "#117733", "tree": "#117733", "crop": YELLOW, "urban": BLACK, "developed": BLACK,
    "grass": GREEN, "savanna": ORANGE, "shrub": "#882255", "wetland": PURPLE, "snow": "#ffffff", "barren": GREY,
    "background": GREY,
}  # fmt: skip
"""Beginning of a word of a class name -> its colour. None of them is the vermilion of errors."""
RGB_BANDS = ("B04", "B03", "B02")
RGB_WHITE = 3000.0
"""Reflectance x 1e4 that is drawn white."""
SAMPLES_PER_PAGE = 8
DPI = 110
PathLike = str | os.PathLike[str]
FloatArray = NDArray[Any]


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: PathLike) -> Path:
    """Draw to memory and write the file atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())
    return Path(path)


def _grey(band: str) -> tuple[float, float]:
    return GREY_DB.get(band, (-30.0, 0.0))


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=NO_DATA)


def show_image(axes: Axes, image: FloatArray, colours: str, limits: tuple[float, float]) -> None:
    # Never blend masked cells or speckle with their neighbours: one array element, one block of pixels.
    axes.imshow(image, cmap=_colours(colours), vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])


def _bar(
    figure: Figure,
    box: tuple[float, float, float, float],
    colours: str,
    limits: tuple[float, float],
    label: str,
    *,
    extend: str = "both",
) -> None:
    """A horizontal colour bar in a box (left, bottom, width, height) in inches."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    figure.colorbar(
        ScalarMappable(Normalize(*limits), _colours(colours)),
        cax=axes,
        orientation="horizontal",
        extend=extend,
        ticks=MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]),
    )
    axes.tick_params(labelsize=7)
    axes.set_title(label, fontsize=8, pad=3)


def _wrap(text: str, inches: float, size: float) -> str:
    """Break a text so that it fits; a glyph of DejaVu Sans Bold is about 0.65 of its size wide, 72 points an inch."""
    return "\n".join(textwrap.wrap(text, max(10, int(inches * 72 / (0.65 * size))))) or text


@functools.lru_cache(maxsize=4096)
def _glyph_width(character: str) -> float:
    """Width of a character of the figures' font, as a share of the font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    return float(TextToPath().get_text_width_height_descent(character, FontProperties(size=100), False)[0]) / 100


def text_width(text: str, size: float) -> float:
    """Width in inches of one line in the regular font of a size in points, rounded up."""
    # Whole pixels for each glyph make small text up to 8 % wider than its outlines.
    return 1.08 * sum(_glyph_width(character) for character in text) * size / 72


def _break_lines(text: str, inches: float, size: float) -> list[str]:
    """Lines that fit: broken at blanks, in long names behind _ - / and, where that is not enough, anywhere."""
    lines = [""]
    for piece in re.findall(r"\s*[^\s_/-]*[_/-]*", text):
        if text_width(lines[-1] + piece, size) <= inches:
            lines[-1] += piece
            continue
        piece = piece.lstrip()
        lines += [""] if lines[-1] else []
        for character in piece:
            if lines[-1] and text_width(lines[-1] + character, size) > inches:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def fit_text(text: str, inches: float, size: float, *, lines: int) -> str:
    """Break a text into at most so many lines of a width; a longer one loses its middle.

    Names end with what tells them apart, and captions with a number, so the end is kept.
    """
    broken = _break_lines(text, inches, size)
    low, high = 2, len(text)  # so many characters fit, so many do not
    while len(broken) > lines and high - low > 1:
        kept = (low + high) // 2
        short = _without_middle(text, kept)
        low, high = (kept, high) if len(_break_lines(short, inches, size)) <= lines else (low, kept)
    return "\n".join(broken if len(broken) <= lines else _break_lines(_without_middle(text, low), inches, size))


def _without_middle(text: str, kept: int) -> str:
    """The first and last characters of a text, so many in all."""
    return f"{text[: kept - kept // 2].rstrip()}...{text[len(text) - kept // 2 :].lstrip()}"


def cell_grid(mask: FloatArray) -> FloatArray:
    """The mask of cells as a square map.

    Args:
        mask: (cells,) of 0 and 1, row by row.

    Raises:
        ValueError: The number of cells is no square.
    """
    side = math.isqrt(len(mask))
    if side * side != len(mask):
        raise ValueError(f"{len(mask)} cells form no square grid")
    return np.asarray(mask, dtype=np.float64).reshape(side, side)


def reconstruction_panel(
    path: PathLike,
    *,
    names: Sequence[str],
    bands: Sequence[str],
    original_db: FloatArray,
    mixed_db: FloatArray,
    mask: FloatArray,
    reconstruction_db: FloatArray,
    weights: FloatArray,
    title: str,
    note: str = "",
) -> list[Path]:
    """Draw what the model saw, what it rebuilt and how far off it is, for each sample and band.

    Columns: original, mixed input, mask, reconstruction of the hidden cells, absolute error there, loss weight.
    More than 8 samples go to further files, `name_page02.png` and so on.

    Args:
        path: PNG to write.
        names: B sample names.
        bands: C band names.
        original_db: (B, C, H, W) dB; NaN is no data.
        mixed_db: (B, C, H, W) dB: partner's pixels in the masked cells.
        mask: (cells,) 1 where the partner is shown and the sample hidden.
        reconstruction_db: (B, C, H, W) dB; only hidden cells are shown.
        weights: (B, C, H, W) weight of each pixel's squared error.
        title: What model and checkpoint.
        note: What a reader must know of this reconstruction; stands below the pictures.

    Returns:
        The files written.

    Raises:
        ValueError: Shapes that do not fit.
    """
    original = np.asarray(original_db, dtype=np.float64)
    shape = original.shape
    maps = {"mixed_db": mixed_db, "reconstruction_db": reconstruction_db, "weights": weights}
    for name, values in maps.items():
        if np.shape(values) != shape:
            raise ValueError(f"{name} has shape {np.shape(values)}, original_db {shape}")
    if len(names) != shape[0] or len(bands) != shape[1]:
        raise ValueError(f"{len(names)} names and {len(bands)} bands for images of shape {shape}")
    grid = cell_grid(np.asarray(mask))
    if shape[2] % len(grid) or shape[3] % len(grid):
        raise ValueError(f"images of {shape[2]}x{shape[3]} pixels cannot be cut into {len(grid)}x{len(grid)} cells")
    finite = np.asarray(weights)[np.isfinite(weights)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, math.e)
    # exp(1 - x) with x in [0, 1] lies in [1, e]; other settings have their own range.
    limits = (1.0, math.e) if low >= 0.999 and high <= math.e + 1e-3 else (low, max(high, low + 1e-3))
    written = []
    for page, start in enumerate(range(0, shape[0], SAMPLES_PER_PAGE), start=1):
        part = slice(start, start + SAMPLES_PER_PAGE)
        place = Path(path) if page == 1 else Path(path).with_name(f"{Path(path).stem}_page{page:02d}.png")
        figure = _reconstruction_page(
            names[part],
            bands,
            original[part],
            np.asarray(mixed_db)[part],
            grid,
            np.asarray(reconstruction_db)[part],
            np.asarray(weights)[part],
            limits,
            title,
            note,
        )
        written.append(save_figure(figure, place))
    return written


def _reconstruction_page(
    names: Sequence[str],
    bands: Sequence[str],
    original: FloatArray,
    mixed: FloatArray,
    grid: FloatArray,
    reconstruction: FloatArray,
    weights: FloatArray,
    weight_limits: tuple[float, float],
    title: str,
    note: str,
) -> Figure:
    side, gap, left, caption, bottom = 1.55, 0.06, 0.42, 0.30, 0.85  # inches
    columns = (
        "original",
        "mixed input",
        "mask",
        "reconstruction\nof hidden cells",
        "absolute error\nof hidden cells",
        "loss weight",
    )
    width = left + len(columns) * (side + gap) + 0.15
    heading = _wrap(title, width - 0.4, 10)
    top = 0.5 + 0.17 * (heading.count("\n") + 1)
    block = len(bands) * (side + gap) + caption
    legend = _wrap(
        "Mask: black = hidden from the model, the partner's pixels stand there. Light grey: not hidden, so "
        f"not reconstructed. Light blue: no data. {note}".strip(),
        1.14 * (width - left),
        7,
    )
    bottom += 0.13 * legend.count("\n")
    height = top + len(names) * block + bottom
    figure = new_figure(width, height)
    figure.text(0.2 / width, 1 - 0.12 / height, heading, fontsize=10, weight="bold", va="top", ha="left")
    repeats = original.shape[2] // len(grid)
    hidden = np.kron(grid, np.ones((repeats, original.shape[3] // len(grid)))) > 0.5
    for sample, name in enumerate(names):
        errors = []
        for band, label in enumerate(bands):
            error = np.abs(reconstruction[sample, band] - original[sample, band])
            inside = error[hidden & np.isfinite(error)]
            errors.append(f"{label} {inside.mean():.2f} dB" if inside.size else f"{label} none")
            cells = (
                (original[sample, band], "gray", _grey(label)),
                (mixed[sample, band], "gray", _grey(label)),
                (grid, "gray_r", (0.0, 1.0)),
                (reconstruction[sample, band], "gray", _grey(label)),
                (error, "cividis", ERROR_DB),
                (weights[sample, band], "cividis", weight_limits),
            )
            y = height - top - sample * block - (band + 1) * (side + gap) + gap
            for column, (image, colours, limits) in enumerate(cells):
                x = left + column * (side + gap)
                axes = figure.add_axes((x / width, y / height, side / width, side / height))
                show_image(axes, image, colours, limits)
                if column in (3, 4):
                    _cover(axes, grid, hidden.shape)
                if column == 0:
                    axes.set_ylabel(label, fontsize=9)
                if sample == band == 0:
                    axes.set_title(columns[column], fontsize=8.5, pad=4)
        y = height - top - (sample + 1) * block + caption
        text = f"{name}   mean |error|: {', '.join(errors)}"
        figure.text(left / width, (y - 0.02) / height, text, fontsize=min(7.5, 7.5 * 135 / max(len(text), 1)), va="top")
    bars: list[tuple[str, tuple[float, float], str, str]] = [
        ("gray", _grey(label), f"{label} backscatter (dB)", "both") for label in bands
    ]
    bars += [("cividis", ERROR_DB, "absolute error (dB)", "max"), ("cividis", weight_limits, "loss weight", "neither")]
    each = (width - left - 0.15) / len(bars)
    for number, (colours, limits, label, extend) in enumerate(bars):
        box = (left + number * each + 0.1, bottom - 0.43, each - 0.35, 0.11)
        _bar(figure, box, colours, limits, label, extend=extend)
    figure.text(left / width, 0.06 / height, legend, fontsize=7, va="bottom")
    return figure


def _cover(axes: Axes, grid: FloatArray, shape: tuple[int, ...]) -> None:
    """Cover the cells that the model saw and draw thin lines between the cells."""
    from matplotlib.patches import Rectangle

    height, width = shape[0] / len(grid), shape[1] / len(grid)
    for row, column in np.argwhere(grid < 0.5):
        axes.add_patch(
            Rectangle((column * width - 0.5, row * height - 0.5), width, height, facecolor=NOT_SHOWN, edgecolor="none")
        )
    for number in range(1, len(grid)):
        axes.axhline(number * height - 0.5, color="white", linewidth=0.4)
        axes.axvline(number * width - 0.5, color="white", linewidth=0.4)


def contact_sheet(
    path: PathLike,
    images_db: FloatArray,
    *,
    bands: Sequence[str],
    captions: Sequence[str],
    title: str,
    columns: int = 6,
) -> Path:
    """Draw many samples small, all bands of a sample side by side.

    Args:
        path: PNG to write.
        images_db: (N, C, H, W) dB; NaN is no data.
        bands: C band names.
        captions: N texts, shown below each sample in at most three lines.
        title: Heading.
        columns: Samples in a row.
    """
    images = np.asarray(images_db)
    count = len(images)
    if len(captions) != count or (count and images.shape[1] != len(bands)):
        raise ValueError(f"{len(captions)} captions and {len(bands)} bands for images of shape {images.shape}")
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    side, gap, text, bottom = 1.15, 0.14, 0.42, 0.62
    block = len(bands) * side + 0.03 * (len(bands) - 1)
    width = max(columns * (block + gap) + gap, 5.0)
    heading = _wrap(title, width - 0.4, 10)
    top = 0.34 + 0.17 * (heading.count("\n") + 1)
    height = top + rows * (side + text) + bottom
    figure = new_figure(width, height)
    figure.text(gap / width, 1 - 0.1 / height, heading, fontsize=10, weight="bold", va="top")
    for number in range(count):
        row, column = divmod(number, columns)
        y = height - top - row * (side + text) - side
        for band, label in enumerate(bands):
            x = gap + column * (block + gap) + band * (side + 0.03)
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            show_image(axes, images[number, band], "gray", _grey(label))
            if row == 0:
                axes.set_title(label, fontsize=8, pad=2)
        x = gap + column * (block + gap)
        lines = fit_text(captions[number], block, 5.8, lines=3)
        figure.text(x / width, (y - 0.03) / height, lines, fontsize=5.8, va="top")
    each = min(2.6, (width - 0.4) / len(bands))
    for number, label in enumerate(bands):
        _bar(figure, (0.2 + number * each, 0.2, each - 0.4, 0.1), "gray", _grey(label), f"{label} backscatter (dB)")
    return save_figure(figure, path)


def histogram_figure(
    path: PathLike,
    *,
    edges: FloatArray,
    counts: Mapping[str, FloatArray],
    marks: Mapping[str, Mapping[str, float]],
    title: str,
) -> Path:
    """Draw the distribution of backscatter of each band.

    Args:
        path: PNG to write.
        edges: (n + 1,) bin edges, dB.
        counts: Band -> (n,) pixels.
        marks: Band -> name of a vertical line -> its place, dB (mean, percentiles, registered mean...).
        title: Heading.
    """
    figure = new_figure(9.4, 2.9 * len(counts) + 0.5)
    figure.suptitle(_wrap(title, 8.8, 10), fontsize=10, weight="bold", x=0.02, ha="left")
    axes = figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]
    middle = (edges[1:] + edges[:-1]) / 2
    for one, (band, values), colour in zip(axes, counts.items(), CYCLE, strict=False):
        share = 100 * values / max(float(np.sum(values)), 1.0)
        one.fill_between(middle, share, step="mid", color=colour, alpha=0.35, linewidth=0)
        one.step(middle, share, where="mid", color=colour, linewidth=1.0)
        for (name, place), line, dash in zip(
            marks.get(band, {}).items(),
            (BLACK, VERMILION, PURPLE, GREEN, ORANGE),
            ("-", "--", ":", "-.", (0, (1, 3))),
            strict=False,
        ):
            one.axvline(place, color=line, linestyle=dash, linewidth=1.3, label=f"{name} {place:.2f} dB")
        one.set_ylabel(f"{band}: pixels (%)")
        # Beside the axes: inside, a line would cross the text.
        one.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        one.margins(y=0.1)
        one.set_ylim(bottom=0)
        one.grid(alpha=0.25)
    axes[-1].set_xlabel("backscatter (dB)")
    figure.align_ylabels(axes)
    figure.tight_layout()
    figure.tight_layout()  # the first one may change the ticks, and with them the room that they need
    return save_figure(figure, path)


def bar_figure(
    path: PathLike,
    *,
    labels: Sequence[str],
    values: Mapping[str, ArrayLike],
    unit: str,
    title: str,
    intervals: Mapping[str, ArrayLike] | None = None,
    decimals: int = 3,
) -> Path:
    """Draw horizontal bars, one group for each label (label balance, average precision of each class).

    Args:
        path: PNG to write.
        labels: K names.
        values: Series name -> (K,) values; NaN is shown as "none".
        unit: Label of the axis.
        title: Heading.
        intervals: Series name -> (K, 2) lower and upper ends.
        decimals: Digits behind the point in the numbers at the bars.
    """
    from matplotlib.patches import Patch

    series = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    thick = 0.8 / max(len(series), 1)
    shown = ["\n".join(textwrap.wrap(label, 44)) for label in labels]
    lines = sum(max(text.count("\n") + 1, 0.75 * len(series)) for text in shown)
    below = _legend_height(list(series), 8.6) if len(series) > 1 else 0.0
    heading = _wrap(title, 8.0, 10)
    above = 0.2 + 0.17 * (heading.count("\n") + 1)
    height = 0.9 + above + below + 0.24 * lines
    figure = new_figure(8.6, height)
    figure.text(0.15 / 8.6, 1 - 0.12 / height, heading, fontsize=10, weight="bold", va="top")
    axes = figure.subplots()
    place = np.arange(len(labels))
    highest = max((float(np.nanmax(value)) for value in series.values() if np.isfinite(value).any()), default=1.0)
    for number, (name, value) in enumerate(series.items()):
        y = place + (number - (len(series) - 1) / 2) * thick
        axes.barh(y, np.nan_to_num(value), height=thick * 0.9, color=CYCLE[number % len(CYCLE)], label=name)
        ends = np.nan_to_num(value)
        if intervals is not None and name in intervals:
            low, high = np.asarray(intervals[name], dtype=np.float64).T
            axes.errorbar(
                value,
                y,
                xerr=(np.maximum(value - low, 0), np.maximum(high - value, 0)),
                fmt="none",
                ecolor=BLACK,
                elinewidth=0.8,
                capsize=2,
            )
            ends = np.fmax(ends, np.nan_to_num(high))
            highest = max(highest, float(np.nanmax(high)))
        for where, end, number_ in zip(y, ends, value, strict=True):
            text = "none" if np.isnan(number_) else f"{number_:,.{decimals}f}"
            axes.annotate(text, (end, where), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.set_yticks(place, shown, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, highest * 1.14 if highest > 0 else 1.0)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.25)
    if len(series) > 1:
        handles = [Patch(color=CYCLE[number % len(CYCLE)], label=name) for number, name in enumerate(series)]
        _legend_below(figure, handles)
    figure.tight_layout(rect=(0, below / height, 1, 1 - above / height))
    return save_figure(figure, path)


def curves_figure(
    path: PathLike,
    *,
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    x_label: str,
    title: str,
    marks: Mapping[str, float] | None = None,
    log_panels: Sequence[str] = (),
    ticks: Sequence[float] | None = None,
) -> Path:
    """Draw curves below one another on a common axis (loss, learning rate, throughput over epochs).

    Args:
        path: PNG to write.
        panels: Label with unit of each vertical axis -> curve name -> (x, y).
        x_label: Label of the common axis.
        title: Heading.
        marks: Text -> place of vertical lines (end of warm-up, the cut).
        log_panels: Panels with a logarithmic axis.
        ticks: The places of the common axis that are named, all of them; it is logarithmic where they span much. By
            default it counts in whole numbers.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    wide = 8.4
    below = _legend_height(names, wide)
    heading = _wrap(title, wide - 0.6, 10)
    above = 0.2 + 0.17 * (heading.count("\n") + 1) + (0.32 if marks else 0.0)
    height = 2.5 * len(panels) + 0.3 + above + below
    figure = new_figure(wide, height)
    figure.text(0.15 / wide, 1 - 0.12 / height, heading, fontsize=10, weight="bold", va="top")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for one, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, (x, y) in curves.items():
            number = names.index(name)
            x_values, y_values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
            one.plot(
                x_values,
                y_values,
                linewidth=1.5,
                marker="o" if len(x_values) <= 30 else None,
                markersize=3,
                **_line_style(number),
            )
        one.set_ylabel("\n".join(textwrap.wrap(label, 26)), fontsize=8.5)
        one.tick_params(labelsize=8)
        one.grid(alpha=0.25)
        if label in log_panels:
            one.set_yscale("log")
        for place in (marks or {}).values():
            one.axvline(place, color="#777777", linestyle=":", linewidth=1.0)
    if ticks is not None:
        if min(ticks) > 0 and max(ticks) >= 4 * min(ticks):
            axes[-1].set_xscale("log")
        axes[-1].xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes[-1].xaxis.set_minor_locator(NullLocator())
        axes[-1].xaxis.set_major_formatter("{x:g}")
    else:
        axes[-1].xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    start, end = axes[0].get_xlim()
    for number, (text, place) in enumerate(sorted((marks or {}).items(), key=lambda mark: mark[1])):
        # Neighbouring marks on different heights, so that their texts do not cover each other; above the axes, where
        # no curve runs.
        late = place > start + 0.75 * (end - start)
        axes[0].annotate(
            text,
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-2 if late else 2, 3 + 8 * (number % 3)),
            textcoords="offset points",
            fontsize=6.5,
            color="#444444",
            ha="right" if late else "left",
        )
    axes[-1].set_xlabel(x_label)
    _legend_below(figure, [Line2D([], [], label=name, linewidth=1.5, **_line_style(number))
                           for number, name in enumerate(names)])  # fmt: skip
    figure.tight_layout(rect=(0, below / height, 1, 1 - above / height))
    return save_figure(figure, path)


def _legend_columns(names: Sequence[str], wide: float) -> int:
    """As many columns as the longest name leaves room for in a figure of a width in inches."""
    each = max((text_width(_legend_text(name, wide), 7.5) for name in names), default=0.0) + 0.6
    return max(1, min(len(names), int((wide - 0.2) / each)))


def _legend_text(name: str, wide: float) -> str:
    return fit_text(name, wide - 0.8, 7.5, lines=1)


def _legend_height(names: Sequence[str], wide: float) -> float:
    """Room in inches that `_legend_below` needs."""
    return 0.148 * -(-len(names) // _legend_columns(names, wide)) + 0.06


def _legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend along the lower edge, below everything else."""
    wide, height = figure.get_size_inches()
    names = [str(handle.get_label()) for handle in handles]
    figure.legend(
        handles=list(handles), labels=[_legend_text(name, wide) for name in names], fontsize=7.5, frameon=False,
        loc="lower left", bbox_to_anchor=(0.1 / wide, 0.04 / height), ncols=_legend_columns(names, wide),
        borderaxespad=0.0, borderpad=0.0, labelspacing=0.35, columnspacing=1.0, handletextpad=0.5, handlelength=3.0,
    )  # fmt: skip


def _line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of a curve; they repeat after 28."""
    return {"color": CYCLE[number % len(CYCLE)], "linestyle": DASHES[(number // len(CYCLE)) % len(DASHES)]}


def _multi_hot(y: ArrayLike, classes: int) -> NDArray[np.bool_]:
    """Class numbers (N,) or multi-hot (N, K) as multi-hot."""
    values = np.asarray(y)
    if values.ndim == 1:
        return np.arange(classes)[None, :] == values[:, None]
    if values.shape[1] != classes:
        raise ValueError(f"{values.shape[1]} columns for {classes} classes")
    return values > 0.5


def _small_multiples(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(5, max(1, math.ceil(math.sqrt(count))))
    rows = -(-count // columns)
    figure = new_figure(max(2.15 * columns + 0.4, 4.5), 2.3 * rows + 0.8)
    figure.suptitle(_wrap(title, max(2.15 * columns, 4.1), 10), fontsize=10, weight="bold", x=0.02, ha="left")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel())
    for one in axes[count:]:
        one.set_visible(False)
    for number, one in enumerate(axes[:count]):
        one.set_xlim(-0.02, 1.02)
        one.set_ylim(-0.02, 1.02)
        one.set_aspect("equal")
        one.set_xticks((0, 0.5, 1))
        one.set_yticks((0, 0.5, 1))
        one.tick_params(labelsize=7, labelbottom=number + columns >= count)
        one.grid(alpha=0.25)
    return figure, axes[:count]


def _curve_figure(
    path: PathLike, y_true: ArrayLike, y_score: ArrayLike, class_names: Sequence[str], *, kind: str, title: str
) -> Path:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    truth, score = _multi_hot(y_true, len(class_names)), np.asarray(y_score, dtype=np.float64)
    if score.shape != truth.shape:
        raise ValueError(f"scores of shape {score.shape} for labels of shape {truth.shape}")
    panels = [(name, truth[:, k], score[:, k]) for k, name in enumerate(class_names)]
    if len(class_names) != 2:  # two classes are one question asked twice: pooled, they say nothing
        panels.append(("all classes pooled (micro)", truth.ravel(), score.ravel()))
    figure, axes = _small_multiples(len(panels), title)
    for one, (name, labels, scores) in zip(axes, panels, strict=True):
        label = "\n".join(textwrap.wrap(name, 34))
        positives = int(labels.sum())
        # Without negatives precision is 1 at every threshold, so is AP, and there is no ROC curve.
        if positives == 0 or (kind == "roc" and positives == labels.size):
            one.text(0.5, 0.5, "no positive" if positives == 0 else "no negative", ha="center", va="center", fontsize=8)
            value = "undefined"
        elif kind == "pr":
            precision, recall, _ = precision_recall_curve(labels, scores)
            met = recall > 0  # at recall 0 precision is that of the first few samples, or made up
            one.step(recall[met], precision[met], where="post", color=BLUE, linewidth=1.4)
            one.axhline(labels.mean(), color=VERMILION, linestyle="--", linewidth=1.0)
            value = f"AP {average_precision_score(labels, scores):.3f}"
        else:
            false, true, _ = roc_curve(labels, scores)
            one.plot(false, true, color=BLUE, linewidth=1.4)
            one.plot((0, 1), (0, 1), color=VERMILION, linestyle="--", linewidth=1.0)
            value = f"AUC {roc_auc_score(labels, scores):.3f}"
        one.set_title(f"{label}\n{value}, n = {positives}", fontsize=6.2, pad=3)
    x_label, y_label = ("recall", "precision") if kind == "pr" else ("false positive rate", "true positive rate")
    note = "dashed: chance, the share of positives" if kind == "pr" else "dashed: chance"
    figure.supxlabel(f"{x_label}      ({note})", fontsize=8.5)
    figure.supylabel(y_label, fontsize=8.5)
    figure.tight_layout()
    return save_figure(figure, path)


def precision_recall_figure(
    path: PathLike,
    y_true: ArrayLike,
    y_score: ArrayLike,
    class_names: Sequence[str],
    *,
    title: str = "Precision and recall",
) -> Path:
    """Precision-recall curve of each class and of all pooled.

    Args:
        path: PNG to write.
        y_true: Multi-hot (N, K), or class numbers (N,).
        y_score: (N, K), larger is more likely.
        class_names: K names.
        title: Heading.
    """
    return _curve_figure(path, y_true, y_score, class_names, kind="pr", title=title)


def roc_figure(
    path: PathLike,
    y_true: ArrayLike,
    y_score: ArrayLike,
    class_names: Sequence[str],
    *,
    title: str = "Receiver operating characteristic",
) -> Path:
    """ROC curve of each class and of all pooled; arguments as for `precision_recall_figure`."""
    return _curve_figure(path, y_true, y_score, class_names, kind="roc", title=title)


def confusion_matrix_figure(
    path: PathLike, y_true: ArrayLike, y_pred: ArrayLike, class_names: Sequence[str], *, title: str | None = None
) -> Path:
    """Confusion matrix, each row in percent of its true class.

    With several labels a sample, row i says how often each class is predicted for the samples that have class i; the
    diagonal is the recall, and rows do not add up to 100.

    Args:
        path: PNG to write.
        y_true: Class numbers (N,), or multi-hot (N, K).
        y_pred: The same, predicted.
        class_names: K names.
        title: Heading; one that says what the rows are by default.
    """
    several = np.asarray(y_true).ndim == 2
    truth, predicted = _multi_hot(y_true, len(class_names)), _multi_hot(y_pred, len(class_names))
    default = (
        "Predicted classes of the samples that have each class (diagonal: recall)" if several else "Confusion matrix"
    )
    counts = truth.T.astype(np.int64) @ predicted.astype(np.int64)
    return _confusion_figure(path, counts, truth.sum(axis=0), class_names, unit="samples", title=title or default)


def confusion_counts_figure(
    path: PathLike, counts: ArrayLike, class_names: Sequence[str], *, unit: str, title: str
) -> Path:
    """A confusion matrix that has been counted already, each row in percent of its true class.

    Args:
        path: PNG to write.
        counts: (K, K), rows are true classes.
        class_names: K names.
        unit: What was counted, such as "pixels".
        title: Heading.
    """
    matrix = np.asarray(counts)
    return _confusion_figure(path, matrix, matrix.sum(axis=1), class_names, unit=unit, title=title)


def _confusion_figure(
    path: PathLike, counts: FloatArray, support: FloatArray, class_names: Sequence[str], *, unit: str, title: str
) -> Path:
    with np.errstate(invalid="ignore"):
        share = 100 * counts / support[:, None]
    classes = len(class_names)
    cell = 0.42 if classes > 5 else 0.8
    shown = ["\n".join(textwrap.wrap(name, 34)) for name in class_names]
    glyph = 0.58 * 6.5 / 72  # inches
    longest = max(len(line) for text in shown for line in text.split("\n"))
    left, bottom = 0.6 + glyph * (longest + 2 + len(f"({support.max():,})")), 0.55 + glyph * longest
    width, height = max(left + cell * classes + 1.0, 4.0), bottom + cell * classes + 0.8
    figure = new_figure(width, height)
    figure.text(0.02, 1 - 0.12 / height, _wrap(title, width - 0.4, 10), fontsize=10, weight="bold", va="top")
    axes = figure.add_axes((left / width, bottom / height, cell * classes / width, cell * classes / height))
    image = axes.imshow(share, cmap=_colours("cividis"), vmin=0, vmax=100)
    for i in range(classes):
        for j in range(classes):
            text = "-" if support[i] == 0 else f"{share[i, j]:.0f}"
            axes.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if support[i] and share[i, j] < 50 else "black",
            )
    axes.set_xticks(range(classes), shown, fontsize=6.5, rotation=90)
    axes.set_yticks(range(classes), [f"{name}  ({n:,})" for name, n in zip(shown, support, strict=True)], fontsize=6.5)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel(f"true ({unit})", fontsize=9)
    bar = figure.add_axes(
        ((left + cell * classes + 0.15) / width, bottom / height, 0.15 / width, cell * classes / height)
    )
    figure.colorbar(image, cax=bar).set_label(f"share of the row's {unit} (%)", fontsize=8)
    bar.tick_params(labelsize=7)
    return save_figure(figure, path)


def per_class_table_figure(
    path: PathLike,
    class_names: Sequence[str],
    columns: Mapping[str, ArrayLike],
    *,
    title: str = "Results of each class",
) -> Path:
    """A table as a picture: one row a class, one column a figure of merit.

    Args:
        path: PNG to write.
        class_names: K names.
        columns: Name -> (K,) numbers; integers are shown as counts, NaN as "none".
        title: Heading.
    """
    from matplotlib.patches import Rectangle

    row, first, each = 0.235, 5.3, 0.95
    width, height = first + each * len(columns) + 0.3, row * (len(class_names) + 1) + 0.75
    figure = new_figure(width, height)
    figure.text(0.15 / width, 1 - 0.12 / height, _wrap(title, width - 0.3, 10), fontsize=10, weight="bold", va="top")

    def put(x: float, line: int, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - (0.62 + row * line) / height, text, va="center", fontsize=8, **style)

    put(0.15, 0, "class", weight="bold")
    for number, (name, raw) in enumerate(columns.items()):
        values = np.asarray(raw)
        right = first + each * (number + 1)
        put(right, 0, name, weight="bold", ha="right")
        counts = np.issubdtype(values.dtype, np.integer)
        for line, value in enumerate(values, start=1):
            text = f"{value:,}" if counts else "none" if np.isnan(value) else f"{value:.4f}"
            put(right, line, text, ha="right")
    for line, name in enumerate(class_names, start=1):
        put(0.15, line, name if len(name) <= 90 else name[:87] + "...")
        if line % 2 == 0:
            figure.add_artist(
                Rectangle(
                    (0, 1 - (0.62 + row * (line + 0.5)) / height),
                    1,
                    row / height,
                    facecolor="#eeeeee",
                    edgecolor="none",
                    zorder=0,
                )
            )
    return save_figure(figure, path)


def label_map_figure(
    path: PathLike,
    *,
    images: FloatArray,
    bands: Sequence[str],
    labels: FloatArray,
    predictions: FloatArray,
    classes: Sequence[str],
    captions: Sequence[str],
    ignored: int,
    title: str,
) -> Path:
    """One row a sample: image, label, prediction, and where the two differ.

    Sentinel-1 bands are drawn in grey with their dB scale, Sentinel-2 in true colour where its red, green and blue are
    there. No data and ignored pixels are light blue.

    Args:
        path: PNG to write.
        images: (B, C, H, W) in the bands' units, NaN where there is no data.
        bands: C band names.
        labels: (B, H, W) class numbers.
        predictions: (B, H, W) class numbers.
        classes: K names, at most 10.
        captions: B texts.
        ignored: Class number of ignored pixels.
        title: Heading.

    Raises:
        ValueError: Shapes that do not fit, or more classes than colours.
    """
    from matplotlib.patches import Patch

    if len(classes) > len(MAP_COLOURS):
        raise ValueError(f"{len(classes)} classes, but {len(MAP_COLOURS)} colours")
    if not len(images) == len(labels) == len(predictions) == len(captions):
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(predictions)} predictions")
    binary = len(classes) == 2
    colours = class_colours(classes)
    greys = [band for band in bands if band in GREY_DB]
    colour = all(band in bands for band in RGB_BANDS)
    views: list[str] = [*greys, *(["true colour"] if colour else [])] or [bands[0]]
    columns = [*views, "label", "prediction", "errors"]
    side, gap, left, caption = 1.75, 0.08, 0.15, 0.38  # inches
    width = left + len(columns) * (side + gap) + 0.1
    heading = _wrap(title, width - 0.4, 10)
    top, bottom = 0.45 + 0.17 * (heading.count("\n") + 1), (1.15 if greys else 0.5) + 0.19 * -(-len(classes) // 4)
    height = top + len(images) * (side + caption) + bottom
    figure = new_figure(width, height)
    figure.text(0.15 / width, 1 - 0.12 / height, heading, fontsize=10, weight="bold", va="top")
    for row in range(len(images)):
        label, predicted = np.asarray(labels[row]), np.asarray(predictions[row])
        outside = label == ignored
        drawn = [_view(images[row], bands, name) for name in views]
        drawn += [_paint(label, colours, outside), _paint(predicted, colours, np.isnan(images[row]).any(axis=0))]
        drawn.append(_errors(label, predicted, outside, binary=binary))
        y = height - top - row * (side + caption) - side
        for column, picture in enumerate(drawn):
            x = left + column * (side + gap)
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.imshow(picture, interpolation="nearest", aspect="equal")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(columns[column], fontsize=9)
        figure.text(left / width, (y - 0.05) / height, captions[row], fontsize=7, va="top")
    for column, name in enumerate(greys):
        _bar(
            figure,
            (left + column * (side + gap) + 0.1, bottom - 0.45, side - 0.2, 0.1),
            "gray",
            _grey(name),
            f"{name} (dB)",
        )
    if binary:
        right, missed, claimed = f"{classes[1]} found", f"{classes[1]} missed", f"{classes[1]} claimed wrongly"
        marks = [(BLUE, right), (LIGHT, f"{classes[0]}, right"), (VERMILION, missed), (YELLOW, claimed)]
    else:
        marks = [(LIGHT, "right"), (VERMILION, "wrong")]
    classes_shown = [
        Patch(facecolor=shade, edgecolor=GREY, label=name) for shade, name in zip(colours, classes, strict=True)
    ]
    errors_shown = [Patch(facecolor=shade, edgecolor=GREY, label=name) for shade, name in marks]
    errors_shown.append(Patch(facecolor=NO_DATA, edgecolor=GREY, label="no data, or ignored"))
    style: dict[str, Any] = {"fontsize": 7, "frameon": False, "borderaxespad": 0.2, "title_fontsize": 8}
    at = (left + len(greys) * (side + gap)) / width if len(greys) < len(columns) - 2 else left / width
    figure.legend(
        handles=classes_shown,
        title="label, prediction",
        loc="lower left",
        bbox_to_anchor=(at, 0.05 / height),
        ncols=min(3, len(classes)),
        **style,
    )
    figure.legend(
        handles=errors_shown,
        title="errors",
        loc="lower right",
        bbox_to_anchor=(1 - 0.05 / width, 0.05 / height),
        ncols=2 if binary else 1,
        **style,
    )
    return save_figure(figure, path)


def class_colours(classes: Sequence[str], *, part: bool = False) -> tuple[str, ...]:
    """A colour for each class of a map: by its name where that is known.

    Blue is water in every figure. The second of two classes stands out, unless the first is the one that is there
    ("flood", "no flood"). Classes beyond the number of colours share a grey.

    Args:
        part: These are some of more classes.
    """
    if len(classes) == 2 and not part:
        return (BLUE, LIGHT) if _is_absence(classes[1]) and not _is_absence(classes[0]) else (LIGHT, BLUE)
    chosen: dict[int, str] = {}
    for number, name in enumerate(classes):  # first these, so that no other class takes the blue of water
        known = {} if _is_absence(name) else CLASS_COLOURS
        named = [shade for word, shade in known.items() if re.search(rf"\b{word}", name.lower())]
        free = [shade for shade in named if shade not in chosen.values()]
        if free:
            chosen[number] = free[0]
    rest = [shade for shade in MAP_COLOURS if shade not in chosen.values()]
    # Colours that mean something by a name come last.
    rest.sort(key=lambda shade: shade in CLASS_COLOURS.values())
    return tuple(chosen.get(number) or (rest.pop(0) if rest else OTHER) for number in range(len(classes)))


def _is_absence(name: str) -> bool:
    """Whether a class is named by what it is not."""
    return re.match(r"(no|not|non|without|dry)\b", name.lower()) is not None


def _rgb(colour: str) -> FloatArray:
    from matplotlib.colors import to_rgb

    return np.asarray(to_rgb(colour))


def _view(image: FloatArray, bands: Sequence[str], name: str) -> FloatArray:
    """One band in grey, or the true colour of an optical image, as (H, W, 3) in [0, 1]."""
    if name == "true colour":
        stack = np.stack([image[list(bands).index(band)] for band in RGB_BANDS], axis=-1) / RGB_WHITE
    else:
        plane = image[list(bands).index(name)]
        low, high = _grey(name) if name in GREY_DB else np.nanpercentile(plane, [2, 98])
        stack = np.repeat(((plane - low) / max(high - low, 1e-9))[..., None], 3, axis=-1)
    shown = np.clip(stack, 0, 1)
    return np.where(np.isfinite(shown).all(axis=-1, keepdims=True), shown, _rgb(NO_DATA))


def _paint(numbers: FloatArray, colours: Sequence[str], outside: FloatArray) -> FloatArray:
    """Class numbers (H, W) -> (H, W, 3)."""
    table = np.stack([_rgb(colour) for colour in colours])
    painted = table[np.clip(numbers, 0, len(table) - 1)]
    painted[outside] = _rgb(NO_DATA)
    return painted


def _errors(label: FloatArray, predicted: FloatArray, outside: FloatArray, *, binary: bool) -> FloatArray:
    """Where label and prediction differ, (H, W, 3)."""
    shown = np.empty((*label.shape, 3))
    shown[...] = _rgb(LIGHT)
    if binary:
        shown[(label == 1) & (predicted == 1)] = _rgb(BLUE)
        shown[(label == 1) & (predicted == 0)] = _rgb(VERMILION)
        shown[(label == 0) & (predicted == 1)] = _rgb(YELLOW)
    else:
        shown[label != predicted] = _rgb(VERMILION)
    shown[outside] = _rgb(NO_DATA)
    return shown
