#!/usr/bin/env python3
"""Write a small raw tree with the structure of SEN12-FLOOD; prepare it with scripts/prepare_sen12flood.sh."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="absent or empty folder")
    parser.add_argument("--train", type=int, default=8, help="training sequences; default: 8")
    parser.add_argument("--test", type=int, default=4, help="test sequences; default: 4")
    parser.add_argument("--frames", type=int, default=8, help="acquisitions of each sequence; default: 8")
    parser.add_argument(
        "--size", type=int, default=512, help="rows and columns of the grid; default: 512 as in reality"
    )
    parser.add_argument(
        "--swath_edges", type=float, default=0.15, help="share of images with a swath edge; default: 0.15"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zip", type=Path, metavar="FILE", help="pack the tree like the published zip, too")
    args = parser.parse_args()
    from sarwmix.synthetic.sen12flood import DemoOptions, generate, make_zip

    options = DemoOptions(args.train, args.test, args.frames, args.size, args.seed, args.swath_edges)
    generate(args.out, options)
    print(f"{args.train} + {args.test} sequences of {args.frames} acquisitions in {args.out}")
    if args.zip is not None:
        make_zip(args.out, args.zip)
        print(f"zip: {args.zip} ({args.zip.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    run_cli(main)
