#!/usr/bin/env python
"""Derive the files in datasets/ (label tables, split lists) from the official BigEarthNet metadata and check them."""

from __future__ import annotations

import argparse
import bz2
import csv
import errno
import gzip
import io
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sarwmix.data.labels import CLASSES_19, CLASSES_43, GROUPING_43
from sarwmix.data.registry import OFFICIAL_COUNTS
from util.args import Parser
from util.cli import run_cli
from util.errors import UserError
from util.files import JSON_LIMIT, TEXT_LIMIT, atomic_write, open_file, parse_json, read_bytes

SPLITS = ("train", "val", "test")
CLASS_TABLE = "bigearthnet_classes.csv"
GROUPING_TABLE = "bigearthnet_43_to_19.csv"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description="Write the label tables and, from the official metadata, the split lists that --dataset benv1 "
        "needs (benv2 reads metadata.parquet itself). Counts are checked. Files may be plain, .gz or .bz2.",
    )
    result.add_argument("--v1_lists", metavar="DIR", help="folder with the official v1 lists train, val and test .csv")
    result.add_argument("--v1_mapping", metavar="FILE", help="table s1_name,s2_name of all v1 patches")
    result.add_argument(
        "--v1_labels",
        metavar="STORE",
        help="Zarr store or GeoTIFF tree of v1: adds a labels column, so that training starts without "
        "reading the labels of every patch",
    )
    result.add_argument("--v2_metadata", metavar="FILE", help="official metadata.parquet of v2: check its counts")
    result.add_argument("--v2_csv", action="store_true", help="also write benv2_{train,val,test}.csv")
    result.add_argument(
        "--label_indices",
        metavar="FILE",
        help="official label_indices.json: check the class order and the 43-to-19 grouping against it",
    )
    result.add_argument(
        "--out",
        dest="output",
        default=str(ROOT / "datasets"),
        metavar="DIR",
        help="where the files go (default: datasets/ of the repository, where they are looked for)",
    )
    result.add_argument("--any_count", action="store_true",
                        help="accept other counts, for a part of the data")  # fmt: skip
    return result


def open_text(path: Path) -> IO[str]:
    """A plain, gzip or bzip2 text file; what it expands to is bounded, too.

    Raises:
        OSError: Missing, no regular file, damaged, or longer than a list can be.
    """
    with open_file(path, limit=TEXT_LIMIT) as stream:
        unpack: Any = {".bz2": bz2.BZ2File, ".gz": lambda file: gzip.GzipFile(fileobj=file)}.get(path.suffix)
        content = stream.read(TEXT_LIMIT + 1) if unpack is None else unpack(stream).read(TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise OSError(errno.EFBIG, f"it holds more than {TEXT_LIMIT:,} bytes", str(path))
    return io.StringIO(content.decode("utf-8"), newline="")


def read_rows(path: Path) -> list[list[str]]:
    """Rows of a CSV file without empty ones, cells stripped."""
    try:
        with open_text(path) as file:
            return [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def find_list(folder: Path, split: str) -> Path:
    """``<split>.csv`` with or without compression."""
    for suffix in ("", ".bz2", ".gz"):
        path = folder / f"{split}.csv{suffix}"
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {split}.csv (or .csv.bz2, .csv.gz); --v1_lists takes the folder of the v1 lists")


def check_count(what: str, found: int, expected: int, *, any_count: bool) -> None:
    """Refuse a list of another length than the official one."""
    if found != expected and not any_count:
        raise UserError(
            f"{what} has {found:,} patches, expected {expected:,} as published; the file is not the official one "
            "(--any_count accepts it)"
        )


def check_label_indices(path: Path) -> None:
    """Compare class order and grouping with the official table.

    Raises:
        UserError: They differ; the message names the first difference.
    """
    try:
        table = parse_json(read_bytes(path, JSON_LIMIT))
        official_43 = sorted(table["original_labels"], key=table["original_labels"].__getitem__)
        official_19 = sorted(table["BigEarthNet-19_labels"], key=table["BigEarthNet-19_labels"].__getitem__)
        groups: dict[str, str | None] = dict.fromkeys(official_43)
        for number, members in enumerate(table["label_conversion"]):
            groups.update({official_43[member]: official_19[number] for member in members})
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no table of label indices: {error!r}") from error
    if tuple(official_19) != CLASSES_19 or tuple(official_43) != CLASSES_43:
        raise UserError(f"{path}: class names or their order differ from sarwmix/data/labels.py")
    for name, group in groups.items():
        if GROUPING_43[name] != group:
            raise UserError(f"{path}: {name!r} belongs to {group!r}, sarwmix/data/labels.py has {GROUPING_43[name]!r}")
    print(f"{path}: 19 classes, 43 names and their grouping agree")


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())
    print(f"wrote {path} ({len(rows):,} rows)", flush=True)


def write_label_tables(folder: Path) -> None:
    """The two small tables that are part of the repository."""
    write_table(folder / CLASS_TABLE, ("index", "class"), list(enumerate(CLASSES_19)))
    rows = []
    for index, name in enumerate(CLASSES_43):
        group = GROUPING_43[name]
        rows.append((index, name, "" if group is None else CLASSES_19.index(group), group or ""))
    write_table(folder / GROUPING_TABLE, ("index43", "label43", "index19", "class19"), rows)


def read_mapping(path: Path) -> dict[str, str]:
    """Sentinel-2 name -> Sentinel-1 name."""
    rows = read_rows(path)
    if not rows or [cell.lower() for cell in rows[0]] != ["s1_name", "s2_name"]:
        raise UserError(f"{path} has header {rows[0] if rows else []}, expected s1_name,s2_name")
    mapping = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2:
            raise UserError(f"{path} row {number} has {len(row)} cells, expected s1_name,s2_name")
        if row[1] in mapping:
            raise UserError(f"{path} row {number}: {row[1]!r} appears twice")
        mapping[row[1]] = row[0]
    if len(set(mapping.values())) != len(mapping):
        raise UserError(f"{path}: a Sentinel-1 name belongs to two Sentinel-2 names")
    return mapping


def stored_labels(store: Path, names: Sequence[str]) -> list[str]:
    """43-class names of patches as stored beside them, joined with ``|``."""
    from concurrent.futures import ThreadPoolExecutor

    from sarwmix.data.labels import class_codes
    from sarwmix.data.spec import BANDS
    from sarwmix.datasets.bigearthnet import open_source

    source = open_source(store, BANDS, 120, names[0])

    def read(name: str) -> str:
        labels = source.labels(name)
        if labels is None:
            raise UserError(f"{store} has no labels beside its patches; --v1_labels takes a Zarr store or GeoTIFF tree")
        class_codes(labels, where=f"{store}: patch {name}", nomenclature="43")
        return "|".join(labels)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, names))


def prepare_v1(lists: Path, mapping_file: Path, output: Path, *, labels: Path | None, any_count: bool) -> None:
    """Write ``benv1_{train,val,test}.csv``: Sentinel-2 name, Sentinel-1 name (column 1), labels if they are known."""
    from sarwmix.datasets.bigearthnet import check_name

    mapping = read_mapping(mapping_file)
    seen: dict[str, str] = {}
    tables = {}
    for split in SPLITS:
        path = find_list(lists, split)
        names = [row[0] for row in read_rows(path)]
        check_count(f"{path} (v1 {split})", len(names), OFFICIAL_COUNTS["benv1"][split], any_count=any_count)
        for number, name in enumerate(names, start=1):
            if name not in mapping:
                raise UserError(f"{path} row {number}: {name!r} is not in {mapping_file}")
            if name in seen:
                raise UserError(f"{path} row {number}: {name!r} is also in split {seen[name]!r}")
            seen[name] = split
            check_name(mapping[name], f"{mapping_file}, Sentinel-1 name of {name}")
        tables[split] = names
    for split, names in tables.items():
        rows = [(name, mapping[name]) for name in names]
        if labels is None:
            write_table(output / f"benv1_{split}.csv", ("s2_name", "s1_name"), rows)
        else:
            found = stored_labels(labels, [row[1] for row in rows])
            with_labels = [(*row, text) for row, text in zip(rows, found, strict=True)]
            write_table(output / f"benv1_{split}.csv", ("s2_name", "s1_name", "labels"), with_labels)


def prepare_v2(metadata: Path, output: Path, *, write_csv: bool, any_count: bool) -> None:
    """Check the official metadata of v2 (labels known, counts of the splits) and write its splits as CSV if asked."""
    from sarwmix.data.labels import names_of
    from sarwmix.datasets.bigearthnet import read_metadata

    table = read_metadata([metadata], SPLITS, nomenclature="19")
    for code, split in enumerate(SPLITS):
        count = int((table.split == code).sum())
        check_count(f"{metadata} (v2 {split})", count, OFFICIAL_COUNTS["benv2"][split], any_count=any_count)
        print(f"{metadata}: {split} {count:,} patches")
    if table.labels is None:
        raise UserError(f"{metadata} has no column labels")
    if (table.labels.sum(axis=1) == 0).any():
        raise UserError(f"{metadata} has patches without a label")
    if not write_csv:
        return
    texts: dict[bytes, str] = {}
    for code, split in enumerate(SPLITS):
        rows = []
        for row in (table.split == code).nonzero()[0]:
            key = table.labels[row].tobytes()
            if key not in texts:
                texts[key] = str(names_of(table.labels[row]))
            rows.append((table.names[int(row)], texts[key], split))
        write_table(output / f"benv2_{split}.csv", ("s1_name", "labels", "split"), rows)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    output = Path(args.output)
    if (args.v1_lists is None) != (args.v1_mapping is None):
        raise UserError("--v1_lists and --v1_mapping belong together: the lists name Sentinel-2 patches only")
    if args.v1_labels is not None and args.v1_lists is None:
        raise UserError("--v1_labels adds a column to the v1 lists; give --v1_lists and --v1_mapping too")
    if args.v2_csv and args.v2_metadata is None:
        raise UserError("--v2_csv needs --v2_metadata")
    if args.label_indices is not None:
        check_label_indices(Path(args.label_indices))
    write_label_tables(output)
    if args.v2_metadata is not None:
        prepare_v2(Path(args.v2_metadata), output, write_csv=args.v2_csv, any_count=args.any_count)
    if args.v1_lists is not None:
        labels = None if args.v1_labels is None else Path(args.v1_labels)
        prepare_v1(Path(args.v1_lists), Path(args.v1_mapping), output, labels=labels, any_count=args.any_count)


if __name__ == "__main__":
    run_cli(main)
