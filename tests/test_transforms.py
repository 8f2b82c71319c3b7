"""Batched transforms: resize, flips, weights from dB, standardisation, invalid pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from models_mixmim import MixMIM, model_config
from sarwmix.preprocessing import Preprocessing
from sarwmix.transforms import (
    SarTransform,
    apply_flips,
    crop_and_resize,
    draw_crops,
    draw_flips,
    resize,
    transform_of,
)
from sarwmix.weighting import WeightOptions, compute_weights
from util.errors import UserError

MEAN, STD = (-19.2, -12.5), (5.4, 5.0)


def transform(weighting: WeightOptions | None = None, size: int = 128, all_finite: bool = False) -> SarTransform:
    limits = ((-30.0, -24.0), (-7.0, -1.0))
    return SarTransform(size=size, mean=MEAN, std=STD, weighting=weighting, range_db=limits, all_finite=all_finite)


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
    limits = (torch.tensor([-30.0, -24.0]), torch.tensor([-7.0, -1.0]))
    torch.testing.assert_close(ranged.weights, compute_weights(db, mode="per_channel", limits=limits))
    of_zscore = transform(WeightOptions(level="pixel", norm="dataset", domain="zscore"))(patches(), flips)
    spread = torch.tensor(STD)
    standard = tuple((limit - torch.tensor(MEAN)) / spread for limit in limits)
    torch.testing.assert_close(of_zscore.weights, compute_weights(zscore.images, mode="per_channel", limits=standard))


def test_token_weights_by_default_shape() -> None:
    assert transform(WeightOptions())(patches()).weights.shape == (3, 16, 2)
    assert transform(WeightOptions(mode="none"))(patches()).weights is None


@pytest.mark.parametrize("mode", ["per_channel", "shared_avg", "shared_intensity"])
@pytest.mark.parametrize("level", ["token", "pixel"])
def test_looking_for_invalid_pixels_changes_nothing_where_there_are_none(
    mode: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU cannot ask cheaply and so treats every batch as if it had some, unless the data set knows better."""
    options = WeightOptions(mode=mode, level=level)
    monkeypatch.setattr("sarwmix.transforms.is_all_finite", lambda values: False)
    monkeypatch.setattr("sarwmix.weighting.is_all_finite", lambda values: False)
    looked = transform(options)(patches())
    known = transform(options, all_finite=True)(patches())
    assert looked.valid is not None
    assert known.valid is None
    assert looked.num_invalid == known.num_invalid == 0
    assert torch.equal(looked.images, known.images)
    model = MixMIM(**model_config("mixmim_tiny"))
    found = [model.losses(torch.ones(3, 16, 2048), b.images, b.weights)[0].item() for b in (looked, known)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


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


# Other preprocessing ---------------------------------------------------------------------------------------------


def prepared(preprocessing: Preprocessing, size: int, image: torch.Tensor) -> torch.Tensor:
    transform = SarTransform(size=size, mean=(-20.26, -12.59), std=(5.91, 5.26), preprocessing=preprocessing)
    return transform(image).images


def test_clip_normalisation() -> None:
    image = torch.tensor([[-30.0, -25.0], [-12.5, 3.0]]).expand(1, 2, 2, 2).clone()
    image[0, 0, 0, 0] = torch.nan  # no data: the band mean, clipped as any value
    out = prepared(Preprocessing("clip", clip=(-25.0, 0.0)), 2, image)
    assert torch.allclose(out[0, 1], torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
    assert out[0, 0, 0, 0].item() == pytest.approx((25 - 20.26) / 25)


def test_quantile_normalisation_is_that_of_each_image_and_band() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal([[[-20.0]], [[-12.0]]], 6.0, (3, 2, 64, 64)).astype(np.float32)
    image[1, 0, :5] = np.nan
    out = prepared(Preprocessing("quantiles"), 64, torch.from_numpy(image)).numpy()
    for sample in range(3):
        for band, (mean, std) in enumerate(((-20.26, 5.91), (-12.59, 5.26))):
            values = image[sample, band]
            low, high = np.nanquantile(values, [0.01, 0.99])
            expected = np.clip((np.clip(values, low, high) - (mean - 2 * std)) / (4 * std), 0, 1)
            valid = np.isfinite(values)
            assert np.allclose(out[sample, band][valid], expected[valid], atol=1e-5)
    assert np.allclose(out[1, 0, :5], 0.5)  # the band mean lies in the middle


def test_evaluation_cuts_the_centre_of_a_larger_image() -> None:
    image = torch.linspace(-30, 0, 64).expand(1, 2, 64, 64).contiguous()
    transform = SarTransform(size=224, mean=(0, 0), std=(1, 1), preprocessing=Preprocessing(geometry="resized_crop"))
    assert transform.evaluation_size == 256
    whole = torch.nn.functional.interpolate(image, size=(256, 256), mode="bilinear", align_corners=False)
    assert torch.allclose(transform(image).images, whole[..., 16:240, 16:240])


def test_random_crops_are_those_of_the_generator_and_equal_a_plain_resize() -> None:
    image = torch.randn(4, 2, 64, 48, generator=torch.Generator().manual_seed(0))
    crops = draw_crops(4, 64, 48, torch.Generator().manual_seed(3))
    assert torch.equal(crops, draw_crops(4, 64, 48, torch.Generator().manual_seed(3)))
    out = crop_and_resize(image, crops, 80)
    for sample, (left, top, wide, tall) in enumerate(crops.int().tolist()):
        assert 0 <= left <= left + wide <= 48
        assert 0 <= top <= top + tall <= 64
        part = image[sample : sample + 1, :, top : top + tall, left : left + wide]
        expected = torch.nn.functional.interpolate(part, size=(80, 80), mode="bilinear", align_corners=False)
        assert torch.allclose(out[sample : sample + 1], expected, atol=1e-4)


def test_preprocessing_travels_in_a_checkpoint() -> None:
    how = Preprocessing("clip", clip=(-25.0, 0.0), geometry="window")
    data = {"statistics": {"mean": [-20.0, -12.0], "std": [5.0, 5.0]}, "preprocessing": how.as_dict()}
    assert transform_of(data, size=64).preprocessing == how
    assert transform_of({"statistics": data["statistics"]}, size=64).preprocessing == Preprocessing()
    with pytest.raises(UserError, match="normalisation is one of"):
        Preprocessing.from_dict({"normalisation": "max", "clip": None, "geometry": "resize"})
    with pytest.raises(UserError, match="clip"):
        Preprocessing("zscore", clip=(0.0, 1.0))
    with pytest.raises(ValueError, match="z-scores"):
        SarTransform(size=8, mean=(0,), std=(1,), weighting=WeightOptions(), preprocessing=how)
