"""Statistics and checks of pair data look at every image once, in dB."""

from __future__ import annotations

import shutil
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


def _damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":  # one bit in the last pixel: no statistic shows it
        path.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    else:
        image = np.load(path)
        image[1] = np.nan
        np.save(path, image)


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "flipped", "nan"])
def test_check_opens_every_pair_file(prepared: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "pairs"))
    files = sorted(folder.glob("*/*.npy"))
    for path in files[1:]:  # the first is left whole, so that there is something to read
        _damage(path, kind)
    found = examine("sen12flood", folder)
    named = {name.split(" ")[0] for one in found.errors() if one.topic == "damaged" for name in one.names}
    assert named == {path.stem for path in files[1:]}


def test_sample_says_what_it_did_not_look_at(prepared: Path) -> None:
    assert examine("sen12flood", prepared).unseen == []
    found = examine("sen12flood", prepared, sample=2)
    count = found.counts["train"]
    assert any(f"{count - 2} of {count} files of split train were not opened" in text for text in found.unseen)
    assert any("samples were not opened (--sample 2)" in text for text in found.unseen)
