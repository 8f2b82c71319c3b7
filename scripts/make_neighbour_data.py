#!/usr/bin/env python
"""Write small generated data in the layout of a neighbouring data set (see docs/data_neighbours.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli

DATASETS = ("eurosat_sar", "dfc2020", "sen1floods11", "satlas", "benv2")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description="Write generated data in the layout of a data set: file names, units, band names and label values "
        "are the real ones, the pictures are random terrain. The same settings give the same files."
    )
    result.add_argument("--dataset", required=True, choices=DATASETS)
    result.add_argument("--out", required=True, metavar="DIR", help="new folder")
    result.add_argument(
        "--samples",
        type=int,
        default=None,
        metavar="N",
        help="training samples, of each class for eurosat_sar; other splits have half as many (default: 4 to 16)",
    )
    result.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    from sarwmix.synthetic.neighbours import make_neighbour_data

    count = make_neighbour_data(args.dataset, args.out, samples=args.samples, seed=args.seed)
    print(
        f"{args.dataset}: {count} training samples{' a class' if args.dataset == 'eurosat_sar' else ''} in {args.out}"
    )


if __name__ == "__main__":
    run_cli(main)
