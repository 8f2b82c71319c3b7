"""Anyone's labelled Sentinel-1 images: classes by sub-folder, a list with labels, or masks (docs/own_data.md).

Images are GeoTIFF, PNG or .npy: one file with all bands, or one file a band whose name holds it (``a_VH.tif``,
``a_VV.tif``; ``a/VH.tif``, ``a/VV.tif``). Bands are found by file name or description; where there is neither,
``band_order`` has to name them: nothing is guessed. The unit is declared and compared with the values.

What the folder holds decides the task: `describe` completes the registry's entry (task, classes, size) before anything
is opened, `build` opens a split.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sarwmix.data.base import IGNORED, MaskDataset, SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import Grid, band_numbers, check_same_grid, held_out, map_labels, read_raster, whole_number
from sarwmix.data.labels import parse_label_list
from sarwmix.data.pixels import UNITS, blank_fills, check_unit, to_decibel
from sarwmix.data.spec import SAR_BANDS, DatasetSpec, EmptySplit, Statistics, parse_split
from sarwmix.datasets.scenes import partner_key, polarisations, side_product
from sarwmix.preprocessing import Preprocessing
from util.arrays import load_npy
from util.errors import UserError
from util.log import get_logger
from util.text import read_text, separator_of

IMAGES = (".tif", ".tiff", ".png", ".npy")
SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
            "testing": "test"}  # fmt: skip
LISTS = ("labels.csv", "labels.tsv", "labels.parquet", "labels.pq")
CLASS_FILE = "classes.txt"
MASK_FOLDERS = ("masks", "labels")
TEST_SHARE, VAL_SHARE = 0.2, 0.1
GROUP_MARK = "::"
"""Stands in a sample's name between its group and the rest, so that every tool knows what belongs together."""
_COLUMNS = {
    "name": ("name", "file", "filename", "image", "path"),
    "split": ("split",),
    "group": ("group", "place", "site", "scene", "event"),
    "label": ("label", "class"),
    "labels": ("labels", "classes"),
    "mask": ("mask",),
}
_LOOKED = 8  # samples whose values are compared with the unit


@dataclass(frozen=True)
class Reading:
    """How a file becomes dB.

    Attributes:
        bands: wanted ones.
        order: all bands of files that do not name theirs; None: not declared.
        unit: of the stored values, or of what `ends` stand for.
        ends: what 0 and the largest value of an integer type stand for; None: values are as stored.
    """

    bands: tuple[str, ...]
    order: tuple[str, ...] | None
    unit: str
    ends: tuple[float, float] | None

    def stored(self, files: Mapping[str, str]) -> tuple[NDArray[np.float32], Grid | None]:
        """Values (C, H, W) in `unit`, NaN where there is no data, and where they lie.

        Args:
            files: band -> its file, or "" -> the file of all bands.

        Raises:
            GeoTiffError: a file cannot be used.
        """
        if "" in files:
            values, names, grid = self._open(files[""])
            return values[self._places(names)], grid
        parts: list[NDArray[np.float32]] = []
        first: Grid | None = None
        for band in self.bands:
            values, names, grid = self._open(files[band])
            if len(values) != 1:
                raise GeoTiffError(f"{files[band]} has {len(values)} bands, its name says {band} alone")
            if first is not None and grid is not None:
                check_same_grid(first, grid, files[band])
            if parts and values.shape != parts[0].shape:
                raise GeoTiffError(f"bands have {parts[0].shape[1:]} and {values.shape[1:]} pixels")
            first = first or grid
            parts.append(values)
        return np.concatenate(parts), first

    def decibel(self, files: Mapping[str, str]) -> tuple[NDArray[np.float32], Grid | None]:
        """As `stored`, in dB."""
        values, grid = self.stored(files)
        return to_decibel(values, self.unit), grid

    def _places(self, names: Sequence[str]) -> list[int]:
        if self.order is None and not any(names):
            raise GeoTiffError(
                f"its {len(names)} band(s) have no names; say which they are, for example --data_option "
                "band_order=VV,VH"
            )
        return band_numbers(names, self.bands, self.order or ())

    def _open(self, path: str) -> tuple[NDArray[np.float32], tuple[str, ...], Grid | None]:
        names: tuple[str, ...]
        grid: Grid | None
        if path.lower().endswith(".npy"):
            stored = self._open_npy(path)
            valid = np.ones(stored.shape, dtype=bool)
            names, grid = ("",) * len(stored), None
        else:
            raster = read_raster(path)
            stored, names, grid, valid = raster.values, raster.names, raster.grid, raster.valid
        kind = stored.dtype
        values = stored.astype(np.float32)
        if self.ends is not None:
            if kind.kind != "u":
                raise GeoTiffError(f"range belongs to files of unsigned whole numbers, this one holds {kind}")
            low, high = self.ends
            valid = valid & (stored != 0).any(axis=0)  # 0 in every band: no data
            values = low + values * np.float32((high - low) / np.iinfo(kind).max)
            values[~valid] = np.nan
            return values, names, grid
        if path.lower().endswith(".png"):
            raise GeoTiffError(
                "a PNG holds whole numbers: say what 0 and the largest one stand for, for example --data_option "
                "range=-30,0"
            )
        values[~valid] = np.nan
        blank_fills(values, self.unit)
        return values, names, grid

    def _open_npy(self, path: str) -> np.ndarray:
        try:
            values = np.asarray(load_npy(path))
        except (OSError, ValueError) as error:
            raise GeoTiffError(str(error)) from error
        if values.ndim == 2:
            values = values[None]
        count = 1 if self.order is None else len(self.order)
        if values.ndim != 3 or values.dtype.kind not in "uif":
            raise GeoTiffError(f"holds {values.dtype} {values.shape}, expected numbers (bands, rows, columns)")
        if len(values) not in (1, count) and values.shape[2] == count:
            values = np.moveaxis(values, 2, 0)
        return values


@dataclass(frozen=True)
class Index:
    """What a folder holds, in the order of the names.

    Attributes:
        names: of the samples, ``group::name`` where groups are known.
        files: of each sample, see `Reading.stored`.
        splits: of each sample.
        task: "multiclass", "multilabel", "segmentation" or "unlabelled".
        classes: names, in the order of the labels.
        labels: multi-hot, numbers, or None.
        masks: of each sample; empty: none.
        values: value in a mask -> class number.
        grouped: whether groups are known.
    """

    names: tuple[str, ...]
    files: tuple[dict[str, str], ...]
    splits: tuple[str, ...]
    task: str
    classes: tuple[str, ...]
    labels: np.ndarray | None
    masks: tuple[str, ...]
    values: Mapping[int, int]
    grouped: bool


# Data sets ---------------------------------------------------------------------------------------------------------


def _fit(image: np.ndarray, size: int, fixed: bool, fill: float) -> np.ndarray:
    """An image (C, H, W) as a square: cut to its middle and filled up, where a size was asked for.

    Raises:
        GeoTiffError: another size, and none was asked for.
    """
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    if not fixed:
        raise GeoTiffError(
            f"has {height}x{width} pixels, the first image {size}x{size}; --data_option size=PX cuts all to their "
            "middle and fills smaller ones up with no-data"
        )
    result = np.full((len(image), size, size), fill, dtype=image.dtype)
    rows, columns = min(height, size), min(width, size)
    top, left = (height - rows) // 2, (width - columns) // 2
    y, x = (size - rows) // 2, (size - columns) // 2
    result[:, y : y + rows, x : x + columns] = image[:, top : top + rows, left : left + columns]
    return result


class FolderImages(SarDataset):
    """Images with classes, or without labels."""

    def __init__(self, *place: Any, files: Sequence[dict[str, str]], reading: Reading, fixed: bool, **more: Any):
        super().__init__(*place, **more)
        self.files, self.reading, self.fixed = list(files), reading, fixed

    def read_into(self, index: int, out: np.ndarray) -> None:
        name, files = self.names[index], self.files[index]
        try:
            values, _ = self.reading.decibel(files)
            out[...] = _fit(values, self.spec.size, self.fixed, np.nan)
        except GeoTiffError as error:
            raise UnreadableSample(name, next(iter(files.values())), str(error)) from error
        finish_image(out, name, next(iter(files.values())), self.spec.bands)


class FolderMasks(MaskDataset):
    """Images with a mask each."""

    def __init__(self, *place: Any, files: Sequence[dict[str, str]], reading: Reading, fixed: bool,
                 masks: Sequence[str], values: Mapping[int, int], **more: Any):  # fmt: skip
        super().__init__(*place, **more)
        self.files, self.reading, self.fixed = list(files), reading, fixed
        self.masks, self.values = list(masks), {IGNORED: IGNORED, **values}

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        name, files, path = self.names[index], self.files[index], self.masks[index]
        first = next(iter(files.values()))
        try:
            values, grid = self.reading.decibel(files)
        except GeoTiffError as error:
            raise UnreadableSample(name, first, str(error)) from error
        try:
            mask, mask_grid = read_mask(path)
            if grid is not None and mask_grid is not None:
                check_same_grid(grid, mask_grid, path)
            if mask.shape != values.shape[1:]:
                raise GeoTiffError(f"has {mask.shape} pixels, its image {values.shape[1:]}")
            numbers = map_labels(mask, self.values)
            image[...] = _fit(values, self.spec.size, self.fixed, np.nan)
            label[...] = _fit(numbers[None], self.spec.size, self.fixed, IGNORED)[0]
        except GeoTiffError as error:
            raise UnreadableSample(name, path, str(error)) from error
        finish_image(image, name, first, self.spec.bands)


def read_mask(path: str) -> tuple[np.ndarray, Grid | None]:
    """Whole numbers (H, W), 255 at declared no-data, and where they lie.

    Raises:
        GeoTiffError: it is no such file.
    """
    if path.lower().endswith(".npy"):
        try:
            values, grid = np.squeeze(np.asarray(load_npy(path))), None
        except (OSError, ValueError) as error:
            raise GeoTiffError(str(error)) from error
        valid = np.ones(values.shape, dtype=bool)
    else:
        raster = read_raster(path)
        if len(raster.values) != 1:
            raise GeoTiffError(f"has {len(raster.values)} bands; expected one, of class numbers")
        values, valid, grid = raster.values[0], raster.valid[0], raster.grid
    if values.ndim != 2 or not (values.dtype.kind in "uib" or (values == np.round(values)).all()):
        raise GeoTiffError(f"holds {values.dtype} {values.shape}; expected whole numbers, one a pixel")
    return np.where(valid, values, IGNORED).astype(np.int64), grid


# The registry's entry ----------------------------------------------------------------------------------------------


def describe(spec: DatasetSpec, data_path: Path, options: Mapping[str, Any]) -> DatasetSpec:
    """The entry of a folder: its task, classes, size and groups.

    Args:
        spec: the registry's entry, with the chosen bands.
        data_path: the folder.
        options: those of `build`.

    Raises:
        UserError: no such folder, or one that holds nothing that can be read.
    """
    given = {key: value for key, value in options.items() if key in spec.options and value is not None}
    index = _index_of(spec, data_path, given)
    reading = _reading(spec.bands, given)
    size = given.get("size")
    if size is None:
        path = next(iter(index.files[0].values()))
        try:
            height, width = reading.stored(index.files[0])[0].shape[1:]
        except GeoTiffError as error:
            raise UserError(f"{path}: {error}") from error
        if height != width:
            raise UserError(
                f"{path} has {height}x{width} pixels; samples are square: --data_option size=PX cuts them to their "
                "middle and fills smaller ones up with no-data"
            )
        size = height
    return replace(
        spec,
        task=index.task,
        classes=index.classes,
        size=whole_number("size", size),
        cluster=spec.cluster if index.grouped else None,
        preprocessing=Preprocessing(geometry="window") if index.task == "segmentation" else spec.preprocessing,
    )


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    list: str | None = None,
    classes: str | None = None,
    unit: str = "dB",
    band_order: str | None = None,
    range: str | None = None,
    size: int | str | None = None,
    seed: int | str = 0,
    missing: str = "error",
) -> SarDataset:
    """Open a split of a folder.

    Args:
        spec: completed by `describe`.
        data_path: the folder.
        split: wanted splits.
        statistics: the statistics in use.
        on_error: see :class:`sarwmix.data.base.SarDataset`.
        list: CSV or Parquet with names and labels; not given: ``labels.csv`` or ``labels.parquet`` in the folder.
        classes: names in their order, joined with commas; of masks ``value=name``. Not given: ``classes.txt``, or those
            that the labels name, sorted.
        unit: of the stored values, one of `sarwmix.data.pixels.UNITS`.
        band_order: all bands of files that do not name theirs.
        range: what 0 and the largest value of whole numbers (PNG) stand for, in `unit`, such as ``-30,0``.
        size: cut and fill up to this side, px; not given: that of the first image, and all must have it.
        seed: decides the splits where the folder names none.
        missing: ``error``, or ``skip``: listed samples without files are left out and counted.

    Raises:
        UserError: see `describe`; a split without samples; values that contradict the unit.
    """
    given: dict[str, Any] = {"list": list, "classes": classes, "unit": unit, "band_order": band_order, "range": range,
                             "seed": seed, "missing": missing}  # fmt: skip
    wanted = parse_split(spec, split)
    index = _index_of(spec, data_path, {key: value for key, value in given.items() if value is not None})
    rows = [row for part in wanted for row, of in enumerate(index.splits) if of == part]
    if not rows:
        there = {part: index.splits.count(part) for part in dict.fromkeys(index.splits)}
        counted = ", ".join(f"{part} {count}" for part, count in there.items())
        raise EmptySplit(f"{data_path} has no sample of split {split!r}; it has {counted}")
    reading = _reading(spec.bands, given)
    place = (spec, split, statistics, [index.names[row] for row in rows])
    common: dict[str, Any] = {"on_error": on_error, "source": data_path, "files": [index.files[row] for row in rows],
                              "reading": reading, "fixed": size is not None}  # fmt: skip
    data: SarDataset
    if index.task == "segmentation":
        data = FolderMasks(*place, masks=[index.masks[row] for row in rows], values=index.values, **common)
    else:
        labels = None if index.labels is None else index.labels[rows]
        data = FolderImages(*place, labels, **common)
    _check_values(common["files"], reading, data_path)
    return data


def _check_values(files: Sequence[dict[str, str]], reading: Reading, data_path: Path) -> None:
    parts = []
    for number in np.unique(np.linspace(0, len(files) - 1, _LOOKED).astype(int)).tolist():
        try:
            parts.append(reading.stored(files[number])[0].reshape(len(reading.bands), -1))
        except GeoTiffError:
            continue  # for whoever reads it
    if parts:
        pixels = np.concatenate(parts, axis=1)
        warning = check_unit(pixels[:, np.isfinite(pixels).all(axis=0)], reading.unit, str(data_path), reading.bands)
        if warning is not None:
            get_logger().warning("%s", warning)


def _reading(bands: Sequence[str], given: Mapping[str, Any]) -> Reading:
    unit, order, ends = str(given.get("unit", "dB")), given.get("band_order"), given.get("range")
    if unit not in UNITS:
        raise UserError(f"option unit must be one of {', '.join(UNITS)}, not {unit!r}")
    names = None if order is None else tuple(part.strip().upper() for part in str(order).split(","))
    if names is not None and (set(bands) - set(names) or len(set(names)) != len(names)):
        raise UserError(f"band_order={order}: expected all bands of a file once each, {' and '.join(bands)} among them")
    numbers = None
    if ends is not None:
        try:
            low, high = (float(part) for part in str(ends).split(","))
        except ValueError:
            low, high = 0.0, 0.0
        if not -1e6 < low < high < 1e6:
            raise UserError(f"range={ends}: expected two numbers, what 0 and the largest value stand for, as in -30,0")
        numbers = (low, high)
    return Reading(tuple(bands), names, unit, numbers)


# The folder --------------------------------------------------------------------------------------------------------


def _index_of(spec: DatasetSpec, data_path: Path, given: Mapping[str, Any]) -> Index:
    if not data_path.is_dir():
        raise UserError(f"data path {data_path} of data set {spec.name!r} is no folder; see docs/own_data.md")
    if given.get("missing", "error") not in ("error", "skip"):
        raise UserError(f"option missing must be error or skip, not {given['missing']!r}")
    table = given.get("list")
    if table is None:
        found = [name for name in LISTS if (data_path / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{data_path} holds {' and '.join(found)}; keep one, or name it: --data_option list=FILE")
        path = data_path / found[0] if found else None
    else:
        path = Path(str(table)).expanduser()
        path = path if path.is_file() else data_path / path
        if not path.is_file():
            raise UserError(f"list {table} exists neither here nor in {data_path}")
    touched = tuple(one.stat().st_mtime_ns for one in (data_path, path) if one is not None)
    return _read_folder(
        str(data_path), path, spec.bands, given.get("classes"), whole_number("seed", given.get("seed", 0)),
        str(given.get("missing", "error")), touched,
    )  # fmt: skip


@lru_cache(maxsize=8)  # several splits are opened of one folder, and each tool asks for the task first
def _read_folder(
    folder: str, table: Path | None, bands: tuple[str, ...], classes: str | None, seed: int, missing: str,
    touched: tuple[int, ...],
) -> Index:  # fmt: skip
    root = Path(folder)
    images = find_images(root, bands)
    if not images:
        raise UserError(
            f"{root} holds no image with {' and '.join(bands)} ({', '.join(IMAGES)}); expected class folders, a list "
            f"{LISTS[0]}, or folders images and masks: docs/own_data.md"
        )
    rows = _listed_rows(table, root, images, missing) if table is not None else _rows_by_place(root, images)
    kinds = {row.kind for row in rows}
    if len(kinds) > 1:
        first = {kind: next(row.name for row in rows if row.kind == kind) for kind in sorted(kinds)}
        seen = "; ".join(f"{name} is {kind}" for kind, name in first.items())
        raise UserError(f"{table or root} is not of one kind ({seen}); docs/own_data.md shows the layouts")
    task = kinds.pop()
    declared = _declared_classes(root, classes)
    names, labels, values = _labels(rows, task, declared, str(table or root))
    groups = [row.group for row in rows]
    grouped = all(groups)
    splits = _splits(rows, task, labels, seed, root)
    full = [f"{row.group}{GROUP_MARK}{row.name}" if grouped else row.name for row in rows]
    return Index(
        tuple(full),
        tuple(images[row.name] for row in rows),
        tuple(splits),
        task,
        names,
        labels,
        tuple(row.mask for row in rows) if task == "segmentation" else (),
        values,
        grouped,
    )


@dataclass(frozen=True)
class Row:
    """A sample as the folder or the list describes it."""

    name: str
    kind: str
    labels: tuple[str, ...] = ()
    mask: str = ""
    split: str = ""
    group: str = ""


def find_images(root: Path, bands: Sequence[str]) -> dict[str, dict[str, str]]:
    """Images below a folder by name (path without suffix and band), with the files of each.

    Raises:
        UserError: two files for the same image.
    """
    found: dict[str, dict[str, str]] = {}
    for path in _files(root):
        if path.name.lower().endswith(IMAGES) and side_product(path) is None and path.parent.name not in MASK_FOLDERS:
            name, band = name_of(path.relative_to(root))
            files = found.setdefault(name, {})
            if band in files or (files and "" in (band, *files)):
                other = next(iter(files.values()))
                raise UserError(f"{other} and {path} are both image {name!r}; keep one of them in the folder")
            files[band] = str(path)
    return {name: files for name, files in found.items() if "" in files or set(bands) <= set(files)}


def name_of(path: Path) -> tuple[str, str]:
    """Name of the image that a file belongs to, and the band that its own name says ("": all)."""
    named = polarisations(path.stem, SAR_BANDS)
    if len(named) != 1:
        return path.with_suffix("").as_posix(), ""
    folder, stem = partner_key(path, named[0])
    return (folder / stem).as_posix(), named[0]


def _files(root: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder) / name


def _rows_by_place(root: Path, images: Iterable[str]) -> list[Row]:
    """Samples of a folder without a list: ``[split/]images/name`` with masks, ``[split/]Class/name``, or names."""
    rows = []
    for name in sorted(images):
        parts = name.split("/")
        split = SPLIT_OF.get(parts[0].lower(), "") if len(parts) > 1 else ""
        inside = parts[1:] if split else parts
        if inside[0] == "images" and len(inside) > 1:
            rows.append(Row(name, "segmentation", mask=_mask_of(root, parts[: len(parts) - len(inside)], inside[1:]),
                            split=split))  # fmt: skip
        elif len(inside) > 1:
            rows.append(Row(name, "multiclass", (inside[0],), split=split))
        else:
            rows.append(Row(name, "unlabelled", split=split))
    return rows


def _mask_of(root: Path, before: Sequence[str], inside: Sequence[str]) -> str:
    for folder in MASK_FOLDERS:
        base = root.joinpath(*before, folder, *inside)
        for suffix in IMAGES:
            for ending in ("", "_mask", "_label"):
                path = base.with_name(f"{base.name}{ending}{suffix}")
                if path.is_file():
                    return str(path)
    expected = "/".join((*before, MASK_FOLDERS[0], *inside))
    raise UserError(f"image {'/'.join((*before, 'images', *inside))} in {root} has no mask; expected {expected}.tif")


def _listed_rows(table: Path, root: Path, images: Mapping[str, dict[str, str]], missing: str) -> list[Row]:
    """Samples of a list, in its order.

    Raises:
        UserError: no such columns, a cell that cannot be used, names twice or without files.
    """
    columns, count = read_table(table)
    place = {kind: next((name for name in names if name in columns), None) for kind, names in _COLUMNS.items()}
    if place["name"] is None:
        raise UserError(f"{table} has the columns {', '.join(columns)}; expected one called name (and label, labels or "
                        "mask; split and group where you have them)")  # fmt: skip
    kinds = [kind for kind in ("label", "labels", "mask") if place[kind] is not None]
    taken = {name for name in place.values() if name}
    hot = [] if kinds else [name for name in columns if name not in taken and _is_hot(columns[name])]
    if len(kinds) > 1:
        raise UserError(f"{table} has the columns {' and '.join(str(place[kind]) for kind in kinds)}; keep one of them")
    short: dict[str, list[str]] = {}
    for name in images:
        short.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    rows, absent, seen = [], [], set()
    for number in range(count):
        where = f"{table} row {number + 2}"

        def cell(kind: str, number: int = number) -> Any:
            column = place[kind]
            return "" if column is None else columns[column][number]

        given = str(cell("name")).strip()
        name, _ = name_of(Path(given)) if Path(given).suffix.lower() in IMAGES else (Path(given).as_posix(), "")
        if name not in images and len(short.get(name, ())) == 1:
            name = short[name][0]
        if name not in images:
            absent.append(given)
            continue
        if name in seen:
            raise UserError(f"{where}: {given} is listed twice")
        seen.add(name)
        split = str(cell("split")).strip().lower()
        if split and split not in SPLIT_OF:
            raise UserError(f"{where}: split {split!r}; expected train, val or test")
        common: dict[str, Any] = {"split": SPLIT_OF.get(split, ""), "group": str(cell("group")).strip()}
        if kinds == ["label"]:
            label = str(cell("label")).strip()
            if not label:
                raise UserError(f"{where}: {given} has no label; several or none are for a column called labels")
            rows.append(Row(name, "multiclass", (label,), **common))
        elif kinds == ["labels"]:
            found = cell("labels")
            several = parse_label_list(found) if isinstance(found, str) else [str(one) for one in found or ()]
            rows.append(Row(name, "multilabel", tuple(several), **common))
        elif kinds == ["mask"]:
            mask = root / str(cell("mask")).strip()
            if not mask.is_file():
                raise UserError(f"{where}: mask {mask} does not exist")
            rows.append(Row(name, "segmentation", mask=str(mask), **common))
        elif len(hot) > 1:
            on = tuple(column for column in hot if str(columns[column][number]).strip().lower() in ("1", "1.0", "true"))
            rows.append(Row(name, "multilabel", on, **common))
        else:
            rows.append(Row(name, "unlabelled", **common))
    if absent and (missing == "error" or not rows):
        raise UserError(
            f"{len(absent)} of the {count} samples of {table} have no image in {root}, the first is {absent[0]!r}; "
            "names are paths below the folder. --data_option missing=skip leaves them out"
        )
    if absent:
        get_logger().warning("%s: %d of %d listed samples are absent and left out", table, len(absent), count)
    return rows


def _is_hot(cells: Sequence[Any]) -> bool:
    return all(str(cell).strip().lower() in ("0", "1", "0.0", "1.0", "true", "false") for cell in cells)


def read_table(path: Path) -> tuple[dict[str, list[Any]], int]:
    """Columns of a CSV or Parquet file by name in lower case, and the number of rows.

    Raises:
        UserError: it cannot be read, is empty, or a row has another number of cells.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            stored = pq.ParquetFile(path).read()
            found = {name.strip().lower(): stored.column(name).to_pylist() for name in stored.column_names}
            columns = {name: ["" if cell is None else cell for cell in cells] for name, cells in found.items()}
            count = stored.num_rows
        else:
            lines = read_text(path).splitlines()
            rows = [row for row in csv.reader(lines, delimiter=separator_of(lines[0] if lines else "")) if row]
            header = [name.strip().lower() for name in rows[0]] if rows else []
            for number, row in enumerate(rows[1:], start=2):
                if len(row) != len(header):
                    raise UserError(f"{path} row {number} has {len(row)} cells, the first row names {len(header)}")
            if len(set(header)) != len(header):
                raise UserError(f"{path}: a column name appears twice in {', '.join(header)}")
            columns = {name: [row[place] for row in rows[1:]] for place, name in enumerate(header)}
            count = max(0, len(rows) - 1)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"list {path} cannot be read: {error}") from error
    if not count:
        raise UserError(f"list {path} names no sample")
    return columns, count


def _declared_classes(root: Path, option: str | None) -> list[tuple[int | None, str]]:
    """(value in masks, name) of each class that was named, in order."""
    if option is None and not (root / CLASS_FILE).is_file():
        return []
    lines = read_text(root / CLASS_FILE).splitlines() if option is None else option.split(",")
    found: list[tuple[int | None, str]] = []
    for line in filter(None, (line.strip() for line in lines)):
        value, sign, name = line.partition("=")
        numbered = bool(sign) and value.strip().lstrip("-").isdecimal()
        found.append((int(value), name.strip()) if numbered else (None, line))
    return found


def _labels(
    rows: Sequence[Row], task: str, declared: Sequence[tuple[int | None, str]], where: str
) -> tuple[tuple[str, ...], np.ndarray | None, dict[int, int]]:
    """Class names, labels and values of masks."""
    names = tuple(dict.fromkeys(name for _, name in declared))
    if task == "segmentation":
        if not names:
            seen: set[int] = set()
            for row in rows[:_LOOKED]:
                try:
                    seen |= set(np.unique(read_mask(row.mask)[0]).tolist())
                except GeoTiffError as error:
                    raise UserError(f"{row.mask}: {error}") from error
            shown = ", ".join(map(str, sorted(seen)))
            raise UserError(
                f"the first masks of {where} hold the values {shown}; say what they mean: --data_option "
                f"classes=0=land,1=water, or lines 0=land in {CLASS_FILE}. 255 is ignored unless it is named"
            )
        values = {position if value is None else value: names.index(name) for position, (value, name)
                  in enumerate(declared)}  # fmt: skip
        return names, None, values
    if task == "unlabelled":
        return (), None, {}
    used = sorted({label for row in rows for label in row.labels})
    unknown = [label for label in used if names and label not in names]
    if unknown:
        raise UserError(f"{where} names the class {unknown[0]!r}, which is none of {', '.join(names)}")
    names = names or tuple(used)
    code = {name: number for number, name in enumerate(names)}
    if task == "multiclass":
        return names, np.array([code[row.labels[0]] for row in rows], dtype=np.int64), {}
    hot = np.zeros((len(rows), len(names)), dtype=np.uint8)
    for number, row in enumerate(rows):
        hot[number, [code[label] for label in row.labels]] = 1
    return names, hot, {}


def _splits(rows: Sequence[Row], task: str, labels: np.ndarray | None, seed: int, root: Path) -> list[str]:
    """Split of each sample: as given, else drawn; validation is drawn from train where only that is missing."""
    given = [row.split for row in rows]
    if any(given) and not all(given):
        name = rows[given.index("")].name
        raise UserError(f"{root}: some samples have a split and some have none, such as {name}; give it for all")
    if task == "unlabelled" and not any(given):
        return ["train"] * len(rows)
    grouped = all(row.group for row in rows)
    units = [row.group if grouped else row.name for row in rows]
    strata = labels if not grouped and labels is not None and labels.ndim == 1 else np.zeros(len(rows), dtype=np.int64)
    chosen = np.array(given if all(given) else ["train"] * len(rows), dtype=object)
    if not all(given):
        _draw(chosen, units, strata, "test", TEST_SHARE, seed)
    if "val" not in chosen:
        _draw(chosen, units, strata, "val", VAL_SHARE / (1 - TEST_SHARE) if not all(given) else VAL_SHARE, seed + 1)
        get_logger().info(
            "%s: %s drawn from %s with seed=%d", root, "val" if all(given) else "test and val",
            "whole groups" if grouped else "single samples; neighbours may be in train and test: a column group or "
            "split keeps them together", seed,
        )  # fmt: skip
    if grouped and all(given):
        seen: dict[str, str] = {}
        for unit, part in zip(units, chosen, strict=True):
            if "test" in {seen.setdefault(unit, part), part} and seen[unit] != part:
                get_logger().warning("%s: group %s is in %s and in %s", root, unit, seen[unit], part)
                break
    return [str(part) for part in chosen]


def _draw(chosen: np.ndarray, units: Sequence[str], strata: np.ndarray, part: str, share: float, seed: int) -> None:
    """Move a share of the units of each stratum from train to another split."""
    for stratum in np.unique(strata):
        rows = [row for row in np.flatnonzero(strata == stratum).tolist() if chosen[row] == "train"]
        own = sorted({units[row] for row in rows})
        out = {unit for unit, is_out in zip(own, held_out(len(own), share, seed=seed), strict=True) if is_out}
        for row in rows:
            if units[row] in out:
                chosen[row] = part
