"""The command: ``python -m sarwmix.sen12flood.prepare``, called by ``scripts/prepare_sen12flood.sh``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from util.cli import run_cli

DESCRIPTION = """\
Prepare SEN12-FLOOD: unzip, warp every Sentinel-1 tile onto its Sentinel-2 grid (ALIGN), form pairs of a dry and a
flooded or dry image of one place (PAIR), drop pairs with 25 % zeros or more (CLEAN), and write them.

It can be interrupted at any moment: the same command continues. Do not run two at once on one --work or --out."""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="prepare_sen12flood.sh", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--zip", type=Path, metavar="FILE", help="the downloaded SEN12FLOOD.zip")
    source.add_argument("--raw-root", type=Path, metavar="DIR", help="the unzipped folder that holds the sequences")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for intermediate files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="result; absent, empty, or to continue")
    parser.add_argument(
        "--layout",
        choices=("npy", "store"),
        default="npy",
        help="npy: one file a pair, 57.6 GB for the full data. store: each image once, 9.8 GB or less. Default: npy",
    )
    parser.add_argument(
        "--warper",
        choices=("rasterio", "gdal"),
        default="rasterio",
        help="rasterio's own GDAL, or the system's bindings (osgeo); the same pixels. Default: rasterio",
    )
    parser.add_argument(
        "--resampling", choices=("nearest", "bilinear", "average"), default="nearest", help="default: nearest"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of an image; default: 512")
    parser.add_argument("--s1list", type=Path, metavar="FILE", help="S1list.json; default: raw folder, then datasets/")
    parser.add_argument(
        "--train_csv", type=Path, metavar="FILE", help="training ids, one a line; default: datasets/sen12_train.csv"
    )
    parser.add_argument(
        "--test_csv", type=Path, metavar="FILE", help="test ids; without any lists the split follows from the ids"
    )
    parser.add_argument("--skip-bad", action="store_true", help="exit with 0 although bad input was left out")
    parser.add_argument("--keep-intermediate", action="store_true", help="keep extracted and aligned files in --work")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier preparation of ours in --out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run."""
    args = build_parser().parse_args(argv)
    from sarwmix.sen12flood.stages import PrepareOptions, prepare
    from util.log import setup_logging
    from util.memory import keep_freed_memory

    setup_logging()
    keep_freed_memory()
    prepare(PrepareOptions(**vars(args)))
    return 0


if __name__ == "__main__":
    run_cli(main)
