#!/usr/bin/env python3
"""Results of finished fine-tuning runs side by side.

    python scripts/show_results.py runs/quickstart/finetune_pretrained runs/quickstart/finetune_random

One line a run: protocol, start, data set, statistics, seed, training samples, what chose the epoch, and the test
metrics of the run's main result (checkpoint_best.pth where epochs were selected).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sarwmix.reports.run import read_run
from sarwmix.tasks.selection import selected_text
from util.args import Parser
from util.cli import run_cli

METRICS = ("ap_macro", "ap_micro", "miou", "iou", "acc", "aacc", "f1_macro", "f1_micro", "accuracy", "f1")
FACTS = ("protocol", "initialisation", "dataset", "statistics", "seed")


def describe(folder: Path) -> dict[str, Any]:
    """A finished run, flattened to what a line shows."""
    run = read_run(folder)
    row = {name: run.metrics.get(name, "-") for name in FACTS}
    row["train"] = run.metrics.get("samples", {}).get("train", "-")
    row["selected_on"] = selected_text(run.metrics, epoch=True)
    row["tested_on"] = run.tested or "-"
    return {"run": folder.name, **row, **run.scalars}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text; metrics that no run has are left out."""
    columns = [
        "run",
        *FACTS,
        "train",
        "selected_on",
        "tested_on",
        *[name for name in METRICS if any(name in row for row in rows)],
    ]
    cells = [columns]
    for row in rows:
        values = [row.get(name, "-") for name in columns]
        cells.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="output folders of main_finetune.py")
    print(table([describe(folder) for folder in parser.parse_args().runs]))


if __name__ == "__main__":
    run_cli(main)
