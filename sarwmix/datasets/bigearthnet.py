"""BigEarthNet v1 and v2: metadata, three storages (GeoTIFF tree, Zarr, LMDB), one class.

Metadata says which patches exist, their labels and splits; a source reads one patch by its ``s1_name``. Any metadata
goes with any source: what a folder holds is recognised by what lies in it. Sentinel-2 bands of v2 are read by the
patch's ``patch_id`` and brought to 120 px by nearest neighbour, as reBEN does; the sample keeps its Sentinel-1 name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sarwmix.data.base import NameList, SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError, PatchReader
from sarwmix.data.io.lmdb import LmdbPatches, is_lmdb
from sarwmix.data.io.rasters import read_raster, whole_number
from sarwmix.data.io.zarr import ZarrPatches, is_zarr
from sarwmix.data.labels import CLASSES_19, class_codes, parse_label_list
from sarwmix.data.spec import SAR_BANDS, DatasetSpec, EmptySplit, Statistics, parse_split, parse_switch
from util.errors import UserError
from util.files import parse_json, read_bytes
from util.log import get_logger
from util.text import first_line, read_text, separator_of

DATASETS_DIR = Path(__file__).resolve().parents[2] / "datasets"
SCENE_PARTS = 5  # S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39: the first five parts name the scene
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
CHECKS = ("sample", "all", "none")
CHECK_SAMPLE = 64  # patches looked for before training when check is "sample"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+){5,}")


# Metadata --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The patches of one or several splits, in the order split by split, within a split as in the file.

    Attributes:
        names: s1_name of each patch.
        labels: uint8 (N, 19), or None when the metadata has no labels.
        split: uint8 (N,), position of the patch's split in ``splits``.
        splits: Names of the splits.
        flagged: bool (N,), seasonal snow, cloud or cloud shadow.
        s2_names: patch_id (Sentinel-2 name) of each patch, or None when the metadata has none.
    """

    names: NameList
    labels: np.ndarray | None
    split: np.ndarray
    splits: tuple[str, ...]
    flagged: np.ndarray
    s2_names: NameList | None = None

    def select(self, rows: np.ndarray) -> Metadata:
        labels = None if self.labels is None else self.labels[rows]
        s2_names = None if self.s2_names is None else self.s2_names.take(rows)
        return Metadata(self.names.take(rows), labels, self.split[rows], self.splits, self.flagged[rows], s2_names)


def check_name(name: str, where: str) -> str:
    """A patch name that is safe as a part of a path.

    Raises:
        UserError: The name is no Sentinel-1 patch name, or would lead out of the data folder.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"{where}: {name!r} is no Sentinel-1 patch name; expected the form "
            "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39 (letters, digits, '.', '-', at least six parts)"
        )
    if name.startswith(("S2A_", "S2B_", "S2C_")):
        raise UserError(
            f"{where}: {name!r} is the name of a Sentinel-2 patch; the column with the Sentinel-1 name is needed "
            "(--id_col takes its number, counted from 0, or its name)"
        )
    return name


def read_metadata(
    paths: Sequence[Path], splits: Sequence[str], *, id_col: int | str | None = None, nomenclature: str = "any"
) -> Metadata:
    """Read metadata files of any supported kind and keep the wanted splits.

    Args:
        paths: Parquet or CSV files with a split column, or CSV files for single splits that have ``train``, ``val`` or
            ``test`` in their file name. Rows of several files are joined.
        splits: The wanted splits, in the wanted order.
        id_col: Number (from 0) or name of the column with the Sentinel-1 name; None: column ``s1_name``, else column 4
            when there are labels in column 1, else column 1, else the only column.
        nomenclature: Which label names are accepted, see :func:`sarwmix.data.labels.class_codes`.

    Raises:
        UserError: A file is missing or not readable, lacks a column, holds an unknown label or a bad name.
    """
    tables = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"metadata file {path} does not exist")
        try:
            if path.suffix in (".parquet", ".pq", ".parq"):
                tables.append(_read_parquet(path, id_col, nomenclature))
            else:
                tables.append(_read_csv(path, id_col, nomenclature))
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:  # pandas and pyarrow errors derive from ValueError
            raise UserError(f"metadata file {path} cannot be read: {first_line(error)}") from error
    labelled = [table.labels is not None for table in tables]
    if any(labelled) and not all(labelled):
        raise UserError(f"some of {', '.join(map(str, paths))} have labels and some have not")
    _check_apart(tables, paths)
    return _join_tables(tables, tuple(splits))


def _check_apart(tables: Sequence[Metadata], paths: Sequence[Path]) -> None:
    """Refuse a patch that is in two splits: it would be trained on and tested on."""
    name = NameList.join([table.names for table in tables]).first_duplicate()
    if name is None:
        return
    found = [
        table.splits[table.split[row]]
        for table in tables
        for row in range(len(table.names))
        if table.names[row] == name
    ]
    if len(set(found)) > 1:
        raise UserError(
            f"{', '.join(map(str, paths))}: patch {name!r} is in more than one split ({', '.join(found)}); what is "
            "trained on must not be tested on. Keep one of its rows"
        )


def _join_tables(tables: list[Metadata], wanted: tuple[str, ...]) -> Metadata:
    names, labels, codes, flagged, s2_names = [], [], [], [], []
    for code, split in enumerate(wanted):
        for table in tables:
            place = table.splits.index(split) if split in table.splits else -1
            part = table.select(np.flatnonzero(table.split == place))
            names.append(part.names)
            codes.append(np.full(len(part.names), code, dtype=np.uint8))
            flagged.append(part.flagged)
            if part.labels is not None:
                labels.append(part.labels)
            if part.s2_names is not None:
                s2_names.append(part.s2_names)
    return Metadata(
        NameList.join(names),
        np.concatenate(labels) if labels else None,
        np.concatenate(codes),
        wanted,
        np.concatenate(flagged),
        NameList.join(s2_names) if len(s2_names) == len(names) else None,
    )


def _split_codes(values: Sequence[str], codes: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Distinct split texts and their codes -> codes of the project's split names."""
    found = []
    for value in values:
        key = str(value).strip().lower()
        if key not in SPLIT_NAMES:
            raise UserError(f"metadata file {path}: unknown split {value!r}; expected train, validation (val) or test")
        found.append(SPLIT_NAMES[key])
    splits = tuple(dict.fromkeys(found))
    table = np.array([splits.index(name) for name in found], dtype=np.uint8)
    return table[codes], splits


def _split_of_file(path: Path) -> str:
    parts = re.split(r"[^a-z]+", path.name.lower())
    found = {SPLIT_NAMES[part] for part in parts if part in SPLIT_NAMES}
    if len(found) != 1:
        raise UserError(
            f"metadata file {path} has no column 'split' and its name does not tell one split; "
            "name it for example benv2_train.csv, or add the column"
        )
    return found.pop()


def _read_parquet(path: Path, id_col: int | str | None, nomenclature: str) -> Metadata:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)  # pq.read_table would import pyarrow.dataset and with it pandas: 0.3 s
    own = file.schema_arrow.names
    columns = [name.strip().lower() for name in own]
    if len(set(columns)) != len(columns):
        raise UserError(f"{path}: a column name appears twice in {own}")
    id_name = _column_name(path, columns, id_col, "s1_name")
    flags = [name for name in ("contains_seasonal_snow", "contains_cloud_or_shadow") if name in columns]
    wanted = [id_name, *(name for name in ("split", "labels", "patch_id") if name in columns), *flags]
    hot = _one_hot(columns, path)
    table = file.read(columns=[own[columns.index(name)] for name in dict.fromkeys([*wanted, *hot])])
    table = table.rename_columns([name.strip().lower() for name in table.column_names])
    count = table.num_rows

    ids = table.column(id_name).combine_chunks()
    if ids.null_count:
        raise UserError(f"metadata file {path}: column {id_name!r} has {ids.null_count} empty cells")
    ids = pc.utf8_trim_whitespace(ids.cast(pa.large_string()))
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    names = _names_of_arrow(ids)
    _check_names(names, path, first_row=1)

    if "split" in columns:
        if table.column("split").null_count:
            raise UserError(f"metadata file {path}: column 'split' has {table.column('split').null_count} empty cells")
        encoded = table.column("split").combine_chunks().cast(pa.string()).dictionary_encode()
        split, splits = _split_codes(encoded.dictionary.to_pylist(), _numbers(encoded.indices), path)
    else:
        split, splits = np.zeros(count, dtype=np.uint8), (_split_of_file(path),)

    labels = None
    if "labels" in columns:
        column = table.column("labels").combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            labels = _labels_of_lists(column, count, path, nomenclature)
        else:
            labels = _labels_of_texts(column.to_pylist(), path, nomenclature, first_row=1)
    elif hot:
        labels = _labels_of_columns([[str(cell) for cell in table.column(name).to_pylist()] for name in hot], hot, path)
    flagged = np.zeros(count, dtype=bool)
    for flag in flags:
        flagged |= _numbers(table.column(flag).combine_chunks().cast(pa.uint8())) > 0  # a missing value is no flag
    s2_names = None
    if "patch_id" in columns:
        texts = table.column("patch_id").combine_chunks().cast(pa.large_string())
        if texts.null_count:
            texts = pc.fill_null(texts, "")  # imports pandas
        s2_names = _names_of_arrow(texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts)
    return Metadata(names, labels, split, splits, flagged, s2_names)


def _numbers(array) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Numbers of an arrow array; `to_numpy`, which imports pandas, only where values are missing."""
    return np.from_dlpack(array) if array.null_count == 0 else array.to_numpy(zero_copy_only=False)


def _names_of_arrow(ids) -> NameList:  # type: ignore[no-untyped-def]  # pyarrow has no type information
    _, offsets_buffer, data = ids.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
    start, stop = int(offsets[0]), int(offsets[-1])
    text = np.frombuffer(data, dtype=np.uint8)[start:stop] if data is not None else np.empty(0, dtype=np.uint8)
    return NameList(text.copy(), offsets - start)


def _labels_of_lists(column, count: int, path: Path, nomenclature: str) -> np.ndarray:  # type: ignore[no-untyped-def]
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = np.nan_to_num(_numbers(pc.list_value_length(column))).astype(np.int64)  # 0 for a missing list
    rows = np.repeat(np.arange(count), lengths)
    encoded = column.flatten().cast(pa.string()).dictionary_encode()
    codes = _numbers(encoded.indices)
    classes = np.full(len(encoded.dictionary), -1)  # -1: a name outside the 19 classes
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        where = f"metadata file {path} row {int(rows[np.argmax(codes == code)]) + 1}"
        for number in class_codes([name], where=where, nomenclature=nomenclature):
            classes[code] = number
    labels = np.zeros((count, len(CLASSES_19)), dtype=np.uint8)
    of_label = classes[codes]
    labels[rows[of_label >= 0], of_label[of_label >= 0]] = 1
    return labels


def _labels_of_texts(texts: Sequence[str], path: Path, nomenclature: str, *, first_row: int) -> np.ndarray:
    """Multi-hot labels of label cells; each distinct cell is parsed once."""
    labels = np.zeros((len(texts), len(CLASSES_19)), dtype=np.uint8)
    known: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        codes = known.get(text)
        if codes is None:
            where = f"metadata file {path} row {row + first_row}"
            if not text:
                raise UserError(f"{where}: the cell of its labels is empty")
            try:
                found = parse_label_list(text)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            codes = known[text] = class_codes(found, where=where, nomenclature=nomenclature)
        labels[row, codes] = 1
    return labels


def _column_name(path: Path, columns: Sequence[str], id_col: int | str | None, default: str) -> str:
    if id_col is None:
        choice: int | str = default
    else:
        choice = int(id_col) if str(id_col).lstrip("-").isdigit() else str(id_col).lower()
    if isinstance(choice, int):
        if not 0 <= choice < len(columns):
            raise UserError(f"{path} has columns 0 to {len(columns) - 1}, id_col {choice} is not there")
        return columns[choice]
    if choice not in columns:
        raise UserError(f"{path} has no column {choice!r}; it has: {', '.join(columns)} (--id_col chooses one)")
    return choice


def _one_hot(columns: Sequence[str], path: Path) -> list[str]:
    """Columns in lower case that are named by the 19 classes, in the project's order; none where there are labels.

    Raises:
        UserError: Only some of the classes have a column.
    """
    names = [name.lower() for name in CLASSES_19]
    absent = [name for name in names if name not in columns]
    if "labels" in columns or len(absent) == len(names):
        return []
    if absent:
        raise UserError(
            f"metadata file {path} has columns for {len(names) - len(absent)} of the 19 classes, without "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}; add them, or give a column 'labels'"
        )
    return names


def _labels_of_columns(cells: Sequence[Sequence[str]], names: Sequence[str], path: Path) -> np.ndarray:
    """Multi-hot labels from a column of each class."""
    known = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0}
    labels = np.zeros((len(cells[0]), len(names)), dtype=np.uint8)
    for number, column in enumerate(cells):
        for row, cell in enumerate(column):
            value = known.get(cell.strip().lower())
            if value is None:
                raise UserError(f"metadata file {path}: column {names[number]!r} holds {cell!r}; expected 0 or 1")
            labels[row, number] = value
    return labels


def _read_csv(path: Path, id_col: int | str | None, nomenclature: str) -> Metadata:
    import pandas as pd

    try:
        text = read_text(path)
        frame = pd.read_csv(
            io.StringIO(text),
            sep=separator_of(text.split("\n", 1)[0]),
            header=None,
            dtype=str,
            skipinitialspace=True,
            keep_default_na=False,
            skip_blank_lines=True,
        )
    except pd.errors.EmptyDataError:
        raise UserError(f"metadata file {path} is empty") from None
    frame = frame.apply(lambda column: column.str.strip())
    header = _header_of(frame.iloc[0].tolist())
    first_row = 1
    if header is not None:
        frame = frame.iloc[1:]
        first_row = 2
    columns = header if header is not None else [str(number) for number in range(frame.shape[1])]
    if len(set(columns)) != len(columns):
        raise UserError(f"{path}: a column name appears twice in {columns}")
    frame.columns = pd.Index(columns)
    if id_col is not None:
        id_name = _column_name(path, columns, id_col, "s1_name")
    else:
        id_name = _guess_id_column(columns, header, frame)
    names = NameList.of(frame[id_name].tolist())
    _check_names(names, path, first_row=first_row)

    labels = None
    label_name = "labels" if "labels" in columns else _guess_label_column(columns, frame)
    if label_name is not None:
        labels = _labels_of_texts(frame[label_name].tolist(), path, nomenclature, first_row=first_row)
    elif hot := _one_hot(columns, path):
        labels = _labels_of_columns([frame[name].tolist() for name in hot], hot, path)
    if "split" in columns:
        codes, values = pd.factorize(frame["split"])
        split, splits = _split_codes([str(value) for value in values], codes, path)
    else:
        split, splits = np.zeros(len(frame), dtype=np.uint8), (_split_of_file(path),)
    flagged = np.zeros(len(frame), dtype=bool)
    for flag in ("contains_seasonal_snow", "contains_cloud_or_shadow"):
        if flag in columns:
            flagged |= frame[flag].str.lower().isin(("true", "1")).to_numpy()
    s2_names = NameList.of(frame["patch_id"].tolist()) if "patch_id" in columns else None
    return Metadata(names, labels, split, splits, flagged, s2_names)


def _header_of(cells: list[str]) -> list[str] | None:
    """The cells of a header row, or None when the row holds data (a patch name or a label list)."""
    if any(_NAME.fullmatch(cell) or cell.startswith("[") for cell in cells):
        return None
    return [cell.strip("'\"").lower() for cell in cells]


def _guess_id_column(columns: list[str], header: list[str] | None, frame) -> str:  # type: ignore[no-untyped-def]
    if header is not None and "s1_name" in header:
        return "s1_name"
    if len(columns) > 4 and len(frame) and str(frame.iloc[0, 1]).startswith("["):
        return columns[4]
    return columns[1] if len(columns) > 1 else columns[0]


def _guess_label_column(columns: list[str], frame) -> str | None:  # type: ignore[no-untyped-def]
    if len(columns) > 1 and len(frame) and str(frame.iloc[0, 1]).startswith("["):
        return columns[1]
    return None


def _check_names(names: NameList, path: Path, *, first_row: int) -> None:
    if _plainly_good(names):
        return
    for row, name in enumerate(names):
        if not _NAME.fullmatch(name) or ".." in name or name.startswith("S2"):
            check_name(name, f"metadata file {path} row {row + first_row}")


def _plainly_good(names: NameList) -> bool:
    """Whether all names pass check_name, decided on bytes, block by block; False: look at each of them."""
    kinds = np.zeros(256, dtype=np.uint8)  # 0: not allowed
    kinds[np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", dtype=np.uint8)] = 1
    kinds[np.frombuffer(b".-", dtype=np.uint8)] = 2
    kinds[ord("_")] = 3
    block = 8192  # temporary arrays that stay in the cache: fresh memory costs more than the work
    return len(names) > 0 and all(
        _plainly_good_block(names.buffer, names.offsets[first : first + block + 1], kinds)
        for first in range(0, len(names), block)
    )


def _plainly_good_block(buffer: np.ndarray, offsets: np.ndarray, kinds: np.ndarray) -> bool:
    if int(np.diff(offsets).min()) < 2:
        return False
    text = buffer[offsets[0] : offsets[-1]]
    starts, stops = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    kind = kinds[text]
    mark = kind > 1
    underscores = np.add.reduceat(kind == kinds[ord("_")], starts, dtype=np.uint16)
    return bool(
        kind.all()
        and not (mark[1:] & mark[:-1]).any()
        and not (mark[starts] | mark[stops - 1]).any()
        and int(underscores.min()) >= SCENE_PARTS
        and not ((text[starts] == ord("S")) & (text[starts + 1] == ord("2"))).any()
    )


def find_metadata(
    data_path: Path, choice: str | Path | Sequence[str | Path] | None, splits: Sequence[str], *, dataset: str
) -> list[Path]:
    """The metadata files of a data set.

    Args:
        data_path: The data folder.
        choice: What the user gave: a file, several files (a list, or one text joined with commas), a folder, a pattern
            with ``{split}``; or None to look in the usual places.
        splits: The wanted splits.
        dataset: ``"benv1"`` or ``"benv2"``, the prefix of split files.

    Raises:
        UserError: Nothing was found; the message lists where was looked.
    """
    if choice is not None:
        items = choice.split(",") if isinstance(choice, str) else [choice] if isinstance(choice, Path) else list(choice)
        paths: list[Path] = []
        for item in items:
            path = Path(str(item).strip()).expanduser()
            if path.is_dir():
                paths += _metadata_in(path, splits, dataset)[0] or [path / "metadata.parquet"]
            elif "{split}" in str(path):
                paths += [Path(str(path).replace("{split}", split)) for split in splits]
            else:
                paths.append(path)
        return paths
    looked: list[str] = []
    folder = data_path if data_path.is_dir() else data_path.parent
    for place in dict.fromkeys((folder, folder.parent, DATASETS_DIR)):
        found, tried = _metadata_in(place, splits, dataset)
        if found:
            return found
        looked += tried
    raise UserError(
        f"no metadata for data set {dataset!r} (split {'+'.join(splits)}) was found; looked for "
        f"{', '.join(looked)}. Give --data_option metadata=FILE, or write the lists with scripts/prepare_datasets.py"
    )


def _metadata_in(folder: Path, splits: Sequence[str], dataset: str) -> tuple[list[Path], list[str]]:
    tried: list[str] = []
    if dataset == "benv2":
        for name in ("metadata.parquet", "metadata.csv"):
            tried.append(str(folder / name))
            if (folder / name).is_file():
                return [folder / name], tried
    for pattern in (f"{dataset}_{{split}}.csv", "{split}.csv"):
        tried.append(str(folder / pattern))
        paths = [folder / pattern.replace("{split}", split) for split in splits]
        if all(path.is_file() for path in paths):
            return paths, tried
    return [], tried


# Sources ---------------------------------------------------------------------------------------------------------


class PatchSource(Protocol):
    """Reads patches by name."""

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill ``out`` (C, H, W) float32 with the values as stored.

        Raises:
            UnreadableSample: The patch is missing or cannot be used.
        """

    def missing(self, name: str) -> str | None:
        """The first file or key of the patch that does not exist, or None when all are there."""

    def labels(self, name: str) -> list[str] | None:
        """Label names stored beside the patch; None when the storage has none.

        Raises:
            UnreadableSample: They should be there and cannot be read.
        """


class GeoTiffTree:
    """``<root>/<scene>/<s1_name>/<s1_name>_<band>.tif`` (v2), or without the scene folder (v1).

    Args:
        root: The folder.
        bands: Band names in the order of the channels.
        size: Height and width of a patch.
        nested: Whether there are scene folders.
        plain: Whether the quick path for plain files is used.
    """

    def __init__(self, root: Path, bands: Sequence[str], size: int, *, nested: bool, plain: bool = True) -> None:
        self.root = str(root)
        self.bands = tuple(bands)
        self.nested = nested
        self._reader = PatchReader(size, size, plain=plain)

    def folder(self, name: str) -> str:
        if not self.nested:
            return f"{self.root}/{name}"
        return f"{self.root}/{'_'.join(name.split('_', SCENE_PARTS)[:SCENE_PARTS])}/{name}"

    def read_into(self, name: str, out: np.ndarray) -> None:
        folder = self.folder(name)
        for channel, band in enumerate(self.bands):
            path = f"{folder}/{name}_{band}.tif"
            try:
                self._reader.read_into(path, out[channel])
            except GeoTiffError as error:
                raise UnreadableSample(name, path, str(error)) from error

    def missing(self, name: str) -> str | None:
        folder = self.folder(name)
        for band in self.bands:
            path = f"{folder}/{name}_{band}.tif"
            if not os.path.isfile(path):
                return path
        return None

    def labels(self, name: str) -> list[str] | None:
        path = f"{self.folder(name)}/{name}_labels_metadata.json"
        try:
            return [str(label) for label in parse_json(read_bytes(path, 1 << 20))["labels"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableSample(name, path, f"no labels: {error}") from error


S2_NAME = re.compile(r"S2[ABC]_[A-Za-z0-9]+(_[A-Za-z0-9]+){3,}")
S2_SCENE_PARTS = 2  # S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57: all but the last two parts name the tile


class OpticalTree:
    """``<root>/<tile>/<patch_id>/<patch_id>_<band>.tif`` (v2), or without the tile folder: 120, 60 or 20 px a band."""

    def __init__(self, root: Path, bands: Sequence[str], size: int, *, nested: bool) -> None:
        self.root = str(root)
        self.bands = tuple(bands)
        self.size = size
        self.nested = nested

    def path(self, name: str, band: str) -> str:
        """File of one band."""
        tile = f"{'_'.join(name.split('_')[:-S2_SCENE_PARTS])}/" if self.nested else ""
        return f"{self.root}/{tile}{name}/{name}_{band}.tif"

    def read_into(self, name: str, out: np.ndarray) -> None:
        for channel, band in enumerate(self.bands):
            path = self.path(name, band)
            try:
                values = read_raster(path, numbers=[1]).floats()[0]
                out[channel] = enlarge(values, self.size)
            except (GeoTiffError, ValueError) as error:
                raise UnreadableSample(name, path, str(error)) from error

    def missing(self, name: str) -> str | None:
        return next((path for band in self.bands if not os.path.isfile(path := self.path(name, band))), None)

    def labels(self, name: str) -> list[str] | None:
        return None  # the metadata that name the Sentinel-2 patch have labels, too


def enlarge(values: np.ndarray, size: int) -> np.ndarray:
    """A square band to `size` px by nearest neighbour.

    Raises:
        ValueError: its side does not divide `size`.
    """
    side = values.shape[-1]
    if values.ndim != 2 or values.shape[0] != side or side == 0 or size % side:
        raise ValueError(
            f"has shape {'x'.join(map(str, values.shape))}, expected {size}, {size // 2} or {size // 6} px"
        )
    return values.repeat(size // side, axis=0).repeat(size // side, axis=1)


def open_optical(data_path: Path, bands: Sequence[str], size: int, example: str) -> PatchSource:
    """Where Sentinel-2 patches lie: an LMDB, or a GeoTIFF tree ``BigEarthNet-S2`` in or beside the data path.

    Raises:
        UserError: There is none.
    """
    if is_lmdb(data_path):
        return LmdbPatches(data_path, bands, size, enlarge=True)
    if is_zarr(data_path):
        raise UserError(f"Zarr store {data_path} holds Sentinel-1 only; bands {', '.join(bands)} need GeoTIFF or LMDB")
    places = (data_path / "BigEarthNet-S2", data_path.parent / "BigEarthNet-S2", data_path)
    for root in places:
        nested = _optical_nesting(root)
        if nested is not None:
            return OpticalTree(root, bands, size, nested=nested)
    wanted = OpticalTree(places[0], bands, size, nested=True).path(example, bands[0])
    raise UserError(
        f"no Sentinel-2 patches for the bands {', '.join(bands)} were found in {', '.join(map(str, places))}; expected "
        f"for example {wanted}"
    )


def _optical_nesting(root: Path) -> bool | None:
    """Whether Sentinel-2 patches lie in tile folders, or directly in `root`; None when there are none."""
    if not root.is_dir():
        return None
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and S2_NAME.fullmatch(entry.name):
            return not any(path.suffix == ".tif" for path in entry.iterdir())
    return None


class JoinedSource:
    """Sentinel-1 and Sentinel-2 bands of a patch, each from its own source.

    Args:
        bands: All bands, in the order of the channels.
        sar: Source of the Sentinel-1 bands, or None when there are none; asked for the patch's own name.
        optical: Source of the Sentinel-2 bands; asked for the patch_id.
        s2_names: Sentinel-1 name -> patch_id.
        size: Height and width.
    """

    def __init__(
        self,
        bands: Sequence[str],
        sar: PatchSource | None,
        optical: PatchSource,
        names: NameList,
        s2_names: NameList,
        size: int,
    ) -> None:
        self.sar, self.optical = sar, optical
        self.sar_channels = np.array([k for k, band in enumerate(bands) if band in SAR_BANDS], dtype=np.int64)
        self.s2_channels = np.array([k for k, band in enumerate(bands) if band not in SAR_BANDS], dtype=np.int64)
        self.size = size
        self.names, self.s2_names = names, s2_names
        # Rows of the names sorted by a hash: a dictionary of half a million texts would be copied by every worker.
        hashes = np.array([hash_name(name) for name in names], dtype=np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def s2_name(self, name: str) -> str:
        """patch_id of a patch."""
        wanted = np.uint64(hash_name(name))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._order[place])
            if self.names[row] == name:
                return self.s2_names[row]
            place += 1
        raise UnreadableSample(name, "metadata", "names no patch_id")

    def read_into(self, name: str, out: np.ndarray) -> None:
        try:
            optical = np.empty((len(self.s2_channels), self.size, self.size), dtype=np.float32)
            self.optical.read_into(self.s2_name(name), optical)
        except UnreadableSample as error:
            raise UnreadableSample(name, error.path, error.reason) from error
        out[self.s2_channels] = optical
        if self.sar is not None:
            sar = np.empty((len(self.sar_channels), self.size, self.size), dtype=np.float32)
            self.sar.read_into(name, sar)
            out[self.sar_channels] = sar

    def missing(self, name: str) -> str | None:
        lost = self.optical.missing(self.s2_name(name))
        return lost if lost is not None or self.sar is None else self.sar.missing(name)

    def labels(self, name: str) -> list[str] | None:
        return None if self.sar is None else self.sar.labels(name)


def hash_name(name: str) -> int:
    """64 bits that are the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def open_source(data_path: Path, bands: Sequence[str], size: int, example: str) -> PatchSource:
    """Recognise what ``data_path`` holds: an LMDB, a Zarr store, or a GeoTIFF tree with or without scene folders.

    Args:
        data_path: Folder, store or LMDB file.
        bands: Band names in the order of the channels.
        size: Height and width of a patch.
        example: A patch that should be there, for the error message.

    Raises:
        UserError: ``data_path`` holds none of them.
    """
    if is_lmdb(data_path):
        return LmdbPatches(data_path, bands, size)
    if not data_path.is_dir():
        raise UserError(f"data path {data_path} is neither a folder (GeoTIFF tree, Zarr, packed store) nor an LMDB")
    if is_zarr(data_path):
        return ZarrPatches(data_path, bands, size)
    for root in (data_path, data_path / "BigEarthNet-S1"):
        nested = _is_nested(root)
        if nested is not None:
            return GeoTiffTree(root, bands, size, nested=nested)
    raise UserError(
        f"data path {data_path} holds no Sentinel-1 patches; expected folders <scene>/<s1_name>/<s1_name>_<band>.tif, "
        f"for example {GeoTiffTree(data_path, bands, size, nested=True).missing(example)}"
    )


def _is_nested(root: Path) -> bool | None:
    """Whether patches lie in scene folders (v2) or directly in ``root`` (v1); None when there are no patches."""
    if not root.is_dir():
        return None
    with os.scandir(root) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link in a circle
                if not entry.is_dir() or entry.name.startswith("."):
                    continue
                if _NAME.fullmatch(entry.name):
                    return False
                if len(entry.name.split("_")) == SCENE_PARTS:
                    return True
    return None


# The data set ----------------------------------------------------------------------------------------------------


class BigEarthNet(SarDataset):
    """Patches of one or several splits, read by name from a source."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        metadata: Metadata,
        source: PatchSource,
        *,
        on_error: str = "raise",
        check: str = "sample",
        with_labels: bool = True,
        data_path: str | Path = "",
    ) -> None:
        labels = metadata.labels if with_labels else None
        super().__init__(spec, split, statistics, metadata.names, labels, on_error=on_error, source=data_path)
        self.metadata = metadata
        self.patches = source
        self._check_presence(check)
        if self.labels is None and with_labels:
            self.labels = self._read_labels()

    def read_into(self, index: int, out: np.ndarray) -> None:
        name = self.names[index]
        self.patches.read_into(name, out)
        finish_image(out, name, lambda: self._place(name), self.spec.bands)

    def _place(self, name: str) -> str:
        """Where a patch is kept: its folder, or the store."""
        folder = getattr(self.patches, "folder", None)
        return str(self.source if folder is None else folder(name))

    def _check_presence(self, check: str) -> None:
        if check not in CHECKS:
            raise UserError(f"check must be one of {', '.join(CHECKS)}, not {check!r}")
        if check == "none":
            return
        count = len(self) if check == "all" else min(CHECK_SAMPLE, len(self))
        lost: list[str] = []
        for position in np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)):
            path = self.patches.missing(self.names[int(position)])
            if path is not None:
                lost.append(path)
        if lost:
            raise UserError(
                f"{len(lost)} of {count} patches looked for are listed but absent in {self.source}; the first is "
                f"{lost[0]}. Complete the data, or leave such patches out with --data_option missing=skip (check=none "
                "does not look; absent patches then count as unreadable ones)"
            )

    def _read_labels(self) -> np.ndarray:
        """Labels stored beside the patches (43 names each), read once at the start."""
        where = f"{self.source}: patch"

        def codes_of(index: int) -> list[int]:
            name = self.names[index]
            stored = self.patches.labels(name)
            if stored is None:
                raise UserError(
                    f"neither the metadata nor {self.source} has labels for {name}; give metadata with labels, "
                    "or labels=none for pretraining"
                )
            return class_codes(stored, where=f"{where} {name}", nomenclature="any")

        labels = np.zeros((len(self), len(self.spec.classes)), dtype=np.uint8)
        with ThreadPoolExecutor(8) as pool:  # waiting for small files, not computing
            for row, codes in enumerate(pool.map(codes_of, range(len(self)))):
                labels[row, codes] = 1
        return labels


def leave_out_absent(table: Metadata, source: PatchSource, what: str) -> Metadata:
    """The listed patches that are there, for a part of the data; how many are not is logged, with the first of them.

    Raises:
        EmptySplit: A split has no patch left.
    """
    with ThreadPoolExecutor(8) as pool:  # one look at a file or key each, half a million in the whole data set
        absent = [path is not None for path in pool.map(source.missing, table.names)]
    kept = np.flatnonzero(~np.array(absent, dtype=bool))
    for code, name in enumerate(table.splits):
        if not (table.split[kept] == code).any():
            raise EmptySplit(f"split {name!r} has none of its {(table.split == code).sum()} listed patches ({what})")
    if len(kept) < len(absent):
        get_logger().warning(
            "%s: %d of %d listed patches are absent and left out; the first is %s",
            what,
            len(absent) - len(kept),
            len(absent),
            table.names[absent.index(True)],
        )
    return table.select(kept)


def take_part(
    table: Metadata,
    paths: Sequence[Path],
    id_col: int | str | None,
    limit: int | str | None,
    tiles: str | None,
    countries: str | None,
) -> Metadata:
    """The patches of some tiles and countries, and a number of them; see :func:`build_benv2`.

    Raises:
        EmptySplit: A split has no patch left.
        UserError: The metadata have no such column, or the number is none.
    """
    if limit is None and tiles is None and countries is None:
        return table
    keep = np.ones(len(table.names), dtype=bool)
    if tiles is not None:
        wanted = {part.strip().upper() for part in tiles.split(",")}
        keep &= np.array([name.split("_")[SCENE_PARTS].upper().removeprefix("T") in wanted for name in table.names])
    if countries is not None:
        inside = _names_in(paths, id_col, {part.strip().lower() for part in countries.split(",")})
        keep &= np.array([name in inside for name in table.names])
    number = None if limit is None else whole_number("limit", limit)
    if number == 0:
        raise UserError("option limit must be a whole number above 0, not 0")
    rows = []
    for code, name in enumerate(table.splits):
        own = np.flatnonzero(keep & (table.split == code))
        if not len(own):
            raise EmptySplit(
                f"split {name!r} has none of its {(table.split == code).sum()} listed patches in tiles={tiles} "
                f"countries={countries}"
            )
        if number is not None and number < len(own):
            own = own[np.linspace(0, len(own) - 1, number).astype(np.int64)]
        rows.append(own)
    chosen = np.concatenate(rows)
    get_logger().info("%d of %d listed patches are used (limit, tiles, countries)", len(chosen), len(table.names))
    return table.select(np.sort(chosen))


def _names_in(paths: Sequence[Path], id_col: int | str | None, countries: set[str]) -> set[str]:
    """Names of the patches of some countries, from the column ``country`` of Parquet metadata."""
    import pyarrow.parquet as pq

    found: set[str] = set()
    known: set[str] = set()
    for path in paths:
        if path.suffix not in (".parquet", ".pq", ".parq"):
            raise UserError(f"countries need the column country of metadata.parquet; {path} is no such file")
        file = pq.ParquetFile(path)
        own = {name.strip().lower(): name for name in file.schema_arrow.names}
        if "country" not in own:
            raise UserError(f"metadata file {path} has no column country; it has: {', '.join(own)}")
        id_name = own[_column_name(path, list(own), id_col, "s1_name")]
        table = file.read(columns=[id_name, own["country"]])
        cells = zip(table.column(id_name).to_pylist(), table.column(own["country"]).to_pylist(), strict=True)
        for name, country in cells:
            known.add(str(country))
            if str(country).strip().lower() in countries:
                found.add(str(name).strip())
    absent = countries - {name.strip().lower() for name in known}
    if absent:
        raise UserError(f"no patch lies in {', '.join(sorted(absent))}; the metadata name {', '.join(sorted(known))}")
    return found


def open_bands(data_path: Path, bands: Sequence[str], size: int, table: Metadata) -> PatchSource:
    """The source of the wanted bands: Sentinel-1 by name, Sentinel-2 by patch_id.

    Raises:
        UserError: The data or the patch_ids are missing.
    """
    sar = [band for band in bands if band in SAR_BANDS]
    optical = [band for band in bands if band not in SAR_BANDS]
    if not optical:
        return open_source(data_path, bands, size, table.names[0])
    if table.s2_names is None or "" in (table.s2_names[0], table.s2_names[-1]):
        raise UserError(
            f"bands {', '.join(optical)} are those of Sentinel-2, but the metadata have no column patch_id with the "
            "names of its patches; use the official metadata.parquet"
        )
    return JoinedSource(
        bands,
        open_source(data_path, sar, size, table.names[0]) if sar else None,
        open_optical(data_path, optical, size, table.s2_names[0]),
        table.names,
        table.s2_names,
        size,
    )


def build_benv2(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    metadata: str | Path | Sequence[str | Path] | None = None,
    id_col: int | str | None = None,
    exclude_snow_cloud: bool | str = True,
    check: str = "sample",
    labels: str = "needed",
    missing: str = "error",
    limit: int | str | None = None,
    tiles: str | None = None,
    countries: str | None = None,
) -> SarDataset:
    """Open BigEarthNet v2 (also the demo data, which have its layout).

    Args:
        spec: The registry's entry.
        data_path: GeoTIFF tree, Zarr store or LMDB; for Sentinel-2 bands the folder with BigEarthNet-S2 (and
            BigEarthNet-S1), or an LMDB with both.
        split: Wanted splits.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        metadata: Files, folder or pattern, see :func:`find_metadata`.
        id_col: Column of the Sentinel-1 name.
        exclude_snow_cloud: Leave out patches flagged with seasonal snow, cloud or cloud shadow. The official
            metadata.parquet holds none of them; they are in a second file that may be named beside it.
        check: Whether the listed patches exist is looked up for a ``"sample"`` of them, for ``"all"``, or ``"none"``.
        labels: ``"needed"``, or ``"none"`` for pretraining: labels are neither read nor delivered.
        missing: ``"error"``, or ``"skip"`` for a part of the data: every listed patch is looked for, and those that are
            absent are counted and left out.
        limit: That many patches of each split at most, evenly spread over its list.
        tiles: Sentinel-2 tiles to keep, joined with commas, such as ``33UUP,29SND``.
        countries: Countries to keep, joined with commas, as the metadata's column ``country`` names them.
    """
    return _build(
        "benv2",
        spec,
        data_path,
        split,
        statistics,
        on_error,
        metadata,
        id_col,
        parse_switch("exclude_snow_cloud", exclude_snow_cloud),
        check,
        labels,
        missing,
        (limit, tiles, countries),
    )


def build_benv1(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    metadata: str | Path | Sequence[str | Path] | None = None,
    id_col: int | str | None = None,
    check: str = "sample",
    labels: str = "needed",
    missing: str = "error",
    limit: int | str | None = None,
    tiles: str | None = None,
) -> SarDataset:
    """Open BigEarthNet v1; arguments as in :func:`build_benv2`. Labels come from the split lists when these have a
    labels column, else from the store (43 names, grouped into 19; a patch outside the 19 has an empty label row)."""
    return _build(
        "benv1", spec, data_path, split, statistics, on_error, metadata, id_col, False, check, labels, missing,
        (limit, tiles, None),
    )  # fmt: skip


def _build(
    family: str,
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    statistics: Statistics,
    on_error: str,
    metadata: str | Path | Sequence[str | Path] | None,
    id_col: int | str | None,
    exclude: bool,
    check: str,
    labels: str,
    missing: str,
    part: tuple[int | str | None, str | None, str | None],
) -> SarDataset:
    if missing not in ("error", "skip"):
        raise UserError(f"option missing must be error or skip, not {missing!r}")
    if labels not in ("needed", "none"):
        raise UserError(f"option labels must be needed or none, not {labels!r}")
    splits = parse_split(spec, split)
    paths = find_metadata(data_path, metadata, splits, dataset=family)
    table = read_metadata(paths, splits, id_col=id_col)
    for code, name in enumerate(splits):
        if not (table.split == code).any():
            raise EmptySplit(f"split {name!r} is empty in {', '.join(map(str, paths))}")
    if exclude:
        table = table.select(np.flatnonzero(~table.flagged))
        if len(table.names) == 0:
            raise UserError(f"all patches of {split!r} are flagged with snow or cloud; use exclude_snow_cloud=False")
    table = take_part(table, paths, id_col, *part)
    source = open_bands(data_path, spec.bands, spec.size, table)
    if missing == "skip":
        table, check = leave_out_absent(table, source, f"{family} {split} in {data_path}"), "none"
    return BigEarthNet(
        spec,
        split,
        statistics,
        table,
        source,
        on_error=on_error,
        check=check,
        with_labels=labels == "needed",
        data_path=data_path,
    )
