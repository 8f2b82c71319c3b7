"""scripts/audit.py: versions compared as numbers, bounds and advisories from the repository."""

from __future__ import annotations

import pytest

import scripts.audit as audit
from util.errors import UserError


def test_versions_are_compared_as_numbers() -> None:
    assert audit.version_key("2.10.0+cu130") == (2, 10)
    assert audit.version_key("2.9") < audit.version_key("2.10") == audit.version_key("2.10.0")
    assert audit.version_key("0.1.5.post2022") == (0, 1, 5)
    with pytest.raises(UserError, match="begin with a number"):
        audit.version_key("main")


def test_what_is_old_is_named() -> None:
    rows = [{"package": "numcodecs", "below": "0.16.6", "what": "runs a pickle", "reference": "x"}]
    assert audit.findings({"torch": "2.10"}, rows, {"torch": "2.11.0+cpu", "numcodecs": "0.16.6"}) == []
    old = audit.findings({"torch": "2.10"}, rows, {"torch": "2.9.1", "numcodecs": "0.16.3"})
    assert [text.split(" ")[0] for text in old] == ["torch", "numcodecs"]
    assert "mended in 0.16.6" in old[1]


def test_stated_bounds_have_no_known_hole() -> None:
    bounds = audit.lower_bounds(audit.REQUIREMENTS)
    assert {"torch", "numcodecs", "zarr", "rasterio"} <= set(bounds)
    assert audit.findings({}, audit.read_advisories(audit.ADVISORIES), dict(bounds)) == []
