#!/usr/bin/env python3
"""Run a grid of pretraining and fine-tuning jobs through the entry scripts, and put the results into one table.

    python scripts/ablate.py --out runs/ablation --grid weight_mode=none,per_channel --grid seed=0,1,2 \\
        --pretrain "--dataset demo --data_path data/demo --model mixmim_tiny --epochs 36" \\
        --finetune "--dataset demo --data_path data/demo --model mixmim_tiny --epochs 12"

Named arms are lists of any flags; --reference compares all of them with one, paired over seeds and test clusters:

    python scripts/ablate.py --out runs/arms --grid seed=0,1,2 --reference plain --arm "plain=--weight_mode none" \\
        --arm "dB=--weight_domain db --weight_norm dataset" --arm "scratch=random" --pretrain "..." --finetune "..."

Several checkpoints of each pretraining: --grid checkpoint=checkpoint_16.pth,checkpoint.pth with --save_epochs 16 among
the flags. Several commands side by side, or a job array: each with --share K/N takes every Nth pretraining and what
starts from it; then once --table_only.

Runs that are finished are not repeated, and one that was stopped continues: give the same command again. A flag that
has no value, such as --norm_pix_loss, takes the values on and off. A flag of main_finetune.py alone is finetune.NAME.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sarwmix.reports.ablation import (
    Combination,
    Job,
    as_csv,
    as_latex,
    as_markdown,
    collect,
    differences,
    parse_arms,
    parse_axis,
    plan,
    share_of,
    split_words,
)
from sarwmix.reports.differences import as_markdown as differences_table
from sarwmix.reports.differences import draw
from util.args import Parser
from util.cli import run_cli
from util.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from util.files import atomic_write, make_directory, write_json
from util.locks import FolderLock


def get_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").split("\n\n")
    parser = Parser(
        description=text[0],
        epilog="\n\n".join(text[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V,V",
        help="a flag of main_pretrain.py and its values; finetune.NAME: of main_finetune.py; seed: of both; repeated",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="a named list of flags of main_pretrain.py; NAME=random: no pretraining; repeated, times the grid",
    )
    parser.add_argument(
        "--pretrain", default="", metavar="FLAGS", help="flags of every pretraining; none: no pretraining"
    )
    parser.add_argument("--finetune", required=True, metavar="FLAGS", help="flags of every fine-tuning or probe")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of all runs and of table.md, .csv and .tex")
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help='what starts each job, e.g. "mpirun -np 8 --bind-to none" (default: one process)',
    )
    parser.add_argument("--metric", default=None, metavar="NAME", help="test metric of the table (default: the task's)")
    parser.add_argument(
        "--reference",
        default=None,
        metavar="NAME",
        help="an arm, or AXIS=VALUE: differences.md and .png show all others against it, with intervals",
    )
    parser.add_argument(
        "--share",
        default=None,
        metavar="K/N",
        help="run the Kth of N parts of the grid, beside commands with the others",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and leave")
    parser.add_argument("--table_only", action="store_true", help="make the table from the runs that are finished")
    return parser


def main() -> int:
    args = get_parser().parse_args()
    check_launcher(args.launcher)
    out = Path(args.out)
    axes, arms = [parse_axis(text) for text in args.grid], parse_arms(args.arm)
    if not axes and not arms:
        raise UserError("there is neither --grid nor --arm; name what the runs differ in")
    if args.reference is not None and args.reference not in {*arms, *(f"{a.name}={v}" for a in axes for v in a.values)}:
        raise UserError(f"--reference {args.reference!r} is no arm or AXIS=VALUE of this grid")
    combinations = plan(axes, args.pretrain, args.finetune, out, arms)
    jobs = list({job.folder: job for job in _jobs(share_of(combinations, args.share))}.values())
    unfinished = [job for job in jobs if not job.finished]  # refuses folders with runs of other settings
    todo = [] if args.table_only else unfinished
    if args.dry_run:
        for job in todo:
            print(shlex.join(command(job, args.launcher)))
        return EXIT_OK
    print(f"{len(combinations)} combinations, {len(jobs)} jobs, {len(todo)} to run", flush=True)
    # Parts of a grid share nothing: each run has a lock of its own, too.
    with FolderLock(
        out if args.share is None else out / f"share_{args.share.replace('/', '_of_')}", "running ablations"
    ):
        failed = run(todo, args.launcher)
    if args.share is not None:
        print(f"part {args.share} is done; when all are: the same command with --table_only instead of --share")
        if failed:
            raise _trouble(failed)
        return EXIT_OK
    trouble = _trouble(failed)
    if failed and not any(combination.finetune.finished for combination in combinations):
        raise trouble
    metric, rows = collect(combinations, args.metric)
    table = as_markdown(metric, rows)
    for name, text in (
        ("table.md", table),
        ("table.tex", as_latex(metric, rows)),
        ("table.csv", as_csv(combinations)),
    ):
        with atomic_write(out / name, "w") as stream:
            stream.write(text)
    if args.reference is not None:
        compared = differences(combinations, metric, args.reference)
        table = differences_table(compared, metric, args.reference)
        with atomic_write(out / "differences.md", "w") as stream:
            stream.write(table)
        draw(compared, out / "differences.png", metric=metric, reference=args.reference)
    print(table)
    print(f"table in {out / 'table.md'}, .tex and .csv")
    if failed:
        raise trouble
    return EXIT_OK


def _trouble(failed: list[Job]) -> UserError:
    names = "\n".join(f"  {job.folder}: {job.folder / 'ablation.log'}" for job in failed)
    return UserError(f"{len(failed)} jobs failed, see the end of their logs; the same command tries again:\n{names}")


def _jobs(combinations: list[Combination]) -> list[Job]:
    return [job for c in combinations for job in (c.pretrain, c.finetune) if job is not None]


def check_launcher(text: str) -> None:
    """Refuse a launcher that cannot be started.

    Raises:
        UserError: quotes that do not close, or no such program.
    """
    words = split_words(text, "--launcher")
    if words and shutil.which(words[0]) is None:
        raise UserError(
            f"--launcher {text!r}: there is no program {words[0]}; give one that is installed and on the PATH, such as "
            '"mpirun -np 2", or leave it out'
        )


def command(job: Job, launcher: str) -> list[str]:
    """The command line of a job; one that was stopped continues."""
    return [*shlex.split(launcher), sys.executable, str(ROOT / job.script), *job.flags, "--resume", "auto"]


def run(jobs: list[Job], launcher: str) -> list[Job]:
    """Run jobs one after the other; returns those that failed. A pretraining that failed takes its fine-tunings along.

    Raises:
        SystemExit: a job was stopped on request (its exit code 75), or this script was: nothing else is started.
    """
    failed: list[Job] = []
    for number, job in enumerate(jobs, start=1):
        start = next((Path(b) for a, b in zip(job.flags, job.flags[1:], strict=False) if a == "--finetune"), None)
        if start is not None and any(start.parent == other.folder for other in failed):
            failed.append(job)
            continue
        make_directory(job.folder)
        print(f"[{number}/{len(jobs)}] {job.folder}", flush=True)
        began = time.monotonic()
        with (job.folder / "ablation.log").open("ab") as log:
            process = subprocess.Popen(command(job, launcher), stdout=log, stderr=subprocess.STDOUT)
            previous = signal.signal(signal.SIGTERM, partial(_hand_on, process))
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.terminate()  # it saves and leaves
                process.wait()
                raise
            finally:
                signal.signal(signal.SIGTERM, previous)
        if code == EXIT_PREEMPTED:
            print(f"{job.folder} was stopped and has saved; the same command continues", file=sys.stderr)
            raise SystemExit(EXIT_PREEMPTED)
        if code == EXIT_OK:
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
            if job.script == "main_pretrain.py":
                write_json(job.folder / "ablation_done.json", {"flags": list(job.flags)})
        else:
            failed.append(job)
            print(f"    failed with exit code {code}: {last_line(job.folder / 'ablation.log')}", flush=True)
    return failed


def _hand_on(process: subprocess.Popen[bytes], number: int, frame: FrameType | None) -> None:
    """A request to stop goes to the job, which saves and leaves with code 75; as SIGUSR1, which mpirun hands on."""
    process.send_signal(signal.SIGUSR1)


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing was printed)"


if __name__ == "__main__":
    run_cli(main)
