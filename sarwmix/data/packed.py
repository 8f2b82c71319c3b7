"""Packed store: all patches of a data set in one array file that is memory-mapped; see docs/file_formats.md.

A store is a folder::

    manifest.json   what it holds, the checksum of each block of 1024 rows and of each index file
    images.npy      (N, C, H, W) float32 (or float16), C order, dB, NaN marks invalid pixels
    offsets.npy     int64 (N + 1,); name i is names.npy[offsets[i]:offsets[i + 1]]
    names.npy       uint8, UTF-8 text of all names
    split.npy       uint8 (N,), position in the manifest's list of splits
    labels.npy      uint8 (N, classes) multi-hot or int64 (N,); absent when unlabelled
    invalid.npy     int32 (N,), number of invalid pixels; -1: the sample could not be read

Rows lie split by split in the order of the source, so that a data set read from its store delivers the same batches,
bit by bit, as from its files. Packing fills disjoint blocks of a file of known size: in parallel, and it goes on where
it was killed, with the same bytes in the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.data.base import MaskDataset, NameList, SarDataset, UnreadableSample
from sarwmix.data.spec import DatasetSpec, EmptySplit, Statistics, parse_split
from util.arrays import load_npy
from util.errors import UserError
from util.files import JSON_LIMIT, TEXT_LIMIT, atomic_write, open_file, parse_json, read_bytes, write_error, write_json
from util.locks import LOCK_NAME, FolderLock

FORMAT = "sarwmix-packed/1"
BLOCK_ROWS = 1024
DTYPES = ("float32", "float16")
CHECKS = ("sample", "touched", "all", "none")
CHECK_BLOCKS = 2  # blocks whose checksum is looked at when a store is opened with check="sample"
JOURNAL = "blocks.jsonl"
_INDEX_LIMIT = 2 << 30  # bytes of one index file
_LOCK_WAIT = 10.0  # seconds
_PIECE_ROWS = 16  # rows in flight while packing: 1.8 MB, which stays in the processor's cache until it is written


class DamagedStore(UserError):
    """A packed store is unfinished or its bytes are not those that were written."""


# Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """The checked content of ``manifest.json``; see docs/file_formats.md for each field."""

    complete: bool
    dataset: str
    splits: tuple[str, ...]
    shape: tuple[int, int, int, int]
    dtype: str
    bands: tuple[str, ...]
    unit: str
    classes: tuple[str, ...]
    labels: str
    names_sha256: str
    labels_sha256: str
    statistics: dict[str, Any]
    source: str
    block_rows: int
    blocks: tuple[str, ...]
    files: dict[str, str]
    unreadable: dict[str, str]

    @property
    def count(self) -> int:
        return self.shape[0]

    @property
    def block_count(self) -> int:
        return -(-self.count // self.block_rows)

    def plan(self) -> dict[str, Any]:
        """What must be equal for a packing to be continued."""
        later = ("complete", "statistics", "source", "blocks", "files", "unreadable")
        return {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in later}

    def as_dict(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"format": FORMAT, "checksum": "crc32", **plain}


def read_manifest(store: str | Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        DamagedStore: The file is missing, no JSON, of another format, or a field is missing or wrong.
    """
    path = Path(store) / "manifest.json"
    try:
        content = parse_json(read_bytes(path, JSON_LIMIT))
    except FileNotFoundError:
        raise DamagedStore(f"{store} is no packed store: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise DamagedStore(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise DamagedStore(f"{path}: format {found!r}, expected {FORMAT!r}; pack the data again")
    try:
        values = {key: content[key] for key in Manifest.__dataclass_fields__}
        for key, kind in _FIELDS.items():
            value = values[key]
            if kind == "list" and isinstance(value, list) and all(isinstance(item, str) for item in value):
                values[key] = tuple(value)
            elif kind == "table" and isinstance(value, dict) and all(isinstance(one, str) for one in value.values()):
                pass
            elif isinstance(kind, str) or type(value) is not kind:
                raise TypeError(f"{key} is {str(value)[:60]!r}")
        if any(type(side) is not int for side in values["shape"]):
            raise TypeError(f"shape is {values['shape']}")
        values["shape"] = tuple(values["shape"])
        manifest = Manifest(**values)
        good = (
            len(manifest.shape) == 4
            and min(manifest.shape) > 0
            and manifest.shape[1] == len(manifest.bands)
            and manifest.dtype in DTYPES
            and manifest.block_rows > 0
            and manifest.labels in ("none", "multi-hot", "number")
            and 0 < len(manifest.splits) < 256
            # Names of files come from the manifest; only our own are opened.
            and (not manifest.complete or set(manifest.files) == _index_files(manifest.labels))
            and (not manifest.complete or len(manifest.blocks) == manifest.block_count)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStore(f"{path} is damaged: {error!r}; pack the data again") from error
    if not good:
        raise DamagedStore(f"{path} is damaged: shape, dtype or number of checksums are wrong; pack the data again")
    return manifest


_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("splits", "bands", "classes", "blocks"), "list"),
    **dict.fromkeys(("files", "unreadable"), "table"),
    **dict.fromkeys(("dataset", "dtype", "unit", "labels", "names_sha256", "labels_sha256", "source"), str),
    **{"complete": bool, "shape": list, "block_rows": int, "statistics": dict},
}


def _index_files(labels: str) -> set[str]:
    return {"names.npy", "offsets.npy", "split.npy", "invalid.npy"} | ({"labels.npy"} if labels != "none" else set())


def open_images(store: Path, manifest: Manifest) -> np.ndarray:
    """Memory-map ``images.npy``, (N, C, H, W), after a check of its header and length.

    Raises:
        DamagedStore: It is missing, truncated, or not the array of the manifest.
    """
    path = store / "images.npy"
    header = _npy_header(manifest.shape, manifest.dtype)
    expected = len(header) + _row_bytes(manifest) * manifest.count
    try:
        with open_file(path) as file:
            found = file.read(len(header))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DamagedStore(f"{path} cannot be read: {error.strerror}; pack the data again") from error
    if found != header:
        raise DamagedStore(f"{path} is not the array {manifest.dtype} {manifest.shape} of its manifest; pack again")
    if size != expected:
        wrong = max(0, size - len(header)) // (_row_bytes(manifest) * manifest.block_rows)
        raise DamagedStore(
            f"{path} has {size} bytes, expected {expected}: block {wrong} (rows from {wrong * manifest.block_rows}) "
            "and what follows are missing; run the same pack_dataset command with --repair"
        )
    try:
        return load_npy(path, mapped=True)
    except (OSError, ValueError) as error:
        raise DamagedStore(f"{path} cannot be read: {error}; pack the data again") from error


def check_blocks(
    store: Path, manifest: Manifest, blocks: Sequence[int], *, progress: Callable[[int], None] | None = None
) -> list[int]:
    """Compare the bytes of some blocks with their checksums.

    Returns:
        The numbers of the blocks that are wrong.
    """
    wrong = []
    header = len(_npy_header(manifest.shape, manifest.dtype))
    with open_file(store / "images.npy") as file:
        buffer = bytearray(1 << 22)
        for done, block in enumerate(blocks):
            rows = _rows_of(block, manifest)
            left = len(rows) * _row_bytes(manifest)
            file.seek(header + rows.start * _row_bytes(manifest))
            value = 0
            while left:
                got = file.readinto(memoryview(buffer)[: min(left, len(buffer))])
                if not got:
                    break
                value = zlib.crc32(memoryview(buffer)[:got], value)
                left -= got
            if left or f"{value:08x}" != manifest.blocks[block]:
                wrong.append(block)
            if progress is not None:
                progress(done + 1)
    return wrong


def verify_store(store: str | Path, *, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check every byte of a finished store.

    Raises:
        DamagedStore: The store is unfinished, or a file or block is wrong; the message names it.
    """
    place = Path(store)
    manifest = read_manifest(place)
    _require_complete(place, manifest)
    open_images(place, manifest)
    _check_index(place, manifest)
    _read_index(place, manifest)
    _refuse(place, manifest, check_blocks(place, manifest, range(manifest.block_count), progress=progress))
    return manifest


def _refuse(store: Path, manifest: Manifest, wrong: Sequence[int]) -> None:
    if wrong:
        rows = _rows_of(wrong[0], manifest)
        more = f" and {len(wrong) - 1} more blocks" if len(wrong) > 1 else ""
        raise DamagedStore(
            f"packed store {store} is damaged: block {wrong[0]} of {manifest.block_count} (rows {rows.start} to "
            f"{rows.stop - 1}){more} differs from its checksum; run the same pack_dataset command with --repair"
        )


def _require_complete(store: Path, manifest: Manifest) -> None:
    if not manifest.complete:
        raise DamagedStore(
            f"packed store {store} is unfinished (its packing was interrupted); run the same pack_dataset command again"
        )


def _check_index(store: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        try:
            found = f"{zlib.crc32(read_bytes(store / name, _INDEX_LIMIT)):08x}"
        except OSError as error:
            raise DamagedStore(f"{store / name} cannot be read: {error.strerror}; pack the data again") from error
        if found != expected:
            raise DamagedStore(f"{store / name} differs from its checksum; pack the data again with --overwrite")


@dataclass(frozen=True)
class _Index:
    """What the index files of a store say about its rows."""

    names: NameList
    split: np.ndarray  # uint8 (N,)
    labels: np.ndarray | None  # uint8 (N, classes) or int64 (N,)
    invalid: np.ndarray  # int32 (N,)


def _read_index(store: Path, manifest: Manifest) -> _Index:
    """Read the index files; they must fit the manifest and one another.

    Raises:
        DamagedStore: A file is missing, of another type or shape, or contradicts the others; named.
    """
    count = manifest.count

    def load(name: str, dtype: str, *shape: int | None) -> np.ndarray:
        try:
            return load_npy(store / name, dtype=dtype, shape=shape)
        except (OSError, ValueError) as error:
            raise DamagedStore(f"{store / name} cannot be read: {error}; pack the data again") from error

    def refuse(name: str, why: str) -> DamagedStore:
        return DamagedStore(f"{store / name} does not fit its store: {why}; pack the data again with --overwrite")

    offsets, text = load("offsets.npy", "int64", count + 1), load("names.npy", "uint8", None)
    if offsets[0] != 0 or offsets[-1] != len(text) or (np.diff(offsets) <= 0).any():
        raise refuse("offsets.npy", f"names do not follow one another in the {len(text)} bytes of names.npy")
    names = NameList(text, offsets)
    starts = text[offsets[:-1]]
    try:
        text.tobytes().decode()
    except UnicodeDecodeError as error:
        raise refuse("names.npy", f"it is no UTF-8 (byte {error.start})") from None
    if ((starts & 0xC0) == 0x80).any() or (text < 32).any():
        raise refuse("names.npy", "a name begins within a character, or holds a control character")
    if names.digest() != manifest.names_sha256:
        raise refuse("names.npy", "the names are not those of the manifest")
    split, invalid = load("split.npy", "uint8", count), load("invalid.npy", "int32", count)
    if split.max() >= len(manifest.splits):
        raise refuse("split.npy", f"there is a split {split.max()} of {len(manifest.splits)}")
    if invalid.min() < -1 or invalid.max() > math.prod(manifest.shape[1:]):
        raise refuse("invalid.npy", "there are more invalid pixels than pixels")
    labels = None
    if manifest.labels != "none":
        hot = manifest.labels == "multi-hot"
        classes = len(manifest.classes)
        labels = load("labels.npy", "uint8", count, classes) if hot else load("labels.npy", "int64", count)
        if labels.size and (labels.min() < 0 or labels.max() > (1 if hot else classes - 1)):
            raise refuse("labels.npy", f"there are labels from {labels.min()} to {labels.max()} for {classes} classes")
        if hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest() != manifest.labels_sha256:
            raise refuse("labels.npy", "the labels are not those of the manifest")
    return _Index(names, split, labels, invalid)


def _row_bytes(manifest: Manifest) -> int:
    return math.prod(manifest.shape[1:]) * np.dtype(manifest.dtype).itemsize


def _rows_of(block: int, manifest: Manifest) -> range:
    return range(block * manifest.block_rows, min(manifest.count, (block + 1) * manifest.block_rows))


def _npy_header(shape: Sequence[int], dtype: str) -> bytes:
    stream = BytesIO()
    description = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, description)  # type: ignore[arg-type]
    return stream.getvalue()


class PackedDataset(SarDataset):
    """The samples of one or several splits of a packed store; a batch is one gather from the mapped file.

    Args:
        spec: The registry's entry.
        store: The folder.
        split: Wanted splits, in this order.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`; concerns samples that could not be read when packing.
        check: Blocks whose checksum is looked at: two of them (``"sample"``), those that are read, each process for
            itself, before their first row is delivered (``"touched"``), ``"all"``, or ``"none"``. The index files and
            the length of the images are always checked.

    Attributes:
        images: The mapped array of the store, (rows, C, H, W).
        rows: int64 (N,), row of each sample.
    """

    gathers = True

    def __init__(
        self,
        spec: DatasetSpec,
        store: Path,
        split: str,
        statistics: Statistics,
        *,
        on_error: str = "raise",
        check: str = "sample",
    ) -> None:
        if check not in CHECKS:
            raise UserError(f"check must be one of {', '.join(CHECKS)}, not {check!r}")
        manifest = read_manifest(store)
        if manifest.dataset != spec.name:
            raise UserError(
                f"packed store {store} holds data set {manifest.dataset!r}, not {spec.name!r}; "
                f"use --dataset {manifest.dataset}"
            )
        _require_complete(store, manifest)
        if (manifest.bands, manifest.unit, manifest.classes) != (spec.bands, spec.unit, spec.classes):
            raise DamagedStore(
                f"packed store {store} has other bands, unit or classes than {spec.name!r}: bands "
                f"{', '.join(manifest.bands)} in {manifest.unit}, asked for {', '.join(spec.bands)} in {spec.unit}. "
                "Give --bands to fit, or pack again"
            )
        self.manifest = manifest
        self.store = Path(store)
        self.images = open_images(self.store, manifest)
        _check_index(self.store, manifest)
        # Blocks that no row of may be delivered before their checksum was compared.
        self._unseen = np.full(manifest.block_count, check == "touched")
        if check in ("sample", "all"):
            last = manifest.block_count - 1
            some = sorted({0, last})[:CHECK_BLOCKS] if check == "sample" else range(last + 1)
            _refuse(self.store, manifest, check_blocks(self.store, manifest, some))
        wanted = parse_split(spec, split)
        index = _read_index(self.store, manifest)
        parts = []
        for name in wanted:
            if name not in manifest.splits:
                raise EmptySplit(
                    f"packed store {store} has no split {name!r}; it has: {', '.join(manifest.splits)}; "
                    "pack the data again with that split"
                )
            parts.append(np.flatnonzero(index.split == manifest.splits.index(name)))
        self.rows = np.concatenate(parts).astype(np.int64)
        names = index.names.take(self.rows)
        labels = None if index.labels is None else index.labels[self.rows]
        invalid = index.invalid[self.rows]
        self._all_finite = not invalid.any()
        self._unreadable = invalid < 0
        self._any_unreadable = bool(self._unreadable.any())
        # Rows that follow one another need no lookup.
        first = int(self.rows[0]) if len(self.rows) else 0
        self._offset = first if np.array_equal(self.rows, np.arange(first, first + len(self.rows))) else None
        super().__init__(spec, split, statistics, names, labels, on_error=on_error, source=store)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": None}  # a spawned process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images = open_images(self.store, self.manifest)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.manifest.shape[1], self.manifest.shape[2], self.manifest.shape[3]

    @property
    def all_finite(self) -> bool:
        return self._all_finite  # counted when it was packed

    def read_into(self, index: int, out: np.ndarray) -> None:
        for _, error in self.read_many(np.array([index]), out[None]):
            raise error

    def read_many(self, indices: np.ndarray, out: np.ndarray) -> list[tuple[int, UnreadableSample]]:
        rows = indices + self._offset if self._offset is not None else self.rows[indices]
        if self._unseen.any():
            self._look_at(np.unique(rows // self.manifest.block_rows))
        if out.dtype == self.images.dtype and out.flags.c_contiguous:
            # mode="clip" writes straight into `out`, the default fills a buffer first; indices are checked already.
            np.take(self.images, rows, axis=0, out=out, mode="clip")
        else:
            out[...] = np.take(self.images, rows, axis=0, mode="clip")
        if not self._any_unreadable:
            return []
        return [(int(i), self._error(int(indices[i]))) for i in np.flatnonzero(self._unreadable[indices])]

    def _look_at(self, blocks: np.ndarray) -> None:
        """Compare the checksums of blocks that this process has not read before.

        Raises:
            DamagedStore: A block is wrong.
        """
        new = [int(block) for block in blocks if self._unseen[block]]
        _refuse(self.store, self.manifest, check_blocks(self.store, self.manifest, new))
        self._unseen[new] = False

    def _error(self, index: int) -> UnreadableSample:
        name = self.names[index]
        reason = self.manifest.unreadable.get(name, "could not be read when the store was packed")
        return UnreadableSample(name, f"{self.store} row {int(self.rows[index])}", reason)


def build(
    spec: DatasetSpec, data_path: Path, split: str, *, statistics: Statistics, on_error: str, check: str = "sample"
) -> PackedDataset:
    """Open a packed store for the registry."""
    return PackedDataset(spec, data_path, split, statistics, on_error=on_error, check=check)


# Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackResult:
    """What a packing did.

    Attributes:
        manifest: The manifest of the finished store.
        packed_blocks: Blocks written in this run.
        kept_blocks: Blocks found finished and intact.
    """

    manifest: Manifest
    packed_blocks: int
    kept_blocks: int


def pack(
    datasets: Sequence[SarDataset],
    store: str | Path,
    *,
    dtype: str = "float32",
    jobs: int = 1,
    mark_unreadable: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackResult:
    """Write data sets (one for each split) into a packed store, or go on with an interrupted packing.

    Args:
        datasets: One data set for each split, of the same registry entry.
        store: The folder; made when missing.
        dtype: ``"float32"`` keeps the values unchanged; ``"float16"`` halves the size (error at most 0.008 dB
            for |dB| < 32, 0.016 dB beyond).
        jobs: Processes.
        mark_unreadable: Store samples that cannot be read as rows of NaN that are marked, instead of stopping.
        overwrite: Replace a store of other content.
        repair: Check each block of a finished store and write those anew that are damaged.
        progress: Called with (rows finished, rows in all).

    Returns:
        The finished store's manifest and what was done.

    Raises:
        UserError: The folder holds something else, there is no space, a sample cannot be read, or a process died.
    """
    place = Path(store)
    if any(isinstance(dataset, MaskDataset) for dataset in datasets):
        raise UserError(
            f"a packed store holds no label maps; data set {datasets[0].spec.name!r} is read from its files"
        )
    plan = _plan(datasets, dtype)
    names, labels, splits = _index_of(datasets)
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is not a folder; choose another place for the packed store")
    # Processes of a packing that was just killed hold the lock until they notice, which takes a moment.
    with FolderLock(place, "packing", wait=_LOCK_WAIT, workers_write=True):
        fresh = _prepare(place, plan, names, labels, splits, overwrite=overwrite)
        known = {} if fresh else _finished_blocks(place, plan)
        if not fresh:
            before = read_manifest(place)
            if before.complete and not repair:
                return PackResult(before, 0, before.block_count)
            if before.complete:
                known = _blocks_of(place, before)
                _set_size(place / "images.npy", plan)
                write_json(place / "manifest.json", plan.as_dict())
        known = _intact(place, plan, known)
        todo = [number for number in range(plan.block_count) if number not in known]
        _check_space(place, plan, len(todo))
        rows_done = sum(len(_rows_of(number, plan)) for number in known)
        if progress is not None:
            progress(rows_done, plan.count)
        try:
            with (place / JOURNAL).open("w", encoding="utf-8") as journal:
                for block in known.values():
                    journal.write(block.line())
                journal.flush()
                for block in _write_blocks(datasets, place, plan, todo, jobs=jobs, mark=mark_unreadable):
                    known[block.number] = block
                    journal.write(block.line())
                    journal.flush()
                    rows_done += len(_rows_of(block.number, plan))
                    if progress is not None:
                        progress(rows_done, plan.count)
            manifest = _finish(place, plan, known)
        except OSError as error:
            raise write_error(place, error) from error
    return PackResult(manifest, len(todo), plan.block_count - len(todo))


@dataclass(frozen=True)
class Block:
    """A finished block: its number, checksum, and the samples in it that could not be read."""

    number: int
    checksum: str
    unreadable: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        return json.dumps({"block": self.number, "crc32": self.checksum, "unreadable": list(self.unreadable)}) + "\n"


def _plan(datasets: Sequence[SarDataset], dtype: str) -> Manifest:
    if not datasets:
        raise ValueError("nothing to pack")
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    first = datasets[0]
    if first.spec.task == "pair":
        raise UserError(f"data set {first.spec.name!r} has pairs of images and its own store; it cannot be packed")
    if any(dataset.spec != first.spec or dataset.shape != first.shape for dataset in datasets):
        raise ValueError("the data sets of a store must have one registry entry and one shape")
    names = NameList.join([dataset.names for dataset in datasets])
    duplicate = names.first_duplicate()
    if duplicate is not None:
        raise UserError(f"sample {duplicate!r} is in two splits; a store holds each sample once")
    _, labels, _ = _index_of(datasets)
    kind = "none" if labels is None else "multi-hot" if labels.ndim == 2 else "number"
    return Manifest(
        complete=False,
        dataset=first.spec.name,
        splits=tuple(dataset.split for dataset in datasets),
        shape=(len(names), *first.shape),
        dtype=dtype,
        bands=first.spec.bands,
        unit=first.spec.unit,
        classes=first.spec.classes,
        labels=kind,
        names_sha256=names.digest(),
        labels_sha256="" if labels is None else hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest(),
        statistics=first.statistics.as_dict(),
        source=type(getattr(first, "patches", first)).__name__,
        block_rows=BLOCK_ROWS,
        blocks=(),
        files={},
        unreadable={},
    )


def _index_of(datasets: Sequence[SarDataset]) -> tuple[NameList, np.ndarray | None, np.ndarray]:
    labels = None
    if datasets[0].labels is not None:
        labels = np.concatenate([np.asarray(dataset.labels) for dataset in datasets])
    splits = np.repeat(np.arange(len(datasets), dtype=np.uint8), [len(dataset) for dataset in datasets])
    return NameList.join([dataset.names for dataset in datasets]), labels, splits


_OWN_FILES = {"manifest.json", "images.npy", "names.npy", "offsets.npy", "split.npy", "labels.npy", "invalid.npy"}


def _prepare(
    place: Path, plan: Manifest, names: NameList, labels: np.ndarray | None, splits: np.ndarray, *, overwrite: bool
) -> bool:
    """Make the index and an empty array file unless they are there; True when the store starts afresh."""
    others = {entry.name for entry in place.iterdir()} - _OWN_FILES - {JOURNAL, LOCK_NAME}
    others = {name for name in others if not name.endswith(".partial")}
    if others:
        raise UserError(f"folder {place} holds other files ({sorted(others)[0]}, ...); choose an empty or new folder")
    if (place / "manifest.json").is_file():
        try:
            same = read_manifest(place).plan() == plan.plan()
        except DamagedStore:
            same = False
        if same:
            return False
        if not overwrite:
            raise UserError(
                f"{place} holds a packed store of other content (data set, splits, dtype or samples differ); "
                "choose another folder, or --overwrite to replace it"
            )
    _check_space(place, plan, plan.block_count)
    for name in (*_OWN_FILES, JOURNAL):
        (place / name).unlink(missing_ok=True)
    _write_index(place, names, labels, splits)
    _set_size(place / "images.npy", plan)
    write_json(place / "manifest.json", plan.as_dict())
    return True


def _write_index(place: Path, names: NameList, labels: np.ndarray | None, splits: np.ndarray) -> None:
    arrays: dict[str, np.ndarray] = {
        "names.npy": np.asarray(names.buffer, dtype=np.uint8),
        "offsets.npy": np.asarray(names.offsets, dtype=np.int64),
        "split.npy": splits,
        "invalid.npy": np.zeros(len(names), dtype=np.int32),
    }
    if labels is not None:
        arrays["labels.npy"] = labels.astype(np.uint8 if labels.ndim == 2 else np.int64)
    for name, array in arrays.items():
        with atomic_write(place / name) as file:
            np.save(file, np.asarray(array))


def _blocks_of(place: Path, manifest: Manifest) -> dict[int, Block]:
    """The blocks that a finished store lists, for a repair; its index must be intact."""
    _check_index(place, manifest)
    index = _read_index(place, manifest)
    names, invalid = index.names, index.invalid
    blocks = {}
    for number, checksum in enumerate(manifest.blocks):
        rows = _rows_of(number, manifest)
        marked = [names[rows.start + int(i)] for i in np.flatnonzero(invalid[rows.start : rows.stop] < 0)]
        reasons = tuple((name, manifest.unreadable.get(name, "could not be read")) for name in marked)
        blocks[number] = Block(number, checksum, reasons)
    return blocks


def _set_size(path: Path, plan: Manifest) -> None:
    """Give the array file its header and length; rows that are there stay."""
    header = _npy_header(plan.shape, plan.dtype)
    try:
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.write(header)
            file.truncate(len(header) + plan.count * _row_bytes(plan))
    except OSError as error:
        raise write_error(path, error) from error


def _check_space(place: Path, plan: Manifest, blocks: int) -> None:
    needed = min(blocks * plan.block_rows, plan.count) * _row_bytes(plan)
    # What an earlier run wrote counts as used already.
    images = place / "images.npy"
    here = images.stat().st_blocks * 512 if images.exists() else 0
    free = shutil.disk_usage(place).free + max(0, here - (plan.count * _row_bytes(plan) - needed))
    if free < needed:
        raise UserError(
            f"not enough space in {place}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "choose another folder, or --dtype float16"
        )


def _finished_blocks(place: Path, plan: Manifest) -> dict[int, Block]:
    """Blocks that the journal of an interrupted packing lists; an incomplete last line is ignored."""
    known: dict[int, Block] = {}
    try:
        lines = read_bytes(place / JOURNAL, TEXT_LIMIT).decode("utf-8", "replace").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            entry = parse_json(line)
            unreadable = tuple((str(name), str(reason)) for name, reason in entry["unreadable"])
            block = Block(int(entry["block"]), str(entry["crc32"]), unreadable)
        except (ValueError, KeyError, TypeError):
            continue
        if 0 <= block.number < plan.block_count:
            known[block.number] = block
    return known


def _intact(place: Path, plan: Manifest, known: dict[int, Block]) -> dict[int, Block]:
    """The listed blocks whose bytes agree: after a power failure the journal may have outlived the data."""
    if not known:
        return {}
    checksums = tuple(known[n].checksum if n in known else "" for n in range(plan.block_count))
    listed = Manifest(**{**_fields(plan), "blocks": checksums})
    wrong = set(check_blocks(place, listed, sorted(known)))
    return {number: block for number, block in known.items() if number not in wrong}


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {key: getattr(manifest, key) for key in Manifest.__dataclass_fields__}


def _finish(place: Path, plan: Manifest, known: dict[int, Block]) -> Manifest:
    for name in ("images.npy", "invalid.npy"):
        with (place / name).open("rb+") as file:
            os.fsync(file.fileno())
    files = {
        name: f"{zlib.crc32(read_bytes(place / name, _INDEX_LIMIT)):08x}"
        for name in sorted(_OWN_FILES - {"manifest.json", "images.npy"})
        if (place / name).is_file()
    }
    blocks = tuple(known[number].checksum for number in range(plan.block_count))
    unreadable = dict(item for number in sorted(known) for item in known[number].unreadable)
    manifest = Manifest(
        **{**_fields(plan), "complete": True, "blocks": blocks, "files": files, "unreadable": unreadable}
    )
    write_json(place / "manifest.json", manifest.as_dict())
    (place / JOURNAL).unlink(missing_ok=True)
    return manifest


def _write_blocks(
    datasets: Sequence[SarDataset], place: Path, plan: Manifest, todo: Sequence[int], *, jobs: int, mark: bool
) -> Iterator[Block]:
    writer = BlockWriter(datasets, place, plan, mark=mark)
    if jobs <= 1 or len(todo) <= 1:
        for number in todo:
            yield writer.write(number)
        return
    # Forked processes inherit the index instead of receiving a copy. Blocks cost the same and are dealt out beforehand,
    # so that a process that is killed holds nothing the others wait for.
    context = multiprocessing.get_context("fork")
    ends: list[Connection] = []
    processes = []
    writer.parent = os.getpid()
    try:
        for number in range(min(jobs, len(todo))):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(writer, todo[number::jobs], there), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        left = len(todo)
        while ends:
            for end in wait(ends):
                assert isinstance(end, Connection)
                try:
                    found = end.recv()
                except EOFError:
                    ends.remove(end)
                    continue
                if isinstance(found, UserError):
                    raise found
                if isinstance(found, str):
                    raise RuntimeError(f"a packing process failed:\n{found}")
                left -= 1
                yield found
        if left:
            raise UserError(f"a packing process died with {left} blocks left (out of memory?); run the command again")
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(writer: BlockWriter, todo: Sequence[int], end: Connection) -> None:
    """One packing process: sends a Block for each block written, or a UserError, or the text of a traceback."""
    try:
        for number in todo:
            end.send(writer.write(number))
    except UserError as error:
        end.send(error)
    except BrokenPipeError:
        return
    except Exception:  # noqa: BLE001 - sent to the packing process, which raises it
        end.send(traceback.format_exc())


class BlockWriter:
    """Reads the samples of a block and writes them to their rows."""

    def __init__(self, datasets: Sequence[SarDataset], place: Path, plan: Manifest, *, mark: bool) -> None:
        self.datasets = datasets
        self.plan = plan
        self.place = place
        self.mark = mark
        self.parent = 0
        self.starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self.header = len(_npy_header(plan.shape, plan.dtype))

    def write(self, number: int) -> Block:
        """Fill one block of the array file and its counts of invalid pixels."""
        rows = _rows_of(number, self.plan)
        buffer = np.empty((_PIECE_ROWS, *self.plan.shape[1:]), dtype=np.float32)
        invalid = np.zeros(len(rows), dtype=np.int32)
        unreadable: list[tuple[str, str]] = []
        checksum = 0
        try:
            with (self.place / "images.npy").open("rb+", buffering=0) as file:
                file.seek(self.header + rows.start * _row_bytes(self.plan))
                for first in range(rows.start, rows.stop, _PIECE_ROWS):
                    piece = buffer[: min(_PIECE_ROWS, rows.stop - first)]
                    counts = invalid[first - rows.start : first - rows.start + len(piece)]
                    unreadable += self._read(first, piece, counts)
                    stored = piece.astype(self.plan.dtype, copy=False)
                    data = stored.reshape(-1).view(np.uint8).data
                    checksum = zlib.crc32(data, checksum)
                    if self.parent and os.getppid() != self.parent:
                        raise SystemExit(1)  # the packing was killed; what follows belongs to the next one
                    while len(data):
                        data = data[file.write(data) :]
            counts_file = np.load(self.place / "invalid.npy", mmap_mode="r+", allow_pickle=False)
            counts_file[rows.start : rows.stop] = invalid
            counts_file.flush()
        except (OSError, ValueError, IndexError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write to {self.place}: {reason}; free space and run the same command again"
            ) from error
        return Block(number, f"{checksum:08x}", tuple(unreadable))

    def _read(self, first: int, piece: np.ndarray, counts: np.ndarray) -> list[tuple[str, str]]:
        """Read rows from ``first`` on into ``piece``; returns the samples that could not be read."""
        unreadable = []
        position = 0
        while position < len(piece):
            which = int(np.searchsorted(self.starts, first + position, side="right")) - 1
            stop = min(len(piece), int(self.starts[which + 1]) - first)
            start_index = first + position - int(self.starts[which])
            part = piece[position:stop]
            bad = self.datasets[which].read_many(np.arange(start_index, start_index + len(part)), part)
            if bad and not self.mark:
                error = bad[0][1]
                raise UserError(f"{error}; --mark_unreadable packs the rest and marks such samples")
            finite = np.isfinite(part)
            if not finite.all():
                part[~finite] = np.nan
                counts[position:stop] = part[0].size - finite.reshape(len(part), -1).sum(axis=1)
            for bad_row, error in bad:
                part[bad_row] = np.nan
                counts[position + bad_row] = -1
                unreadable.append((error.name, error.reason))
            position = stop
        return unreadable
