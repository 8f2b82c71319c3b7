"""Quick-look pictures beside predictions: the scene in dB, the result with its scale and legend, a scale bar.

Colours are distinguishable with colour-vision deficiency (Okabe and Ito 2008, cividis); light blue is no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sarwmix.data.spec import DECIBEL, unit_of
from sarwmix.figures import base as pictures
from sarwmix.figures.base import NO_DATA, OTHER, class_colours, fit_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST = 900  # pixels of the longer side of a thumbnail at most
COLUMNS, SIDE = 3, 3.9  # panels in a row, and their width in inches
MAPS = 6  # classes whose probability is drawn
FloatArray = NDArray[np.float32]


class Thumbnail:
    """Mean of blocks of pixels, filled from top to bottom.

    Args:
        height, width: of the full image.
        bands: names of the channels.
    """

    def __init__(self, height: int, width: int, bands: Sequence[str]) -> None:
        self.bands = tuple(bands)
        self.height, self.width = height, width
        self.factor = max(1, math.ceil(max(height, width) / LONGEST))
        shape = (len(bands), -(-height // self.factor), -(-width // self.factor))
        self._sum = np.zeros(shape, dtype=np.float32)
        self._count = np.zeros(shape, dtype=np.float32)

    def add(self, row: int, values: FloatArray) -> None:
        """Rows (C, n, width) from `row` on; NaN does not count. Rows beyond the image are left out."""
        values = values[:, : self.height - row]
        if not values.shape[1]:
            return
        good = np.isfinite(values)
        columns = np.arange(0, self.width, self.factor)
        sums = np.add.reduceat(np.where(good, values, np.float32(0)), columns, axis=2)
        counts = np.add.reduceat(good, columns, axis=2, dtype=np.float32)
        places = np.arange(row, row + values.shape[1]) // self.factor
        for place in range(int(places[0]), int(places[-1]) + 1):
            here = places == place
            self._sum[:, place] += sums[:, here].sum(axis=1)
            self._count[:, place] += counts[:, here].sum(axis=1)

    def image(self) -> FloatArray:
        """(C, h, w); NaN where nothing is valid."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sum / self._count


class _Page:
    """Panels of one shape in rows, with room for a bar or legend below each."""

    def __init__(self, shape: tuple[int, int], panels: int, title: str, *, below: float = 0.62) -> None:
        ratio = float(np.clip(shape[0] / shape[1], 0.25, 2.2))
        self._below, self._tall = below, SIDE * ratio
        columns = 2 if panels == 4 else min(COLUMNS, panels)
        rows = -(-panels // columns)
        self._columns = columns
        self._width = columns * (SIDE + 0.25) + 0.25
        heading = pictures._wrap(title, self._width - 0.4, 11)
        self._top = 0.3 + 0.19 * (heading.count("\n") + 1)
        self._height = self._top + rows * (self._tall + 0.3 + below) + 0.3
        self.figure: Figure = pictures.new_figure(self._width, self._height)
        self.figure.text(0.25 / self._width, 1 - 0.12 / self._height, heading, fontsize=11, weight="bold", va="top")
        self.figure.text(0.25 / self._width, 0.1 / self._height, "Light blue: no data or no result.", fontsize=7.5)
        self._next = 0

    def panel(self, title: str) -> tuple[Axes, tuple[float, float, float]]:
        """Axes of the next panel, and (left, bottom, width) in inches of the room below it."""
        row, column = divmod(self._next, self._columns)
        self._next += 1
        left = 0.25 + column * (SIDE + 0.25)
        bottom = self._height - self._top - (row + 1) * (self._tall + 0.3) - row * self._below
        box = (left / self._width, bottom / self._height, SIDE / self._width, self._tall / self._height)
        axes = self.figure.add_axes(box)
        axes.set_title(fit_text(title, SIDE, 8, lines=2), fontsize=8, pad=3)
        return axes, (left, bottom - self._below, SIDE)

    def show(
        self, title: str, image: NDArray[Any], colours: str, limits: tuple[float, float], label: str, extend: str
    ) -> Axes:
        """A panel with a colour bar."""
        axes, (left, bottom, width) = self.panel(title)
        pictures.show_image(axes, image, colours, limits)
        box = (left + 0.15, bottom + 0.25, width - 0.3, 0.1)
        pictures._bar(self.figure, box, colours, limits, label, extend=extend)
        return axes

    def classes(self, title: str, image: NDArray[Any], colours: Sequence[str], names: Sequence[str]) -> None:
        """A panel of class numbers, NaN where there is none, with a legend."""
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.patches import Patch

        axes, (left, bottom, width) = self.panel(title)
        table = ListedColormap(list(colours)).with_extremes(bad=NO_DATA)
        norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
        axes.imshow(image, cmap=table, norm=norm, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        handles = [
            Patch(facecolor=colour, edgecolor="#666666", linewidth=0.4, label=name)
            for colour, name in zip(colours, names, strict=True)
        ]
        self.figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left / self._width, (bottom + self._below - 0.02) / self._height),
            fontsize=6.8,
            frameon=False,
            ncols=2,
            handlelength=1.2,
            columnspacing=0.8,
            borderaxespad=0.0,
        )

    def save(self, path: Path) -> Path:
        return pictures.save_figure(self.figure, path)


def _scale_bar(axes: Axes, pixels: float, width: int, metres: float | None) -> None:
    """A bar of a round length in the lower left corner.

    Args:
        pixels: scene pixels of one pixel of the picture.
        width: of the picture.
        metres: of one scene pixel; None: the bar counts pixels.
    """
    from matplotlib.patches import Rectangle

    unit = pixels * (metres or 1.0)
    wanted = 0.3 * width * unit
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    text = f"{length:g} px" if metres is None else f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    # The box is laid out in inches. On a narrow scene it is as wide as its text and reaches beyond the picture.
    axes.apply_aspect()  # shrinks the axes to the scene's shape, on which the shares below depend
    extent, dpi = axes.get_window_extent(), axes.figure.dpi
    right, tall = dpi / extent.width, dpi / extent.height  # shares of the axes of an inch
    bar, edge = length / unit / width, 0.08 * right
    box = max(bar, pictures.text_width(text, 7) * right) + 2 * edge
    style: dict[str, Any] = {"transform": axes.transAxes, "linewidth": 0, "clip_on": False}
    axes.add_patch(Rectangle((0, 0), box, 0.32 * tall, color="white", alpha=0.8, zorder=2.6, **style))
    axes.add_patch(Rectangle((edge, 0.06 * tall), bar, 0.045 * tall, color="black", zorder=2.7, **style))
    axes.text(edge, 0.13 * tall, text, transform=axes.transAxes, fontsize=7, va="bottom")


def _image(page: _Page, thumbnail: Thumbnail, metres: float | None, date: str = "") -> None:
    """VV and VH in dB; of a scene without them its first band as reflectance."""
    image = thumbnail.image()
    shown: list[str] = [band for band in ("VV", "VH") if band in thumbnail.bands] or [thumbnail.bands[0]]
    for band in shown:
        values = image[thumbnail.bands.index(band)]
        radar = unit_of(band) == DECIBEL
        label = f"{band} backscatter (dB)" if radar else f"{band} reflectance x 10,000"
        limits = pictures._grey(band) if radar else (0.0, pictures.RGB_WHITE)
        axes = page.show(f"{band}{date}", values, "gray", limits, label, "both")
        _scale_bar(axes, thumbnail.factor, values.shape[1], metres)


def classification_figure(
    path: Path,
    thumbnail: Thumbnail,
    probability: FloatArray,
    names: Sequence[str],
    *,
    cell: int,
    metres: float | None,
    title: str,
    exclusive: bool,
) -> Path:
    """Backscatter, the most probable class of each cell, and the probability of the most frequent classes.

    Args:
        path: PNG to write.
        thumbnail: of the scene.
        probability: (K, rows, columns), NaN where there is no result.
        names: K class names.
        cell: side of a cell, px of the scene.
        metres: width of a scene pixel.
        title: heading.
        exclusive: whether a cell has one class; else several may be present.
    """
    known = np.isfinite(probability).all(axis=0)
    mean = probability[:, known].mean(axis=1)
    order = np.argsort(-mean, kind="stable")[: min(MAPS, len(names))]
    best = np.where(known, np.nan_to_num(probability).argmax(axis=0), -1)
    # Of classes that may be absent together the likeliest is none where it is unlikely, too.
    none = known & (np.nan_to_num(probability).max(axis=0) < 0.5) & (not exclusive)
    best[none] = -1
    found, areas = np.unique(best[best >= 0], return_counts=True)
    shown = found[np.argsort(-areas, kind="stable")][:7]
    numbers = np.full(best.shape, np.nan)
    for place, number in enumerate(shown):
        numbers[best == number] = place
    rest = known & ~none & ~np.isfinite(numbers)
    numbers[rest] = len(shown)
    labels = [_short(f"{names[n]} ({100 * (best == n).sum() / known.sum():.0f} %)") for n in shown]
    few = len(names) <= len(pictures.MAP_COLOURS)  # then a class has the same colour on every map
    palette = class_colours(names) if few else class_colours([names[n] for n in shown], part=True)
    colours = [palette[n] for n in shown] if few else list(palette)
    if rest.any():
        labels.append(f"other classes ({100 * rest.sum() / known.sum():.0f} %)")
        colours.append(OTHER)
    if none.any():
        numbers[none] = len(labels)
        labels.append(f"no class reaches 0.5 ({100 * none.sum() / known.sum():.0f} %)")
        colours.append(pictures.NOT_SHOWN)
    # Crop the picture to the scene: cells at the lower and right edge may reach beyond it.
    shape = (thumbnail.height, thumbnail.width)
    page = _Page(shape, 3 + len(order), title, below=max(0.62, 0.12 + 0.155 * -(-len(labels) // 2)))
    _image(page, thumbnail, metres)
    page.classes("class of highest probability", _crop(numbers, cell, shape), colours, labels)
    what = "probability" if exclusive else "probability that the class is present"
    for number in order:
        image = _crop(probability[number], cell, shape)
        page.show(f"{names[number]} (mean {mean[number]:.2f})", image, "cividis", (0.0, 1.0), what, "neither")
    return page.save(path)


def _short(text: str) -> str:
    """A name that fits one of the two columns of a legend."""
    return fit_text(text, SIDE / 2 - 0.3, 6.8, lines=1)


def _crop(cells: NDArray[Any], cell: int, shape: tuple[int, int]) -> NDArray[Any]:
    """Cells -> picture of the scene's extent, nearest neighbour; at most `LONGEST` pixels a side."""
    step = max(1, math.ceil(max(shape) / LONGEST))
    rows, columns = (np.minimum(np.arange(step // 2, length, step), length - 1) // cell for length in shape)
    return cells[np.ix_(rows, columns)]


def segmentation_figure(
    path: Path,
    thumbnail: Thumbnail,
    probability: FloatArray,
    names: Sequence[str],
    *,
    areas: NDArray[np.int64],
    metres: float | None,
    title: str,
) -> Path:
    """Backscatter, the class map, and where two classes are, the probability of the second one.

    Args:
        path: PNG to write.
        thumbnail: of the scene.
        probability: (K, h, w) mean of blocks of pixels.
        names: K class names.
        areas: (K,) pixels of each class.
        metres: width of a scene pixel.
        title: heading.
    """
    known = np.isfinite(probability).all(axis=0)
    numbers = np.where(known, np.nan_to_num(probability).argmax(axis=0).astype(np.float64), np.nan)
    share = 100 * areas / areas.sum()
    labels = [_short(f"{name} ({part:.1f} %)") for name, part in zip(names, share, strict=True)]
    colours = class_colours(names)
    page = _Page(numbers.shape, 4, title, below=max(0.62, 0.12 + 0.155 * -(-len(labels) // 2)))
    _image(page, thumbnail, metres)
    page.classes("class of highest probability", numbers, colours, labels)
    if len(names) == 2:
        label = f"probability of {names[1]}"
        page.show(label, probability[1], "cividis", (0.0, 1.0), "probability", "neither")
    else:
        best = np.where(known, np.nan_to_num(probability).max(axis=0), np.nan)
        page.show("probability of that class", best, "cividis", (0.0, 1.0), "probability", "neither")
    return page.save(path)


def flood_figure(
    path: Path,
    thumbnails: Sequence[Thumbnail],
    probability: FloatArray,
    names: Sequence[str],
    *,
    cell: int,
    metres: float | None,
    dates: Sequence[str],
    probability_scene: float,
    title: str,
) -> Path:
    """VV of both dates, its change, and the probability of flood of windows and tiles.

    Args:
        path: PNG to write.
        thumbnails: of both dates.
        probability: (channels, rows, columns), NaN where there is no result.
        names: of the channels.
        cell: side of a cell, px of the scene.
        metres: width of a scene pixel.
        dates: names of the two scenes.
        probability_scene: of flood in the whole scene.
        title: heading.
    """
    shape = (thumbnails[0].height, thumbnails[0].width)
    page = _Page(shape, 3 + len(names), f"{title}: probability of flood in the scene {probability_scene:.3f}")
    images = []
    for thumbnail, date, order in zip(thumbnails, dates, ("first", "second"), strict=True):
        images.append(thumbnail.image()[thumbnail.bands.index("VV")])
        label = "VV backscatter (dB)"
        axes = page.show(f"{order} date: {date}", images[-1], "gray", pictures._grey("VV"), label, "both")
        _scale_bar(axes, thumbnail.factor, images[-1].shape[1], metres)
    page.show("change of VV", images[1] - images[0], "PuOr", (-10.0, 10.0), "VV second - first (dB)", "both")
    for name, values in zip(names, probability, strict=True):
        page.show(name, _crop(values, cell, shape), "cividis", (0.0, 1.0), "probability of flood", "neither")
    return page.save(path)
