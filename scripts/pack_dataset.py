#!/usr/bin/env python
"""Pack a data set into one memory-mapped file (docs/file_formats.md), or write it as LMDB or Zarr; verify a store."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sarwmix.data import registry
from sarwmix.data.spec import EmptySplit
from util.args import Parser, non_negative_int
from util.cli import run_cli
from util.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from sarwmix.data.base import SarDataset

FORMATS = ("packed", "lmdb", "zarr2", "zarr3")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description="Pack a data set so that it can be read fast. Run the same command again after an interruption: it "
        "goes on where it stopped. The store is then given as --data_path to every other command.",
    )
    result.add_argument("--dataset", choices=registry.names(), help="registered data set")
    result.add_argument("--data_path", metavar="DIR", help="source: GeoTIFF tree, Zarr, LMDB, or another packed store")
    result.add_argument("--out", dest="output", required=True, metavar="DIR", help="the store to write, or to --verify")
    result.add_argument("--splits", default=None, metavar="A+B", help="splits to pack (default: all that are there)")
    result.add_argument("--format", choices=FORMATS, default="packed", help="what to write (default %(default)s)")
    result.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="float16 halves a packed store; errors reach 0.004 dB below |16| dB, 0.008 dB below |32| "
        "dB, 0.016 dB beyond (default %(default)s: values unchanged)",
    )
    result.add_argument(
        "--jobs",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="processes that pack (default 0: one for each usable processor)",
    )
    result.add_argument(
        "--mark_unreadable",
        action="store_true",
        help="pack what can be read and mark the rest, instead of stopping at the first bad sample",
    )
    result.add_argument("--overwrite", action="store_true", help="replace a packed store of other content")
    result.add_argument("--repair", action="store_true", help="write damaged blocks of a finished store anew")
    result.add_argument(
        "--verify",
        action="store_true",
        help="compare every byte of the store with its checksums (alone, or after packing)",
    )
    result.add_argument("--data_option", action="append", default=[], metavar="NAME=VALUE",
                        help="option of the data set, e.g. metadata=FILE; may be repeated")  # fmt: skip
    return result


class Counter:
    """Prints how far the work is, at most every two seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = time.monotonic()
        self.shown = self.start
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.shown >= 2 or (done == total and now > self.shown + 0.5):
            rate = (done - self.first) / (now - self.start)
            left = (total - done) / rate if rate else 0.0
            print(f"{done}/{total} {self.what}, {rate:,.0f} per second, {left:.0f} s left", flush=True)
            self.shown = now


def open_splits(args: argparse.Namespace) -> list[SarDataset]:
    """One data set for each split that is packed."""
    spec = registry.get_spec(args.dataset)
    options = registry.parse_options(args.data_option)
    if args.splits is not None:
        wanted = registry.parse_split(spec, args.splits)
        return [registry.build_dataset(args.dataset, args.data_path, split, **options) for split in wanted]
    found, problems = [], []
    for split in spec.splits:
        try:
            found.append(registry.build_dataset(args.dataset, args.data_path, split, **options))
        except EmptySplit as error:
            problems.append(f"{split}: {error}")
    if not found:
        raise UserError(f"no split of {args.dataset!r} can be opened; {problems[0]}")
    for problem in problems:
        print(f"left out {problem}", flush=True)
    return found


def usable_processors() -> int:
    """Processors that this process may use."""
    import os

    return len(os.sched_getaffinity(0))


def write_packed(args: argparse.Namespace, datasets: list[SarDataset]) -> None:
    """Write or continue the packed store."""
    from sarwmix.data.packed import pack

    start = time.monotonic()
    result = pack(
        datasets,
        args.output,
        dtype=args.dtype,
        jobs=args.jobs or usable_processors(),
        mark_unreadable=args.mark_unreadable,
        overwrite=args.overwrite,
        repair=args.repair,
        progress=Counter("patches"),
    )
    manifest = result.manifest
    seconds = time.monotonic() - start
    size = (Path(args.output) / "images.npy").stat().st_size
    print(
        f"{args.output}: {manifest.count} patches of {'+'.join(manifest.splits)}, {size / 1e9:.2f} GB "
        f"{manifest.dtype}; {result.packed_blocks} blocks written, {result.kept_blocks} kept, {seconds:.1f} s"
    )
    for name, reason in list(manifest.unreadable.items())[:20]:
        print(f"marked as unreadable: {name}: {reason}")
    if len(manifest.unreadable) > 20:
        print(f"and {len(manifest.unreadable) - 20} more, see manifest.json")


def write_other(args: argparse.Namespace, datasets: list[SarDataset]) -> None:
    """Write an LMDB of safetensors or a Zarr store, keyed by name, and go on with one that is there."""
    for option in ("mark_unreadable", "overwrite", "repair", "verify"):
        if getattr(args, option):
            raise UserError(f"--{option} is for --format packed; {args.format} is written name by name")
    if args.dtype != "float32":
        raise UserError(f"--format {args.format} keeps the values unchanged; --dtype {args.dtype} is for packed stores")
    write = write_as_lmdb if args.format == "lmdb" else write_as_zarr
    from util.locks import FolderLock

    with FolderLock(args.output, "packing"):
        written = sum(write(args, dataset) for dataset in datasets)
    total = sum(len(dataset) for dataset in datasets)
    print(f"{args.output}: {total} patches, {written} written now, {total - written} were there")


def write_as_lmdb(args: argparse.Namespace, dataset: SarDataset) -> int:
    """One split as records of an LMDB; returns the number of patches written now.

    Sentinel-1 bands go under the Sentinel-1 name, Sentinel-2 bands under the patch_id, as in reBEN's LMDB.
    """
    from sarwmix.data.io.lmdb import write_lmdb
    from sarwmix.data.spec import SAR_BANDS
    from sarwmix.datasets.bigearthnet import BigEarthNet, JoinedSource

    if not isinstance(dataset, BigEarthNet):
        raise UserError(f"--format lmdb is for BigEarthNet; data set {args.dataset!r} is read from its own files")
    bands = dataset.spec.bands
    written = 0
    for what, channels in (
        ("patches", [k for k, band in enumerate(bands) if band in SAR_BANDS]),
        ("Sentinel-2 patches", [k for k, band in enumerate(bands) if band not in SAR_BANDS]),
    ):
        if not channels:
            continue
        number = {name: index for index, name in enumerate(dataset.names)}
        optical = what != "patches"
        if optical:
            assert isinstance(dataset.patches, JoinedSource)
            number = {dataset.patches.s2_name(name): index for name, index in number.items()}
        counter = Counter(f"{what} of {dataset.split}")

        def read(name: str, number: dict[str, int] = number, channels: list[int] = channels) -> np.ndarray:
            return dataset.read(number[name])[channels]

        def show(done: int, counter: Counter = counter) -> None:
            counter(done, len(dataset))

        count = write_lmdb(args.output, number, read, bands=[bands[k] for k in channels], native=optical, progress=show)
        written = max(written, count)
    return written


def write_as_zarr(args: argparse.Namespace, dataset: SarDataset) -> int:
    """One split as groups of a Zarr store; returns the number written now."""
    from sarwmix.data.io.zarr import write_zarr
    from sarwmix.data.labels import CLASSES_19, GROUPING_43, names_of

    labels = dataset.labels
    if dataset.spec.classes != CLASSES_19 or labels is None:
        raise UserError(f"--format {args.format} is for data sets with the 19 BigEarthNet classes")
    # Such a store holds 43-class names; the first name of each group stands for its class.
    example = {group: name for name, group in reversed(GROUPING_43.items()) if group is not None}
    counter = Counter(f"patches of {dataset.split}")

    def patches() -> Iterator[tuple[str, np.ndarray, list[str]]]:
        for index, name in enumerate(dataset.names):
            yield name, dataset.read(index), [example[label] for label in names_of(labels[index])]
            counter(index + 1, len(dataset))

    return write_zarr(args.output, patches(), bands=dataset.spec.bands, zarr_format=int(args.format[-1]))


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    if args.dataset is None or args.data_path is None:
        if not (args.verify and args.dataset is None and args.data_path is None):
            raise UserError("--dataset and --data_path are needed to pack; only --verify works with --out alone")
    else:
        datasets = open_splits(args)
        if args.format == "packed":
            write_packed(args, datasets)
        else:
            write_other(args, datasets)
    if args.verify:
        from sarwmix.data.packed import read_manifest, verify_store

        total = read_manifest(args.output).block_count
        counter = Counter("blocks verified")
        manifest = verify_store(args.output, progress=lambda done: counter(done, total))
        print(f"{args.output}: all {manifest.block_count} blocks and the index agree with their checksums")


if __name__ == "__main__":
    run_cli(main)
