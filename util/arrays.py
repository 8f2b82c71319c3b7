"""NumPy files from outside: `.npy` and `.npz`, refused by their headers and sizes before memory is taken."""

from __future__ import annotations

import errno
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import IO, NamedTuple

import numpy as np

from util.files import open_file

NPZ_LIMIT = 1 << 30  # bytes that the arrays of an .npz may have together
_HEADER_LIMIT = 1 << 16
_ITEM = re.compile(r"'(descr|fortran_order|shape)'\s*:\s*('[^']*'|True|False|\([0-9,\sL]*\))\s*(,|(?=\}))\s*")
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|c8|c16|U[0-9]{1,6}|S[0-9]{1,6})")


class NpyHeader(NamedTuple):
    """What a `.npy` file says about itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    size: int  # bytes of signature and header; the numbers follow

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@lru_cache(maxsize=16)  # files of one kind have the same header
def _parse(text: bytes, size: int) -> NpyHeader:
    try:
        words = text.decode("latin-1").strip()
        body = words[1:-1].strip() if words[:1] == "{" and words[-1:] == "}" else ""
        items = {match[1]: match[2] for match in _ITEM.finditer(body + "}")}
        whole = _ITEM.sub("", body + "}") == "}"
        if not whole or len(items) != 3 or items["fortran_order"][0] == "(" or items["shape"][0] != "(":
            raise ValueError
        if not _DTYPE.fullmatch(items["descr"][1:-1]):
            raise ValueError(f"its type {items['descr']} is not one of numbers or text")
        numbers = [part.strip().rstrip("L") for part in items["shape"][1:-1].split(",")]
        if any(not number for number in numbers[:-1]) or any(len(number) > 18 for number in numbers):
            raise ValueError
        shape = tuple(int(number) for number in numbers if number)
        dtype = np.dtype(items["descr"][1:-1])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its .npy header is damaged ({str(error) or repr(text[:80])})") from None
    return NpyHeader(shape, dtype, items["fortran_order"] == "True", size)


def read_npy_header(stream: IO[bytes]) -> NpyHeader:
    """Read signature and header; the stream then stands at the numbers.

    Raises:
        ValueError: no `.npy`, a damaged header, or a type other than numbers and text (objects would be a pickle).
    """
    start = stream.read(10)
    if len(start) < 10 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3) or start[7] != 0:
        raise ValueError(f"it is no .npy file (it begins with {start[:8]!r})")
    length, size = struct.unpack_from("<H", start, 8)[0], 10
    if start[6] > 1:
        more = stream.read(2)
        length, size = struct.unpack("<I", (start[8:] + more).ljust(4, b"\0"))[0], 12
    if length > _HEADER_LIMIT:
        raise ValueError(f"its .npy header says that it has {length:,} bytes, expected at most {_HEADER_LIMIT:,}")
    text = stream.read(length)
    if len(text) != length:
        raise ValueError("its .npy header is truncated")
    return _parse(text, size + length)


def load_npy(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shape: Sequence[int | None] | None = None,
    mapped: bool = False,
) -> np.ndarray:
    """Read a `.npy` file whose length is what its header says.

    Args:
        path: the file.
        dtype: what it must hold, such as "float32"; None: numbers or text of any kind.
        shape: what it must have; None in it: any length.
        mapped: map the file for reading instead of reading it.

    Raises:
        OSError: as `util.files.open_file`.
        ValueError: no `.npy`, truncated, too long, or of another type or shape; says which.
    """
    with open_file(path) as stream:
        header = read_npy_header(stream)
        room = os.fstat(stream.fileno()).st_size - header.size
        if room != header.data_bytes:
            raise ValueError(
                f"it has {room:,} bytes of numbers, its header says {header.data_bytes:,} ({header.dtype} "
                f"{header.shape})"
            )
        if dtype is not None and header.dtype != np.dtype(dtype):
            raise ValueError(f"it holds {header.dtype}, expected {dtype}")
        if shape is not None and not _fits(header.shape, shape):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(f"it has shape {header.shape}, expected ({wanted})")
        order = "F" if header.fortran else "C"
        if mapped and header.data_bytes:
            mapping = np.memmap(stream, header.dtype, "r", header.size, header.shape, order)  # type: ignore[call-overload]
            return mapping.view(np.ndarray)
        return _numbers(stream, header)


def _fits(shape: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    sides = zip(shape, wanted, strict=True) if len(shape) == len(wanted) else ()
    return len(shape) == len(wanted) and all(side in (None, length) for length, side in sides)


def _numbers(stream: IO[bytes], header: NpyHeader) -> np.ndarray:
    data = bytearray(header.data_bytes)
    view, done = memoryview(data), 0
    while done < len(data):
        block = stream.read(min(1 << 24, len(data) - done))
        if not block:
            raise ValueError(f"it is truncated: {done:,} of {len(data):,} bytes of numbers")
        view[done : done + len(block)] = block
        done += len(block)
    array = np.frombuffer(data, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def load_npz(path: str | os.PathLike[str], *, limit: int = NPZ_LIMIT) -> dict[str, np.ndarray]:
    """Read all arrays of an `.npz`.

    Args:
        path: the file.
        limit: bytes that all arrays together may have.

    Raises:
        OSError: as `util.files.open_file`; also arrays beyond `limit` (EFBIG).
        ValueError: no zip, a damaged or encrypted one, or an entry that is no array of the length it says.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with open_file(path, limit=limit) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > limit:
                raise OSError(errno.EFBIG, f"its arrays say that they have more than {limit:,} bytes", os.fspath(path))
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or name in arrays:
                    raise ValueError(f"its entry {entry.filename!r} is there twice, or compressed as no .npz is")
                with archive.open(entry) as stream:
                    header = read_npy_header(stream)
                    if header.size + header.data_bytes != entry.file_size:
                        raise ValueError(
                            f"its array {name!r} has {entry.file_size - header.size:,} bytes, its header says "
                            f"{header.data_bytes:,} ({header.dtype} {header.shape})"
                        )
                    arrays[name] = _numbers(stream, header)
                    stream.read(1)  # the end, where the checksum is looked at
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"it is no whole .npz file ({error})") from error
    return arrays
