"""The records of the weighting study, and that the page shows what they give today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import sarwmix.reports.differences
import scripts.weighting_study as study
from util.files import read_json

PAGE = study.ROOT / "docs" / "weighting_study.md"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kept records alone; the figure is not drawn."""
    for path in study.RECORDS.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sarwmix.reports.differences, "draw", lambda *args, **kwargs: None)
    return tmp_path


def test_the_page_shows_what_the_records_give(records: Path) -> None:
    """A change of the intervals has to reach the page: `weighting_study.py --report`, then its table into the page."""
    study.report(records)
    table = (records / "table.md").read_text()
    assert table == (study.RECORDS / "table.md").read_text()
    assert table.strip() in PAGE.read_text()


def test_each_record_is_of_the_study(records: Path) -> None:
    found = [read_json(path) for path in records.glob("*.json")]
    assert {(r["arm"], r["seed"]) for r in found} >= {(arm, seed) for arm in study.ARMS for seed in range(1, 9)}
    assert all(record["flags"] == study.ARMS[record["arm"]] for record in found)
    for record in found:
        of_event = record["ap_of_event"]
        assert len(of_event) == 10
        assert record["ap"] == pytest.approx(sum(of_event.values()) / 10, abs=1e-5)
        assert record["steps"] == (0 if record["arm"] == study.RANDOM else study.STEPS)


def test_a_seed_that_lacks_an_arm_is_left_out(records: Path) -> None:
    (records / "noise-steps250-seed3.json").unlink()
    study.report(records)
    assert "seeds in the table: 1, 2, 4, 5, 6, 7, 8." in (records / "table.md").read_text()
