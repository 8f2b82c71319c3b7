"""Sine/cosine tables by formula, resizing by properties."""

from __future__ import annotations

import math

import pytest
import torch

from util.errors import UserError
from util.pos_embed import resize_position_table, resize_relative_bias, sincos_table


def test_sincos_by_hand():
    table = sincos_table(8, 3)
    assert table.shape == (1, 9, 8)
    assert table.dtype == torch.float32
    row, column = 2, 1
    omega = [1.0, 1 / 10000**0.5]  # channels/2 = 4 values an axis: 2 frequencies
    expected = [math.sin(column * w) for w in omega] + [math.cos(column * w) for w in omega]
    expected += [math.sin(row * w) for w in omega] + [math.cos(row * w) for w in omega]
    torch.testing.assert_close(table[0, row * 3 + column], torch.tensor(expected), rtol=1e-7, atol=1e-7)


def test_sincos_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_table(6, 2)


def test_resize_keeps_equal_sizes_and_constants():
    table = torch.randn(1, 16, 6)
    assert resize_position_table(table, 16) is not None
    assert torch.equal(resize_position_table(table, 16), table)
    constant = torch.full((225, 4), 1.5)
    torch.testing.assert_close(resize_relative_bias(constant, 49), torch.full((49, 4), 1.5))


def test_resize_is_bicubic_per_channel_row_major():
    table = torch.randn(1, 16, 3)
    expected = torch.nn.functional.interpolate(
        table[0].T.reshape(1, 3, 4, 4), size=(8, 8), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(resize_position_table(table, 64)[0].T.reshape(3, 8, 8), expected[0])


def test_resize_refuses_what_is_not_square():
    with pytest.raises(UserError, match="not a square"):
        resize_relative_bias(torch.zeros(10, 2), 9)
    with pytest.raises(UserError, match="not a square"):
        resize_position_table(torch.zeros(1, 9, 2), 10)
