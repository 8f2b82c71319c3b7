"""The measurements of whole loops: run with a tiny model, so that they work where there is a GPU to measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_training

    yield benchmark_training
    sys.modules.pop("benchmark_training", None)


def test_pairs_are_evaluated_both_ways(measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = measure.make_pairs(tmp_path, sequences=1, frames=4, size=128)
    row = measure.pair_evaluation("mixmim_tiny", pairs, batch=4, device=CPU, rounds=1)
    assert row["times"] == pytest.approx(row["textbook"] / row["ours"])
    assert f"evaluation of {len(pairs)} pairs of " in capsys.readouterr().out


def test_the_gpu_part_runs_sections_that_exist(measure, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_check

    assert set(measure.GPU_SECTIONS) <= set(gpu_check.SECTIONS)
    if not torch.cuda.is_available():
        assert measure.part_gpu("mixmim_base", 256, 600) == []
        assert "no CUDA device here" in capsys.readouterr().out
