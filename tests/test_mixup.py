"""Mixup, CutMix, label smoothing and random erasing with multi-hot labels."""

from __future__ import annotations

import pytest
import torch

from sarwmix.mixup import Mixup, random_erase, smooth_labels
from util.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant_batch(batch: int = 6, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Image b is b everywhere; label b is the multi-hot code of b."""
    images = torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(batch, 2, size, size).contiguous()
    bits = torch.tensor([[(b >> k) & 1 for k in range(4)] for b in range(batch)], dtype=torch.float32)
    return images, bits


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_label_shares_are_pixel_shares(kind: str, mode: str) -> None:
    images, labels = constant_batch()
    # the label carries the sample's number, so that the mixed label must equal the mean of the mixed pixels
    target = torch.cat([labels, torch.arange(6.0)[:, None]], dim=1)
    mix = Mixup(**{kind: 1.0}, mode=mode)
    seen = set()
    for seed in range(20):
        (mixed,), soft = mix((images,), target, generator(seed))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft[:, 4], rtol=1e-5, atol=1e-5)
        assert soft[:, :4].min() >= 0
        assert soft[:, :4].max() <= 1 + 1e-6
        if kind == "cutmix":  # pixels come from one of two samples, never in between
            assert all(len(sample.unique()) <= 2 and set(sample.unique().tolist()) <= set(range(6)) for sample in mixed)
        else:  # constant images stay constant
            assert float(mixed.flatten(1).std(dim=1).max()) < 1e-5
        seen.add(round(float(soft[1, 4]), 4))
    assert len(seen) > 10


def test_both_images_of_a_pair_are_mixed_alike() -> None:
    images, labels = constant_batch()
    (first, second), _ = Mixup(mixup=0.8, cutmix=1.0, mode="elem")((images, images + 100), labels, generator(3))
    torch.testing.assert_close(first + 100, second)


def test_the_generator_decides_everything() -> None:
    images, labels = constant_batch()
    mix = Mixup(mixup=0.8, cutmix=1.0, prob=0.7, mode="elem")
    one, two, other = (mix((images,), labels, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one[0][0], two[0][0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])


def test_probability_zero_and_switched_off_leave_the_batch_alone() -> None:
    images, labels = constant_batch()
    for mix in (Mixup(), Mixup(mixup=0.8, prob=0.0)):
        assert not mix.active
        (same,), target = mix((images,), labels, generator())
        assert same is images
        assert target is labels


def test_probability_and_switch_probability_are_frequencies() -> None:
    images, labels = constant_batch(batch=2)
    mix = Mixup(mixup=1.0, cutmix=1.0, prob=0.5, switch_prob=0.25)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    draws = 2000
    for seed in range(draws):
        (mixed,), _ = mix((images,), labels, generator(seed))
        values = mixed[1].unique()
        kinds["none" if values.tolist() == [1.0] else "cutmix" if len(values) == 2 else "mixup"] += 1
    # a batch of 2 keeps its order under half of the permutations, and looks unmixed then
    assert kinds["mixup"] / draws == pytest.approx(0.5 * 0.75 * 0.5, abs=0.03)
    assert kinds["cutmix"] / draws == pytest.approx(0.5 * 0.25 * 0.5, abs=0.03)


@pytest.mark.parametrize(
    "options", [{"mixup": -1}, {"cutmix": float("nan")}, {"prob": 1.5}, {"switch_prob": -0.1}, {"mode": "pair"}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UserError):
        Mixup(**options)


def test_label_smoothing_of_independent_labels() -> None:
    target = torch.tensor([[1.0, 0.0, 0.25]])
    torch.testing.assert_close(smooth_labels(target, 0.2), torch.tensor([[0.9, 0.1, 0.3]]))
    assert smooth_labels(target, 0.0) is target


def test_random_erasing_sets_one_rectangle_to_the_mean() -> None:
    images = torch.ones(400, 2, 32, 32)
    first, second = random_erase((images, 2 * images), 0.5, generator(1))
    erased = first[:, 0] == 0
    assert torch.equal(first[:, 0] == 0, first[:, 1] == 0)
    assert torch.equal(erased, second[:, 0] == 0)
    hit = erased.flatten(1).any(dim=1)
    assert float(hit.float().mean()) == pytest.approx(0.5, abs=0.08)
    share = erased[hit].float().mean(dim=(1, 2))
    assert float(share.min()) > 0.01
    assert float(share.max()) < 0.4
    for sample in erased[hit][:50]:  # a full rectangle: as many pixels as its bounding box
        rows, columns = sample.any(dim=1), sample.any(dim=0)
        assert int(sample.sum()) == int(rows.sum()) * int(columns.sum())
    assert random_erase((images,), 0.0, generator())[0] is images
