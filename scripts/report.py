#!/usr/bin/env python
"""Write one self-contained HTML page about finished runs, with curves, results, pictures and the table for a paper."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(description=__doc__)
    result.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="--output_dir of a finished or stopped run of main_pretrain.py or main_finetune.py",
    )
    result.add_argument(
        "--out",
        default="runs/report",
        metavar="DIR",
        help="folder for report.html, figures/, table.md and table.tex (default %(default)s)",
    )
    result.add_argument("--title", default="Training report", help="heading of the page (default: %(default)s)")
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    from sarwmix.reports.page import write_report

    page = write_report(args.runs, args.out, title=args.title)
    print(f"written to {page} ({page.stat().st_size / 1e6:.1f} MB, opens in any browser without other files)")


if __name__ == "__main__":
    run_cli(main)
