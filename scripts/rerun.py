#!/usr/bin/env python3
"""Repeat a run from its passport and say whether the numbers agree bit by bit; where not, what differs.

    python scripts/rerun.py runs/finetune
    python scripts/rerun.py runs/finetune -- --seed 1          # the same command with another flag
    python scripts/rerun.py runs/finetune --against runs/other # compare two runs, train nothing

The command, its folder and the number of processes come from passport.json. Exit code 0: bit-equal, 10: not.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.args import Parser
from util.cli import run_cli
from util.errors import EXIT_OK, UserError

EXIT_DIFFERS = 10


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a run of main_pretrain.py or main_finetune.py")
    parser.add_argument("--out", default=None, metavar="DIR", help="a new folder; not given: RUN_rerun")
    parser.add_argument("--against", default=None, metavar="RUN", help="compare with this run instead of repeating")
    parser.add_argument("--dry_run", action="store_true", help="print the command and leave")
    return parser


def repeat(folder: Path, out: Path, extra: list[str], *, dry_run: bool) -> int:
    """Run the command again; its exit code."""
    from sarwmix.reports.rerun import command_of, first_start, read_passport

    passport = first_start(read_passport(folder))
    program, words = command_of(passport, str(out.resolve()), extra)
    command = [sys.executable, str(ROOT / program), *words]
    processes = int(passport["machine"]["processes"])
    if processes > 1:
        if shutil.which("mpirun") is None:
            raise UserError(f"the run had {processes} processes, and there is no mpirun to start as many")
        flags = ["--oversubscribe", "--bind-to", "none"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
        command = ["mpirun", "-np", str(processes), *flags, *command]
    where = Path(passport["command"]["folder"])
    print(f"in {where}: {shlex.join(command)}", flush=True)
    if dry_run:
        return EXIT_OK
    threads = {"OMP_NUM_THREADS": str(passport["machine"]["threads"])}  # sums depend on how they are shared out
    return subprocess.run(command, cwd=where if where.is_dir() else None, env={**os.environ, **threads}).returncode


def main() -> int:
    """Entry point."""
    words = sys.argv[1:]
    extra = words[words.index("--") + 1 :] if "--" in words else []
    args = get_parser().parse_args(words[: words.index("--")] if "--" in words else words)
    folder = Path(args.run)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a run")
    other = Path(args.against) if args.against else Path(args.out or f"{args.run.rstrip('/')}_rerun")
    if args.against is None:
        if other.exists() and any(other.iterdir()):
            raise UserError(f"{other} is not empty; give a new folder with --out, or compare: --against {other}")
        code = repeat(folder, other, extra, dry_run=args.dry_run)
        if args.dry_run:
            return EXIT_OK
        if code:
            raise UserError(f"the command ended with exit code {code}; its own message stands above")
    elif not other.is_dir():
        raise UserError(f"--against {other} is no folder; give the folder of a run")

    from sarwmix.reports.rerun import compare_runs

    found = compare_runs(folder, other)
    print("\n".join(found.lines()))
    return EXIT_OK if found.equal else EXIT_DIFFERS


if __name__ == "__main__":
    run_cli(main)
