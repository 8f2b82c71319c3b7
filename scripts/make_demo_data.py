#!/usr/bin/env python
"""Write the demo data: generated Sentinel-1 patches in the layout of BigEarthNet v2 (see docs/demo_data.md)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description="Write generated Sentinel-1 patches (GeoTIFF tree and metadata.parquet, 19-class labels). "
        "The same patches and seed give the same bytes. Complete data of the same settings are used again."
    )
    result.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    result.add_argument(
        "--patches",
        type=int,
        default=768,
        metavar="N",
        help="patches in all, about 60/20/20 %% train/validation/test (default %(default)s)",
    )
    result.add_argument("--seed", type=int, default=0, help="default %(default)s")
    result.add_argument("--jobs", type=int, default=None, metavar="N", help="threads (default: all usable processors)")
    result.add_argument(
        "--overwrite", action="store_true", help="replace demo data of other settings; anything else is never replaced"
    )
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    from sarwmix.synthetic.benv2 import generate

    start = time.monotonic()
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            print(f"demo data: {done}/{total} patches, {time.monotonic() - start:.1f} s", flush=True)

    written = generate(
        args.out, patches=args.patches, seed=args.seed, jobs=args.jobs, overwrite=args.overwrite, progress=progress
    )
    print(f"demo data of {args.patches} patches {'written to' if written else 'already complete in'} {args.out}")


if __name__ == "__main__":
    run_cli(main)
