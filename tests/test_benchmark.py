"""The measurements of whole loops: run with a tiny model, so that they work where there is a GPU to measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sarwmix.data.packed import pack
from sarwmix.data.registry import build_dataset
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_training

    monkeypatch.setattr(benchmark_training, "WARM_UP", 1)
    monkeypatch.setattr(benchmark_training, "TIMED", 2)
    yield benchmark_training
    sys.modules.pop("benchmark_training", None)


def test_pretraining_from_a_store_and_from_memory(measure, demo_root: Path, tmp_path: Path) -> None:
    pack([build_dataset("demo", demo_root, split) for split in ("train", "val", "test")], tmp_path / "packed")
    data = build_dataset("demo", tmp_path / "packed", "train+val")
    options = {"batch": 4, "device": CPU, "compiled": False, "folder": tmp_path}
    found = [measure.pretraining_rate("mixmim_tiny", data, cache=cache, **options) for cache in ("none", "device")]
    assert found[0]["train_loss"] == found[1]["train_loss"]  # the same samples in the same order
    for row in found:
        assert row["images_per_s"] > 0
        assert 0 <= row["data_wait"] < 1
        assert row["gflop"] == pytest.approx(0.716, abs=0.001)  # 3 x 0.239 of a forward pass


def test_pairs_are_trained_and_evaluated_both_ways(measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = measure.make_pairs(tmp_path, sequences=1, frames=4, size=128)
    assert (
        measure.pair_rate("mixmim_tiny", pairs, batch=2, device=CPU, compiled=False, folder=tmp_path)["pairs_per_s"] > 0
    )
    row = measure.pair_evaluation("mixmim_tiny", pairs, batch=4, device=CPU, rounds=1)
    assert row["times"] == pytest.approx(row["textbook"] / row["ours"])
    assert f"evaluation of {len(pairs)} pairs of " in capsys.readouterr().out
