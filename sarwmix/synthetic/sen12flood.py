"""Generate a small raw tree with the structure of SEN12-FLOOD, for tests and for a demonstration without a download.

What is as in the real data: file names, S1list.json, ids with four digits for train and fewer for test, Sentinel-1
tiles in EPSG:4326 with linear power, float32, one file a band, about as many pixels as the grid, pixel grids that
differ between orbits, swath edges that leave zeros; Sentinel-2 bands in UTM at 10 m.

What is invented: the scene. Land cover and relief are smooth random fields; low ground holds a lake in every image and
is under water in flooded ones, 6 to 10 dB darker. Soil moisture and wind change whole images by up to 0.8 dB, so that
neither a dark image nor a change as such means flood. Speckle is multiplicative, gamma distributed (Ulaby et al.).
"""

from __future__ import annotations

import datetime
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.sen12flood.grid import LONLAT, PIXEL, Grid
from sarwmix.sen12flood.metadata import S1LIST
from util.errors import UserError
from util.files import make_directory

DEGREES = 8.983152841195215e-05  # 10 m of latitude, the pixel of the real tiles
LOOKS = 5.0  # equivalent number of looks of the speckle
MARGIN = 24  # pixels by which a tile reaches beyond the grid
SITES = (
    (32736, 640_000, 7_820_000),
    (32639, 480_000, 3_450_000),
    (32755, 410_000, 7_870_000),
    (32630, 560_000, 610_000),
)
LAND_DB = {"VH": -17.5, "VV": -10.8}
LAKE_DB = {"VH": -27.0, "VV": -20.5}


@dataclass(frozen=True)
class DemoOptions:
    """Size of the generated tree.

    Attributes:
        train: Number of training sequences.
        test: Number of test sequences.
        frames: Acquisitions of each sequence; about three eighths show the flood.
        size: Rows and columns of the Sentinel-2 grid (512 in the real data).
        seed: Everything follows from it.
        swath_edges: Fraction of acquisitions whose swath ends inside the tile.
    """

    train: int = 8
    test: int = 4
    frames: int = 8
    size: int = 512
    seed: int = 0
    swath_edges: float = 0.15

    def __post_init__(self) -> None:
        if min(self.train, self.test) < 1 or not 1 <= self.frames <= 90 or self.size < 32:
            raise UserError(
                f"train and test need at least 1 sequence, frames 1 to 90, size at least 32; got {self.train}, "
                f"{self.test}, {self.frames}, {self.size}"
            )
        if not 0 <= self.swath_edges <= 1:
            raise UserError(f"swath_edges is a fraction between 0 and 1, got {self.swath_edges}")


@dataclass(frozen=True)
class Scene:
    """A generated place, on the Sentinel-2 grid enlarged by the margin on each side.

    Attributes:
        grid: The Sentinel-2 grid.
        cover: Land cover as an offset in dB.
        height: Relief, in no unit; low ground floods first.
        lake: Height below which there is always water.
        flood: Height below which there is water in a flooded image.
    """

    grid: Grid
    cover: np.ndarray
    height: np.ndarray
    lake: float
    flood: float


def generate(root: str | Path, options: DemoOptions) -> Path:
    """Write the tree.

    Args:
        root: Folder that is absent or empty.
        options: Its size.

    Returns:
        The root.

    Raises:
        UserError: The folder is not empty.
    """
    root = make_directory(root)
    if any(root.iterdir()):
        raise UserError(f"{root} is not empty; expected an absent or empty folder for the generated data")
    listing: dict[str, Any] = {}
    for number in range(options.train + options.test):
        # Ids as in the real data: "0001" and so on are train, "0", "1", ... test.
        train = number < options.train
        folder = f"{number + 1:04d}" if train else str(number - options.train)
        listing[folder] = _write_sequence(root / folder, folder, number, options)
    (root / S1LIST).write_text(json.dumps(listing), encoding="utf-8")
    return root


def make_zip(root: str | Path, path: str | Path, *, top: str = "SEN12FLOOD") -> Path:
    """Pack a generated tree like the published zip: everything below one folder; times are fixed.

    Args:
        root: The tree.
        path: The zip to write.
        top: Name of the folder inside.
    """
    root, path = Path(root), Path(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in [root, *sorted(root.rglob("*"))]:
            name = f"{top}/{file.relative_to(root).as_posix()}" if file != root else top
            entry = zipfile.ZipInfo(name + "/" if file.is_dir() else name, (2020, 5, 7, 12, 0, 0))
            entry.external_attr = (0o755 if file.is_dir() else 0o644) << 16
            if file.is_dir():
                archive.writestr(entry, b"")
            else:
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
    return path


def _write_sequence(path: Path, folder: str, number: int, options: DemoOptions) -> dict[str, Any]:
    rng = np.random.default_rng([options.seed, number])
    path.mkdir()
    scene = _scene(rng, number, options)
    first = datetime.date(2019, 1, 4) + datetime.timedelta(days=int(rng.integers(0, 30)))
    flood_begins = options.frames - max(1, 3 * options.frames // 8)  # 8 frames: 5 dry, then 3 flooded: 15 of 25 pairs
    frames = {}
    geometries = [_lonlat_grid(scene.grid, rng) for _ in range(2)]
    for index in range(options.frames):
        date = first + datetime.timedelta(days=6 * index)
        flooding = index >= flood_begins
        ascending = index % 2 == 0
        product = _product_name(rng, date, ascending)
        bands = _acquisition(rng, scene, geometries[index % 2], flooding, options.swath_edges)
        for band, pixels in bands.items():
            _write_tile(path / f"{product}_corrected_{band}.tif", pixels, LONLAT, geometries[index % 2][2])
        frames[str(index + 1)] = {
            "date": date.isoformat(),
            "FLOODING": flooding,
            "orbit": "ASCENDING" if ascending else "DESCENDING",
            "filename": product,
        }
    for offset in (2, 17):
        date = first + datetime.timedelta(days=offset)
        for band in ("B03", "B04"):
            reflectance = np.clip(900 + 160 * scene.cover, 1, 10_000) + rng.normal(0, 40, scene.cover.shape)
            inner = reflectance[MARGIN:-MARGIN, MARGIN:-MARGIN].clip(1, 18_000).astype(np.uint16)
            _write_tile(path / f"S2_{date.isoformat()}_{band}.tif", inner, scene.grid.crs, scene.grid.transform)
    entry: dict[str, Any] = {"count": len(frames)}
    entry.update({key: frames[key] for key in sorted(frames, key=int, reverse=True)})  # unordered in the real file too
    entry["folder"] = folder
    entry["geo"] = {"type": "Polygon", "coordinates": [_polygon(scene.grid)]}
    entry["urls"] = [f"https://example.org/GRD_HD/{frame['filename']}.zip" for frame in frames.values()]
    return entry


def _scene(rng: np.random.Generator, number: int, options: DemoOptions) -> Scene:
    code, left, top = SITES[number % len(SITES)]
    shift = PIXEL * options.size * (1 + number // len(SITES))
    grid = Grid(f"EPSG:{code}", left + shift, top + shift, PIXEL, options.size, options.size, "")
    side = options.size + 2 * MARGIN
    cover = 1.6 * _smooth(rng, side, 9) + 0.8 * _smooth(rng, side, 31)
    height = _smooth(rng, side, 4) + 0.35 * _smooth(rng, side, 13)
    inner = height[MARGIN:-MARGIN, MARGIN:-MARGIN]
    lake, flood = np.quantile(inner, [rng.uniform(0.02, 0.08), rng.uniform(0.28, 0.5)])
    return Scene(grid, cover, height, float(lake), float(flood))


def _smooth(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """A smooth random field (side, side) of about unit variance: coarse normal values, interpolated linearly."""
    coarse = rng.normal(size=(cells + 1, cells + 1))
    at = np.linspace(0, cells, side)
    low = np.minimum(at.astype(int), cells - 1)
    part = at - low
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    return 1.4 * (rows[:, low] * (1 - part) + rows[:, low + 1] * part)


def _lonlat_grid(grid: Grid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Any]:
    """Pixel grid of one orbit in degrees: for each of its pixels the row and column of the scene, and its transform."""
    from rasterio.transform import from_origin
    from rasterio.warp import transform

    west, south, east, north = grid.lonlat_bounds()
    step_x = DEGREES / np.cos(np.deg2rad((south + north) / 2))
    pad = rng.uniform(2, 6, size=4)
    west, north = west - pad[0] * step_x, north + pad[1] * DEGREES
    width = int(np.ceil((east - west) / step_x + pad[2]))
    height = int(np.ceil((north - south) / DEGREES + pad[3]))
    # Projected coordinates bend by far less than a pixel between nodes 16 pixels apart, so nodes are interpolated.
    node_x, node_y = np.linspace(0, width, width // 16 + 2), np.linspace(0, height, height // 16 + 2)
    longitude, latitude = np.meshgrid(west + node_x * step_x, north - node_y * DEGREES)
    xs, ys = transform(LONLAT, grid.crs, longitude.ravel().tolist(), latitude.ravel().tolist())[:2]
    centres_x, centres_y = np.arange(width) + 0.5, np.arange(height) + 0.5

    def spread(values: list[float]) -> np.ndarray:
        nodes = np.asarray(values).reshape(longitude.shape)
        rows = np.stack([np.interp(centres_x, node_x, row) for row in nodes])
        return np.stack([np.interp(centres_y, node_y, column) for column in rows.T], axis=1)

    column = np.floor((spread(xs) - grid.left) / PIXEL).astype(np.int64) + MARGIN
    row = np.floor((grid.top - spread(ys)) / PIXEL).astype(np.int64) + MARGIN
    side = grid.width + 2 * MARGIN
    return row.clip(0, side - 1), column.clip(0, side - 1), from_origin(west, north, step_x, DEGREES)


def _acquisition(
    rng: np.random.Generator,
    scene: Scene,
    geometry: tuple[np.ndarray, np.ndarray, Any],
    flooding: bool,
    swath_edges: float,
) -> dict[str, np.ndarray]:
    row, column, _ = geometry
    height = scene.height[row, column]
    lake = height < scene.lake
    water = height < scene.flood if flooding else lake
    moisture, wind, depth = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), rng.uniform(6.0, 10.0)
    covered = np.ones(height.shape, dtype=bool)
    if rng.random() < swath_edges:
        # A slanted edge; half of them take more than a quarter of the image, which the cleaning drops.
        share = rng.uniform(0.05, 0.55)
        across = np.linspace(0, 1, height.shape[1])[None, :] + 0.15 * np.linspace(0, 1, height.shape[0])[:, None]
        covered = across > share if rng.random() < 0.5 else across < across.max() - share
    bands = {}
    for band in ("VV", "VH"):
        land = LAND_DB[band] + scene.cover[row, column] + moisture
        level = np.where(lake, LAKE_DB[band] + wind, np.where(water, np.minimum(land - depth, LAND_DB[band] - 5), land))
        speckle = rng.gamma(LOOKS, 1 / LOOKS, size=height.shape)
        power = 10 ** (level / 10) * speckle
        bands[band] = np.where(covered, power, 0).astype(np.float32)
    return bands


def _product_name(rng: np.random.Generator, date: datetime.date, ascending: bool) -> str:
    day = date.strftime("%Y%m%d")
    hour = "16" if ascending else "03"
    orbit = 26_000 + (date - datetime.date(2019, 1, 1)).days * 15
    return (
        f"S1{'B' if ascending else 'A'}_IW_GRDH_1SDV_{day}T{hour}2250_{day}T{hour}2315_{orbit:06d}_"
        f"{int(rng.integers(16**6)):06X}_{int(rng.integers(16**4)):04X}"
    )


def _write_tile(path: Path, pixels: np.ndarray, crs: str, transform: Any) -> None:
    import rasterio

    height, width = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=1, dtype=pixels.dtype, crs=crs, transform=transform
    ) as output:
        output.write(pixels, 1)


def _polygon(grid: Grid) -> list[list[float]]:
    from rasterio.warp import transform

    left, bottom, right, top = grid.bounds
    xs, ys = [left, left, right, right, left], [top, bottom, bottom, top, top]
    longitude, latitude = transform(grid.crs, LONLAT, xs, ys)[:2]
    return [[round(x, 6), round(y, 6)] for x, y in zip(longitude, latitude, strict=True)]
