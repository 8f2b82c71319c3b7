#!/usr/bin/env python
"""Compare installed packages with the stated lower bounds and with known advisories; asks nobody over the network."""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError
from util.text import read_text

ADVISORIES = ROOT / "sarwmix" / "tables" / "advisories.csv"
REQUIREMENTS = ROOT / "requirements.txt"


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    return Parser(description=__doc__)


def version_key(text: str) -> tuple[int, ...]:
    """Numbers of a version, for comparison: `2.10.0+cu130` -> (2, 10); what follows the numbers does not count.

    Raises:
        UserError: it does not begin with a number.
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    if found is None:
        raise UserError(f"version {text!r} does not begin with a number")
    numbers = [int(part) for part in found[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def lower_bounds(path: Path) -> dict[str, str]:
    """Package -> least version, from a list of requirements."""
    found = {}
    for line in read_text(path).splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][^\s,;#]*)", line)
        if match:
            found[match[1].lower()] = match[2]
    return found


def read_advisories(path: Path) -> list[dict[str, str]]:
    """Rows package, below, what, reference.

    Raises:
        UserError: a column is missing.
    """
    with io.StringIO(read_text(path), newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or set(rows[0]) != {"package", "below", "what", "reference"}:
        raise UserError(f"{path} must have the columns package, below, what and reference")
    return rows


def installed(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def findings(bounds: dict[str, str], advisories: list[dict[str, str]], versions: dict[str, str | None]) -> list[str]:
    """What is wrong with some versions, in words."""
    found = []
    for name, least in bounds.items():
        version = versions.get(name)
        if version is not None and version_key(version) < version_key(least):
            found.append(f"{name} {version} is older than {least}, which requirements.txt states: update it")
    for row in advisories:
        version = versions.get(row["package"])
        if version is not None and version_key(version) < version_key(row["below"]):
            found.append(
                f"{row['package']} {version}: {row['what']} ({row['reference']}); mended in {row['below']}: update it"
            )
    return found


def main() -> int:
    """Entry point."""
    parser().parse_args()
    bounds, advisories = lower_bounds(REQUIREMENTS), read_advisories(ADVISORIES)
    names = sorted({*bounds, *(row["package"] for row in advisories)})
    versions = {name: installed(name) for name in names}
    for name in names:
        print(f"{name:16} {versions[name] or 'not installed'}")
    found = findings(bounds, advisories, versions)
    if found:
        raise UserError("; ".join(found))
    print(f"nothing known against these versions ({len(advisories)} advisories, {len(bounds)} lower bounds)")
    return 0


if __name__ == "__main__":
    run_cli(main)
