"""Images with several bands and label maps, read with rasterio: bands by name, no-data as NaN, grids compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.data.io.geotiff import GeoTiffError, open_raster
from sarwmix.data.spec import SAR_BANDS

SAME_PIXEL = 0.5
"""Grids may lie this far apart, in pixels: coordinates are rounded differently by different writers."""


@dataclass(frozen=True)
class Grid:
    """Where pixels lie.

    Attributes:
        height: Rows.
        width: Columns.
        crs: WKT, "" when there is none.
        transform: (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f.
    """

    height: int
    width: int
    crs: str
    transform: tuple[float, ...]

    def difference(self, other: Grid) -> str | None:
        """In words how another grid differs, or None when it is the same."""
        if (self.height, self.width) != (other.height, other.width):
            return f"{self.height}x{self.width} pixels against {other.height}x{other.width}"
        if not self.crs or not other.crs:
            return None  # plain pixels, such as PNG
        if not same_crs(self.crs, other.crs):
            return f"coordinate system {self.crs[:60]} against {other.crs[:60]}"
        pixel = max(
            abs(value) for value in (self.transform[0], self.transform[1], self.transform[3], self.transform[4])
        )
        for row, column in ((0, 0), (0, self.width), (self.height, 0)):
            x, y = self._place(row, column)
            u, v = other._place(row, column)
            if max(abs(x - u), abs(y - v)) > SAME_PIXEL * pixel:
                return f"corner at {x:.8g}, {y:.8g} against {u:.8g}, {v:.8g}"
        return None

    def _place(self, row: int, column: int) -> tuple[float, float]:
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f


def same_crs(first: str, second: str) -> bool:
    """Whether two coordinate systems in WKT are the same, however they are written; "" (none) equals only itself."""
    if first == second or not first or not second:
        return first == second
    from rasterio.crs import CRS

    return CRS.from_wkt(first) == CRS.from_wkt(second)


@dataclass(frozen=True)
class Raster:
    """Pixels with their grid.

    Attributes:
        values: (C, H, W), as stored.
        valid: bool (C, H, W), False at declared no-data and masked pixels.
        names: Band descriptions, "" where there is none.
        grid: Where they lie.
    """

    values: np.ndarray
    valid: np.ndarray
    names: tuple[str, ...]
    grid: Grid

    def floats(self) -> np.ndarray:
        """float32 (C, H, W), NaN at no-data; a scale or offset that is declared has been applied."""
        out = self.values.astype(np.float32)
        out[~self.valid] = np.nan
        return out


def read_raster(path: str | Path, *, numbers: Sequence[int] | None = None) -> Raster:
    """Read all bands, or some by number (from 1).

    Raises:
        GeoTiffError: The file is missing, truncated, or lacks a band.
    """
    with open_raster(path) as source:
        chosen = list(numbers) if numbers is not None else list(range(1, source.count + 1))
        if max(chosen) > source.count:
            raise GeoTiffError(f"has {source.count} band(s), band {max(chosen)} is needed")
        if any("complex" in source.dtypes[k - 1] for k in chosen):
            raise GeoTiffError(f"holds {source.dtypes[chosen[0] - 1]} values, expected real numbers")
        values = source.read(chosen)
        valid = source.read_masks(chosen) != 0
        scales = np.array([source.scales[k - 1] for k in chosen])[:, None, None]
        offsets = np.array([source.offsets[k - 1] for k in chosen])[:, None, None]
        names = tuple(source.descriptions[k - 1] or "" for k in chosen)
        crs = source.crs.to_wkt() if source.crs else ""
        grid = Grid(source.height, source.width, crs, tuple(source.transform)[:6])
    if not ((scales == 1) & (offsets == 0)).all():
        values = values * scales + offsets
    return Raster(values, valid, names, grid)


def plain_band_name(text: str) -> str | None:
    """The band that a description names: ``"VV"``, ``"B1"`` and ``"Sigma0_VV_dB"`` -> VV, B01, VV; None: no band."""
    found = []
    for word in re.split(r"[^A-Za-z0-9]+", text.upper()):
        if word in SAR_BANDS:
            found.append(word)
        elif match := re.fullmatch(r"B(\d{1,2}A?)", word):
            number = match.group(1)
            found.append("B8A" if number in ("8A", "08A") else f"B{int(number):02d}" if number.isdigit() else word)
    return found[0] if len(set(found)) == 1 else None


def band_numbers(names: Sequence[str], wanted: Sequence[str], order: Sequence[str]) -> list[int]:
    """Positions (from 0) of bands in a file: by its descriptions, or by the order that the data set is known to have.

    Args:
        names: Descriptions of the file's bands.
        wanted: Bands that are needed.
        order: Bands of a file without descriptions.

    Raises:
        GeoTiffError: A band is missing, or the file has another number of bands and no names.
    """
    known = [plain_band_name(name) for name in names]
    if any(known):
        missing = [band for band in wanted if band not in known]
        if missing:
            described = ", ".join(repr(name) for name in names)
            raise GeoTiffError(f"has no band {', '.join(missing)}; its bands are described as {described}")
        return [known.index(band) for band in wanted]
    if len(names) != len(order):
        raise GeoTiffError(
            f"has {len(names)} band(s) without names, expected {len(order)}: {', '.join(order)} in this order"
        )
    return [list(order).index(band) for band in wanted]


def map_labels(label: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Label values to class numbers.

    Args:
        label: Integer (H, W).
        table: Value in the file -> class number, 255 for ignored.

    Returns:
        uint8 (H, W).

    Raises:
        GeoTiffError: A value is not in the table.
    """
    values, places = np.unique(label, return_inverse=True)
    wrong = [value for value in values.tolist() if value not in table]
    if wrong:
        known = sorted(table)
        raise GeoTiffError(
            f"holds the label value(s) {', '.join(f'{value:g}' for value in wrong[:8])}; "
            f"expected {', '.join(map(str, known))}"
        )
    return np.array([table[int(value)] for value in values.tolist()], dtype=np.uint8)[places].reshape(label.shape)


def check_same_grid(image: Grid, label: Grid, label_path: str | Path) -> None:
    """Refuse a label map that does not lie on its image.

    Raises:
        GeoTiffError: Size, coordinate system or place differ.
    """
    difference = image.difference(label)
    if difference:
        raise GeoTiffError(f"image and label {label_path} have different grids: {difference}")


def blocks_of(paths: Iterable[str | Path], *, side: float = 10_000.0) -> list[str] | None:
    """Square of the ground that each image's upper left corner lies in; neighbours resemble each other.

    Args:
        paths: Rasters; only their headers are read.
        side: Of a square, in metres; coordinates in degrees count 111 km each, in both directions.

    Returns:
        Coordinate system and number of the square for each image; None where one of them does not say where it lies.
    """
    found = []
    for path in paths:
        try:
            with open_raster(path, whole=False) as source:
                if source.crs is None or source.transform.is_identity:
                    return None
                unit = side / 111_000 if source.crs.is_geographic else side
                place = (source.transform.c // unit, source.transform.f // unit)
                found.append(f"{source.crs.to_epsg()}_{place[0]:.0f}_{place[1]:.0f}")
        except GeoTiffError:
            return None  # whoever reads the pixels says what is wrong
    return found


def list_files(folder: Path, suffix: str = ".tif") -> list[Path]:
    """Files of a folder with a suffix, sorted, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix and not path.name.startswith("."))


def held_out(count: int, share: float, *, seed: int) -> np.ndarray:
    """Which of `count` samples are held out: bool (count,), at least one of them and at most all but one.

    The choice depends on seed and count alone.
    """
    number = min(max(1, round(count * share)), max(count - 1, 0))
    out = np.zeros(count, dtype=bool)
    out[np.random.default_rng([seed, 0x5EED]).permutation(count)[:number]] = True
    return out


def fraction(name: str, value: Any) -> float | None:
    """An option that is a share above 0 and below 1, or None.

    Raises:
        UserError: It is something else.
    """
    from util.errors import UserError

    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1:
        raise UserError(f"option {name} must be a share above 0 and below 1, not {value!r}")
    return number


def whole_number(name: str, value: Any) -> int:
    """An option that is a whole number of 0 or more.

    Raises:
        UserError: It is something else.
    """
    from util.errors import UserError

    if not str(value).isdecimal() or len(str(value)) > 18:
        raise UserError(f"option {name} must be a whole number of 0 or more, not {value!r}")
    return int(value)
