#!/usr/bin/env python3
"""How much does a fine-tuned model bear? Its score against the dose of faults in its images.

    python scripts/stress.py runs/finetune

Extra speckle, a calibration offset, a slope over the incidence angle, border noise, a coarser resolution, a missing
band, swapped bands: one at a time, at several doses, on the test split, each paired with the images as read. Writes
stress.png, stress.csv and stress.json to RUN/stress. Works with every data set in dB. See docs/checks_and_reports.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main_finetune
from util import args as groups
from util.cli import run_cli
from util.errors import UserError
from util.files import atomic_write, make_directory, write_json

if TYPE_CHECKING:
    from sarwmix.finetune.bench import Workbench
    from sarwmix.finetune.stress import Stressed
    from sarwmix.inference.model import Pretrained
    from sarwmix.perturbations import Perturbation


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = groups.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a fine-tuning run (its best epoch), or a checkpoint")
    parser.add_argument("--data_path", default=None, metavar="DIR", help="not given: where the run found its data")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default %(default)s")
    parser.add_argument("--metric", default=None, metavar="NAME", help="not given: the task's main one")
    parser.add_argument("--only", nargs="+", default=None, metavar="FAULT", help="these faults alone")
    parser.add_argument("--limit", type=groups.positive_int, default=None, metavar="N",
                        help="evaluate on N samples, evenly spread over the split")  # fmt: skip
    parser.add_argument("--batch_size", type=groups.positive_int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=groups.seed_number, default=0, help="of the draws; default %(default)s")
    parser.add_argument("--out", default=None, metavar="DIR", help="not given: RUN/stress")
    return parser


def open_run(args: argparse.Namespace, checkpoint: Path) -> tuple[Workbench, Pretrained]:
    """Data and model of a run, as its own evaluation opens them."""
    import numpy as np

    from sarwmix.finetune.bench import open_bench
    from sarwmix.finetune.settings import check_args, settings_of_checkpoint
    from sarwmix.inference.model import choose_device, from_checkpoint
    from util.checkpoint import load_checkpoint
    from util.distributed import Processes

    saved = load_checkpoint(checkpoint, verify=False).get("args")
    if not isinstance(saved, dict) or "protocol" not in saved:
        raise UserError(f"{checkpoint} does not say how it was fine-tuned; give a run of main_finetune.py")
    words = ["--eval", "--resume", str(checkpoint), "--batch_size", str(args.batch_size), "--amp", "off"]
    words += ["--data_path", args.data_path or saved["data_path"], "--num_workers", "0"]
    flags = main_finetune.get_parser().parse_args(words)
    settings_of_checkpoint(flags, {"data_path", "batch_size", "amp"})
    check_args(flags)
    model = from_checkpoint(checkpoint).to(choose_device(args.device))
    bench = open_bench(flags, Processes(device=model.device))
    if bench.task.classes != model.classes or bench.splits["test"].spec.bands != model.bands:
        raise UserError(f"{checkpoint} was trained on other classes or bands than the data has now")
    if args.split not in bench.splits:
        raise UserError(f"the run has no split {args.split}; it has {', '.join(bench.splits)}")
    data = bench.splits[args.split]
    if args.limit is not None and args.limit < len(data):
        data = data.subset(np.unique(np.linspace(0, len(data) - 1, args.limit).astype(np.int64)))
    return replace(bench, splits={args.split: data}), model


def choose(names: list[str] | None, bands: tuple[str, ...]) -> list[Perturbation]:
    """The faults that were asked for."""
    from sarwmix.perturbations import perturbations

    known = {one.name: one for one in perturbations(bands)}
    for name in names or ():
        if name not in known:
            raise UserError(f"--only {name} is no fault of these bands; choose from {', '.join(known)}")
    return [known[name] for name in names or known]


def panels_of(chosen: list[Perturbation], rows: list[Stressed]) -> list[dict[str, Any]]:
    """What the picture wants of each fault."""
    found = []
    for one in chosen:
        own = [row for row in rows if row.perturbation == one.name]
        found.append({
            "name": one.name, "axis": one.axis, "doses": [row.dose for row in own], "none": one.none,
            "scores": [row.score for row in own], "low": [row.low for row in own], "high": [row.high for row in own],
            "labels": one.labels,
        })  # fmt: skip
    return found


def main() -> None:
    """Entry point."""
    args = get_parser().parse_args()
    place = Path(args.run)
    checkpoint = place / "checkpoint_best.pth" if place.is_dir() else place
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist; give the folder of a fine-tuning run, or a checkpoint")

    from sarwmix.figures.stress import stress_figure
    from sarwmix.finetune.stress import stress, table_rows
    from util.log import get_logger, setup_logging

    setup_logging()
    bench, model = open_run(args, checkpoint)
    data = bench.splits[args.split]
    chosen, metric = choose(args.only, model.bands), args.metric or bench.task.primary
    title = f"{data.spec.name}, {len(data):,} samples of {args.split}, {model.settings.name}"
    get_logger().info("%s: %s", checkpoint, title)
    clean, rows = stress(bench, model.model, args.split, chosen, metric=metric, seed=args.seed)
    folder = make_directory(args.out or checkpoint.parent / "stress")
    table = table_rows(clean, rows)
    with atomic_write(folder / "stress.csv", "w") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    what = {"checkpoint": str(checkpoint), "dataset": data.spec.name, "split": args.split, "samples": len(data),
            "metric": metric, "seed": args.seed, "bands": list(model.bands)}  # fmt: skip
    write_json(folder / "stress.json", {**what, "rows": table})
    picture = stress_figure(folder / "stress.png", panels_of(chosen, rows), clean=clean, metric=metric, title=title)
    get_logger().info("%s, stress.csv, stress.json", picture)


if __name__ == "__main__":
    run_cli(main)
