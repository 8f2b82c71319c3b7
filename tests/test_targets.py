"""Targets of the reconstruction beside the image, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch

from models_mixmim import MixMIM, model_config
from sarwmix.targets import multilook, oriented_gradients, ratio_gradient
from sarwmix.transforms import SarTransform
from sarwmix.weighting import WeightOptions


def test_multilook_is_the_mean_power_of_a_block() -> None:
    db = np.random.default_rng(0).normal(-15, 6, (2, 2, 16, 24))
    valid = np.random.default_rng(1).random(db.shape) < 0.6
    valid[0, 0, :8, :8] = False
    power = 10 ** (db / 10)
    for mask in (None, valid):
        got = multilook(torch.from_numpy(db), None if mask is None else torch.from_numpy(mask), 8).double().numpy()
        for b, c, r, k in np.ndindex(2, 2, 2, 3):
            place = (b, c, slice(8 * r, 8 * r + 8), slice(8 * k, 8 * k + 8))
            inside = power[place].ravel() if mask is None else power[place][mask[place]]
            expected = 10 * np.log10(inside.mean()) if len(inside) else db[place]
            np.testing.assert_allclose(got[place], np.broadcast_to(expected, (8, 8)), atol=1e-4)
    torch.testing.assert_close(multilook(torch.from_numpy(db).float(), None, 1), torch.from_numpy(db).float())


def test_speckle_shrinks_by_the_number_of_looks() -> None:
    # exponential power: variance of one look is the square of the mean, of 64 looks a 64th of it
    power = torch.from_numpy(np.random.default_rng(2).exponential(0.1, (1, 1, 512, 512)))
    smooth = 10 ** (multilook(10 * power.log10(), None, 8)[0, 0, ::8, ::8] / 10)
    assert abs(smooth.var().item() / (0.01 / 64) - 1) < 0.06


def test_the_loss_compares_with_the_target_and_the_input_stays() -> None:
    image = torch.randn(2, 2, 128, 128) * 5 - 15
    plain, looks = (
        SarTransform(size=128, mean=(-19, -12), std=(5, 5), weighting=WeightOptions(mode="none"), target_looks=k)
        for k in (1, 8)
    )
    assert plain(image).target is None
    batch = looks(image)
    assert torch.equal(batch.images, plain(image).images)
    model = MixMIM(**model_config("mixmim_tiny")).eval()
    mask = model.draw_mask()
    out = model(batch.images, None, mask=mask, return_pred=True, target=batch.target)
    rec = model.merge_prediction(out.pred, mask)
    expected = ((rec - model.cells_of(batch.target)) ** 2).mean()
    torch.testing.assert_close(out.loss, expected)
    same = model(batch.images, None, mask=mask, return_pred=True)
    assert torch.equal(same.pred, out.pred)
    assert same.loss > out.loss


def test_ratio_gradient_against_loops_in_float64() -> None:
    db = np.random.default_rng(3).normal(-15, 5, (1, 2, 20, 24))
    padded = np.pad(10 ** (db / 10), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    expected = np.empty_like(db)
    for b, r, c in np.ndindex(2, 20, 24):
        plane, y, x = padded[0, b], r + 4, c + 4
        left, right = plane[y - 4 : y + 5, x - 4 : x].mean(), plane[y - 4 : y + 5, x + 1 : x + 5].mean()
        up, below = plane[y - 4 : y, x - 4 : x + 5].mean(), plane[y + 1 : y + 5, x - 4 : x + 5].mean()
        expected[0, b, r, c] = 10 * np.hypot(np.log10(right / left), np.log10(below / up))
    np.testing.assert_allclose(ratio_gradient(torch.from_numpy(db)).numpy(), expected, atol=2e-4)
    # the level does not matter: twenty dB darker, the same edges
    torch.testing.assert_close(ratio_gradient(torch.from_numpy(db - 20)), ratio_gradient(torch.from_numpy(db)))


def test_oriented_gradients_by_hand() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # rises to the right: orientation 0, bin 0
    got = oriented_gradients(ramp)
    assert got.shape == ramp.shape
    assert torch.equal(got[0, 0, :8, :8], torch.eye(8)[0].expand(8, 8))
    down = oriented_gradients(ramp.mT)  # rises downwards: 90 degrees, bin 4
    assert torch.equal(down[0, 0, 8:, 8:], torch.eye(8)[4].expand(8, 8))
    torch.testing.assert_close(oriented_gradients(-ramp), got)  # orientation has no sign
    noise = oriented_gradients(torch.randn(2, 2, 32, 32))
    torch.testing.assert_close(noise[:, :, ::8].unflatten(-1, (4, 8)).square().sum(-1), torch.ones(2, 2, 4, 4))
