#!/usr/bin/env python
"""Compute mean, standard deviation and percentiles of a data set, for `--statistics FILE.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sarwmix.data import registry
from util.args import Parser
from util.cli import run_cli
from util.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description="Mean, standard deviation, 1 % and 99 % percentile of each band over all valid pixels, in dB. "
        "One pass, constant memory; invalid pixels are left out and counted."
    )
    result.add_argument("--dataset", required=True, choices=registry.names(), help="registered data set")
    result.add_argument("--data_path", required=True, metavar="DIR", help="root of the data, or a packed store")
    result.add_argument(
        "--split", default=None, help="split, or several joined by + (default: what pretraining sees, all but test)"
    )
    result.add_argument("--sample", type=int, default=None, metavar="N", help="read N random samples instead of all")
    result.add_argument("--seed", type=int, default=0, help="seed of the random sample (default %(default)s)")
    result.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="reading processes (default: usable processors, one for 1,024 samples at most)",
    )
    result.add_argument("--out", required=True, metavar="FILE.json", help="file to write")
    result.add_argument(
        "--data_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the data set, e.g. unit=linear for s1_scenes; may be repeated",
    )
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    out = Path(args.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: expected a name that ends with .json")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it first")

    from sarwmix.checks import statistics
    from util.files import write_json

    options = registry.parse_options(args.data_option)
    spec = registry.get_spec(args.dataset, options.get("bands"), options, args.data_path)
    wanted = args.split or ("train" if spec.task in ("unlabelled", "pair") else "train+val")
    dataset = registry.build_dataset(args.dataset, args.data_path, wanted, **options).single_images()
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if 10 * done // total > shown:
            shown = 10 * done // total
            print(f"{done}/{total} samples", flush=True)

    moments = statistics.compute_moments(dataset, sample=args.sample, seed=args.seed, jobs=args.jobs, progress=progress)
    content = statistics.report(dataset, moments, drawn=args.sample is not None and args.sample < len(dataset))
    write_json(out, content)
    for number, (band, unit) in enumerate(zip(content["bands"], dataset.spec.units, strict=True)):
        print(
            f"{band}: mean {content['mean'][number]:.4f} {unit}, std {content['std'][number]:.4f} {unit}, "
            f"1 % {content['p01'][number]:.2f} {unit}, 99 % {content['p99'][number]:.2f} {unit}, "
            f"{content['invalid_pixels'][number]} invalid pixels"
        )
    for line in content["unreadable"][:10]:
        print(f"unreadable, left out: {line}")
    if len(content["unreadable"]) > 10:
        print(f"... and {len(content['unreadable']) - 10} more, listed in {out}")
    print(f"written to {out}; use it with --statistics {out}")


if __name__ == "__main__":
    run_cli(main)
