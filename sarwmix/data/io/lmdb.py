"""BigEarthNet patches in an LMDB: key ``s1_name``, value a safetensors record with one tensor (H, W) for each band.

Sentinel-2 patches have their ``patch_id`` as key and tensors of 120, 60 and 20 px. This is how reBEN's tools store the
data. Records are found by name, never by position, and hold the values unchanged.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sarwmix.data.base import UnreadableSample
from util.errors import UserError

if TYPE_CHECKING:
    import lmdb

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
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("header is no JSON object")
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} has type {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        if not 0 <= start <= end <= size or end - start != int(np.prod(shape)) * np.dtype(dtype).itemsize:
            raise ValueError(f"bytes {start} to {end} of tensor {name!r} do not fit a record of {size}")
        tensors[name] = (dtype, shape, start, end)
    return tensors


# Open environments by path, with the process that opened them: several splits share one, because LMDB refuses to open
# a file twice in a process, and none may be used across a fork, so that a child closes what it inherited.
_OPEN: dict[str, tuple[int, lmdb.Environment]] = {}


_MAGIC = 0xBEEFC0DE
_META = 152  # bytes of a page that describe the file: header 16, then magic, version, ..., last page, transaction


def check_size(path: Path) -> None:
    """Refuse a file that is no LMDB or shorter than it says: reading beyond its end kills the process ("Bus error").

    An LMDB begins with two pages that describe it, of which the one with the later transaction counts.

    Args:
        path: Folder or file of the LMDB.

    Raises:
        UserError: Names the file, its size and what it should be.
    """
    file = path / "data.mdb" if path.is_dir() else path
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(_META)
            page = struct.unpack_from("<I", first, 40)[0] if len(first) == _META else 0
            usable = 256 <= page <= 1 << 16 and struct.unpack_from("<I", first, 16)[0] == _MAGIC
            stream.seek(page)
            metas = [first, stream.read(_META)] if usable else []
    except OSError as error:
        raise UserError(f"LMDB {file} cannot be read: {error.strerror}") from error
    metas = [meta for meta in metas if len(meta) == _META and struct.unpack_from("<I", meta, 16)[0] == _MAGIC]
    if len(metas) < 2:
        raise UserError(f"{file} ({size:,} bytes) is no LMDB, or only the beginning of one; copy it again")
    last, _ = max((struct.unpack_from("<QQ", meta, 136) for meta in metas), key=lambda pair: pair[1])
    needed = (last + 1) * page
    if size < needed:
        raise UserError(
            f"LMDB {file} is cut short: it has {size:,} of {needed:,} bytes; copy it again (where the original is "
            "as long, `mdb_copy -c` writes it whole)"
        )


def _open(path: Path) -> lmdb.Environment:
    import lmdb

    key = os.path.realpath(path)
    process, environment = _OPEN.get(key, (0, None))
    if environment is not None:
        if process == os.getpid():
            return environment
        environment.close()
        del _OPEN[key]
    check_size(path)
    try:
        environment = lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise UserError(f"LMDB {path} cannot be opened: {error}") from error
    _OPEN[key] = (os.getpid(), environment)
    return environment


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
        self._reading: lmdb.Transaction | None = None
        self._process = 0
        # Records of one data set have the same header: it is parsed once and compared afterwards.
        self._header = b""
        self._places: list[tuple[str, int, int, int]] = []
        self._transaction()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None}

    def _transaction(self) -> lmdb.Transaction:
        if self._reading is None or self._process != os.getpid():
            self._reading = _open(self.path).begin(buffers=True)
            self._process = os.getpid()
        return self._reading

    def read_into(self, name: str, out: np.ndarray) -> None:
        place = f"{self.path}[{name}]"
        record = self._transaction().get(name.encode())
        if record is None:
            raise UnreadableSample(name, place, "is not in the LMDB")
        if len(record) < 8 or 8 + (length := int.from_bytes(record[:8], "little")) > len(record):
            raise UnreadableSample(name, place, f"record of {len(record)} bytes is truncated")
        header = record[8 : 8 + length]
        if header != self._header:
            self._learn(bytes(header), len(record) - 8 - length, name, place)
        data = record[8 + length :]
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
        except (ValueError, KeyError, TypeError) as error:
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
        return None if self._transaction().get(name.encode()) is not None else f"{self.path}[{name}]"

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

    Path(path).mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=_FIRST_MAP_SIZE, meminit=False)
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
    except (ValueError, KeyError, TypeError):
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
