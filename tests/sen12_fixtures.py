"""Small SEN12-FLOOD trees and helpers shared by the tests of that data set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sarwmix.sen12flood.stages import PrepareOptions, Summary, prepare
from sarwmix.synthetic.sen12flood import DemoOptions, generate

# Two training sequences and one of test, 4 frames each (3 dry, 1 flooded): 3 * 1 + 3 = 6 pairs a sequence. The seed
# gives images on both sides of the 25 % of zeros.
SIZE = 64
TINY = DemoOptions(train=2, test=1, frames=4, size=SIZE, seed=3, swath_edges=0.5)


def make_raw(root: Path, options: DemoOptions = TINY) -> Path:
    return generate(root / "raw", options)


def run(raw: Path, base: Path, **options: Any) -> Summary:
    """Prepare ``raw`` in this process into ``base/out`` with ``base/work``."""
    given: dict[str, Any] = {"raw_root": raw, "work": base / "work", "out": base / "out", "size": SIZE, "jobs": 1}
    return prepare(PrepareOptions(**(given | options)))


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder with its checksum; folders with 'folder'."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


def manifest(base: Path) -> dict[str, Any]:
    return json.loads((base / "out" / "manifest.json").read_text())


def problem_kinds(base: Path) -> list[str]:
    return [problem["kind"] for problem in manifest(base)["problems"]]


def edit_s1list(raw: Path, change: Any) -> None:
    """Load S1list.json, let ``change`` modify it, and write it back."""
    path = raw / "S1list.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
