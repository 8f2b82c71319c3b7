#!/usr/bin/env python
"""List Sentinel-1 scene and acquisition time of every BigEarthNet-S1 patch as CSV, from its _labels_metadata.json."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError
from util.files import atomic_write, parse_json, read_bytes
from util.text import cells

SUFFIX = "_labels_metadata.json"
SHOWN = 5  # patch folders without metadata that are named
COLUMNS = ("s1_name", "scene", "acquisition_time", "s2_name")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(description=(__doc__ or "").strip())
    result.add_argument("--data_path", required=True, metavar="DIR", help="BigEarthNet-S1 folder, of v1 or v2")
    result.add_argument("--out", required=True, metavar="FILE", help="CSV to write: " + ", ".join(COLUMNS))
    result.add_argument(
        "--skip_bad", action="store_true", help="leave patches with a damaged metadata file out, naming them"
    )
    return result


def find_metadata(root: Path, without: list[str]) -> Iterator[Path]:
    """Metadata files of all patches, sorted by name, in patch folders or scene folders with patch folders.

    Args:
        root: BigEarthNet-S1.
        without: Gets the names of patch folders that have no metadata file: with images, or named as patches are.
    """
    for folder, folders, files in os.walk(root):
        folders.sort()
        found = sorted(name for name in files if name.endswith(SUFFIX))
        for name in found:
            yield Path(folder) / name
        patch = Path(folder).name
        has_images = any(name.lower().endswith(".tif") for name in files)
        if not found and not folders and (has_images or patch.startswith(("S1A_", "S1B_"))):
            without.append(patch)


def read_row(path: Path) -> tuple[str, str, str, str]:
    """Name, scene, acquisition time and Sentinel-2 patch of one metadata file.

    Raises:
        UserError: The file is damaged or lacks an entry.
    """
    try:
        content = parse_json(read_bytes(path, 1 << 20))
        scene, time = str(content["scene_source"]), str(content["acquisition_time"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used: {error!r}; expected scene_source and acquisition_time") from error
    return path.name.removesuffix(SUFFIX), scene, time, str(content.get("corresponding_s2_patch", ""))


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    root = Path(args.data_path)
    if not root.is_dir():
        raise UserError(f"data path {root} is no folder; expected BigEarthNet-S1")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = bad = 0
    without: list[str] = []
    for path in find_metadata(root, without):
        try:
            writer.writerow(cells(read_row(path)))
        except UserError as error:
            if not args.skip_bad:
                raise UserError(f"{error} (--skip_bad leaves such patches out)") from error
            print(f"left out: {error}", flush=True)
            bad += 1
            continue
        count += 1
        if count % 50_000 == 0:
            print(f"{count:,} patches", flush=True)
    if not count:
        raise UserError(
            f"{root} holds no usable *{SUFFIX} ({len(without)} patch folders have none, {bad} files are damaged); "
            f"expected <patch>/<patch>{SUFFIX}, as in BigEarthNet-S1 v1"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out, "w") as file:
        file.write(text.getvalue())
    if without:
        shown = ", ".join(without[:SHOWN]) + (f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "")
        print(f"warning: {len(without):,} patch folders have no *{SUFFIX} and are left out: {shown}", flush=True)
    left_out = bad + len(without)
    print(f"{out}: {count:,} patches" + (f", {left_out:,} left out" if left_out else ""))


if __name__ == "__main__":
    run_cli(main)
