"""Loss weights: published maps, and each row of the contract's table by hand or in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import PARITY

from sarwmix.weighting import WeightOptions, compute_weights, permute_cells, spread_to_pixels
from util.errors import UserError

# One 2 x 2 image, bands VH and VV, in dB: linear power 0.1, 1, 10, 100 and 0.01, 0.1, 1, 10.
DB = torch.tensor([[[[-10.0, 0.0], [10.0, 20.0]], [[-20.0, -10.0], [0.0, 10.0]]]])


def w(x: float, scale: float = 1.0) -> float:
    return math.exp(scale * (1 - x))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_published_maps(scale: float) -> None:
    recorded = np.load(PARITY / "weighting.npz")
    db = torch.from_numpy(recorded["db"])
    for mode, key in (("per_channel", "per_channel"), ("shared_intensity", "shared_avg")):
        ours = compute_weights(db, mode=mode, exp_scale=scale).numpy()
        np.testing.assert_allclose(ours, recorded[f"{key}_{scale}"], rtol=1e-6)


def test_per_channel_by_hand() -> None:
    # x = (p - 0.1) / (100 - 0.1 + 1e-6) for VH; (p - 0.01) / (10 - 0.01 + 1e-6) for VV
    vh = [w((p - 0.1) / 99.900001) for p in (0.1, 1, 10, 100)]
    vv = [w((p - 0.01) / 9.990001) for p in (0.01, 0.1, 1, 10)]
    got = compute_weights(DB, mode="per_channel")
    assert got.shape == DB.shape
    assert got[0, 0].flatten().tolist() == pytest.approx(vh, rel=1e-5)
    assert got[0, 1].flatten().tolist() == pytest.approx(vv, rel=1e-5)
    assert got.max().item() == pytest.approx(math.e)
    assert got.min().item() == pytest.approx(1.0, rel=1e-5)
    scaled = compute_weights(DB, mode="per_channel", exp_scale=2.0)
    torch.testing.assert_close(scaled, got**2)


def test_shared_avg_is_mean_of_weights() -> None:
    each = compute_weights(DB, mode="per_channel")
    got = compute_weights(DB, mode="shared_avg")
    torch.testing.assert_close(got, each.mean(1, keepdim=True).expand_as(DB))


def test_shared_intensity_averages_power_first() -> None:
    power = [(a + b) / 2 for a, b in zip((0.1, 1, 10, 100), (0.01, 0.1, 1, 10), strict=True)]
    low, high = min(power), max(power)
    expected = [w((p - low) / (high - low + 1e-6)) for p in power]
    got = compute_weights(DB, mode="shared_intensity")
    assert got[0, 0].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(got[0, 0], got[0, 1])


def test_none_is_one() -> None:
    assert torch.equal(compute_weights(DB, mode="none"), torch.ones_like(DB))


def test_token_level_averages_cells() -> None:
    db = torch.randn(3, 2, 64, 96) * 5 - 15
    pixels = compute_weights(db, mode="per_channel", level="pixel")
    tokens = compute_weights(db, mode="per_channel", level="token")
    assert tokens.shape == (3, 6, 2)
    torch.testing.assert_close(tokens[1, 4, 0], pixels[1, 0, 32:, 32:64].mean())  # cell 4 of 2 x 3: row 1, column 1
    spread = spread_to_pixels(tokens, torch.ones(db.shape, dtype=torch.bool))
    torch.testing.assert_close(spread[1, 0, 40, 50], tokens[1, 4, 0])
    torch.testing.assert_close(spread.mean((0, 2, 3)), pixels.mean((0, 2, 3)))
    with pytest.raises(ValueError, match="multiples of 32"):
        compute_weights(DB, mode="none", level="token")


def test_clip_by_numpy_percentiles() -> None:
    rng = np.random.default_rng(0)
    db = rng.normal(-15, 5, (2, 2, 40, 50))
    power = 10 ** (db / 10)
    low, high = (np.percentile(power, p, axis=(2, 3), keepdims=True) for p in (5, 95))
    expected = np.exp(1 - (np.clip(power, low, high) - low) / (high - low + 1e-6))
    got = compute_weights(torch.from_numpy(db), mode="per_channel", clip=5)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5)


def test_clip_ignores_one_bright_scatterer() -> None:
    db = torch.full((1, 2, 64, 64), -12.0) + torch.randn(1, 2, 64, 64)
    bright = db.clone()
    bright[..., 5, 5] = 30.0
    assert compute_weights(bright, mode="per_channel").std() < 0.1 < compute_weights(db, mode="per_channel").std()
    clipped = compute_weights(bright, mode="per_channel", clip=1)
    assert (clipped - compute_weights(db, mode="per_channel", clip=1)).abs().mean() < 0.01


def test_renorm_keeps_the_mean_at_one() -> None:
    db = torch.randn(4, 2, 64, 64) * 5 - 15
    plain = compute_weights(db, mode="per_channel")
    got = compute_weights(db, mode="per_channel", renorm=True)
    torch.testing.assert_close(got.mean((1, 2, 3)), torch.ones(4))
    torch.testing.assert_close(got[2], plain[2] / plain[2].mean())
    tokens = compute_weights(db, mode="per_channel", level="token", renorm=True)
    torch.testing.assert_close(tokens.mean((1, 2)), torch.ones(4))


def test_dataset_range_lets_dark_images_count_more() -> None:
    limits = (torch.tensor([-30.0, -20.0]), torch.tensor([-10.0, 0.0]))  # power 0.001 .. 0.1 and 0.01 .. 1
    dark, bright = torch.full((1, 2, 32, 32), -25.0), torch.full((1, 2, 32, 32), -12.0)
    got = [compute_weights(db, mode="per_channel", limits=limits) for db in (dark, bright)]
    # VH dark: x = (10**-2.5 - 0.001) / (0.099 + 1e-6)
    assert got[0][0, 0, 0, 0].item() == pytest.approx(w((10**-2.5 - 0.001) / 0.099001), rel=1e-5)
    assert got[0].mean() > got[1].mean()
    outside = compute_weights(torch.full((1, 2, 32, 32), 20.0), mode="shared_intensity", limits=limits)
    assert outside.min().item() == pytest.approx(1.0, rel=1e-4)  # clamped, so that 1 <= w <= e holds


def test_decibel_domain_in_float64() -> None:
    db = np.random.default_rng(3).normal((-19, -12), 5, (2, 40, 50, 2)).transpose(0, 3, 1, 2)
    low, high = np.array([-30.0, -24.0]), np.array([-8.0, -2.0])
    low_, high_ = low[:, None, None], high[:, None, None]
    x = (np.clip(db, low_, high_) - low_) / (high_ - low_ + 1e-6)
    limits = (torch.from_numpy(low), torch.from_numpy(high))
    sar = torch.from_numpy(db)
    for scale in (1.0, 3.0, -3.0):
        got = compute_weights(sar, mode="per_channel", exp_scale=scale, decibel=True, limits=limits).double().numpy()
        np.testing.assert_allclose(got, np.exp(scale * (1 - x)), rtol=2e-5)
    own = db - db.min(axis=(2, 3), keepdims=True)
    x = own / (own.max(axis=(2, 3), keepdims=True) + 1e-6)
    got = compute_weights(sar, mode="per_channel", decibel=True).double().numpy()
    np.testing.assert_allclose(got, np.exp(1 - x), rtol=2e-5)
    # the mean power of both bands, in dB, within the dB of the mean of the powers at the ranges' ends
    mean, ends = (
        10 * np.log10((10 ** (db / 10)).mean(axis=1)),
        [10 * np.log10((10 ** (e / 10)).mean()) for e in (low, high)],
    )
    x = (np.clip(mean, *ends) - ends[0]) / (ends[1] - ends[0] + 1e-6)
    got = compute_weights(sar, mode="shared_intensity", decibel=True, limits=limits).double().numpy()
    np.testing.assert_allclose(got[:, 1], np.exp(1 - x), rtol=2e-5)


def test_negative_scale_turns_the_order_round() -> None:
    db = torch.tensor([[[[-30.0, -10.0]]]])
    up, down = (compute_weights(db, mode="per_channel", exp_scale=s)[0, 0, 0].tolist() for s in (1.0, -1.0))
    assert up == pytest.approx([math.e, 1.0], rel=1e-4)
    assert down == pytest.approx([1 / math.e, 1.0], rel=1e-4)


def test_noise_weights_in_float64() -> None:
    rng = np.random.default_rng(4)
    db = rng.normal(-22, 6, (1, 2, 30, 20))
    holes = rng.random(db.shape) < 0.1
    holes[0, 0, :12, :12] = True  # a whole neighbourhood without a valid pixel
    power, noise = 10 ** (db / 10), 10 ** (np.array([-25.0, -24.0]) / 10)
    for valid in (None, ~holes):
        expected = np.zeros_like(db)
        for b, r, c in np.ndindex(2, 30, 20):
            box = (0, b, slice(max(r - 4, 0), r + 5), slice(max(c - 4, 0), c + 5))
            inside = power[box] if valid is None else power[box][valid[box]]
            if len(inside.ravel()) and (valid is None or valid[0, b, r, c]):
                expected[0, b, r, c] = (inside.mean() / (inside.mean() + noise[b])) ** 2
        mask = None if valid is None else torch.from_numpy(valid)
        got = compute_weights(torch.from_numpy(db), mode="noise", valid=mask, noise=torch.from_numpy(noise))
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-5, atol=1e-9)
    flat = compute_weights(torch.full((1, 2, 9, 9), -25.0), mode="noise", noise=torch.from_numpy(noise))
    assert flat[0, 0].unique().tolist() == pytest.approx([0.25], rel=1e-5)  # signal as strong as noise


def test_permuted_weights_are_the_same_weights_elsewhere() -> None:
    db = torch.randn(3, 2, 64, 64) * 5 - 15
    db[1, 0, :32, 32:] = float("nan")  # cell 1 of image 1
    tokens = compute_weights(db, mode="per_channel", level="token")
    order = torch.tensor([2, 0, 3, 1])
    got = permute_cells(tokens, order)
    torch.testing.assert_close(got[0], tokens[0, order])
    torch.testing.assert_close(got.mean((1, 2))[[0, 2]], tokens.mean((1, 2))[[0, 2]])
    assert got[1, 3, 0].item() == pytest.approx(tokens[1, [0, 2, 3], 0].mean().item())  # not 0: cell 3 is valid
    assert got[1, 3, 1] == tokens[1, 1, 1]


@pytest.mark.parametrize("mode", ["none", "per_channel", "shared_avg", "shared_intensity"])
@pytest.mark.parametrize("options", [{}, {"clip": 2.0}, {"renorm": True}, {"level": "token"}])
def test_invalid_pixels_are_left_out(mode: str, options: dict) -> None:
    db = torch.randn(2, 2, 64, 64) * 4 - 15
    holes = torch.zeros(db.shape, dtype=torch.bool)
    holes[0, :, :10, :20] = True
    holes[1, 0, 40:, :] = True
    results = []
    for value in (float("nan"), float("inf"), -float("inf")):
        results.append(compute_weights(torch.where(holes, torch.tensor(value), db), mode=mode, **options))
    results.append(compute_weights(torch.where(holes, torch.tensor(60.0), db), mode=mode, valid=~holes, **options))
    for other in results[1:]:
        assert torch.equal(results[0], other)
    assert torch.isfinite(results[0]).all()
    if options.get("level") != "token":
        assert (results[0][holes] == 0).all()
        assert (results[0][~holes] > 0).all()


def test_invalid_by_hand() -> None:
    db = DB.clone()
    db[0, 0, 1, 1] = float("nan")  # the brightest VH pixel: range of VH is now 0.1 .. 10
    got = compute_weights(db, mode="per_channel")
    assert got[0, 0].flatten().tolist() == pytest.approx(
        [w((p - 0.1) / 9.900001) for p in (0.1, 1, 10)] + [0], rel=1e-5
    )
    shared = compute_weights(db, mode="shared_avg")
    assert shared[0, :, 1, 1].tolist() == pytest.approx([0, 1.0], rel=1e-5)  # the valid band keeps its own weight
    nothing = compute_weights(torch.full((1, 2, 32, 32), float("nan")), mode="per_channel", clip=1, renorm=True)
    assert (nothing == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sum"}, "per_channel"),
        ({"level": "image"}, "token, pixel"),
        ({"domain": "log"}, "linear, db, zscore"),
        ({"norm": "batch"}, "image, dataset"),
        ({"exp_scale": 0.0}, "is not 0"),
        ({"exp_scale": -80.0}, "between -80"),
        ({"clip": 50.0}, "below 50"),
        ({"range": "p05"}, "p01-median"),
        ({"range": "p01-median"}, "needs --weight_norm dataset"),
        ({"mode": "noise", "domain": "db"}, "no range and no exponent"),
        ({"mode": "noise", "exp_scale": 2.0}, "no range and no exponent"),
        ({"permute": True, "level": "pixel"}, "weight_level token"),
        ({"permute": True, "mode": "none"}, "needs weights"),
        ({"norm": "dataset", "clip": 1.0}, "no effect"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightOptions(**options)
    if set(options) & {"mode", "level"} and len(options) == 1:
        with pytest.raises(ValueError, match="expected one of"):
            compute_weights(DB, **{"mode": "none", **options})
