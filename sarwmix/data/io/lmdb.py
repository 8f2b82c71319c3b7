"""BigEarthNet patches in an LMDB: key ``s1_name``, value a safetensors record with one tensor (H, W) for each band.

Sentinel-2 patches have their ``patch_id`` as key and tensors of 120, 60 and 20 px. This is how reBEN's tools store the
data. Records are found by name, never by position, and hold the values unchanged.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.data.base import UnreadableSample
from util.errors import UserError
from util.files import WriteError, make_directory, open_file, parse_json

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U8": "|u1"}
_COMMIT_EVERY = 256  # records of one transaction: what an interruption can lose
_FIRST_MAP_SIZE = 1 << 30


def is_lmdb(path: str | Path) -> bool:
    """Whether ``path`` is an LMDB: a folder with ``data.mdb``, or such a file itself."""
    place = Path(path)
    return (place / "data.mdb").is_file() or (place.is_file() and place.suffix in (".mdb", ".lmdb"))


def parse_header(text: bytes, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Tensors of a safetensors header: name -> (numpy dtype, shape, first byte, end) within the data part.

    Args:
        text: The JSON header.
        size: Bytes of the data part.

    Raises:
        ValueError: The header is damaged or names bytes that are not there.
    """
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("header is no JSON object")
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
            raise ValueError(f"shape and bytes of tensor {name!r} are not whole numbers")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} has type {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        if not 0 <= start <= end <= size or end - start != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"bytes {start} to {end} of tensor {name!r} do not fit a record of {size}")
        tensors[name] = (dtype, shape, start, end)
    return tensors


_MAGIC = 0xBEEFC0DE
_META = 152  # bytes of a page that describe the file: header 16, then magic, version, ..., last page, transaction
_HEADER = 16  # bytes of a page before its entries
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4  # kinds of pages
_BIG = 1  # flag of an entry whose value lies in pages of its own
_DEEPEST = 32
_RECORD_LIMIT = 64 << 20  # bytes; a patch of 14 bands has 0.8 MB


class LmdbFile:
    """Finds records in an LMDB by their keys, and believes nothing that the file says about itself.

    The library maps the file and follows its page numbers: beyond the end the process dies ("Bus error"), and a flipped
    bit is enough. Here pages are read, every number is compared with the file's length first, and damage is an error.
    An LMDB is a tree of pages of one size; two pages at the beginning describe it, of which the one with the later
    transaction counts.

    Args:
        path: Folder or file of the LMDB.

    Raises:
        UserError: No LMDB, or one that is shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / "data.mdb" if path.is_dir() else path
        try:
            with open_file(self.file) as stream:
                self._descriptor = os.dup(stream.fileno())
        except OSError as error:
            raise UserError(f"LMDB {self.file} cannot be read: {error.strerror}") from error
        os.set_inheritable(self._descriptor, False)
        try:
            self._describe()
        except BaseException:
            self.close()
            raise
        self._branches: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def close(self) -> None:
        """Close the file; pages cannot be read any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()

    def _describe(self) -> None:
        size = os.fstat(self._descriptor).st_size
        first = os.pread(self._descriptor, _META, 0)
        page = struct.unpack_from("<I", first, 40)[0] if len(first) == _META else 0
        usable = 256 <= page <= 1 << 16 and struct.unpack_from("<I", first, 16)[0] == _MAGIC
        metas = [first, os.pread(self._descriptor, _META, page)] if usable else []
        metas = [meta for meta in metas if len(meta) == _META and struct.unpack_from("<I", meta, 16)[0] == _MAGIC]
        if len(metas) < 2 or any(meta[20:24] != b"\x01\0\0\0" for meta in metas):
            raise UserError(
                f"{self.file} ({size:,} bytes) is no LMDB (of data version 1), or only the beginning of one; copy it "
                "again"
            )
        newest = max(metas, key=lambda meta: struct.unpack_from("<Q", meta, 144)[0])
        last = struct.unpack_from("<Q", newest, 136)[0]
        needed = (last + 1) * page
        if size < needed:
            raise UserError(
                f"LMDB {self.file} is cut short: it has {size:,} of {needed:,} bytes; copy it again (where the "
                "original is as long, `mdb_copy -c` writes it whole)"
            )
        self._page, self._last = page, last
        (self._root,) = struct.unpack_from("<Q", newest, 128)

    def _read(self, number: int, kind: int) -> bytes:
        if not 1 < number <= self._last:
            raise DamagedLmdb(f"page {number} of {self._last + 1} is asked for")
        page = os.pread(self._descriptor, self._page, number * self._page)
        if len(page) != self._page or not page[10] & kind or page[:8] != number.to_bytes(8, "little"):
            raise DamagedLmdb(f"page {number} is not of the kind that is expected")
        return page

    def _entries(self, page: bytes) -> tuple[int, ...]:
        """Where the entries of a page begin."""
        (lower,) = struct.unpack_from("<H", page, 12)
        count = (lower - _HEADER) // 2
        if not 0 < count <= (self._page - _HEADER) // 10:
            raise DamagedLmdb(f"a page says that it has {count} entries")
        return struct.unpack_from(f"<{count}H", page, _HEADER)

    @staticmethod
    def _key(page: bytes, place: int) -> bytes:
        if place + 8 > len(page):
            raise DamagedLmdb("an entry lies beyond its page")
        end = place + 8 + (page[place + 6] | page[place + 7] << 8)
        if end > len(page):
            raise DamagedLmdb("a key lies beyond its page")
        return page[place + 8 : end]

    def get(self, key: bytes) -> bytes | None:
        """The record of a key, or None.

        Raises:
            DamagedLmdb: The way to it leads out of the file or to something else.
        """
        if self._root == 0xFFFFFFFFFFFFFFFF:  # of an empty one
            return None
        number = self._root
        for _ in range(_DEEPEST):
            known = self._branches.get(number)
            if known is None:
                page = self._read(number, _BRANCH | _LEAF)
                known = page, self._entries(page)
                if page[10] & _BRANCH and len(self._branches) < 4096:
                    self._branches[number] = known
            page, places = known
            leaf = bool(page[10] & _LEAF)
            # The last entry whose key is not above ours; the first key of a branch counts as below all others.
            low, high = (0, len(places)) if leaf else (1, len(places))
            while low < high:
                middle = (low + high) // 2
                if self._key(page, places[middle]) <= key:
                    low = middle + 1
                else:
                    high = middle
            if leaf:
                return self._value(page, places[low - 1], key) if low else None
            place = places[low - 1]
            if place + 8 > len(page):
                raise DamagedLmdb("an entry lies beyond its page")
            number = int.from_bytes(page[place : place + 6], "little")
        raise DamagedLmdb("its pages lead in circles")

    def _value(self, page: bytes, place: int, key: bytes) -> bytes | None:
        if self._key(page, place) != key:
            return None
        size, flags = struct.unpack_from("<IH", page, place)
        start = place + 8 + len(key)
        if flags & ~_BIG or size > _RECORD_LIMIT:
            raise DamagedLmdb(f"the entry has flags {flags} and {size:,} bytes")
        if not flags:
            if start + size > len(page):
                raise DamagedLmdb("a record lies beyond its page")
            return page[start : start + size]
        number = int.from_bytes(page[start : start + 8], "little")
        self._read(number, _OVERFLOW)
        value = os.pread(self._descriptor, size, number * self._page + _HEADER)
        if len(value) != size or number * self._page + _HEADER + size > (self._last + 1) * self._page:
            raise DamagedLmdb(f"a record of {size:,} bytes from page {number} on is longer than the file")
        return value


class DamagedLmdb(Exception):
    """What the file says about itself does not fit together."""


# Open files by path: several splits share one.
_OPEN: dict[str, LmdbFile] = {}


def _open(path: Path) -> LmdbFile:
    key = os.path.realpath(path)
    known = _OPEN.get(key)
    if known is not None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(known._descriptor), os.stat(known.file)):
                return known
    _OPEN[key] = LmdbFile(path)
    return _OPEN[key]


def check_size(path: Path) -> None:
    """Refuse a file that is no LMDB or shorter than it says.

    Raises:
        UserError: Names the file, its size and what it should be.
    """
    LmdbFile(path).close()


class LmdbPatches:
    """Reads patches from an LMDB of safetensors.

    Args:
        path: Folder (or file) of the LMDB.
        bands: Band names in the order of the channels; keys inside a record.
        size: Height and width of a patch.
        enlarge: Whether tensors may be smaller by a whole factor; they are enlarged by nearest neighbour.
    """

    def __init__(self, path: Path, bands: Sequence[str], size: int, *, enlarge: bool = False) -> None:
        self.path = Path(path)
        self.bands = tuple(bands)
        self.size = size
        self.enlarge = enlarge
        self._file: LmdbFile | None = None
        # Records of one data set have the same header: it is parsed once and compared afterwards.
        self._header = b""
        self._places: list[tuple[str, int, int, int]] = []
        self._opened()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _opened(self) -> LmdbFile:
        if self._file is None:
            self._file = _open(self.path)
        return self._file

    def _record(self, name: str) -> bytes | None:
        """The record of a patch, or None.

        Raises:
            UnreadableSample: The way to it is damaged.
        """
        try:
            return self._opened().get(name.encode())
        except (DamagedLmdb, OSError) as error:
            raise UnreadableSample(name, self.path, f"the LMDB is damaged: {error}; copy it again") from error

    def read_into(self, name: str, out: np.ndarray) -> None:
        place = f"{self.path}[{name}]"
        record = self._record(name)
        if record is None:
            raise UnreadableSample(name, place, "is not in the LMDB")
        if len(record) < 8 or 8 + (length := int.from_bytes(record[:8], "little")) > len(record):
            raise UnreadableSample(name, place, f"record of {len(record)} bytes is truncated")
        record_view = memoryview(record)
        header = record_view[8 : 8 + length]
        if header != self._header:
            self._learn(bytes(header), len(record) - 8 - length, name, place)
        data = record_view[8 + length :]
        for channel, (dtype, start, end, side) in enumerate(self._places):
            if end > len(data):
                raise UnreadableSample(name, place, f"record of {len(record)} bytes is truncated")
            values = np.frombuffer(data[start:end], dtype=dtype).reshape(side, side)
            factor = self.size // side
            out[channel] = values if factor == 1 else values.repeat(factor, axis=0).repeat(factor, axis=1)

    def _learn(self, header: bytes, size: int, name: str, place: str) -> None:
        self._header = b""
        try:
            tensors = parse_header(header, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableSample(name, place, f"is no safetensors record: {error}") from error
        places = []
        for band in self.bands:
            if band not in tensors:
                raise UnreadableSample(name, place, f"has no tensor {band!r}; it has: {', '.join(tensors)}")
            dtype, shape, start, end = tensors[band]
            side = shape[0] if shape else 0
            smaller = self.enlarge and 0 < side < self.size and self.size % side == 0
            if shape != (side, side) or (side != self.size and not smaller):
                raise UnreadableSample(
                    name, place, f"tensor {band!r} has shape {shape}, expected ({self.size}, {self.size})"
                )
            places.append((dtype, start, end, side))
        self._header, self._places = header, places

    def missing(self, name: str) -> str | None:
        return None if self._record(name) is not None else f"{self.path}[{name}]"

    def labels(self, name: str) -> list[str] | None:
        return None  # reBEN's records hold pixels only; labels come from the metadata


def write_lmdb(
    path: str | Path,
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    *,
    bands: Sequence[str] = ("VH", "VV"),
    native: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write patches into an LMDB; records that hold all bands already are kept, so it can be resumed.

    A record that lacks a band, or is damaged, is written anew; other tensors in it are kept.

    Args:
        path: Folder of the LMDB; made when missing. The data file grows as needed.
        names: The patches, by name.
        read: Reads one patch, float32 (C, H, W) in dB; called only for what is written.
        bands: Band names in the order of the channels.
        native: Store bands that were enlarged by nearest neighbour in their own size, and whole numbers as uint16.
        progress: Called with the number of names handled so far, after each commit.

    Returns:
        The number of patches written.
    """
    import lmdb
    from safetensors.numpy import load, save

    make_directory(path)
    if (Path(path) / "data.mdb").exists():
        check_size(Path(path))
    try:
        environment = lmdb.open(str(path), map_size=_FIRST_MAP_SIZE, meminit=False)
    except (lmdb.Error, OSError) as error:
        raise WriteError(f"cannot write LMDB {path}: {error}. Choose another folder, then run again.") from error
    written = handled = 0
    pending: dict[bytes, bytes] = {}

    def commit() -> None:
        while pending:
            try:
                with environment.begin(write=True) as transaction:
                    for key, value in pending.items():
                        transaction.put(key, value)
                pending.clear()
            except lmdb.MapFullError:
                environment.set_mapsize(2 * environment.info()["map_size"])
        if progress is not None:
            progress(handled)

    try:
        for name in names:
            with environment.begin() as transaction:
                record = transaction.get(name.encode()) or b""
            there = tensor_names(record)
            if not there.issuperset(bands):
                image = read(name)
                planes = [native_form(image[i]) if native else image[i].astype(np.float32) for i in range(len(bands))]
                tensors = {band: np.ascontiguousarray(plane) for band, plane in zip(bands, planes, strict=True)}
                pending[name.encode()] = save((load(record) if there else {}) | tensors)
                written += 1
            handled += 1
            if len(pending) >= _COMMIT_EVERY:
                commit()
        commit()
        environment.sync(True)
    except (lmdb.Error, OSError) as error:
        raise WriteError(
            f"cannot write LMDB {path}: {error} (disk full or limited?). What was committed before is whole; free "
            "space, then run the same command again"
        ) from error
    finally:
        environment.close()
    return written


def tensor_names(record: bytes) -> frozenset[str]:
    """Names of the tensors of a record; none when it is damaged."""
    length = int.from_bytes(record[:8], "little")
    if len(record) < 8 or 8 + length > len(record):
        return frozenset()
    return _header_names(record[8 : 8 + length], len(record) - 8 - length)


@lru_cache(maxsize=64)  # records of one data set have the same header
def _header_names(header: bytes, size: int) -> frozenset[str]:
    try:
        return frozenset(parse_header(header, size))
    except (ValueError, KeyError, TypeError, AttributeError):
        return frozenset()


def native_form(plane: np.ndarray) -> np.ndarray:
    """The smallest band that gives the same values when enlarged by nearest neighbour; uint16 where they are whole.

    Args:
        plane: float32 (H, H).
    """
    for factor in (6, 2):
        small = plane[::factor, ::factor]
        if plane.shape[0] % factor == 0 and np.array_equal(
            small.repeat(factor, axis=0).repeat(factor, axis=1), plane, equal_nan=True
        ):
            plane = small
            break
    if np.isfinite(plane).all() and plane.min() >= 0 and plane.max() <= 65_535 and (plane == np.rint(plane)).all():
        return plane.astype(np.uint16)
    return plane.astype(np.float32)
