"""Statistics and checks of pair data look at every image once, in dB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sen12_fixtures

from sarwmix.checks.samples import examine
from sarwmix.checks.statistics import compute_moments
from sarwmix.data import registry
from sarwmix.datasets.sen12flood import PairDataset, PairImages


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pairs")
    sen12_fixtures.run(sen12_fixtures.make_raw(base), base)
    return base / "out"


def test_each_image_once_and_in_db(prepared: Path) -> None:
    pairs = registry.build_dataset("sen12flood", prepared, "train")
    assert isinstance(pairs, PairDataset)
    images = pairs.single_images()
    assert isinstance(images, PairImages)
    # Every pair has two images; frames of a sequence appear in several pairs.
    assert len(images) < 2 * len(pairs)
    pair, time = images.places[3]
    stored = np.asarray(pairs[int(pair)][f"image{time + 1}"])
    found = images.read(3)
    valid = stored > 0
    assert np.allclose(found[valid], 10 * np.log10(stored[valid]), atol=1e-4)
    assert (found[stored == 0] == -60.0).all()
    fingerprints = {images.read(index).tobytes() for index in range(len(images))}
    assert len(fingerprints) == len(images)


def test_other_data_sets_stay_as_they_are(demo_root: Path) -> None:
    dataset = registry.build_dataset("demo", demo_root, "test")
    assert dataset.single_images() is dataset


def test_statistics_and_check(prepared: Path) -> None:
    images = registry.build_dataset("sen12flood", prepared, "train").single_images()
    moments = compute_moments(images)
    assert -30 < moments.mean[0] < moments.mean[1] < -5
    found = examine("sen12flood", prepared)
    assert set(found.counts) == {"train", "test"}
    assert set(found.classes["train"]) == {"no flood", "flood"}
    assert found.errors() == []
