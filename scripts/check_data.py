#!/usr/bin/env python
"""Check a data set: lists, files, units, bands, pixels, labels, statistics; with histograms and a contact sheet.

Exit code: 0 nothing wrong (warnings allowed), 10 errors found (with --strict also for warnings), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import TYPE_CHECKING

from sarwmix.data import registry
from sarwmix.data.spec import DECIBEL
from util import args as groups
from util.cli import run_cli
from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.checks.samples import Examination

FOUND = 10
SHEET = 24


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = groups.Parser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        epilog="Exit code: 0 nothing wrong (warnings allowed), 10 errors found (with "
        "--strict warnings too), 2 wrong usage.",
    )
    result.add_argument("--dataset", required=True, choices=registry.names(), help="registered data set")
    result.add_argument("--data_path", required=True, metavar="DIR", help="root of the data, or a packed store")
    result.add_argument("--split", default=None, help="split, or several joined by + (default: all there are)")
    result.add_argument(
        "--sample", type=groups.positive_int, default=None, metavar="N", help="read N random samples instead of all"
    )
    result.add_argument(
        "--seed", type=groups.non_negative_int, default=0, help="seed of the random sample (default %(default)s)"
    )
    result.add_argument(
        "--jobs",
        type=groups.positive_int,
        default=None,
        metavar="N",
        help="reading processes (default: usable processors, one for 1,024 samples at most)",
    )
    result.add_argument(
        "--reference",
        default=None,
        metavar="FILE",
        help="official metadata.parquet: names, labels and splits are compared with it",
    )
    result.add_argument(
        "--out", default=None, metavar="DIR", help="folder for report.json and pictures (default: runs/check_<dataset>)"
    )
    result.add_argument("--strict", action="store_true", help="warnings count as errors in the exit code")
    result.add_argument(
        "--data_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the data set, e.g. unit=linear for s1_scenes; may be repeated",
    )
    return result


def draw(found: Examination, folder: Path, seed: int) -> list[Path]:
    """Histograms, label balance and contact sheet."""
    import numpy as np

    from sarwmix.checks import statistics
    from sarwmix.figures import base as pictures

    dataset, moments = found.dataset, found.moments
    assert dataset is not None
    assert moments is not None
    assert found.facts is not None
    written: list[Path] = []
    heading = f"{dataset.spec.name}, split {dataset.split}: {moments.samples:,} of {len(dataset):,} samples read"
    if moments.samples == 0 or (moments.count == 0).any():
        return written
    # Histograms and the contact sheet have dB axes: Sentinel-2 bands are left to the numbers of the report.
    sar = {band: k for k, band in enumerate(dataset.spec.bands) if dataset.spec.units[k] == DECIBEL}
    if sar:
        per_bin = round(0.25 / statistics.HISTOGRAM_STEP)
        edges = statistics.HISTOGRAM_LOW + 0.25 * np.arange(statistics.BINS // per_bin + 1)
        histogram = moments.histogram.reshape(len(moments.histogram), -1, per_bin).sum(axis=2)[list(sar.values())]
        used = np.flatnonzero(histogram.sum(axis=0) > 1e-5 * histogram.sum())
        part = slice(int(used[0]), int(used[-1]) + 1)
        p01, p99 = moments.percentile(1), moments.percentile(99)
        marks = {
            band: {"mean": float(moments.mean[k]), "mean in use": dataset.statistics.mean[k], "1 %": float(p01[k]),
                   "99 %": float(p99[k])}
            for band, k in sar.items()}  # fmt: skip
        written.append(
            pictures.histogram_figure(
                folder / "histogram.png",
                edges=edges[part.start : part.stop + 1],
                counts={band: histogram[row, part] for row, band in enumerate(sar)},
                marks=marks,
                title=heading,
            )
        )
    maps = bool(found.facts.labelled.shape[1])
    what = "pairs" if registry.get_spec(dataset.spec.name).task == "pair" else "samples"
    if found.classes:
        written.append(
            pictures.bar_figure(
                folder / "labels.png",
                labels=dataset.spec.classes,
                unit="pixels" if maps else what,
                decimals=0,
                values={split: list(counts.values()) for split, counts in found.classes.items()},
                # Pairs are counted, not the images that they share.
                title=f"{dataset.spec.name}: {'pixels' if maps else what} of each class "
                f"({sum(found.counts.values()):,} {'samples' if maps else f'{what} in all'})",
            )
        )
    if not sar:
        return written
    chosen = np.random.default_rng(seed).permutation(found.facts.index)[:SHEET]
    images, captions = [], []
    for index in np.sort(chosen):
        images.append(dataset.read(int(index)))
        labels = "" if dataset.labels is None else ": " + ", ".join(_classes(found, int(index)))
        captions.append(dataset.names[int(index)] + labels)
    written.append(
        pictures.contact_sheet(
            folder / "contact_sheet.png",
            np.stack(images)[:, list(sar.values())],
            bands=list(sar),
            captions=captions,
            title=heading,
        )
    )
    return written


def _classes(found: Examination, index: int) -> list[str]:
    import numpy as np

    assert found.dataset is not None
    assert found.dataset.labels is not None
    row = found.dataset.labels[index]
    numbers = np.flatnonzero(row) if np.ndim(row) else [row]
    return [found.dataset.spec.classes[int(number)] for number in numbers]


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    folder = Path(args.out or f"runs/check_{args.dataset}")
    if args.reference is not None and not Path(args.reference).is_file():
        raise UserError(f"--reference {args.reference} does not exist; expected the official metadata.parquet")
    spec = registry.get_spec(args.dataset)
    splits = registry.parse_split(spec, args.split) if args.split else None
    options = registry.parse_options(args.data_option)
    spec = registry.get_spec(args.dataset, options.get("bands"), options)
    if not Path(args.data_path).exists():
        raise UserError(f"data path {args.data_path} does not exist; give an existing folder or store")

    from sarwmix.checks import samples as data_check
    from util.files import file_set, write_json

    with file_set(folder):  # a folder that cannot be written is found before hours of reading
        pass
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if 10 * done // total > shown:
            shown = 10 * done // total
            print(f"{done:,}/{total:,} samples", flush=True)

    found = data_check.examine(
        args.dataset,
        args.data_path,
        splits=splits,
        sample=args.sample,
        seed=args.seed,
        jobs=args.jobs,
        options=options,
        reference=args.reference,
        progress=progress,
    )
    written: list[Path] = []
    if found.dataset is not None:
        written = draw(found, folder, args.seed)
        print(f"{args.dataset}: " + ", ".join(f"{split} {count:,}" for split, count in found.counts.items()))
        moments = found.moments
        if moments is not None and moments.samples:
            for k, (band, unit) in enumerate(zip(spec.bands, spec.units, strict=True)):
                print(
                    f"{band}: mean {moments.mean[k]:.2f} {unit} (in use {found.dataset.statistics.mean[k]:.2f}), "
                    f"std {moments.std()[k]:.2f} {unit} (in use {found.dataset.statistics.std[k]:.2f}), "
                    f"{moments.invalid[k]:,} invalid pixels"
                )
    for finding in found.findings:
        print(finding.text())
    for text in found.unseen:
        print(f"not looked at: {text}")
    errors = found.errors()
    write_json(folder / "report.json", {
        "dataset": args.dataset,
        "data_path": args.data_path,
        "counts": found.counts,
        "read": 0 if found.moments is None else found.moments.samples,
        "statistics": None if found.moments is None or not found.moments.samples else {
            "bands": list(spec.bands),
            "mean": found.moments.mean.tolist(),
            "std": found.moments.std().tolist(),
            "invalid_pixels": found.moments.invalid.tolist(),
        },
        "classes": found.classes,
        "not_looked_at": found.unseen,
        "findings": [{"kind": one.kind, "topic": one.topic, "message": one.message, "names": list(one.names)}
                     for one in found.findings],
    })  # fmt: skip
    warnings = len(found.findings) - len(errors)
    names = ", ".join(path.name for path in [folder / "report.json", *written])
    print(f"{len(errors)} kind(s) of error, {warnings} kind(s) of warning; {names} in {folder}")
    return FOUND if errors or (args.strict and warnings) else 0


if __name__ == "__main__":
    run_cli(main)
