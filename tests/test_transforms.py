"""Batched transforms: resize, flips, weights from dB, standardisation, invalid pixels."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from sarwmix.transforms import SarTransform, apply_flips, draw_flips, resize
from sarwmix.weighting import WeightOptions, compute_weights

MEAN, STD = (-19.2, -12.5), (5.4, 5.0)


def transform(weighting: WeightOptions | None = None, size: int = 128) -> SarTransform:
    limits = ((-30.0, -24.0), (-7.0, -1.0))
    return SarTransform(size=size, mean=MEAN, std=STD, weighting=weighting, linear_range_db=limits)


def patches(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, 120, 120, generator=torch.Generator().manual_seed(1)) * 4 - 15


def test_resize_equals_torchvision() -> None:
    for size in (128, 64):
        reference = v2.functional.resize(patches(), [size, size], antialias=True)
        torch.testing.assert_close(resize(patches(), size), reference, rtol=1e-5, atol=1e-5)


def test_flips() -> None:
    x = patches(4)
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    got = apply_flips(x, flips)
    for i, dims in enumerate([(), (-1,), (-2,), (-2, -1)]):
        assert torch.equal(got[i], x[i].flip(dims) if dims else x[i])
    drawn = draw_flips(4000, torch.Generator().manual_seed(0))
    assert drawn.float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_zscore_and_back() -> None:
    got = transform()(patches())
    db = resize(patches(), 128)
    torch.testing.assert_close(got.images[:, 1], (db[:, 1] + 12.5) / 5.0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(transform().to_db(got.images), db, rtol=1e-4, atol=1e-4)
    assert got.weights is None
    assert got.valid is None
    assert got.num_invalid == 0


def test_weights_come_from_db_before_standardisation() -> None:
    flips = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    got = transform(WeightOptions(level="pixel"))(patches(), flips)
    db = apply_flips(resize(patches(), 128), flips)
    torch.testing.assert_close(got.db, db)
    torch.testing.assert_close(got.weights, compute_weights(db, mode="per_channel"))
    zscore = transform(WeightOptions(level="pixel", domain="zscore"))(patches(), flips)
    torch.testing.assert_close(zscore.weights, compute_weights(zscore.images, mode="per_channel"))
    assert not torch.allclose(zscore.weights, got.weights)
    ranged = transform(WeightOptions(level="pixel", norm="dataset"))(patches(), flips)
    limits = tuple(10 ** (torch.tensor(v) / 10) for v in ((-30.0, -24.0), (-7.0, -1.0)))
    torch.testing.assert_close(ranged.weights, compute_weights(db, mode="per_channel", linear_range=limits))


def test_token_weights_by_default_shape() -> None:
    assert transform(WeightOptions())(patches()).weights.shape == (3, 16, 2)
    assert transform(WeightOptions(mode="none"))(patches()).weights is None


@pytest.mark.parametrize("level", ["token", "pixel"])
@pytest.mark.parametrize("mode", ["none", "per_channel"])
def test_invalid_pixels(level: str, mode: str) -> None:
    x = patches()
    results = []
    for value in (float("nan"), float("inf")):
        x[0, 0, 30:50, 30:50] = value
        results.append(transform(WeightOptions(mode=mode, level=level))(x))
    got = results[0]
    assert torch.equal(got.images, results[1].images)
    assert got.num_invalid == 400
    assert torch.isfinite(got.images).all()
    assert got.valid is not None
    # 20 of 120 px are 21.3 of 128; interpolation widens the hole by at most a pixel on each side
    assert 21**2 <= (~got.valid).sum() <= 24**2
    assert (got.images[~got.valid].abs() < 1e-6).all()  # the band mean is 0 in z-scores
    assert got.weights.shape == x.shape[:2] + (128, 128)  # also at token level: invalid pixels must not count
    assert (got.weights[~got.valid] == 0).all()
    assert (got.weights[got.valid] > 0).all()
    clean = transform(WeightOptions(mode=mode, level=level))(patches())
    torch.testing.assert_close(got.images[1:], clean.images[1:])
