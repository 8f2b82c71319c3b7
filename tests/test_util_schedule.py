"""The schedule equals the published one exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from util.errors import UserError
from util.schedule import check_schedule, effective_batch, learning_rate, scaled_lr, set_learning_rate

CURVES = json.loads((Path(__file__).parent / "parity" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("name", sorted(CURVES))
def test_recorded_curves_exactly(name):
    lr, min_lr, warmup, epochs = (float(part) for part in name.split("_"))
    for epoch, expected in CURVES[name]:
        assert learning_rate(epoch, lr=lr, min_lr=min_lr, warmup_epochs=warmup, epochs=epochs) == expected


def test_ends():
    plan = {"lr": 1.0, "min_lr": 0.25, "warmup_epochs": 2, "epochs": 4}
    assert learning_rate(0, **plan) == 0
    assert learning_rate(1, **plan) == 0.5
    assert learning_rate(2, **plan) == 1.0
    assert learning_rate(3, **plan) == pytest.approx(0.625)
    assert learning_rate(4, **plan) == 0.25
    assert learning_rate(9, **plan) == 0.25
    assert learning_rate(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=1) == 1.0
    assert learning_rate(3, lr=1.0, min_lr=0.1, warmup_epochs=3, epochs=3) == 0.1


def test_published_recipe_rate():
    # 256 per GPU x 1 accumulated x 8 GPUs = 2048; 1.5e-4 * 2048 / 256 = 1.2e-3
    assert effective_batch(256, 1, 8) == 2048
    assert scaled_lr(1.5e-4, 2048) == pytest.approx(1.2e-3, rel=1e-12)


def test_groups_keep_their_scale():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr_scale": 0.5}, {"params": parameters[1:]}], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"warmup_epochs": 11}, {"lr": 0.0}, {"lr": float("nan")}, {"min_lr": 2.0}, {"min_lr": -1.0}],
)
def test_nonsense_is_refused(wrong):
    good = {"lr": 1.0, "min_lr": 0.0, "warmup_epochs": 1, "epochs": 10}
    check_schedule(**good)
    with pytest.raises(UserError):
        check_schedule(**{**good, **wrong})
