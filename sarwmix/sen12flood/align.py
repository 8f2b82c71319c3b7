"""Read, check and warp the Sentinel-1 tiles of one sequence onto its Sentinel-2 grid.

Each tile is read once and each aligned image is written once, into its row of one preallocated file. VV and VH of an
acquisition nearly always share their pixel grid and are then warped in one call, which computes coordinates once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.data.io.geotiff import GeoTiffError, open_raster
from sarwmix.sen12flood.grid import LONLAT, Grid, find_grid
from sarwmix.sen12flood.metadata import Frame, Problem, SequenceInfo
from util.errors import UserError

BANDS = ("VH", "VV")
WARPERS = ("rasterio", "gdal")
TOLERANCE = 0.125  # source pixels; GDAL's own default for the approximation of coordinates along a row
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
Warp = Callable[[np.ndarray, Any, Grid, str, bool], np.ndarray]


class TileError(Exception):
    """A tile that cannot be used.

    Attributes:
        kind: Short machine-readable reason.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Tile:
    """One band of one acquisition as stored.

    Attributes:
        pixels: float32 (H, W), linear power; declared no-data is NaN, everything else is finite and >= 0.
        transform: Affine map of (column, row) to (longitude, latitude).
    """

    pixels: np.ndarray
    transform: Any


@dataclass(frozen=True)
class AlignOptions:
    """What decides the pixels of an aligned image.

    Attributes:
        size: Rows and columns that an image must have.
        warper: ``"rasterio"`` or ``"gdal"``.
        resampling: ``"nearest"``, ``"bilinear"`` or ``"average"``. No cubic or Lanczos: they overshoot, and negative
            power has no decibel value.
        max_zeros: An image with this fraction of zeros or more in a channel can be in no pair and is not written.
    """

    size: int = 512
    warper: str = "rasterio"
    resampling: str = "nearest"
    max_zeros: float = 0.25


@dataclass(frozen=True)
class SequenceTask:
    """Work on one sequence.

    Attributes:
        sequence: Folder and frames.
        root: The raw root; tiles lie in ``root/<folder>``.
        rows: Row of each frame in the image file; -1: checked, but in no pair and therefore not written.
    """

    sequence: SequenceInfo
    root: str
    rows: tuple[int, ...]


@dataclass
class AlignedFrame:
    """Outcome for one frame.

    Attributes:
        product: The frame's product name.
        status: ``"aligned"``, ``"bad"`` (a problem is listed) or ``"other size"``.
        row: Row in the image file, or -1 when nothing was written.
        zeros: Fraction of zeros in VH and in VV.
        crc32: Checksum of the row's bytes.
    """

    product: str
    status: str
    row: int = -1
    zeros: tuple[float, float] = (0.0, 0.0)
    crc32: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "product": self.product,
            "status": self.status,
            "row": self.row,
            "zeros": list(self.zeros),
            "crc32": self.crc32,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AlignedFrame:
        zeros = (float(values["zeros"][0]), float(values["zeros"][1]))
        return cls(str(values["product"]), str(values["status"]), int(values["row"]), zeros, int(values["crc32"]))


@dataclass
class AlignedSequence:
    """Outcome for one sequence: its grid, one entry a frame in the order of the frames, and what was wrong."""

    folder: str
    grid: dict[str, Any] | None
    frames: list[AlignedFrame] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0  # tiles in the folder that S1list.json does not name


def tile_path(folder: Path, product: str, band: str) -> Path:
    """``<folder>/<product>_corrected_<band>.tif``."""
    return folder / f"{product}_corrected_{band}.tif"


def read_tile(path: Path) -> Tile:
    """Read one band and check it.

    Raises:
        TileError: Missing, truncated, not one band, not EPSG:4326, NaN, infinite or negative power.
    """
    try:
        with open_raster(path) as source:
            if source.count != 1:
                raise TileError("wrong bands", f"has {source.count} bands, expected 1; replace the file")
            crs, transform, nodata = source.crs, source.transform, source.nodata
            pixels = source.read(1)
    except GeoTiffError as error:
        if not path.exists():
            raise TileError("missing file", "does not exist; expected it beside the other band; restore it") from None
        raise TileError("unreadable", f"{error}; expected a whole GeoTIFF; download or unzip it again") from error
    if crs is None or crs.to_epsg() != 4326:
        name = "no coordinate system" if crs is None else crs.to_string()[:60]
        raise TileError("wrong CRS", f"is in {name}, expected {LONLAT}; replace the file by the original tile")
    if np.iscomplexobj(pixels):
        raise TileError("wrong type", f"holds {pixels.dtype} values, expected float32 linear power")
    pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    if nodata is not None and nodata != 0:
        pixels[np.isnan(pixels) if np.isnan(nodata) else pixels == np.float32(nodata)] = np.nan
        checked = pixels[~np.isnan(pixels)] if np.isnan(pixels).any() else pixels
    else:
        checked = pixels
    # NaN propagates through min and max, so two passes see NaN, infinities and negative values.
    low, high = (float(checked.min()), float(checked.max())) if checked.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(checked.size - np.isfinite(checked).sum())
        raise TileError(
            "not finite", f"holds {count} NaN or infinite pixels, expected linear power >= 0; replace the file"
        )
    if low < 0:
        count = int((checked < 0).sum())
        raise TileError(
            "negative power",
            f"holds {count} negative pixels (minimum {low:g}), expected linear power >= 0; is the tile in decibel? "
            "Replace it by the original",
        )
    return Tile(pixels, transform)


def _overlaps(tile: Tile, lonlat: tuple[float, float, float, float]) -> bool:
    """Whether the tile's footprint touches the grid's, both as rectangles in degrees."""
    height, width = tile.pixels.shape
    x0, y0 = tile.transform @ (0, 0)
    x1, y1 = tile.transform @ (width, height)
    west, south, east, north = lonlat
    return min(x0, x1) < east and max(x0, x1) > west and min(y0, y1) < north and max(y0, y1) > south


def warp_rasterio(pixels: np.ndarray, transform: Any, grid: Grid, resampling: str, masked: bool) -> np.ndarray:
    """Warp (C, H, W) from EPSG:4326 onto the grid with the GDAL inside rasterio. Uncovered pixels are 0.

    Args:
        pixels: float32 (C, H, W).
        transform: Affine map of the source.
        grid: Target.
        resampling: ``"nearest"``, ``"bilinear"`` or ``"average"``. No cubic or Lanczos: they overshoot, and negative
            power has no decibel value.
        masked: Whether NaN marks source pixels without data; they then take no part.
    """
    from rasterio.enums import Resampling
    from rasterio.warp import reproject

    out = np.zeros((len(pixels), grid.height, grid.width), dtype=np.float32)
    nodata = {"src_nodata": np.nan, "dst_nodata": np.nan} if masked else {}
    reproject(
        pixels,
        out,
        src_transform=transform,
        src_crs=LONLAT,
        dst_transform=grid.transform,
        dst_crs=grid.crs,
        resampling=Resampling[resampling],
        tolerance=TOLERANCE,
        num_threads=1,
        **nodata,
    )
    return out


def warp_gdal(pixels: np.ndarray, transform: Any, grid: Grid, resampling: str, masked: bool) -> np.ndarray:
    """The same with the system's GDAL bindings (``osgeo``)."""
    from osgeo import gdal, osr

    gdal.UseExceptions()
    bands, height, width = pixels.shape
    source = gdal.GetDriverByName("MEM").Create("", width, height, bands, gdal.GDT_Float32)
    source.SetGeoTransform(transform.to_gdal())
    lonlat = osr.SpatialReference()
    lonlat.SetFromUserInput(LONLAT)
    lonlat.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
    source.SetSpatialRef(lonlat)
    for band in range(bands):
        source.GetRasterBand(band + 1).WriteArray(pixels[band])
    nodata = {"srcNodata": "nan", "dstNodata": "nan"} if masked else {}
    warped = gdal.Warp(
        "",
        source,
        format="MEM",
        outputBounds=grid.bounds,
        width=grid.width,
        height=grid.height,
        dstSRS=grid.crs,
        resampleAlg="near" if resampling == "nearest" else resampling,
        errorThreshold=TOLERANCE,
        **nodata,
    )
    return warped.ReadAsArray().reshape(bands, grid.height, grid.width)


def get_warper(name: str) -> Warp:
    """The warp function of a name.

    Raises:
        UserError: Unknown, or the bindings are not installed.
    """
    if name == "rasterio":
        return warp_rasterio
    if name == "gdal":
        try:
            from osgeo import gdal, gdal_array  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--warper gdal needs the Python bindings of the system's GDAL ({error}); install libgdal-dev and then "
                'pip install --no-build-isolation "gdal==$(gdal-config --version)", or use --warper rasterio'
            ) from error
        return warp_gdal
    raise UserError(f"unknown warper {name!r}; expected one of {', '.join(WARPERS)}")


def align_frame(tiles: list[Tile], grid: Grid, options: AlignOptions) -> np.ndarray:
    """Warp VH and VV onto the grid.

    Returns:
        float32 (2, height, width), VH then VV, linear power, uncovered pixels 0.
    """
    warp = get_warper(options.warper)
    # With nearest neighbour a pixel without data is copied like any other, so zeros can stand for it right away.
    # Interpolation must not blend such pixels, nor the zeros at the border of a swath, into their neighbours.
    masked = options.resampling != "nearest"
    prepared = []
    for tile in tiles:
        pixels = tile.pixels
        if masked:
            pixels = np.where(pixels == 0, np.float32(np.nan), pixels)
        elif np.isnan(pixels).any():
            pixels = np.nan_to_num(pixels, nan=0.0)
        prepared.append(pixels)
    same = tiles[0].transform == tiles[1].transform and prepared[0].shape == prepared[1].shape
    if same and not masked:
        image = warp(np.stack(prepared), tiles[0].transform, grid, options.resampling, False)
    else:
        image = np.concatenate(
            [
                warp(pixels[None], tile.transform, grid, options.resampling, masked)
                for pixels, tile in zip(prepared, tiles, strict=True)
            ]
        )
    if masked:
        image = np.nan_to_num(image, nan=0.0)
    return image


def align_sequence(task: SequenceTask, options: AlignOptions, images: str, offset: int) -> AlignedSequence:
    """Align all frames of one sequence and write them into their rows.

    Args:
        task: The sequence, where its tiles lie, and the row of each frame.
        options: Warper, resampling, size.
        images: The image file, opened for writing in place; rows are (2, size, size) float32.
        offset: Byte at which row 0 begins.

    Returns:
        The outcome; problems never raise, a full disk does (OSError).
    """
    import rasterio

    sequence = task.sequence
    folder = Path(task.root) / sequence.folder
    if not folder.is_dir():
        problem = Problem(
            "missing folder",
            sequence.folder,
            f"folder {folder} does not exist; expected the tiles of {len(sequence.frames)} frames; unzip it again",
        )
        return AlignedSequence(
            sequence.folder, None, [AlignedFrame(f.product, "bad") for f in sequence.frames], [problem]
        )
    present = sorted(os.listdir(folder))
    with rasterio.Env(GDAL_CACHEMAX=64, **GDAL_OPTIONS):
        b04 = [folder / name for name in present if name.startswith("S2_") and name.endswith("_B04.tif")]
        grid, problems = find_grid(sequence.folder, b04, sequence.polygon, options.size)
        result = AlignedSequence(sequence.folder, None if grid is None else grid.as_dict(), problems=problems)
        result.unlisted = _count_unlisted(sequence, present)
        if grid is None:
            result.frames = [AlignedFrame(f.product, "bad") for f in sequence.frames]
            return result
        lonlat = grid.lonlat_bounds()
        names = set(present)
        file = os.open(images, os.O_WRONLY)
        try:
            for frame, row in zip(sequence.frames, task.rows, strict=True):
                result.frames.append(
                    _align_one(folder, frame, row, grid, lonlat, names, options, file, offset, problems)
                )
        finally:
            os.close(file)
    return result


def _count_unlisted(sequence: SequenceInfo, present: list[str]) -> int:
    listed = {tile_path(Path(), frame.product, band).name for frame in sequence.frames for band in BANDS}
    return sum(1 for name in present if "_corrected_V" in name and name.endswith(".tif") and name not in listed)


def _align_one(
    folder: Path,
    frame: Frame,
    row: int,
    grid: Grid,
    lonlat: tuple[float, float, float, float],
    present: set[str],
    options: AlignOptions,
    file: int,
    offset: int,
    problems: list[Problem],
) -> AlignedFrame:
    paths = [tile_path(folder, frame.product, band) for band in BANDS]
    missing = [path for path in paths if path.name not in present]
    if missing:
        kind = "missing frame" if len(missing) == len(paths) else f"{BANDS[paths.index(missing[0])]} missing"
        message = (
            "neither VV nor VH tile exists; expected both; unzip the folder again, or remove the frame from the JSON"
            if len(missing) == len(paths)
            else f"{missing[0].name} does not exist although the other band does; expected both; unzip the folder again"
        )
        problems.append(Problem(kind, f"{folder.name}/{frame.product}", message))
        return AlignedFrame(frame.product, "bad")
    tiles = []
    for path in paths:
        try:
            tile = read_tile(path)
            if not _overlaps(tile, lonlat):
                raise TileError(
                    "no overlap",
                    f"does not touch the grid of {grid.origin}; expected a tile of this place; replace the file",
                )
        except TileError as error:
            problems.append(Problem(error.kind, f"{folder.name}/{path.name}", str(error)))
            return AlignedFrame(frame.product, "bad")
        tiles.append(tile)
    image = align_frame(tiles, grid, options)
    # Verify before anything is written: the grid's shape, and real numbers everywhere.
    expected = (len(BANDS), grid.height, grid.width)
    if image.shape != expected or not (np.isfinite(image.min()) and np.isfinite(image.max())):
        problems.append(
            Problem(
                "bad warp",
                f"{folder.name}/{frame.product}",
                f"the warped image has shape {image.shape} or is not finite; expected {expected}; report this tile",
            )
        )
        return AlignedFrame(frame.product, "bad")
    zeros = tuple(1.0 - np.count_nonzero(band) / band.size for band in image)
    result = AlignedFrame(frame.product, "aligned", zeros=(zeros[0], zeros[1]))
    if (grid.height, grid.width) != (options.size, options.size):
        result.status = "other size"
    elif row >= 0 and max(zeros) < options.max_zeros:
        data = image.data.cast("B")
        write_at(file, data, offset + row * len(data))
        result.row = row
        result.crc32 = zlib.crc32(data)
    return result


def write_at(file: int, data: memoryview, position: int) -> None:
    """Write all of ``data`` at ``position``; a short write (disk nearly full) is continued until it fails or ends."""
    while len(data):
        written = os.pwrite(file, data, position)
        data = data[written:]
        position += written
