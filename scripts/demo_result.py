#!/usr/bin/env python3
"""Does pretraining help on the demo data? Pretrained against random weights over several seeds, in one table.

    python scripts/demo_result.py --data_path data/demo

Pretrains once for each seed, then runs main_finetune.py once for each start, protocol and seed (what is finished is not
repeated). Prints mean and standard deviation of the test metrics over seeds, and the difference in macro AP with a 95 %
interval over seeds and test sites. The seed decides everything that is random: pretraining, head, order of the samples
and augmentation. With --pretrained all seeds share one pretraining, whose own chance no interval covers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sarwmix.tasks.intervals import difference_of_runs
from util.args import Parser, positive_int
from util.cli import run_cli
from util.errors import UserError
from util.files import make_directory, read_json, read_jsonl, write_json

# The same settings for both starts. The demo has few samples: small batches, so that there are enough steps.
RECIPES: dict[str, list[str]] = {
    "finetune": [
        *("--batch_size", "8", "--epochs", "12", "--warmup_epochs", "1"),
        *("--lr", "1e-3", "--layer_decay", "0.8", "--drop_path", "0"),
    ],
    "linear": ["--batch_size", "64", "--epochs", "30"],
    "knn": [],
}
# As scripts/common.sh pretrains the demo with two processes of 8 samples.
PRETRAIN = ("--batch_size", "16", "--epochs", "36", "--warmup_epochs", "2", "--lr", "2e-3")
METRICS = ("ap_macro", "ap_micro", "f1_macro")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_path", required=True, metavar="DIR", help="demo data (scripts/make_demo_data.py)")
    parser.add_argument("--pretrained", metavar="CKPT", help="start all seeds from this one (not given: pretrain each)")
    parser.add_argument("--output_dir", default="runs/demo_result", metavar="DIR")
    parser.add_argument("--model", default="mixmim_tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocols", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--jobs", type=positive_int, default=2, metavar="N", help="runs at a time, one core each")
    return parser


def run_program(args: argparse.Namespace, program: str, folder: Path, seed: int, words: list[str]) -> None:
    """Run an entry script on the demo data on one core; what it says goes to console.txt."""
    command = [sys.executable, str(ROOT / program), "--dataset", "demo", "--data_path", args.data_path]
    command += ["--model", args.model, "--seed", str(seed), "--num_workers", "0", "--output_dir", str(folder), *words]
    make_directory(folder)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "console.txt", "w", encoding="utf-8") as console:
        done = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=one_core, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with code {done.returncode}; see {folder / 'console.txt'}")


def pretrain(args: argparse.Namespace, seed: int) -> str:
    """The checkpoint that a seed starts from."""
    if args.pretrained:
        return str(args.pretrained)
    folder = Path(args.output_dir) / f"pretrain_{seed}"
    epochs = int(PRETRAIN[PRETRAIN.index("--epochs") + 1])
    log = folder / "log.txt"
    if not log.is_file() or len(read_jsonl(log)) < epochs:
        run_program(args, "main_pretrain.py", folder, seed, [*PRETRAIN, "--resume", "auto"])
        print(f"  done: pretraining, seed {seed}  ({folder})", flush=True)
    return str(folder / "checkpoint.pth")


def run_folder(args: argparse.Namespace, start: str, protocol: str, seed: int) -> Path:
    return Path(args.output_dir) / f"{protocol}_{start}_{seed}"


def run_once(args: argparse.Namespace, start: str, protocol: str, seed: int) -> dict[str, Any]:
    """One run of main_finetune.py; returns its test metrics."""
    folder = run_folder(args, start, protocol, seed)
    if not (folder / "metrics.json").is_file():
        words = ["--protocol", protocol, *RECIPES[protocol]]
        words += ["--finetune", pretrain(args, seed)] if start == "pretrained" else []
        run_program(args, "main_finetune.py", folder, seed, words)
    result = next(iter(read_json(folder / "metrics.json")["results"].values()))
    scalars = result["test"]["scalars"]
    print(f"  done: {protocol}, {start}, seed {seed}: macro AP {scalars['ap_macro']:.4f}  ({folder})", flush=True)
    return scalars


def main() -> None:
    args = get_parser().parse_args()
    if args.pretrained and not Path(args.pretrained).is_file():
        raise UserError(f"checkpoint {args.pretrained} does not exist; make it with main_pretrain.py")
    keys = [(protocol, start) for protocol in args.protocols for start in ("random", "pretrained")]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: pretrain(args, seed), args.seeds))  # once a seed, before runs that share it
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
    differences = {}
    for protocol in args.protocols:
        first, second = (
            [run_folder(args, start, protocol, seed) for seed in args.seeds] for start in ("pretrained", "random")
        )
        one = differences[protocol] = difference_of_runs(first, second, METRICS[0], seeds=(args.seeds, args.seeds))
        print(f"{protocol:10} pretrained - random, macro AP: {one.estimate:+.4f} [{one.low:.4f}, {one.high:.4f}], "
              f"95 % over {one.covers}")  # fmt: skip
    seeds_of = "one pretraining, not varied" if args.pretrained else "pretraining varies with the seed"
    print(f"{seeds_of}; epochs are selected on val")
    write_json(
        Path(args.output_dir) / "demo_result.json",
        {
            "seeds": args.seeds,
            "pretraining": seeds_of,
            "test": {" ".join(key): rows for key, rows in found.items()},
            "differences": {protocol: dataclasses.asdict(one) for protocol, one in differences.items()},
        },
    )


if __name__ == "__main__":
    run_cli(main)
