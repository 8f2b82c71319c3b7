"""Calibration: a temperature that is known is found, the error is that of a hand count, and predictions use it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sarwmix.inference.export import export_model
from sarwmix.inference.model import from_checkpoint, from_pretrained
from sarwmix.tasks.calibration import at_temperature, calibrate, expected_calibration_error, fit_temperature
from tests.prediction_fixtures import write_finetuned
from tests.test_pretrained import images


def test_error_by_hand() -> None:
    # two bins of ten: .95 and .92 in the last (one of two right), .15 in the second (wrong): (|1.87 - 1| + .15) / 3
    scores, target = np.array([[0.95, 0.92, 0.15]]), np.array([[1, 0, 0]])
    assert expected_calibration_error(scores, target, exclusive=False, bins=10) == pytest.approx((0.87 + 0.15) / 3)
    # exclusive: confidences .6 (right) and .7 (wrong), in bins of their own: (.4 + .7) / 2
    scores, target = np.array([[0.6, 0.4], [0.3, 0.7]]), np.array([0, 0])
    assert expected_calibration_error(scores, target, exclusive=True, bins=10) == pytest.approx((0.4 + 0.7) / 2)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([[1, 0]]), exclusive=False) == 0


def test_probabilities_at_a_temperature() -> None:
    logits = np.array([[2.0, -1.0, 0.5]])
    sigmoid = 1 / (1 + np.exp(-logits))
    assert np.allclose(at_temperature(sigmoid, 2.0, exclusive=False), 1 / (1 + np.exp(-logits / 2)))
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert np.allclose(at_temperature(softmax, 2.0, exclusive=True), np.exp(logits / 2) / np.exp(logits / 2).sum())
    assert np.isfinite(at_temperature(np.array([[0.0, 1.0]]), 0.1, exclusive=False)).all()


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_known_temperature_is_found(exclusive: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20000, 3))
    if exclusive:
        truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        target = (truth.cumsum(1) < rng.random((20000, 1))).sum(1).clip(max=2)
    else:
        truth = 1 / (1 + np.exp(-logits))
        target = (rng.random(truth.shape) < truth).astype(np.uint8)
    sharp = at_temperature(truth, 1 / 2.5, exclusive=exclusive)  # too sure by 2.5
    assert fit_temperature(sharp, target, exclusive=exclusive) == pytest.approx(2.5, rel=0.05)
    half = [{"scores": sharp[part], "target": target[part]} for part in (np.s_[:10000], np.s_[10000:])]
    found = calibrate(half[0], half[1], "val", exclusive=exclusive)["expected_calibration_error"]
    assert found["test"]["after"] < 0.02 < 0.08 < found["test"]["before"]


def test_predictions_use_the_temperature_of_their_run(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "checkpoint_best.pth")
    before = from_checkpoint(path)
    assert before.temperature == 1
    entry = {"epoch": 3, "calibration": {"temperature": 2.0}}
    (tmp_path / "metrics.json").write_text(json.dumps({"results": {"checkpoint_best.pth": entry}}))
    after = from_checkpoint(path)
    assert after.temperature == 2
    expected = torch.sigmoid(before.logits(images()).double() / 2)
    assert torch.allclose(after.scores(images()), expected)
    assert torch.equal(after.logits(images()), before.logits(images()))
    folder = export_model(path, tmp_path / "out", program=False)
    assert torch.equal(from_pretrained(folder).scores(images()), after.scores(images()))
    assert "Probabilities are calibrated" in (folder / "README.md").read_text()
    entry["epoch"] = 4  # the file has been written again since
    (tmp_path / "metrics.json").write_text(json.dumps({"results": {"checkpoint_best.pth": entry}}))
    assert from_checkpoint(path).temperature == 1
