#!/usr/bin/env python
"""What is known of a file: checkpoint, export, packed store, run, or weights of any other project.

python scripts/describe.py runs/base/checkpoint.pth
python scripts/describe.py B2_vits16_fgmae_ep99.pth exported/ PACKED
python scripts/describe.py --known            # the weight files that the package knows
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("path", nargs="*", metavar="PATH", help="weight file, checkpoint, export, run or store")
    result.add_argument(
        "--known", action="store_true", help="list the weight files that sarwmix/tables/weights.csv names"
    )
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    if not args.path and not args.known:
        raise UserError("give a file or folder, or --known")
    from sarwmix.models.passport import known_weights

    if args.known:
        for row in known_weights():
            print(f"{row.pattern}\n  {row.what}; {row.model or 'several models'}; bands {', '.join(row.bands)} in "
                  f"{row.unit}; {row.source}; licence: {row.licence}")  # fmt: skip
    from sarwmix.inference.describing import facts_of

    for path in args.path:
        print(path)
        for name, value in facts_of(Path(path)):
            print(f"  {name:<13}{value}")


if __name__ == "__main__":
    run_cli(main)
