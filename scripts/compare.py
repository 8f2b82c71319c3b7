#!/usr/bin/env python3
"""One table of encoders x data sets x protocols from finished runs, with published numbers beside them.

    python scripts/compare.py runs/compare_demo/linear_* runs/compare_demo/knn_* --out runs/table --latex

Runs that differ in seeds alone (their own, their pretraining's) become a mean with its 95 % interval. What is not like
for like (samples, labels, statistics, bands, label fraction, any flag that can change a result, seeds) is kept apart,
marked by a letter and said below the table. Published numbers (sarwmix/tables/published_results.csv) stand in a column
of their own, never averaged with ours.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sarwmix.reports.comparison import (
    CSV_COLUMNS,
    PUBLISHED_FILE,
    as_latex,
    as_markdown,
    as_records,
    build_tables,
    read_published,
)
from sarwmix.reports.run import read_run
from util.args import Parser
from util.cli import run_cli
from util.files import atomic_write, make_directory


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders of main_finetune.py, or metrics.json files"
    )
    parser.add_argument("--metric", default=None, help="metric to show, e.g. ap_micro (not given: the task's main one)")
    parser.add_argument("--out", default=None, metavar="PATH", help="also write PATH.md and PATH.csv (all metrics)")
    parser.add_argument("--latex", action="store_true", help="with --out: PATH.tex, too (booktabs)")
    parser.add_argument(
        "--published", default=str(PUBLISHED_FILE), metavar="CSV", help="published numbers; none: leave out"
    )
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.latex and not args.out:
        parser.error("--latex needs --out PATH")
    published = [] if args.published == "none" else read_published(args.published)
    tables = build_tables([read_run(run) for run in args.runs], published, metric=args.metric)
    text = as_markdown(tables)
    print(text, end="")
    if args.out is None:
        return
    out = Path(args.out)
    make_directory(out.parent)
    table = io.StringIO()
    writer = csv.DictWriter(table, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_records(tables))
    contents = {".md": text, ".csv": table.getvalue()} | ({".tex": as_latex(tables)} if args.latex else {})
    for suffix, content in contents.items():
        with atomic_write(out.with_name(out.name + suffix)) as stream:
            stream.write(content.encode())


if __name__ == "__main__":
    run_cli(main)
