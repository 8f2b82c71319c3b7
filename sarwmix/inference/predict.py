"""A trained model on scenes of any size: windows are read, predicted, blended and written strip by strip.

Three kinds of result, after the model's task:

* classification (multilabel, multiclass): probabilities on a grid of cells, and one CSV row a tile;
* pair (flood or no flood from two dates): probability of each tile, of each window, and of the whole scene;
* segmentation: a class for each pixel from overlapping windows blended with smooth weights.

Memory does not grow with the length of a scene: at any time one strip of tiles is in memory, with the rows of the
result that later tiles can still change. Files appear when all of them are complete.

Shapes: B tiles of a batch, C bands in the model's order, K channels of the result, T side of a tile in pixels.
"""

from __future__ import annotations

import contextlib
import csv
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sarwmix.data.io.rasters import same_crs
from sarwmix.data.pixels import UNITS, blank_fills, check_unit, recognise, to_decibel
from sarwmix.data.spec import DECIBEL, REFLECTANCE, unit_of
from sarwmix.datasets.scenes import (
    BLOCK_CACHE,
    SPACING_M,
    Scene,
    SceneReader,
    find_scenes,
    has_other_pixels,
    parse_band_order,
    pixel_size_m,
)
from sarwmix.datasets.sen12flood import ZERO_POWER
from sarwmix.figures.base import class_colours
from sarwmix.figures.quicklook import Thumbnail, classification_figure, flood_figure, segmentation_figure
from sarwmix.inference.model import Pretrained
from sarwmix.transforms import blend_weights, starts
from util.errors import UserError
from util.files import TEMP_SUFFIX, WriteError, file_set, write_json
from util.log import Progress, get_logger
from util.text import cells, first_line

NO_CLASS = 255
MIN_VALID = 0.5  # share of valid pixels of a tile, unless another one is asked for
FLOOD = 1
PAIR_TILE = 128  # px of the model's input that the encoder of pairs sees at once
FloatArray = NDArray[np.float32]


class EmptyScene(UserError):
    """A scene without anything to predict."""


class UnreadableScene(UserError):
    """A scene whose file is damaged."""


@dataclass(frozen=True)
class Options:
    """How a scene is predicted.

    Attributes:
        stride: distance of neighbouring tiles, px; None: the tile's side, for segmentation half of it.
        min_valid: least share of valid pixels of a tile; others have no result. None: `MIN_VALID`; class maps have
            no such limit.
        batch_size: tiles that the model sees at once.
        probabilities: also write the class probabilities of a segmentation.
    """

    stride: int | None = None
    min_valid: float | None = None
    batch_size: int = 32
    probabilities: bool = False

    @property
    def least(self) -> float:
        """`min_valid`, or what stands for it."""
        return MIN_VALID if self.min_valid is None else self.min_valid


# Scenes ----------------------------------------------------------------------------------------------------------


def open_scenes(
    paths: Sequence[Path], bands: Sequence[str], band_order: str | None = None, *, broken: list[str] | None = None
) -> list[Scene]:
    """The scenes of folders or files, bands in the model's order.

    Args:
        paths: folders or files.
        bands: of the model.
        band_order: names of the bands of files without descriptions, "VV,VH".
        broken: takes the files that cannot be opened, see `find_scenes`.

    Raises:
        UserError: nothing there, a band without its partners, different grids of the bands...
    """
    for path in paths:
        if not path.exists():
            raise UserError(
                f"scene {path} does not exist; give a GeoTIFF with {', '.join(bands)}, one file for each, or a folder"
            )
    root = paths[0] if len(paths) == 1 else list(paths)
    try:
        scenes, ignored = find_scenes(root, tuple(bands), parse_band_order(band_order, bands), broken=broken)
    except UserError as error:  # these readers know the option by the name that data sets have for it
        raise UserError(str(error).replace("band_order=", "--band_order ")) from error
    for text in ignored[:5]:
        get_logger().warning("left out: %s", text)
    return scenes


def sample_pixels(reader: SceneReader, scene: Scene, *, side: int = 64, grid: int = 5) -> FloatArray:
    """Valid values (C, n) as stored, from a grid of small windows; from the whole scene where these hold none.

    Raises:
        EmptyScene: no valid pixel at all.
        UnreadableScene: the file cannot be read.
    """

    def read(row: int, column: int, height: int, width: int, step: int) -> FloatArray:
        values = read_stored(reader, scene, row, column, height, width)[:, ::step, ::step]
        flat = values.reshape(len(values), -1)
        return flat[:, np.isfinite(flat).all(axis=0)]

    height, width = min(side, scene.height), min(side, scene.width)
    drawn = [
        read(int(row), int(column), height, width, 1)
        for row in np.linspace(0, scene.height - height, grid)
        for column in np.linspace(0, scene.width - width, grid)
    ]
    if sum(part.shape[1] for part in drawn) < 100:
        drawn += [read(row, 0, min(side, scene.height - row), scene.width, 3) for row in range(0, scene.height, side)]
    pixels = np.concatenate(drawn, axis=1)
    if pixels.shape[1] == 0:
        raise EmptyScene(f"scene {scene.name} ({scene.bands[0].path}) has no valid pixel: all no-data, NaN or 0")
    return pixels


def resolve_unit(reader: SceneReader, scene: Scene, declared: str | None, bands: Sequence[str]) -> str:
    """The unit of a scene's radar bands: as declared and not contradicted, or found and said in a warning.

    Sentinel-2 bands are reflectance times 10,000 and have no other unit here.

    Raises:
        UserError: the values contradict the declaration, or there is no radar band that it could mean.
    """
    pixels = sample_pixels(reader, scene)
    radar = radar_channels(bands)
    if not radar:
        if declared is not None:
            raise UserError(f"--unit {declared} is for radar bands; the model reads {', '.join(bands)}: leave it out")
        return REFLECTANCE
    names, pixels = [bands[number] for number in radar], pixels[radar]
    blank_fills(pixels[:, None], None)  # a view: (C, 1, n)
    pixels = pixels[:, np.isfinite(pixels).all(axis=0)]
    if pixels.shape[1] == 0:
        raise EmptyScene(f"scene {scene.name} ({scene.bands[0].path}) holds fill values alone: no backscatter")
    unit = declared
    if unit is None:
        unit = recognise(pixels, names)
        medians = ", ".join(f"{band} {value:.4g}" for band, value in zip(names, np.median(pixels, axis=1), strict=True))
        if unit not in UNITS:
            raise UserError(
                f"scene {scene.name} ({scene.bands[0].path}): the values look like {unit} (median {medians}), not like "
                f"calibrated backscatter in {', '.join(UNITS)}; calibrate or rescale the scene first"
            )
        get_logger().warning(
            "scene %s: --unit is not given; the values look like %s (median %s)", scene.name, unit, medians
        )
    elif unit not in UNITS:
        raise UserError(f"--unit {unit}: expected one of {', '.join(UNITS)}")
    try:
        warning = check_unit(pixels, unit, scene.bands[0].path, names)
    except UserError as error:
        raise UserError(str(error).replace("give unit=", "give --unit ")) from error
    if warning is not None:
        get_logger().warning("%s", warning)
    return unit


def radar_channels(bands: Sequence[str]) -> list[int]:
    """Channels of the Sentinel-1 bands."""
    return [number for number, band in enumerate(bands) if unit_of(band) == DECIBEL]


def read_stored(reader: SceneReader, scene: Scene, row: int, column: int, height: int, width: int) -> FloatArray:
    """A window as stored; an unreadable file becomes an error for the user."""
    try:
        return reader.stored(scene, row, column, height, width)
    except OSError as error:
        raise UnreadableScene(
            f"scene {scene.name}: {scene.bands[0].path} {error}. Nothing was written for it; copy or download the file "
            "again"
        ) from error


@dataclass
class Source:
    """A scene whose unit is known, read in the model's units.

    Attributes:
        unit: of its radar bands as stored.
        radar: channels of the radar bands.
        zero_is_dark: whether zero power in one band counts as -60 dB, as in the data of pairs; else it is no-data.
    """

    scene: Scene
    reader: SceneReader
    unit: str
    radar: Sequence[int]
    zero_is_dark: bool = False

    def rows(self, row: int, height: int) -> FloatArray:
        """Rows of the scene, (C, height, width) float32, dB or reflectance x 1e4, NaN where there is no data."""
        values = read_stored(self.reader, self.scene, row, 0, height, self.scene.width)
        if self.radar:
            radar = values[list(self.radar)]
            blank_fills(radar, self.unit, zero_is_dark=self.zero_is_dark and self.unit == "linear")
            values[:, np.isnan(radar).all(axis=0)] = np.nan
            if self.zero_is_dark and self.unit == "linear":
                radar[radar == 0] = ZERO_POWER
            values[list(self.radar)] = to_decibel(radar, self.unit)
        values[~np.isfinite(values)] = np.nan
        return values

    def strips(self, rows: Sequence[int], tile: int) -> Iterator[tuple[int, FloatArray, int]]:
        """The strips of tiles that begin at the given rows, each row of the file read once.

        Yields:
            (first row, strip (C, tile, at least tile), first new row): the strip ends with NaN where the scene is
            smaller than a tile.
        """
        width = max(self.scene.width, tile)
        shape = (len(self.scene.bands), tile, width)
        buffer = np.full(shape, np.nan, dtype=np.float32)
        have = 0  # rows of the scene before this one are, or were, in the buffer
        before = 0
        for row in rows:
            keep = max(0, have - row)
            if keep and row > before:
                buffer[:, :keep] = buffer[:, row - before : row - before + keep].copy()
            new = min(tile, self.scene.height - row) - keep
            if new > 0:
                buffer[:, keep : keep + new, : self.scene.width] = self.rows(row + keep, new)
            first_new, have, before = have, row + keep + max(new, 0), row
            yield row, buffer, first_new


def check_same_grid(first: Scene, second: Scene) -> None:
    """Refuse two dates on different grids.

    Raises:
        UserError: size, coordinate system or place differ; both are named.
    """
    one, two = np.array(first.transform), np.array(second.transform)
    pixel = max(abs(one[0]), abs(one[4]), 1e-12)
    moved = np.abs(one - two).max() > 0.01 * pixel  # a hundredth of a pixel
    if (first.height, first.width) == (second.height, second.width) and not moved and same_crs(first.crs, second.crs):
        return
    raise UserError(
        f"the two dates lie on different grids: {first.name} has {_grid(first)}; {second.name} has {_grid(second)}. "
        "Resample one to the other first, for example with gdalwarp -te ... -tr ... -t_srs ..."
    )


def _grid(scene: Scene) -> str:
    a, _, x, _, e, y = scene.transform
    name = "no coordinate system"
    if scene.crs:
        from rasterio.crs import CRS

        crs = CRS.from_wkt(scene.crs)
        name = crs.to_string() if len(crs.to_string()) < 40 else f"{scene.crs[:40]}..."
    return f"{scene.height} x {scene.width} pixels of {a:.6g} x {e:.6g} from {x:.9g}, {y:.9g} in {name}"


def say_about_place(scene: Scene) -> None:
    """Warn of a scene without georeference, and of one whose pixels are larger or smaller than the models know."""
    spacing = pixel_size_m(scene)
    if spacing is None:
        get_logger().warning(
            "scene %s has no georeference: results are in pixel coordinates (geocode the scene first, for example with "
            "SNAP or gdalwarp, to get a map)",
            scene.name,
        )
    elif has_other_pixels(scene) is not None:
        get_logger().warning(
            "scene %s has pixels of %.3g m; the models were trained on %.0f m: objects look larger or smaller "
            "than they know them. Resample with gdalwarp -tr",
            scene.name,
            spacing,
            SPACING_M,
        )


# Blending --------------------------------------------------------------------------------------------------------


class Mosaic:
    """Weighted mean of overlapping tiles on a grid, streaming from top to bottom.

    Args:
        channels: K.
        height, width: of the grid.
        reach: rows that one tile can touch.
    """

    def __init__(self, channels: int, height: int, width: int, reach: int) -> None:
        self.height, self.width = height, width
        self._first = 0  # grid row of the first row in the buffers
        self._sum = np.zeros((channels, min(reach, height), width), dtype=np.float32)
        self._weight = np.zeros((min(reach, height), width), dtype=np.float32)

    def add(self, row: int, column: int, values: FloatArray, weights: FloatArray) -> None:
        """Add a tile: values (K, h, w) or (K, 1, 1) and weights (h, w), from a grid row and column on."""
        height, width = min(weights.shape[0], self.height - row), min(weights.shape[1], self.width - column)
        top = row - self._first
        rows, columns = slice(top, top + height), slice(column, column + width)
        part = weights[:height, :width]
        self._sum[:, rows, columns] += values[:, :height, :width] * part
        self._weight[rows, columns] += part

    def finish(self, until: int) -> tuple[int, FloatArray]:
        """Take out the rows before `until`, which no later tile touches.

        Returns:
            The first of them, and (K, rows, width) with NaN where no tile was added.
        """
        first, count = self._first, min(until, self.height) - self._first
        with np.errstate(invalid="ignore", divide="ignore"):
            block = self._sum[:, :count] / self._weight[:count]
        left = self._sum.shape[1] - count
        for buffer in (self._sum, self._weight):
            buffer[..., :left, :] = buffer[..., count:, :].copy()
            buffer[..., left:, :] = 0
        self._first += count
        return first, block


def overlaps(start: float, length: float, cell: int, count: int) -> tuple[int, FloatArray]:
    """How many pixels of a run fall into each cell: the first cell, and the pixels in it and the following ones."""
    first = min(int(start // cell), count - 1)
    last = min(int(-(-(start + length) // cell)), count)
    edges = np.clip(np.arange(first, max(last, first + 1) + 1) * cell, start, start + length)
    return first, np.diff(edges).astype(np.float32)


# Files -----------------------------------------------------------------------------------------------------------


class Raster:
    """A GeoTIFF written from top to bottom.

    Args:
        path: the file.
        scene: whose place it takes over.
        cell: side of a pixel of this raster in pixels of the scene.
        shape: (K, height, width).
        dtype: "float32" with NaN as no-data, or "uint8" with 255.
        names: of the bands.
        tags: what the file says about itself.
        colours: class number -> RGBA, for uint8.
    """

    def __init__(
        self,
        path: Path,
        scene: Scene,
        *,
        cell: int,
        shape: tuple[int, int, int],
        dtype: str,
        names: Sequence[str],
        tags: dict[str, str],
        colours: dict[int, tuple[int, int, int, int]] | None = None,
    ) -> None:
        import rasterio
        from rasterio.crs import CRS
        from rasterio.transform import Affine

        self.path = path
        self._shape = shape
        place: dict[str, Any] = {}
        transform = Affine(*scene.transform)
        if scene.crs:
            place["crs"] = CRS.from_wkt(scene.crs)
        if scene.crs or transform != Affine.identity():
            place["transform"] = transform @ Affine.scale(cell)
        layout: dict[str, Any] = {"blockysize": 16}
        if dtype == "uint8" and shape[1] >= 512 and shape[2] >= 512:
            layout = {"tiled": True, "blockxsize": 512, "blockysize": 512}
        with _writing(path):
            self._file = rasterio.open(
                path, "w", driver="GTiff", count=shape[0], height=shape[1], width=shape[2], dtype=dtype,
                nodata=NO_CLASS if dtype == "uint8" else math.nan, compress="deflate", interleave="band",
                bigtiff="if_safer", **layout, **place,
            )  # fmt: skip
            for number, name in enumerate(names, start=1):
                self._file.set_band_description(number, name)
            self._file.update_tags(**tags)
            if colours is not None:
                self._file.write_colormap(1, colours)

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Rows (K, n, width) from `row` on."""
        from rasterio.windows import Window

        if values.shape[1]:
            with _writing(self.path):
                self._file.write(values, window=Window(0, row, self._shape[2], values.shape[1]))

    def close(self) -> None:
        """Finish the file and read it again: GDAL does not report every failed write when it closes."""
        import rasterio
        from rasterio.windows import Window

        with _writing(self.path):
            self._file.close()
            with rasterio.open(self.path) as check:
                for row in range(0, self._shape[1], 512):
                    height = min(512, self._shape[1] - row)
                    for number in range(1, self._shape[0] + 1):
                        check.read(number, window=Window(0, row, self._shape[2], height))

    def abandon(self) -> None:
        """Close after an error."""
        with contextlib.suppress(Exception):
            self._file.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """GDAL's errors while writing, as ours."""
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, OSError) as error:
        # Hidden working folder: the user knows the folder above it.
        folder = path.parent.parent if path.parent.name.endswith(TEMP_SUFFIX) else path.parent
        raise WriteError(
            f"cannot write {folder / path.name}: {first_line(error)} (disk full or limited?). Files of that name, if "
            "any, are untouched. Free space or choose another --out, then run again."
        ) from error


class TileTable:
    """The CSV of tiles: where each lies and what the model says about it."""

    def __init__(self, path: Path, scene: Scene, columns: Sequence[str]) -> None:
        self._scene = scene
        self._stream = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._writer = csv.writer(self._stream, lineterminator="\n")
        self._crs: Any = None
        if scene.crs:
            from rasterio.crs import CRS

            self._crs = CRS.from_wkt(scene.crs)
        place = ["x", "y", "longitude", "latitude"] if self._crs is not None else ["x", "y"]
        self._writer.writerow(cells(["row", "column", "height", "width", *place, "valid", *columns]))

    def add(self, tiles: Sequence[tuple[float, float, float, float]], results: Sequence[Sequence[Any]]) -> None:
        """Tiles (row, column, height, width) and (valid share, result...) of each."""
        if not tiles:
            return
        a, b, c, d, e, f = self._scene.transform
        place = np.array(tiles)
        rows, columns = place[:, 0] + place[:, 2] / 2, place[:, 1] + place[:, 3] / 2
        x, y = a * columns + b * rows + c, d * columns + e * rows + f
        spherical: list[list[str]] = [[] for _ in tiles]
        if self._crs is not None:
            from rasterio.warp import transform

            longitude, latitude = transform(self._crs, "EPSG:4326", x.tolist(), y.tolist())
            spherical = [[f"{lon:.7f}", f"{lat:.7f}"] for lon, lat in zip(longitude, latitude, strict=True)]
        for number, (tile, result) in enumerate(zip(tiles, results, strict=True)):
            corner = [f"{value:g}" if value != int(value) else int(value) for value in tile]
            values = [f"{value:.6g}" if isinstance(value, float) else value for value in result]
            place_of = [f"{x[number]:.10g}", f"{y[number]:.10g}", *spherical[number]]
            self._writer.writerow(cells([*corner, *place_of, *values]))

    def close(self) -> None:
        self._stream.close()


# Prediction ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was found in one scene.

    Attributes:
        name: of the scene.
        summary: plain values, kept in `<name>.json`.
        files: written.
    """

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def predict_scene(
    model: Pretrained,
    scene: Scene,
    out: Path,
    *,
    second: Scene | None = None,
    unit: str | None = None,
    options: Options | None = None,
) -> Outcome:
    """Predict one scene (or one pair of dates) and write the results.

    Args:
        model: fine-tuned.
        scene: the scene, or the first date.
        out: folder.
        second: the second date, for models of pairs.
        unit: "dB" or "linear"; None: found from the values, with a warning.
        options: strides and limits.

    Raises:
        UserError: whatever the input lacks; nothing is written then.
    """
    options = options or Options()
    task = model.need_task()
    if (second is not None) != (task.name == "pair"):
        raise UserError(
            f"{model.source} compares two dates: give the second one with --second"
            if task.name == "pair"
            else f"{model.source} ({task.name}) looks at one date; leave --second out"
        )
    if second is not None:
        check_same_grid(scene, second)
    run: Callable[[Pretrained, list[Source], Path, Options], dict[str, Any]]
    if task.name == "pair":
        run = _predict_pair
    elif task.name == "segmentation":
        run = _predict_pixels
    elif task.name in ("multilabel", "multiclass"):
        run = _predict_tiles
    else:
        raise UserError(
            f"{model.source} is of task {task.name}; scenes can be predicted for classification, pairs, maps"
        )
    _check_options(task.name, options)
    sources = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset has no geotransform")
        for one in [scene] if second is None else [scene, second]:
            reader = SceneReader(None)  # read as stored; `Source` converts
            sources.append(
                Source(
                    one,
                    reader,
                    resolve_unit(reader, one, unit, model.bands),
                    radar_channels(model.bands),
                    zero_is_dark=task.name == "pair",
                )
            )
        _check_size(scene, model, options)
        say_about_place(scene)
        with _gdal(), file_set(out) as work:
            summary = {
                "scene": scene.name,
                "files": [band.path for one in sources for band in one.scene.bands],
                "unit": [one.unit for one in sources],
                "model": model.source,
                "task": task.name,
                "bands": list(model.bands),
                "classes": list(model.classes),
                **run(model, sources, work, options),
            }
            write_json(work / f"{scene.name}.json", summary)
            names = sorted(path.name for path in work.iterdir())
    return Outcome(scene.name, summary, [out / name for name in names])


def _check_options(task: str, options: Options) -> None:
    """Refuse what has no effect on a task.

    Raises:
        UserError: such an option is set.
    """
    if options.probabilities and task != "segmentation":
        raise UserError(
            f"--probabilities is for class maps; results of task {task} are probabilities already: leave it out"
        )
    if options.min_valid is not None and task == "segmentation":
        raise UserError(
            f"--min_valid {options.min_valid:g} has no effect on class maps, where each valid pixel gets a class: "
            "leave it out"
        )


def _gdal() -> Any:
    import rasterio

    return rasterio.Env(GDAL_CACHEMAX=BLOCK_CACHE)


def _check_size(scene: Scene, model: Pretrained, options: Options) -> None:
    tile = model.tile
    if scene.height >= tile and scene.width >= tile:
        return
    covered = min(scene.height, tile) * min(scene.width, tile) / tile**2
    text = f"scene {scene.name} has {scene.height} x {scene.width} px, less than one tile of {tile} x {tile} px"
    if covered < options.least and model.need_task().name != "segmentation":
        raise EmptyScene(
            f"{text}: it fills {100 * covered:.0f} % of it, less than --min_valid {options.least:g}. Give a larger "
            "scene, or a smaller --min_valid"
        )
    get_logger().warning("%s; what is missing counts as no data", text)


def _tiles(
    strip: FloatArray, columns: Sequence[int], tile: int, least: float, batch: int
) -> Iterator[tuple[list[int], list[float], Tensor]]:
    """Batches of the tiles of a strip that have enough valid pixels: columns, valid shares, images (B, C, T, T)."""
    good = np.isfinite(strip).all(axis=0).sum(axis=0)
    total = np.concatenate([[0], np.cumsum(good)])
    kept = [(column, float(total[column + tile] - total[column]) / tile**2) for column in columns]
    kept = [item for item in kept if item[1] > 0 and item[1] >= least]
    for begin in range(0, len(kept), batch):
        some = kept[begin : begin + batch]
        images = np.stack([strip[:, :, column : column + tile] for column, _ in some])
        yield [column for column, _ in some], [share for _, share in some], torch.from_numpy(images)


def _geometry(model: Pretrained, scene: Scene, options: Options, default: int) -> tuple[int, int, list[int], list[int]]:
    tile = model.tile
    stride = options.stride or default
    if stride > tile:
        raise UserError(f"--stride {stride} leaves gaps between tiles of {tile} px; give at most {tile}")
    return tile, stride, starts(scene.height, tile, stride), starts(scene.width, tile, stride)


def _tags(model: Pretrained, **more: str) -> dict[str, str]:
    return {"MODEL": model.source, "TASK": str(model.record.get("task")), **more}


def _nothing(scene: Scene, options: Options) -> EmptyScene:
    return EmptyScene(
        f"scene {scene.name}: no tile has {100 * options.least:g} % valid pixels; give a smaller --min_valid, or "
        "look at the scene's no-data"
    )


def _predict_tiles(model: Pretrained, sources: list[Source], work: Path, options: Options) -> dict[str, Any]:
    """Classification: probabilities on cells of `stride` pixels, and of each tile."""
    (source,) = sources
    scene, task = source.scene, model.need_task()
    tile, stride, rows, columns = _geometry(model, scene, options, default=model.tile)
    shape = (-(-scene.height // stride), -(-scene.width // stride))
    reach = -(-tile // stride) + 1
    mosaic = Mosaic(len(model.classes), *shape, reach=2 * reach)
    path = work / f"{scene.name}_probability.tif"
    raster = Raster(
        path, scene, cell=stride, shape=(len(model.classes), *shape), dtype="float32", names=model.classes,
        tags=_tags(model, TILE=str(tile), STRIDE=str(stride)),
    )  # fmt: skip
    thumbnail = Thumbnail(scene.height, scene.width, model.bands)
    table = TileTable(work / f"{scene.name}_tiles.csv", scene, ["classes", *model.classes])
    result = np.full((len(model.classes), *shape), np.nan, dtype=np.float32)
    count, mean = 0, np.zeros(len(model.classes))
    progress = Progress(len(rows), title=scene.name)
    try:
        for number, (row, strip, new) in enumerate(source.strips(rows, tile)):
            thumbnail.add(new, strip[:, new - row :, : scene.width])
            top, tall = overlaps(row, tile, stride, shape[0])
            for some, shares, images in _tiles(strip, columns, tile, options.least, options.batch_size):
                scores = model.scores(images).cpu().numpy()
                places, lines = [], []
                for column, share, values in zip(some, shares, scores, strict=True):
                    left, wide = overlaps(column, tile, stride, shape[1])
                    mosaic.add(top, left, values.astype(np.float32)[:, None, None], np.outer(tall, wide))
                    places.append((row, column, min(tile, scene.height), min(tile, scene.width)))
                    lines.append([share, _names(model, values, exclusive=task.exclusive), *values.tolist()])
                table.add(places, lines)
                count, mean = count + len(some), mean + scores.sum(axis=0)
            until = rows[number + 1] // stride if number + 1 < len(rows) else shape[0]
            begin, block = mosaic.finish(until)
            raster.write(begin, block)
            result[:, begin : begin + block.shape[1]] = block
            progress.update(number + 1)
        raster.close()
    finally:
        raster.abandon()
        table.close()
        progress.close()
    if not count:
        raise _nothing(scene, options)
    classification_figure(
        work / f"{scene.name}_quicklook.png", thumbnail, result, model.classes, cell=stride,
        metres=pixel_size_m(scene), title=f"{scene.name}: {model.settings.name}, {count:,} tiles of {tile} px",
        exclusive=task.exclusive,
    )  # fmt: skip
    average = dict(zip(model.classes, (mean / count).tolist(), strict=True))
    return {"tile": tile, "stride": stride, "tiles": count, "mean_probability": average}


def _names(model: Pretrained, values: NDArray[Any], *, exclusive: bool) -> str:
    """The classes that a tile is said to have."""
    if exclusive:
        return model.classes[int(values.argmax())]
    return "; ".join(name for name, value in zip(model.classes, values, strict=True) if value > 0.5)


def _predict_pixels(model: Pretrained, sources: list[Source], work: Path, options: Options) -> dict[str, Any]:
    """Segmentation: overlapping windows, blended probabilities, a class for each valid pixel."""
    (source,) = sources
    scene, count = source.scene, len(model.classes)
    tile, stride, rows, columns = _geometry(model, scene, options, default=max(1, model.tile // 2))
    mosaic = Mosaic(count, scene.height, scene.width, reach=2 * tile)
    thumbnail = Thumbnail(scene.height, scene.width, model.bands)
    chances = Thumbnail(scene.height, scene.width, model.classes)
    weights = blend_weights(tile)
    valid = np.zeros((min(2 * tile, scene.height), scene.width), dtype=bool)  # rows that are not written yet
    written = 0
    areas = np.zeros(count, dtype=np.int64)
    shape = (scene.height, scene.width)
    tags = _tags(model, TILE=str(tile), STRIDE=str(stride))
    colours = {number: (*_rgb(colour), 255) for number, colour in enumerate(class_colours(model.classes))}
    rasters = [
        Raster(work / f"{scene.name}_classes.tif", scene, cell=1, shape=(1, *shape), dtype="uint8",
               names=["; ".join(f"{number} {name}" for number, name in enumerate(model.classes))],
               tags=tags, colours=colours)
    ]  # fmt: skip
    if options.probabilities:
        path = work / f"{scene.name}_probability.tif"
        rasters.append(
            Raster(path, scene, cell=1, shape=(count, *shape), dtype="float32", names=model.classes, tags=tags)
        )
    windows = 0
    progress = Progress(len(rows), title=scene.name)
    try:
        for number, (row, strip, new) in enumerate(source.strips(rows, tile)):
            fresh = strip[:, new - row :, : scene.width][:, : scene.height - new]
            thumbnail.add(new, fresh)
            valid[new - written : new - written + fresh.shape[1]] = np.isfinite(fresh).all(axis=0)
            # A window with a single valid pixel counts: each valid pixel gets a class.
            for some, _, images in _tiles(strip, columns, tile, 0.0, max(1, options.batch_size // 8)):
                scores = model.scores(images)  # (B, K, S, S)
                if scores.shape[-1] != tile:
                    scores = F.interpolate(scores, size=(tile, tile), mode="bilinear", align_corners=False)
                for column, values in zip(some, scores.float().cpu().numpy(), strict=True):
                    mosaic.add(row, column, values, weights)
                windows += len(some)
            until = rows[number + 1] if number + 1 < len(rows) else scene.height
            begin, block = mosaic.finish(until)
            good = valid[: block.shape[1]]
            block[:, ~good] = np.nan
            classes = np.full(good.shape, NO_CLASS, dtype=np.uint8)
            known = good & np.isfinite(block).all(axis=0)
            classes[known] = block[:, known].argmax(axis=0)
            areas += np.bincount(classes[known], minlength=count)
            rasters[0].write(begin, classes[None])
            for raster in rasters[1:]:
                raster.write(begin, block)
            chances.add(begin, block)
            valid[: len(valid) - block.shape[1]] = valid[block.shape[1] :].copy()
            written = begin + block.shape[1]
            progress.update(number + 1)
        for raster in rasters:
            raster.close()
    finally:
        for raster in rasters:
            raster.abandon()
        progress.close()
    if not areas.sum():
        raise _nothing(scene, options)
    segmentation_figure(
        work / f"{scene.name}_quicklook.png", thumbnail, chances.image(), model.classes, areas=areas,
        metres=pixel_size_m(scene), title=f"{scene.name}: {model.settings.name}, {tile} px windows every {stride} px",
    )  # fmt: skip
    share = (areas / areas.sum()).tolist()
    return {
        "tile": tile,
        "stride": stride,
        "tiles": windows,
        "pixels": dict(zip(model.classes, areas.tolist(), strict=True)),
        "share": dict(zip(model.classes, share, strict=True)),
    }


def _rgb(colour: str) -> tuple[int, int, int]:
    from matplotlib.colors import to_rgb

    red, green, blue = (round(255 * value) for value in to_rgb(colour))
    return red, green, blue


def _predict_pair(model: Pretrained, sources: list[Source], work: Path, options: Options) -> dict[str, Any]:
    """Flood or no flood from two dates.

    The model cuts a window (as large as a training sample) into tiles, and says from the mean (or maximum) of the
    tiles' feature differences whether there is a flood. "Window" is that probability, as trained. "Tile" is the head
    on the difference of one tile alone: for the mean, a window's logit is the mean of its tiles' logits, so this says
    which tiles speak for a flood. "Scene" pools over all tiles.
    """
    scene, network = sources[0].scene, model.model
    pools_mean = getattr(network, "patch_op", "avg") == "avg"
    tile, stride, rows, columns = _geometry(model, scene, options, default=model.tile)
    per_side = model.settings.input_size // PAIR_TILE
    # One tile is the window itself; legacy "tiles" are no squares of one place.
    with_tiles = per_side > 1 and not getattr(network, "legacy_tiling", False)
    part = tile / per_side  # side of a tile, px of the scene
    cell = round(part) if with_tiles else stride
    shape = (-(-scene.height // cell), -(-scene.width // cell))
    names = ["P(flood) of the window"] + (["P(flood) of the tile"] if with_tiles else [])
    reach = 2 * (-(-tile // cell) + 1)
    mosaics = [Mosaic(1, *shape, reach=reach) for _ in names]
    raster = Raster(
        work / f"{scene.name}_flood.tif", scene, cell=cell, shape=(len(names), *shape), dtype="float32", names=names,
        tags=_tags(model, SECOND=sources[1].scene.name, WINDOW=str(tile), STRIDE=str(stride)),
    )  # fmt: skip
    thumbnails = [Thumbnail(scene.height, scene.width, model.bands) for _ in sources]
    table = TileTable(work / f"{scene.name}_tiles.csv", scene, ["kind", "probability_flood"])
    result = np.full((len(names), *shape), np.nan, dtype=np.float32)
    pooled: Tensor | None = None
    weight, windows, flooded, highest = 0.0, 0, 0, 0.0
    progress = Progress(len(rows), title=scene.name)
    try:
        strips = zip(*(one.strips(rows, tile) for one in sources), strict=True)
        for number, ((row, first, new), (_, second, _)) in enumerate(strips):
            for thumbnail, strip in zip(thumbnails, (first, second), strict=True):
                thumbnail.add(new, strip[:, new - row :, : scene.width])
            both = np.concatenate([first, second])  # valid where both dates are
            size = max(1, options.batch_size // (2 * per_side**2))
            for some, shares, images in _tiles(both, columns, tile, options.least, size):
                one, two = images.chunk(2, dim=1)
                shares_of_tiles = _shares(images, per_side)  # (B, per_side ** 2)
                use = shares_of_tiles >= options.least
                use[use.sum(axis=1) == 0] = True  # the window has enough valid pixels, spread over its tiles
                if not with_tiles:
                    use[:] = True
                difference, by_tile, by_window = _compare_tiles(model, one, two, use, pools_mean)
                places: list[tuple[float, float, float, float]] = []
                lines: list[list[Any]] = []
                for index, column in enumerate(some):
                    top, tall = overlaps(row, tile, cell, shape[0])
                    left, wide = overlaps(column, tile, cell, shape[1])
                    value = by_window[index]
                    mosaics[0].add(top, left, np.full((1, 1, 1), value, np.float32), np.outer(tall, wide))
                    places.append((row, column, min(tile, scene.height), min(tile, scene.width)))
                    lines.append([shares[index], "window", float(value)])
                    for inside in range(per_side**2 if with_tiles else 0):
                        if not use[index, inside]:
                            continue
                        y = row + part * (inside // per_side)
                        x = column + part * (inside % per_side)
                        top, tall = overlaps(y, part, cell, shape[0])
                        left, wide = overlaps(x, part, cell, shape[1])
                        chance = by_tile[index, inside]
                        mosaics[1].add(top, left, np.full((1, 1, 1), chance, np.float32), np.outer(tall, wide))
                        places.append((y, x, part, part))
                        lines.append([float(shares_of_tiles[index, inside]), "tile", float(chance)])
                table.add(places, lines)
                windows += len(some)
                flooded += int((by_window > 0.5).sum())
                highest = max(highest, float(by_window.max()))
                # The last window of a line overlaps its neighbour; what was there before is not counted twice.
                factor = _fresh(row, some, rows, columns, tile, per_side, number) * use
                chosen = torch.from_numpy(factor.astype(np.float32)).to(difference.device)
                if pools_mean:
                    total = (difference * chosen[:, :, None]).sum(dim=(0, 1))
                    pooled = total if pooled is None else pooled + total
                    weight += float(factor.sum())
                else:
                    top_features = difference[torch.from_numpy(use).to(difference.device)].amax(dim=0)
                    pooled = top_features if pooled is None else torch.maximum(pooled, top_features)
                    weight = 1.0
            until = rows[number + 1] // cell if number + 1 < len(rows) else shape[0]
            blocks = [mosaic.finish(until) for mosaic in mosaics]
            block = np.concatenate([values for _, values in blocks])
            raster.write(blocks[0][0], block)
            result[:, blocks[0][0] : blocks[0][0] + block.shape[1]] = block
            progress.update(number + 1)
        raster.close()
    finally:
        raster.abandon()
        table.close()
        progress.close()
    if pooled is None:
        raise _nothing(scene, options)
    with torch.no_grad():
        logits = network.apply_head((pooled / weight)[None])  # type: ignore[operator]
    chance = float(model.probabilities(logits.double())[0, FLOOD])
    flood_figure(
        work / f"{scene.name}_quicklook.png", thumbnails, result, names, cell=cell, metres=pixel_size_m(scene),
        dates=[one.scene.name for one in sources], probability_scene=chance,
        title=f"{scene.name}: {model.settings.name}",
    )  # fmt: skip
    return {
        "second": sources[1].scene.name,
        "window": tile,
        "tile": part if with_tiles else None,
        "stride": stride,
        "windows": windows,
        "probability_flood": chance,
        "highest_window": highest,
        "share_of_windows_with_flood": flooded / windows,
    }


def _shares(images: Tensor, per_side: int) -> NDArray[np.float64]:
    """Share of valid pixels of each tile of each window, (B, tiles)."""
    good = torch.isfinite(images).all(dim=1, keepdim=True).float()
    return F.adaptive_avg_pool2d(good, per_side).flatten(1).double().numpy()


@torch.no_grad()
def _compare_tiles(
    model: Pretrained, one: Tensor, two: Tensor, use: NDArray[np.bool_], pools_mean: bool
) -> tuple[Tensor, NDArray[Any], NDArray[Any]]:
    """Feature differences (B, tiles, D), probability of flood of each tile (B, tiles) and of each window (B,)."""
    network: Any = model.model
    first, second = model.inputs(one, two)
    difference = (network.encode_image(first) - network.encode_image(second)).abs()
    chosen = torch.from_numpy(use).to(difference.device)[:, :, None]
    if pools_mean:
        window = (difference * chosen).sum(dim=1) / chosen.sum(dim=1)
    else:
        window = difference.masked_fill(~chosen, -torch.inf).amax(dim=1)

    def flood(features: Tensor) -> Tensor:
        return model.probabilities(network.apply_head(features).double())[:, FLOOD]

    by_tile = flood(difference.flatten(0, 1)).view(difference.shape[:2])
    return difference, by_tile.cpu().numpy(), flood(window).cpu().numpy()


def _fresh(
    row: int, some: Sequence[int], rows: Sequence[int], columns: Sequence[int], tile: int, per_side: int, number: int
) -> NDArray[np.float64]:
    """Share of each tile of each window that no earlier window covered, (B, tiles)."""

    def new(start: int, before: int) -> NDArray[np.float64]:
        part = tile / per_side
        edges = np.clip(start + part * np.arange(per_side + 1), max(before, start), None)
        return np.diff(edges) / part

    down = new(row, rows[number - 1] + tile if number else row)
    out = []
    for column in some:
        place = columns.index(column)
        out.append(np.outer(down, new(column, columns[place - 1] + tile if place else column)).ravel())
    return np.array(out)
