"""The pixel grid of a sequence: that of its Sentinel-2 B04 tiles, or rebuilt from the polygon in S1list.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarwmix.data.io.geotiff import GeoTiffError, open_raster
from sarwmix.sen12flood.metadata import Problem

PIXEL = 10.0  # metres
LONLAT = "EPSG:4326"
SQUARE_TOLERANCE = 1.0  # metres; the polygon's corners have 6 decimals of a degree, about 0.1 m


@dataclass(frozen=True)
class Grid:
    """A north-up pixel grid.

    Attributes:
        crs: Coordinate system, ``EPSG:<code>`` or WKT.
        left: Left edge (m).
        top: Upper edge (m).
        pixel: Pixel size (m).
        width: Columns.
        height: Rows.
        origin: The file it was read from, or ``"polygon"``.
    """

    crs: str
    left: float
    top: float
    pixel: float
    width: int
    height: int
    origin: str

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top (m)."""
        return self.left, self.top - self.height * self.pixel, self.left + self.width * self.pixel, self.top

    @property
    def transform(self) -> Any:
        """Affine map of (column, row) to (x, y)."""
        from rasterio.transform import from_origin

        return from_origin(self.left, self.top, self.pixel, self.pixel)

    def lonlat_bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in degrees."""
        from rasterio.warp import transform_bounds

        west, south, east, north = transform_bounds(self.crs, LONLAT, *self.bounds)
        return west, south, east, north

    def as_dict(self) -> dict[str, Any]:
        """For the table of sequences."""
        return {
            "crs": self.crs,
            "left": self.left,
            "top": self.top,
            "pixel": self.pixel,
            "width": self.width,
            "height": self.height,
            "origin": self.origin,
        }


class GridError(Exception):
    """No usable grid; the message says why."""


def read_grid(path: str | Path) -> Grid:
    """The grid of a Sentinel-2 tile, from its header alone.

    Raises:
        GridError: Unreadable, rotated, not in metres, or not of 10 m.
    """
    path = Path(path)
    try:
        with open_raster(path) as source:
            crs, transform, width, height = source.crs, source.transform, source.width, source.height
    except GeoTiffError as error:
        raise GridError(f"{path.name} {error}") from error
    if crs is None or not crs.is_projected:
        raise GridError(f"{path.name} has coordinate system {crs}; expected UTM")
    if transform.b or transform.d or transform.a != PIXEL or transform.e != -PIXEL:
        raise GridError(f"{path.name} has pixels {transform.a} x {-transform.e}; expected north-up pixels of {PIXEL} m")
    return Grid(_crs_name(crs), transform.c, transform.f, PIXEL, width, height, path.name)


def _crs_name(crs: Any) -> str:
    code = crs.to_epsg()
    return crs.to_wkt() if code is None else f"EPSG:{code}"


def grid_from_polygon(polygon: tuple[tuple[float, float], ...], size: int) -> Grid:
    """Rebuild the grid from a polygon (longitude, latitude) that is an exact square of ``size`` pixels in UTM.

    The zone is that of the centre, or a neighbour where the tile was cut in the zone next door: the one in which the
    corners make a square.

    Raises:
        GridError: No polygon, or no square of the wanted size in any of the zones.
    """
    from rasterio.warp import transform

    corners = list(dict.fromkeys(polygon))
    if len(corners) != 4:
        raise GridError(f"the polygon has {len(corners)} corners, expected 4")
    longitudes = [point[0] for point in corners]
    latitudes = [point[1] for point in corners]
    if not all(math.isfinite(v) for v in (*longitudes, *latitudes)) or max(map(abs, latitudes)) > 84:
        raise GridError("the polygon lies outside the range of UTM")
    centre = sum(longitudes) / 4
    zone = min(60, max(1, math.floor((centre + 180) / 6) + 1))
    hemisphere = 32600 if sum(latitudes) >= 0 else 32700
    side = size * PIXEL
    best: tuple[float, str, float, float] | None = None
    for candidate in (zone, zone - 1, zone + 1):
        for base in (hemisphere, 65300 - hemisphere):  # 32600 <-> 32700: a scene's tiles keep its hemisphere
            crs = f"EPSG:{base + (candidate - 1) % 60 + 1}"
            xs, ys = transform(LONLAT, crs, longitudes, latitudes)[:2]
            left = PIXEL * round(min(xs) / PIXEL)
            top = PIXEL * round(max(ys) / PIXEL)
            error = max(
                *(min(abs(x - left), abs(x - left - side)) for x in xs),
                *(min(abs(y - top), abs(y - top + side)) for y in ys),
            )
            if best is None or error < best[0] - 1e-6:
                best = (error, crs, left, top)
    assert best is not None
    error, crs, left, top = best
    if error > SQUARE_TOLERANCE:
        raise GridError(f"the polygon is no square of {side:.0f} m in UTM (corners are off by {error:.1f} m)")
    return Grid(crs, left, top, PIXEL, size, size, "polygon")


def find_grid(
    folder: str, tiles: list[Path], polygon: tuple[tuple[float, float], ...], size: int
) -> tuple[Grid | None, list[Problem]]:
    """The grid of a sequence: its first readable B04 tile, else its polygon.

    Args:
        folder: Id of the sequence.
        tiles: Its B04 tiles, sorted.
        polygon: Its polygon.
        size: Rows and columns of a grid that is rebuilt.

    Returns:
        The grid, or None where there is none, and what was wrong on the way. A missing B04 with a good polygon is no
        problem; the grid's ``origin`` then says ``"polygon"``.
    """
    problems: list[Problem] = []
    for tile in tiles:
        try:
            return read_grid(tile), problems
        except GridError as error:
            problems.append(
                Problem("bad B04", f"{folder}/{tile.name}", f"{error}; another B04 or the polygon is used; replace it")
            )
    try:
        return grid_from_polygon(polygon, size), problems
    except GridError as error:
        problems.append(
            Problem(
                "no grid",
                folder,
                f"no usable S2_<date>_B04.tif, and {error}; expected either; the sequence is left out; add a B04 tile",
            )
        )
        return None, problems
