"""Any folder of Sentinel-1 GeoTIFFs as a data set without labels, cut into tiles while it is read.

A scene is one file with the bands VV and VH, or two files of one band each that differ only by VV / VH in their name;
other polarisations, and one alone, where ``bands`` says so.
Bands are found by name: in the file name, in the band descriptions, or by a declared order. The unit is declared (dB or
linear power) and the values are checked against it. See docs/data_s1_scenes.md.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sarwmix.data.base import SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError, open_dataset, open_raster
from sarwmix.data.pixels import UNITS, blank_fills, check_unit, describe_fills, to_decibel
from sarwmix.data.spec import EmptySplit, parse_split
from util.errors import UserError
from util.log import get_logger

if TYPE_CHECKING:
    from sarwmix.data.spec import DatasetSpec, Statistics

SUFFIXES = (".tif", ".tiff")
SPACING_M = 10.0
"""Width of a pixel of the published training data."""
OPEN_FILES = 16
"""Files that a reading thread keeps open."""
BLOCK_CACHE = 128 << 20
"""Bytes of decoded blocks that GDAL keeps in each process."""
_NAMED = 5
"""Items that a message lists before it says how many more there are."""


@dataclass(frozen=True)
class Band:
    """Where one band of a scene lies: file and band number from 1 on."""

    path: str
    number: int


@dataclass(frozen=True)
class Scene:
    """One acquisition on one grid.

    Attributes:
        name: Unique among the scenes of a folder.
        bands: In the order of the data set's bands (VH, VV).
        height: Pixels.
        width: Pixels.
        crs: WKT, or "" when the file has none.
        transform: Affine coefficients (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f.
    """

    name: str
    bands: tuple[Band, ...]
    height: int
    width: int
    crs: str
    transform: tuple[float, ...]


@dataclass
class Survey:
    """What the survey of a scene's pixels found.

    Attributes:
        valid: Valid pixels of each tile, (rows, columns) of tiles.
        pixels: Some valid values of each band, (C, n), as stored.
        fills: Values that stand for no data, and how many pixels had each.
    """

    valid: NDArray[np.int64]
    pixels: NDArray[np.float32]
    fills: Counter[float] = field(default_factory=Counter)


@dataclass
class Skipped:
    """What the folder holds and the data set leaves out."""

    files: list[str] = field(default_factory=list)  # "path: reason"
    scenes: list[str] = field(default_factory=list)  # "name: reason"
    tiles: int = 0


def _listing(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def polarisations(text: str, bands: Sequence[str]) -> list[str]:
    """Bands named in a text as words of their own: `S1_VV.tif` and `Sigma0_VV_db` name VV, `SAVVY.tif` does not."""
    words = {word.upper() for word in re.split(r"[^A-Za-z0-9]+", text)}
    return [band for band in bands if band in words]


def find_files(root: Path) -> list[Path]:
    """GeoTIFFs below a folder (or the one file), sorted, without hidden ones."""
    if root.is_file():
        return [root]
    found, unnamed, seen = [], [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link that leads back, or to a folder that was met before
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.lower().endswith(SUFFIXES) or name.startswith("."):
                continue
            try:
                name.encode("utf-8")
                found.append(Path(folder) / name)
            except UnicodeEncodeError:
                unnamed.append(os.path.join(folder, name).encode("utf-8", "backslashreplace").decode())
    if unnamed:
        get_logger().warning(
            "%d file(s) whose names are not UTF-8 left out; rename them: %s", len(unnamed), _listing(unnamed)
        )
    return sorted(found)


# Last words of the names of what processors write beside backscatter; the first ones tell wherever they stand.
_SIDE_WORDS = ("bordermask", "layover", "shadow", "incidence", "coherence")
_LAST_WORDS = ("mask", "inc", "lia", "theta", "angle", "ls", "lsmap", "noise", "coh", "area", "ratio", "dem", "rgb")


def side_product(path: Path) -> str | None:
    """The word in a file's name that says that it holds no backscatter."""
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", path.stem) if word]
    for word in words:
        if word in _SIDE_WORDS or (word in _LAST_WORDS and word == words[-1]):
            return word
    return None


def _is_raw(path: Path) -> bool:
    """Whether a file lies in an unpacked product of the ground segment: digital numbers, not backscatter."""
    return any(part.upper().endswith(".SAFE") for part in path.parts)


@dataclass(frozen=True)
class _Header:
    path: Path
    count: int
    descriptions: tuple[str, ...]
    dtype: str
    height: int
    width: int
    crs: str
    transform: tuple[float, ...]

    def lies_on(self, other: _Header) -> bool:
        """Whether both have the same pixels, to a hundredth of a pixel in every corner."""
        if (self.height, self.width, self.crs) != (other.height, other.width, other.crs):
            return False
        corners = [(column, row, 1) for column in (0, self.width) for row in (0, self.height)]
        here, there = (np.array(header.transform).reshape(2, 3) for header in (self, other))
        pixel = max(np.hypot(here[0, 0], here[1, 0]), np.hypot(here[0, 1], here[1, 1]))
        return bool(np.abs((here - there) @ np.array(corners, float).T).max() <= 0.01 * pixel)

    def shown(self) -> str:
        a, _, x, _, e, y = self.transform
        reference = f", {self.crs[:40]}..." if self.crs else ", no coordinate system"
        return f"{self.height}x{self.width} pixels of {a:.6g} x {-e:.6g} from {x:.9g}, {y:.9g}{reference}"


def _read_header(path: Path) -> _Header | str:
    """The header, or why there is none."""
    try:
        with open_raster(path, whole=False) as source:
            return _Header(
                path,
                source.count,
                tuple(text or "" for text in source.descriptions),
                source.dtypes[0],
                source.height,
                source.width,
                source.crs.to_wkt() if source.crs else "",
                tuple(source.transform)[:6],
            )
    except GeoTiffError as error:
        text = str(error)
        return text.replace("cannot be read (truncated or damaged?)", "cannot be opened (truncated or no GeoTIFF?)")


def parse_band_order(text: str | None, bands: Sequence[str]) -> tuple[str, ...] | None:
    """Declared names of the bands of multi-band files, from text such as "VV,VH"; None: not declared."""
    if text is None:
        return None
    order = tuple(part.strip().upper() for part in text.split(","))
    if any(order.count(band) != 1 for band in bands):
        raise UserError(
            f"band_order={text!r}: expected the names of all bands of a file in their order, with "
            f"{' and '.join(bands)} once each, for example band_order=VV,VH"
        )
    return order


def _whole_bands(header: _Header, order: tuple[str, ...] | None, bands: Sequence[str]) -> list[int] | str:
    """Band numbers of a multi-band file, or why it is not a scene.

    Raises:
        UserError: The declared order contradicts the file.
    """
    named = [polarisations(text, bands) for text in header.descriptions]
    described = [[number for number, found in enumerate(named, start=1) if found == [band]] for band in bands]
    usable = all(len(numbers) == 1 for numbers in described)
    if order is not None:
        if len(order) != header.count:
            return f"has {header.count} bands, band_order names {len(order)}"
        numbers = [order.index(band) + 1 for band in bands]
        if usable and numbers != [found[0] for found in described]:
            raise UserError(
                f"{header.path}: band_order={','.join(order)} contradicts the file's band descriptions "
                f"{', '.join(header.descriptions)}; correct band_order or leave it out"
            )
        return numbers
    if usable:
        return [found[0] for found in described]
    given = ", ".join(text or "none" for text in header.descriptions)
    return f"has {header.count} bands and no descriptions that name {' and '.join(bands)} once each (found: {given})"


def find_scenes(
    root: Path | Sequence[Path],
    bands: Sequence[str],
    order: tuple[str, ...] | None,
    *,
    broken: list[str] | None = None,
    hint: str = "",
) -> tuple[list[Scene], list[str]]:
    """Find the scenes of a folder.

    Args:
        root: Folder, searched with all folders below it, one file, or several of them.
        bands: Wanted bands.
        order: Declared names of the bands of multi-band files.
        hint: What else helps where a band is missing, for messages.
        broken: Takes the files that could not be opened, "path: reason". If given, scenes that lack one of them are
            left out; otherwise they are refused as scenes without a band.

    Returns:
        The scenes sorted by name, and "path: reason" of the files that belong to none.

    Raises:
        UserError: No scene, a band without its partner, grids that differ, or a contradiction.
    """
    paths = find_files(root) if isinstance(root, Path) else [path for one in root for path in find_files(one)]
    if not isinstance(root, Path):
        paths = [Path(os.path.abspath(path)) for path in paths]  # partners are found by their folder's name
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else root[0]
    if not paths:
        raise UserError(
            f"{root} holds no GeoTIFF (*.tif, *.tiff); expected Sentinel-1 scenes with "
            f"{' and '.join(bands)}, see docs/data_s1_scenes.md"
        )
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(_read_header, paths))
    ignored: list[str] = []
    whole: list[tuple[str, _Header, list[int]]] = []
    single: dict[tuple[Path, str], dict[str, _Header]] = {}
    for path, header in zip(paths, headers, strict=True):
        side = side_product(path)
        if isinstance(header, str):
            ignored.append(f"{path}: {header}")
        elif _is_raw(path):
            ignored.append(f"{path}: raw product, not calibrated")
        elif side is not None:
            ignored.append(f"{path}: a side product ({side}), no backscatter")
        elif "complex" in header.dtype:
            ignored.append(f"{path}: holds {header.dtype} values; expected detected backscatter (GRD), dB or linear")
        elif header.count > 1:
            numbers = _whole_bands(header, order, bands)
            if isinstance(numbers, str):
                ignored.append(f"{path}: {numbers}")
            else:
                whole.append((path.stem, header, numbers))
        else:
            named = polarisations(path.stem, bands) or polarisations(header.descriptions[0], bands)
            if len(named) != 1:
                holds = " and ".join(named) or f"none of {', '.join(bands)}"
                ignored.append(f"{path}: one band, and its name holds {holds}")
                continue
            partners = single.setdefault(partner_key(path, named[0]), {})
            if named[0] in partners:
                raise UserError(
                    f"{partners[named[0]].path} and {path} are both {named[0]} of the same scene; "
                    "keep one of them in the folder"
                )
            partners[named[0]] = header
    if broken is not None:
        broken += [f"{path}: {text}" for path, text in zip(paths, headers, strict=True) if isinstance(text, str)]
        gone = {_scene_key(path, bands) for path, text in zip(paths, headers, strict=True) if isinstance(text, str)}
        for key in [key for key, found in single.items() if len(found) < len(bands) and key in gone]:
            ignored += [f"{header.path}: its partner cannot be opened" for header in single.pop(key).values()]
    complete = whole or any(len(found) == len(bands) for found in single.values())
    if complete:  # one polarisation among scenes of both: left out by name
        for key in [key for key, found in single.items() if len(found) < len(bands)]:
            ignored += [f"{header.path}: no file of the other polarisation" for header in single.pop(key).values()]
    lone = [
        f"{next(iter(found.values())).path} (without {', '.join(b for b in bands if b not in found)})"
        for found in single.values()
        if len(found) < len(bands)
    ]
    if lone:
        closed = [f"{path}: {text}" for path, text in zip(paths, headers, strict=True) if isinstance(text, str)]
        unread = f" Files that could not be opened: {_listing(closed)}." if closed else ""
        raise UserError(
            f"{len(lone)} of the files in {root} have no partner of the other polarisation: "
            f"{_listing(lone)}. The model reads {' and '.join(bands)} together; add the missing files, "
            f"whose names differ only in the band, or move these away.{hint}{unread}"
        )
    scenes: list[tuple[Path, Scene]] = []
    for (folder, stem), found in single.items():
        first, *others = (found[band] for band in bands)
        for other in others:
            if not other.lies_on(first):
                raise UserError(
                    f"{first.path} and {other.path} lie on different grids ({first.shown()}; "
                    f"{other.shown()}); resample one to the other first, for example with gdalwarp"
                )
        name = stem or folder.name
        scenes.append(
            (
                folder / name,
                Scene(
                    name,
                    tuple(Band(str(found[band].path), 1) for band in bands),
                    first.height,
                    first.width,
                    first.crs,
                    first.transform,
                ),
            )
        )
    for stem, header, numbers in whole:
        scenes.append(
            (
                header.path.with_suffix(""),
                Scene(
                    stem,
                    tuple(Band(str(header.path), number) for number in numbers),
                    header.height,
                    header.width,
                    header.crs,
                    header.transform,
                ),
            )
        )
    if not scenes and any(_is_raw(path) for path in paths):
        raise UserError(
            f"{root} holds a raw product of digital numbers (.SAFE); calibrate it first (SNAP's Calibration and "
            "Range-Doppler Terrain Correction, pyroSAR or S1Tiling write the GeoTIFFs that are read here)"
        )
    if not scenes:
        raise UserError(
            f"{root} holds {len(paths)} GeoTIFF(s), but no scene with {' and '.join(bands)}: "
            f"{_listing(ignored)}. Name the bands in the file names (..._VH.tif, ..._VV.tif) or in the "
            f"band descriptions, or declare their order, for example band_order=VV,VH.{hint}"
        )
    names = [scene.name for _, scene in scenes]
    if len(set(names)) < len(names):  # the same names in several folders: put the folders before them
        base = root if root.is_dir() else root.parent
        scenes = [(place, Scene("__".join(place.relative_to(base).parts), *_rest(scene))) for place, scene in scenes]
    return sorted((scene for _, scene in scenes), key=lambda scene: scene.name), ignored


def partner_key(path: Path, band: str) -> tuple[Path, str]:
    """What the files of one scene share: their folder, and their name without the band."""
    stem = re.sub(rf"(^|[^A-Za-z0-9])({band})(?=$|[^A-Za-z0-9])", r"\1", path.stem, flags=re.IGNORECASE)
    return path.parent, re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", stem)


def _scene_key(path: Path, bands: Sequence[str]) -> tuple[Path, str] | None:
    """As `partner_key` of a file that names one band; None of others."""
    named = polarisations(path.stem, bands)
    return partner_key(path, named[0]) if len(named) == 1 else None


def _rest(scene: Scene) -> tuple[Any, ...]:
    return scene.bands, scene.height, scene.width, scene.crs, scene.transform


class SceneReader:
    """Reads windows of scenes; keeps a few files open in each thread and each process."""

    def __init__(self, unit: str | None) -> None:
        """
        Args:
            unit: Of the values in the files, one of `UNITS`; None: any sensor's bands; who reads blanks fill values.
        """
        self.unit = unit
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[SceneReader], tuple[str | None]]:
        return type(self), (self.unit,)

    def _open(self, path: str) -> Any:
        if getattr(self._local, "process", None) != os.getpid():
            # An open file must not be shared with the process that this one was forked from.
            self._local.process = os.getpid()
            self._local.sources = OrderedDict()
        sources: OrderedDict[str, Any] = self._local.sources
        if path in sources:
            sources.move_to_end(path)
        else:
            sources[path] = open_dataset(path, whole=False)
            if len(sources) > OPEN_FILES:
                sources.popitem(last=False)[1].close()
        return sources[path]

    def stored(
        self, scene: Scene, row: int, column: int, height: int, width: int, fills: Counter[float] | None = None
    ) -> NDArray[np.float32]:
        """A window as it is stored.

        Args:
            fills: Takes how many pixels had which undeclared value that stands for no data.

        Returns:
            (C, height, width) float32 in the unit of the file; NaN in all bands where one has no data: its declared
            no-data value, its mask, 0, or another value that processors write there (see `blank_fills`).

        Raises:
            OSError: The pixels cannot be read.
        """
        import rasterio
        from rasterio.enums import MaskFlags
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(column, row, width, height)
        result = np.empty((len(scene.bands), height, width), dtype=np.float32)
        declared = np.zeros((height, width), dtype=bool)
        for out, band in zip(result, scene.bands, strict=True):
            try:
                # GDAL would keep 5 % of the machine's memory in each process for blocks that are hardly read twice.
                with rasterio.Env(GDAL_CACHEMAX=BLOCK_CACHE):
                    source = self._open(band.path)
                    values = source.read(band.number, window=window)
                    flags = source.mask_flag_enums[band.number - 1]
                    mask = None if MaskFlags.all_valid in flags else source.read_masks(band.number, window=window)
            except GeoTiffError as error:
                raise OSError(str(error)) from error
            except RasterioError as error:
                raise OSError(f"cannot be read (truncated or damaged?): {error}") from error
            scale, offset = source.scales[band.number - 1], source.offsets[band.number - 1]
            out[...] = values if (scale, offset) == (1.0, 0.0) else values.astype(np.float64) * scale + offset
            if mask is not None:
                declared |= mask == 0
        result[:, declared] = np.nan
        if self.unit is None:
            result[:, (result == 0).all(axis=0)] = np.nan
        else:
            blank_fills(result, self.unit, fills)
        return result

    def decibel(self, scene: Scene, row: int, column: int, height: int, width: int) -> NDArray[np.float32]:
        """A window (C, height, width) in dB; NaN where there is no data, also where linear power is not positive."""
        assert self.unit is not None
        return to_decibel(self.stored(scene, row, column, height, width), self.unit)


def tile_starts(length: int, tile: int, stride: int) -> NDArray[np.int64]:
    """First pixels of the whole tiles along one axis."""
    return np.arange(0, length - tile + 1, stride, dtype=np.int64)


def _survey(reader: SceneReader, scene: Scene, tile: int, stride: int, *, every_pixel: bool) -> Survey:
    """Count the valid pixels of each tile and draw values for the check of the unit.

    Raises:
        OSError: The pixels cannot be read.
    """
    rows, columns = tile_starts(scene.height, tile, stride), tile_starts(scene.width, tile, stride)
    if not every_pixel:
        middle = reader.stored(scene, (scene.height - tile) // 2, (scene.width - tile) // 2, tile, tile)
        pixels = middle.reshape(len(middle), -1)
        return Survey(np.full((len(rows), len(columns)), tile * tile), pixels[:, np.isfinite(pixels).all(axis=0)])
    valid = np.zeros((len(rows), len(columns)), dtype=np.int64)
    drawn, fills, above = [], Counter[float](), 0
    for number, row in enumerate(rows):
        found = Counter[float]()
        strip = reader.stored(scene, int(row), 0, tile, scene.width, found)
        if int(row) >= above:  # strips may overlap: each pixel is counted once where they do not
            fills, above = fills + found, int(row) + tile
        good = np.asarray(np.isfinite(to_decibel(strip, reader.unit or "dB")).all(axis=0))
        total = np.concatenate([[0], np.cumsum(good.sum(axis=0))])
        valid[number] = total[columns + tile] - total[columns]
        # Every 7th pixel: enough for a check, and no multiple of a block or a field pattern.
        thin = strip[:, ::7, ::7]
        drawn.append(thin[:, np.isfinite(thin).all(axis=0)])
    return Survey(valid, np.concatenate(drawn, axis=1), fills)


class SceneTiles(SarDataset):
    """Tiles of Sentinel-1 scenes, (2, tile, tile) in dB, without labels.

    Attributes:
        scenes: The scenes of the split.
        windows: int32 (N, 3): scene, first row and first column of each tile.
        skipped: What was left out, over all splits.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        *,
        scenes: Sequence[Scene],
        windows: NDArray[np.int32],
        tile: int,
        reader: SceneReader,
        skipped: Skipped,
        on_error: str,
        source: str | Path,
    ) -> None:
        names = [f"{scenes[scene].name}_r{row}_c{column}" for scene, row, column in windows.tolist()]
        super().__init__(spec, split, statistics, names, None, on_error=on_error, source=source)
        self.scenes = list(scenes)
        self.windows = windows
        self.tile = tile
        self.reader = reader
        self.skipped = skipped

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.spec.bands), self.tile, self.tile

    def read_into(self, index: int, out: np.ndarray) -> None:
        number, row, column = (int(value) for value in self.windows[index])
        scene = self.scenes[number]
        path = scene.bands[0].path
        try:
            out[...] = self.reader.decibel(scene, row, column, self.tile, self.tile)
        except OSError as error:
            raise UnreadableSample(self.names[index], path, str(error)) from error
        finish_image(out, self.names[index], path, self.spec.bands)

    def place(self, index: int) -> dict[str, Any]:
        """Where a tile lies.

        Returns:
            scene (name), paths (of each band), row and column (first pixel), crs (WKT or ""), transform (six affine
            coefficients of the tile's own grid), x and y (coordinates of its centre in the crs).
        """
        number, row, column = (int(value) for value in self.windows[index])
        scene = self.scenes[number]
        a, b, c, d, e, f = scene.transform
        middle = self.tile / 2
        return {
            "scene": scene.name,
            "paths": [band.path for band in scene.bands],
            "row": row,
            "column": column,
            "crs": scene.crs,
            "transform": (a, b, a * column + b * row + c, d, e, d * column + e * row + f),
            "x": a * (column + middle) + b * (row + middle) + c,
            "y": d * (column + middle) + e * (row + middle) + f,
        }


def _number(name: str, value: Any, *, kind: type, low: float, high: float, expected: str) -> Any:
    """An option as a number; on the command line options are texts."""
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not low <= number <= high:
        raise UserError(f"{name}={value}: expected {expected}")
    return number


def acquisitions(scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """The acquisition of each scene: a filtered or reprocessed copy is no scene of its own.

    Copies have the same time in their name (``20200108T044150``), or the same pixels and a name that goes on where the
    other ends (``scene`` and ``scene_filtered``). Numbers follow the first scene of each.
    """
    found: list[int] = []
    at: dict[str, int] = {}  # time in a name -> acquisition
    on: dict[Any, list[tuple[list[str], int]]] = {}  # pixels -> names in words, and their acquisition
    for scene in scenes:
        words = re.split(r"[^A-Za-z0-9]+", scene.name)
        time = re.search(r"\d{8}[Tt_]?\d{6}", scene.name)
        there = on.setdefault((scene.height, scene.width, scene.crs, scene.transform), [])
        copies = [number for other, number in there if all(a == b for a, b in zip(words, other, strict=False))]
        number = at.get(time[0] if time else "", copies[0] if copies else max(found, default=-1) + 1)
        found.append(number)
        there.append((words, number))
        if time:
            at.setdefault(time[0], number)
    return np.array(found, np.int64)


def _assign(group: NDArray[np.int64], holdout: float, seed: int, wanted: Iterable[str]) -> NDArray[np.int64]:
    """Numbers of the scenes that belong to the wanted splits: one half of what is held out each for val and test.

    Args:
        group: The acquisition of each scene; none of them is divided.
    """
    if holdout == 0:
        return np.arange(len(group))
    count = len(np.unique(group))
    held = max(2, round(count * holdout))
    order = np.random.default_rng(seed).permutation(count)
    parts = {"val": order[: held // 2], "test": order[held // 2 : held], "train": order[held:]}
    return np.flatnonzero(np.isin(group, np.concatenate([parts[name] for name in wanted])))


def pixel_size_m(scene: Scene) -> float | None:
    """Width of a pixel in metres; None without a coordinate system."""
    if not scene.crs:
        return None
    from rasterio.crs import CRS

    crs = CRS.from_wkt(scene.crs)
    a, b, _, d, e, y = scene.transform
    width = math.hypot(a, d)
    if crs.is_projected:
        return width * float(crs.linear_units_factor[1])
    middle = y + d * scene.width / 2 + e * scene.height / 2
    return width * 111_320.0 * math.cos(math.radians(min(abs(middle), 89.0)))


def has_other_pixels(scene: Scene) -> float | None:
    """Width of its pixels in metres, where that is far from the 10 m of all published training data."""
    spacing = pixel_size_m(scene)
    return None if spacing is None or 0.75 <= spacing / SPACING_M <= 1.35 else spacing


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str,
    unit: str = "dB",
    tile: int | str = 120,
    stride: int | str | None = None,
    band_order: str | None = None,
    min_valid: float | str = 0.5,
    holdout: float | str = 0.0,
    seed: int | str = 0,
) -> SceneTiles:
    """Open a folder of Sentinel-1 scenes for the registry.

    Args:
        spec: The registry's entry `s1_scenes`.
        data_path: Folder with the scenes, also in folders below it, or one file.
        split: "train"; with `holdout` also "val" and "test", or several joined by "+".
        statistics: Statistics in use.
        on_error: "raise" or "replace".
        unit: Unit of the values in the files: "dB", "linear" (power) or "amplitude" (its root).
        tile: Side of a tile, pixels.
        stride: Distance of neighbouring tiles, pixels; the tile's side by default.
        band_order: Names of all bands of multi-band files in their order, such as "VV,VH"; by default their band
            descriptions tell.
        min_valid: Least share of valid pixels that a tile must have; others are left out and counted. 0 takes all
            tiles without reading the scenes first.
        holdout: Share of the scenes that is kept for val and test, half each; 0: all scenes are train.
        seed: Seed of the choice of held-out scenes.

    Raises:
        UserError: No usable scene, values that contradict the unit, or an option out of range.
    """
    if unit not in UNITS:
        raise UserError(f"unit={unit}: expected one of {', '.join(UNITS)}")
    size = _number("tile", tile, kind=int, low=16, high=4096, expected="a number of pixels from 16 to 4096")
    step = (
        size
        if stride is None
        else _number("stride", stride, kind=int, low=1, high=4096, expected="a number of pixels from 1 to 4096")
    )
    least = _number("min_valid", min_valid, kind=float, low=0, high=1, expected="a share from 0 to 1")
    held = _number("holdout", holdout, kind=float, low=0, high=0.9, expected="a share from 0 to 0.9")
    draw = _number("seed", seed, kind=int, low=0, high=2**63, expected="a number of 0 or more")
    wanted = parse_split(spec, split)
    if held == 0 and wanted != ("train",):
        raise EmptySplit(
            f"split {split!r}: without holdout all scenes of {data_path} are in split 'train'; ask for "
            "that, or give for example holdout=0.2 to keep 10 % of the scenes each for val and test"
        )

    hint = " Other polarisations, or one alone: --data_option bands=VH (VV, HH,HV, ...); --bands in main_pretrain.py."
    scenes, ignored = find_scenes(data_path, spec.bands, parse_band_order(band_order, spec.bands), hint=hint)
    skipped = Skipped(files=ignored)
    reader = SceneReader(unit)

    def survey(scene: Scene) -> Survey | str:
        if scene.height < size or scene.width < size:
            return f"{scene.height}x{scene.width} pixels are less than one tile of {size}"
        try:
            return _survey(reader, scene, size, step, every_pixel=least > 0)
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        surveys = list(pool.map(survey, scenes))
    usable: list[Scene] = []
    tiles: list[NDArray[np.int32]] = []
    remarks: list[str] = []
    for scene, found in zip(scenes, surveys, strict=True):
        if isinstance(found, str):
            skipped.scenes.append(f"{scene.name}: {found}")
            continue
        warning = check_unit(found.pixels, unit, scene.bands[0].path, spec.bands)
        if warning is not None:
            remarks.append(warning)
        if found.fills:
            remarks.append(f"{scene.bands[0].path}: no data where the value is {describe_fills(found.fills)}")
        keep = found.valid >= max(1, int(np.ceil(least * size * size)))
        skipped.tiles += int((~keep).sum())
        if not keep.any():
            most = int(found.valid.max())
            reason = "no valid pixel (all no-data)" if most == 0 else f"no tile has {100 * least:g} % valid pixels"
            skipped.scenes.append(f"{scene.name}: {reason}")
            continue
        rows, columns = np.nonzero(keep)
        tiles.append(np.stack([np.full(rows.size, len(usable)), rows * step, columns * step], axis=1).astype(np.int32))
        usable.append(scene)
    log = get_logger()
    for kind, items in (("file(s) that belong to no scene", skipped.files), ("scene(s)", skipped.scenes)):
        if items:
            log.warning("%s: %d %s left out: %s", data_path, len(items), kind, _listing(items))
    for warning in remarks[:_NAMED]:
        log.warning("%s", warning)
    if not usable:
        raise UserError(f"{data_path} holds {len(scenes)} scene(s), none of them usable: {_listing(skipped.scenes)}")
    coarse = [(scene.name, spacing) for scene in usable if (spacing := has_other_pixels(scene)) is not None]
    if coarse:
        log.warning(
            "%s: %d of %d scenes have pixels far from %g m, the first %s of %.3g m: published weights and statistics "
            "are of %g m. Resample with gdalwarp -tr, unless all your data are so",
            data_path, len(coarse), len(usable), SPACING_M, coarse[0][0], coarse[0][1], SPACING_M,
        )  # fmt: skip
    group = acquisitions(usable) if held > 0 else np.arange(len(usable))
    apart = len(np.unique(group))
    if held > 0 and apart < 3:
        raise UserError(
            f"holdout={held:g}: {data_path} has {len(usable)} usable scene(s) of {apart} acquisition(s); at least 3 "
            "are needed to hold scenes out for val and test"
        )
    chosen = _assign(group, held, draw, wanted)
    parts = [tiles[number] for number in chosen]
    for position, part in enumerate(parts):
        part[:, 0] = position
    windows = np.concatenate(parts) if parts else np.zeros((0, 3), np.int32)
    log.info(
        "%s: %d tiles of %dx%d from %d of %d scenes (%s); %d tiles with less than %g %% valid pixels left out",
        data_path,
        len(windows),
        size,
        size,
        len(chosen),
        len(scenes),
        split,
        skipped.tiles,
        100 * least,
    )
    return SceneTiles(
        spec,
        split,
        statistics,
        scenes=[usable[number] for number in chosen],
        windows=windows,
        tile=size,
        reader=reader,
        skipped=skipped,
        on_error=on_error,
        source=data_path,
    )
