"""Operations of a forward pass, by hand and against the published size."""

from __future__ import annotations

import pytest
import torch

from models_mixmim import MixMIM, model_config
from util import linear
from util.flops import count_flops


def test_a_layer_by_hand():
    model = torch.nn.Sequential(linear.Linear(8, 16), torch.nn.Linear(16, 4))
    total, table = count_flops(model, lambda: model(torch.zeros(3, 8)), samples=3)
    assert total == 2 * (8 * 16 + 16 * 4)
    assert [line.split()[0] for line in table.splitlines()] == ["0", "1"]
    assert "66.7 %" in table
    assert linear._WANTED
    assert model.training


def test_pretraining_at_base_size():
    """The forward pass of mixmim_base at 128 px costs 11.8 GFLOP, of which the loss needs some less."""
    model = MixMIM(**model_config("mixmim_base"))
    total, table = count_flops(model, lambda: model(torch.zeros(2, 2, 128, 128)), samples=2)
    assert total == pytest.approx(11.7e9, rel=0.02)
    rows = [line.split()[0] for line in table.splitlines()]
    assert {"patch_embed", "layers.0.blocks", "layers.2.blocks", "decoder_blocks"} <= set(rows)
