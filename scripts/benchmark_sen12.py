#!/usr/bin/env python3
"""Time and bytes of the SEN12-FLOOD preparation against a straightforward implementation, in one interleaved run.

Each measurement is a fresh process on the same generated tree; the order alternates (straightforward, npy, store, then
backwards), and the figure is the median of the ratios within a round. Processor time is given, too: it is what counts
on a machine that others use at the same time. --durable adds a sync of the file system to every measurement, so that
bytes still on their way to the disk count. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("straightforward", "npy", "store")


def run_variant(variant: str, raw: Path, folder: Path, size: int, jobs: int, durable: bool) -> tuple[float, float]:
    """Wall-clock and processor seconds of one variant in a fresh process; its result stays in folder/out."""
    work, out = folder / "work", folder / "out"
    if variant == "straightforward":
        code = (
            "import sys; from pathlib import Path; from sarwmix.sen12flood.baseline import prepare_straightforward; "
            "prepare_straightforward(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), size=int(sys.argv[4]))"
        )
        command = [sys.executable, "-c", code, str(raw), str(work), str(out), str(size)]
    else:
        command = [sys.executable, "-m", "sarwmix.sen12flood.prepare", "--raw-root", str(raw), "--work", str(work)]
        command += ["--out", str(out), "--layout", variant, "--size", str(size), "--jobs", str(jobs)]
    if durable:
        os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if durable:
        os.sync()
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise UserError(f"{variant} ended with {done.returncode}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pixel_bytes(out: Path) -> int:
    """Bytes of all files of a result."""
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def compare(reference: Path, npy: Path, store: Path) -> int:
    """Number of pairs, after checking that all three results hold the same values.

    Raises:
        UserError: They differ; times would mean nothing.
    """
    import numpy as np

    from sarwmix.sen12flood.layout import read_pairs

    images = np.load(store / "images.npy", mmap_mode="r")
    wanted = {f"{file.parent.name}/{file.name}": file for file in reference.rglob("*.npy")}
    pairs = read_pairs(store)
    if {f"{p.split}/{p.name}.npy" for p in pairs} != set(wanted) or len(list(npy.rglob("*.npy"))) != len(wanted):
        raise UserError("the results hold different pairs")
    for pair in pairs:
        file = f"{pair.split}/{pair.name}.npy"
        expected = np.load(wanted[file])
        same = np.array_equal(np.load(npy / file), expected)
        if not same or not np.array_equal(np.stack([images[pair.row1], images[pair.row2]]), expected):
            raise UserError(f"{file} differs")
    return len(pairs)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for scratch files (a RAM disk measures the processor alone)")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--frames", type=int, default=14, help="per sequence; default: 14, the mean of the real data")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--durable", action="store_true", help="time until everything is on the disk")
    args = parser.parse_args()
    from sarwmix.synthetic.sen12flood import DemoOptions, generate

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        test = max(1, args.sequences // 4)
        raw = generate(scratch / "raw", DemoOptions(args.sequences - test, test, args.frames, args.size))
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        processor: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        sizes: dict[str, int] = {}
        pairs = 0
        for number in range(args.rounds):
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                folder = scratch / variant
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                wall, used = run_variant(variant, raw, folder, args.size, args.jobs, args.durable)
                seconds[variant].append(wall)
                processor[variant].append(used)
            if number == 0:
                outs = [scratch / variant / "out" for variant in VARIANTS]
                pairs = compare(*outs)
                sizes = {variant: pixel_bytes(out) for variant, out in zip(VARIANTS, outs, strict=True)}
                sizes["straightforward with intermediate files"] = pixel_bytes(scratch / "straightforward")

        def ratios(times: dict[str, list[float]]) -> dict[str, float]:
            base = times["straightforward"]
            return {
                variant: round(statistics.median(a / b for a, b in zip(times[variant], base, strict=True)), 4)
                for variant in VARIANTS[1:]
            }

        result = {
            "sequences": args.sequences,
            "frames": args.frames,
            "size": args.size,
            "jobs": args.jobs,
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "durable": args.durable,
            "pairs": pairs,
            "same_values": True,
            "seconds": {variant: [round(value, 3) for value in values] for variant, values in seconds.items()},
            "processor_seconds": {variant: [round(v, 3) for v in values] for variant, values in processor.items()},
            "time_ratio": ratios(seconds),
            "processor_time_ratio": ratios(processor),
            "load": os.getloadavg()[0],
            "bytes": sizes,
            "bytes_written_ratio": {
                variant: round(sizes[variant] / sizes["straightforward with intermediate files"], 4)
                for variant in VARIANTS[1:]
            },
            "store_to_npy_bytes": round(sizes["store"] / sizes["npy"], 4),
        }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_cli(main)
