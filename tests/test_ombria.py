"""OMBRIA from a generated clone: splits by events and by folder, values, refusals; the real pairs where they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sarwmix.data.base import UnreadableSample
from sarwmix.data.registry import build_dataset
from util.errors import UserError

NUMBERS = {"train": (1, 49, 51, 151, 199, 460), "test": (2, 201, 249)}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Nine pairs; the before image of number n is n // 2 everywhere, the after image 255 - n // 2."""
    for part, numbers in NUMBERS.items():
        for number in numbers:
            mask = np.zeros((256, 256), np.uint8)
            mask[:100] = 255
            for kind, values in (("BEFORE", number // 2), ("AFTER", 255 - number // 2), ("MASK", mask)):
                path = tmp_path / "OmbriaS1" / part / kind / f"S1_{kind.lower()}_{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.broadcast_to(np.asarray(values, np.uint8), (256, 256)).copy()).save(path)
    return tmp_path


def test_values_names_and_events(clone: Path) -> None:
    data = build_dataset("ombria", clone, "train+val+test")
    assert list(data.names) == [
        "e00_0001", "e00_0002", "e00_0049", "e01_0051", "e03_0151", "e03_0199", "e04_0201", "e04_0249", "e09_0460",
    ]  # fmt: skip
    sample = data[5]  # number 199
    assert sample["image"][:, 9, 9].tolist() == pytest.approx([-30 + 30 * 99 / 255, -30 + 30 * 156 / 255])
    assert sample["label"].float().mean().item() == pytest.approx(100 / 256)
    assert data.spec.cluster is not None
    parts = {split: list(build_dataset("ombria", clone, split).names) for split in ("train", "val", "test")}
    assert parts["val"] == ["e03_0151", "e03_0199"]
    assert parts["test"] == ["e04_0201", "e04_0249", "e09_0460"]
    assert "e09_0460" not in build_dataset("ombria", clone, "test", masks="agreeing").names


def test_the_official_split_says_that_it_leaks(clone: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = build_dataset("ombria", clone, "test", by="official")
    assert list(data.names) == ["e00_0002", "e04_0201", "e04_0249"]
    assert "67 %" in caplog.text
    with pytest.raises(UserError, match="no val"):
        build_dataset("ombria", clone, "val", by="official")


def test_refusals(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected by=events"):
        build_dataset("ombria", clone, "train", by="random")
    with pytest.raises(UserError, match="train/BEFORE"):
        build_dataset("ombria", clone / "OmbriaS1" / "train", "train")
    (clone / "OmbriaS1" / "train" / "MASK" / "S1_mask_0001.png").unlink()
    with pytest.raises(UserError, match=r"1 files .* S1_mask_0001.png|S1_mask_0001.png"):
        build_dataset("ombria", clone, "train")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(clone / "OmbriaS1" / "train" / "MASK" / "S1_mask_0001.png")
    with pytest.raises(UnreadableSample, match=r"\(64, 64\)"):
        build_dataset("ombria", clone, "train")[0]


def test_real_pairs(realdata: Path) -> None:
    root = realdata / "ombria_s1"
    if not root.is_dir():
        pytest.skip("OMBRIA is not there")
    sizes = {split: len(build_dataset("ombria", root, split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 694
    assert len(build_dataset("ombria", root, "train", by="official")) == 624
    first = build_dataset("ombria", root, "test", masks="agreeing")[0]
    flooded = first["image"][1][first["label"] == 1]
    assert flooded.median() < first["image"][1].median()  # water is dark after the flood
