"""Files of a prepared SEN12-FLOOD folder, in both layouts.

| file | layout | content |
|---|---|---|
| ``manifest.json`` | both | format, layout, options, counts, label balance, problems, versions |
| ``pairs.csv`` | both | one line a pair: split, name, folder, first, second, label, row1, row2 (npy: rows are -1) |
| ``images.csv`` | both | one line a frame: split, folder, product, date, flooding, status, zeros, row, CRC-32 |
| ``sequences.csv`` | both | one line a folder: split, frames, grid (CRS, left, top, pixel, width, height), its origin |
| ``{train,test}/<name>.npy`` | npy | float32 (2, 2, S, S): time x (VH, VV) x rows x columns, linear power |
| ``images.npy`` | store | float32 (M, 2, S, S), each image once |

Every ``.npy`` header is padded to 4096 bytes, which the format allows: the pixels then begin at a block of the file
system, and copies inside one file system can share blocks where it supports that.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarwmix.sen12flood.metadata import parse_pair_name
from util.errors import UserError
from util.files import JSON_LIMIT, TEXT_LIMIT, parse_json, read_bytes

FORMAT = "sarwmix-sen12flood/1"
FORMAT_FAMILY = "sarwmix-sen12flood/"
MANIFEST, PAIRS, IMAGES, SEQUENCES, STORE = "manifest.json", "pairs.csv", "images.csv", "sequences.csv", "images.npy"
STORE_PARTIAL = ".images.npy.building"
HEADER_BYTES = 4096
COMPLETE, IN_PROGRESS, BEING_REMOVED = "complete", "in progress", "being removed"

PAIR_COLUMNS = ("split", "name", "folder", "first", "second", "label", "row1", "row2")
IMAGE_COLUMNS = (
    "split", "folder", "product", "date", "flooding", "status", "zeros_vh", "zeros_vv", "row", "crc32",
)  # fmt: skip
SEQUENCE_COLUMNS = (
    "split", "folder", "frames", "aligned", "pairs", "crs", "left", "top", "pixel", "width", "height", "origin",
)  # fmt: skip


@dataclass(frozen=True)
class PairRow:
    """One line of pairs.csv."""

    split: str
    name: str
    folder: str
    first: str
    second: str
    label: int
    row1: int
    row2: int


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The 4096 bytes before the pixels of a float32 array in C order, ``.npy`` format 1.0."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}".encode("latin-1")
    room = HEADER_BYTES - 10
    if len(text) >= room:
        raise ValueError(f"shape {shape} does not fit into a header of {HEADER_BYTES} bytes")
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"


def row_bytes(size: int) -> int:
    """Bytes of one image, (2, size, size) float32."""
    return 2 * size * size * 4


def pair_file_bytes(size: int) -> int:
    """Bytes of one pair's ``.npy``."""
    return HEADER_BYTES + 2 * row_bytes(size)


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as UTF-8 CSV with a header line and ``\\n`` line ends."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue().encode()


def read_table(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a table that :func:`csv_bytes` wrote.

    Raises:
        UserError: Missing, cut short, or with other columns.
    """
    try:
        with io.StringIO(read_bytes(path, TEXT_LIMIT).decode(), newline="") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); run the preparation again") from error
    if not rows or tuple(rows[0]) != tuple(columns):
        found = rows[0] if rows else []
        raise UserError(f"{path} has columns {found}, expected {list(columns)}; run the preparation again")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(columns):
            raise UserError(f"{path} line {number} has {len(row)} values, expected {len(columns)}; prepare it again")
    return rows[1:]


def read_pairs(folder: Path) -> list[PairRow]:
    """pairs.csv of a prepared folder.

    Raises:
        UserError: Missing or damaged.
    """
    path = folder / PAIRS
    pairs = []
    for number, row in enumerate(read_table(path, PAIR_COLUMNS), 2):
        try:
            if any(len(cell) > 18 for cell in row[5:]):
                raise ValueError(f"numbers {row[5:]}")
            pair = PairRow(row[0], row[1], row[2], row[3], row[4], int(row[5]), int(row[6]), int(row[7]))
            if parse_pair_name(pair.name) != (pair.folder, pair.first, pair.second, pair.label):
                raise ValueError(f"name {pair.name!r} does not fit its columns")
            if pair.split not in ("train", "test") or "/" in pair.name or "\\" in pair.name:
                raise ValueError(f"split {pair.split!r}, name {pair.name!r}")
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}; run the preparation again") from error
        pairs.append(pair)
    return pairs


def image_checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each image in images.csv, by ``folder/product``.

    Raises:
        UserError: Missing or damaged.
    """
    path = folder / IMAGES
    table = read_table(path, IMAGE_COLUMNS)
    try:
        return {f"{row[1]}/{row[2]}": int(row[9], 16) for row in table if row[9]}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; run the preparation again") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json if the folder has one of ours, else None."""
    try:
        content = parse_json(read_bytes(folder / MANIFEST, JSON_LIMIT))
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and str(content.get("format", "")).startswith(FORMAT_FAMILY):
        return content
    return None


def pair_path(folder: Path, pair: PairRow) -> Path:
    """Where the npy layout keeps a pair."""
    return folder / pair.split / f"{pair.name}.npy"


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, without waiting for the disk.

    For records that are checked when they are read back; :func:`util.files.atomic_write` is for results.
    """
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)
