"""scripts/weight_report.py: weights by class on tiles whose water is dark, columns without labels, refusals."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sarwmix.transforms import SarTransform
from sarwmix.weighting import WeightOptions
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("weight_report", ROOT / "scripts" / "weight_report.py")
assert spec is not None
assert spec.loader is not None
weight_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weight_report)


def transform(**options: object) -> SarTransform:
    weighting = WeightOptions(**options)  # type: ignore[arg-type]
    return SarTransform(size=128, mean=(-15, -15), std=(5, 5), weighting=weighting, range_db=((-25, -25), (-5, -5)))


def test_weights_of_water_by_hand() -> None:
    # water at -25 dB (x = 0), land at -5 dB (x = 1): w = e and 1 with dB over that range
    images = torch.full((2, 2, 128, 128), -5.0)
    labels = np.zeros((2, 128, 128), np.uint8)
    images[:, :, :32], labels[:, :32] = -25.0, 1
    images[1, :, 100, 100] = float("nan")
    found = {"plain": transform(mode="none"), "dB": transform(domain="db", norm="dataset")}
    line = weight_report.table(images, labels, ["land", "water"], found)[-1]
    assert line.startswith("| dB | 2.718, +1.00 |")
    # four of sixteen cells: mean (4 e + 12) / 16, deviation (e - 1) sqrt(3) / 4
    assert "52.0 %" in line
    assert "| 0 (averaged) |" in line


def test_demo_has_no_classes(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "demo", "--data_path", str(demo_root), "--tiles", "8", "--out", str(tmp_path / "out")]
    weights = ["--weights", "--weight_clip 5", "--weights", "--weight_level pixel"]
    monkeypatch.setattr(sys, "argv", ["weight_report.py", *flags, *weights])
    weight_report.main()
    text = (tmp_path / "out" / "weights.md").read_text()
    assert "| weighting | between cells | within cells | gradient cosine |" in text
    rows = re.findall(r"^\| --weight.* \| (.*) \| ([0-9.]+) \|$", text, flags=re.M)
    assert len(rows) == 2
    assert all(0.5 < float(cosine) <= 1.0 for _, cosine in rows)
    assert (tmp_path / "out" / "weights.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["weight_report.py", *flags, "--weights", "--weight_range p01-median"])
    with pytest.raises(UserError, match="needs --weight_norm dataset"):
        weight_report.main()
