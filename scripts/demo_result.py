#!/usr/bin/env python3
"""Does pretraining help on the demo data? Pretrained against random weights over several seeds, in one table.

    python scripts/demo_result.py --data_path data/demo --pretrained runs/quickstart/pretrain/checkpoint.pth

Runs main_finetune.py once for each start, protocol and seed (runs that are finished are not repeated) and prints mean
and standard deviation of the test metrics. The seed decides head, order of the samples and augmentation, and the whole
model where it starts from random weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.args import Parser, positive_int
from util.cli import run_cli
from util.errors import UserError
from util.files import make_directory, read_json, write_json

# The same settings for both starts. The demo has few samples: small batches, so that there are enough steps.
RECIPES: dict[str, list[str]] = {
    "finetune": [
        *("--batch_size", "8", "--epochs", "12", "--warmup_epochs", "1"),
        *("--lr", "1e-3", "--layer_decay", "0.8", "--drop_path", "0"),
    ],
    "linear": ["--batch_size", "64", "--epochs", "30"],
    "knn": [],
}
METRICS = ("ap_macro", "ap_micro", "f1_macro")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_path", required=True, metavar="DIR", help="demo data (scripts/make_demo_data.py)")
    parser.add_argument("--pretrained", required=True, metavar="CKPT", help="checkpoint of main_pretrain.py")
    parser.add_argument("--output_dir", default="runs/demo_result", metavar="DIR")
    parser.add_argument("--model", default="mixmim_tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocols", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--jobs", type=positive_int, default=2, metavar="N", help="runs at a time, one core each")
    return parser


def run_once(args: argparse.Namespace, start: str, protocol: str, seed: int) -> dict[str, Any]:
    """One run of main_finetune.py; returns its test metrics."""
    folder = Path(args.output_dir) / f"{protocol}_{start}_{seed}"
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, str(ROOT / "main_finetune.py"), "--dataset", "demo", "--data_path", args.data_path]
        command += ["--model", args.model, "--protocol", protocol, "--seed", str(seed), "--num_workers", "0"]
        command += ["--output_dir", str(folder), *RECIPES[protocol]]
        command += ["--finetune", args.pretrained] if start == "pretrained" else []
        make_directory(folder)
        one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(folder / "console.txt", "w", encoding="utf-8") as console:
            done = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=one_core, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)} ended with code {done.returncode}; see {folder / 'console.txt'}")
    result = next(iter(read_json(folder / "metrics.json")["results"].values()))
    scalars = result["test"]["scalars"]
    print(f"  done: {protocol}, {start}, seed {seed}: macro AP {scalars['ap_macro']:.4f}  ({folder})", flush=True)
    return scalars


def main() -> None:
    args = get_parser().parse_args()
    if not Path(args.pretrained).is_file():
        raise UserError(f"checkpoint {args.pretrained} does not exist; make it with main_pretrain.py")
    keys = [(protocol, start) for protocol in args.protocols for start in ("random", "pretrained")]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {key: [pool.submit(run_once, args, key[1], key[0], seed) for seed in args.seeds] for key in keys}
        found = {key: [run.result() for run in started] for key, started in runs.items()}
    print(f"{'protocol':10} {'start':11} {'seeds':>5}  " + "  ".join(f"{name:>16}" for name in METRICS))
    for (protocol, start), rows in found.items():
        cells = []
        for name in METRICS:
            values = [row[name] for row in rows]
            spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"{protocol:10} {start:11} {len(rows):5}  " + "  ".join(f"{cell:>16}" for cell in cells))
    write_json(
        Path(args.output_dir) / "demo_result.json",
        {"seeds": args.seeds, "test": {" ".join(key): rows for key, rows in found.items()}},
    )


if __name__ == "__main__":
    run_cli(main)
