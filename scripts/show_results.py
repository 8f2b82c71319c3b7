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

from sarwmix.tasks.selection import selected_text
from util.args import Parser
from util.cli import run_cli
from util.errors import UserError
from util.files import read_json

METRICS = ("ap_macro", "ap_micro", "miou", "iou", "acc", "aacc", "f1_macro", "f1_micro", "accuracy", "f1")
FACTS = ("protocol", "initialisation", "dataset", "statistics", "seed")


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a run, flattened to what a line shows.

    Raises:
        UserError: the folder holds no finished run.
    """
    path = folder if folder.suffix == ".json" else folder / "metrics.json"
    if not path.is_file() and (folder / "metrics_eval.json").is_file():
        path = folder / "metrics_eval.json"  # --eval with a folder of its own
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run is not finished, or it is no run of main_finetune.py")
    content = read_json(path)
    try:
        result = next(iter(content["results"].values()))
        row = {name: content.get(name, "-") for name in FACTS}
        row["train"] = content.get("samples", {}).get("train", "-")
        row["selected_on"] = selected_text(content, epoch=True)
        return {"run": folder.name, **row, **result.get("test", {}).get("scalars", {})}
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path} is not the metrics.json of a fine-tuning run: it holds no results; give output folders of "
            "main_finetune.py"
        ) from error


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text; metrics that no run has are left out."""
    columns = ["run", *FACTS, "train", "selected_on", *[name for name in METRICS if any(name in row for row in rows)]]
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
    print(table([read_run(folder) for folder in parser.parse_args().runs]))


if __name__ == "__main__":
    run_cli(main)
