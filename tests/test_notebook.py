"""The notebook's cells run, and the API page is what the code says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import api_page
from tests.conftest import ROOT, clean_environment


def code_cells(path: Path) -> list[str]:
    """Sources of the notebook's code cells, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    """In one process, from another folder; Jupyter itself adds nothing that is tested here."""
    program = "\n\n".join(code_cells(ROOT / "notebooks" / "first_look.ipynb")).replace(
        "Path.cwd()", f"Path({str(ROOT)!r})"
    )
    (tmp_path / "cells.py").write_text("import matplotlib\nmatplotlib.use('Agg')\n" + program)
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment({}),
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hidden cells of 16" in done.stdout
    assert (tmp_path / "first_look" / "weights.png").is_file()


def test_notebook_is_kept_without_outputs() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), path


def test_api_page_is_current_and_says_something_about_every_name() -> None:
    text = api_page.page()
    assert api_page.PAGE.read_text(encoding="utf-8") == text, "run python scripts/api_page.py"
    assert "```text\n\n```" not in text
    assert "object at 0x" not in text
