"""Streaming statistics against numpy in float64, and the file that training reads back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sarwmix.checks.statistics import Moments, compute_moments, report, sample_indices
from sarwmix.data import registry
from sarwmix.data.base import SarDataset, UnreadableSample
from sarwmix.synthetic import benv2 as demo
from scripts import compute_statistics
from util.errors import UserError


class Memory(SarDataset):
    """Images held in memory; those in `broken` cannot be read."""

    def __init__(self, images: np.ndarray, broken: tuple[int, ...] = ()) -> None:
        spec = registry.get_spec("demo")
        names = [f"patch_{i}" for i in range(len(images))]
        super().__init__(spec, "train", spec.statistics["demo"], names, None, source="memory")
        self.images = images
        self.broken = broken

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def read(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise UnreadableSample(self.names[index], "memory", "broken on purpose")
        return self.images[index]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    level = rng.normal(-15, 4, (150, 2, 1, 1))
    values = (level + rng.normal(0, 2, (150, 2, 8, 8))).astype(np.float32)
    values[3, 0, :4] = np.nan
    values[7, :, 0, 0] = np.nan
    values[9, 1, 1, 1] = np.inf
    return values


def test_equals_numpy_over_all_valid_pixels(images: np.ndarray) -> None:
    moments = compute_moments(Memory(images))
    for band in range(2):
        pixels = images[:, band].astype(np.float64)
        pixels = pixels[np.isfinite(pixels)]
        assert moments.count[band] == pixels.size
        assert moments.invalid[band] == images[:, band].size - pixels.size
        assert moments.mean[band] == pytest.approx(pixels.mean(), rel=1e-12)
        assert moments.std()[band] == pytest.approx(pixels.std(), rel=1e-12)
        assert moments.minimum[band] == pixels.min()
        assert moments.maximum[band] == pixels.max()
        for percent in (0, 1, 50, 99, 100):
            assert moments.percentile(percent)[band] == pytest.approx(np.percentile(pixels, percent), abs=0.06)
        clean = np.where(np.isfinite(images[:, band]), images[:, band], np.nan).reshape(150, -1)
        within = np.sqrt(np.nansum((clean - np.nanmean(clean, axis=1, keepdims=True)) ** 2) / pixels.size)
        assert np.sqrt(moments.within[band] / moments.count[band]) == pytest.approx(within, rel=1e-5)


def test_percentile_is_exact_to_a_bin() -> None:
    values = np.linspace(-30, 0, 100_001, dtype=np.float32).reshape(1, 1, 1, -1)
    moments = Moments.of(values)
    for percent in (1.0, 37.5, 99.0):
        assert moments.percentile(percent)[0] == pytest.approx(-30 + 0.3 * percent, abs=0.011)


def test_large_offset_keeps_the_variance() -> None:
    """Sums of squares would lose it: 1e4 dB offset, 1e-2 dB deviation."""
    rng = np.random.default_rng(1)
    parts = [(1e4 + 0.01 * rng.standard_normal((4, 1, 16, 16))) for _ in range(6)]
    total = Moments.empty(1)
    for part in parts:
        total.add(Moments.of(part))
    assert total.std()[0] == pytest.approx(np.concatenate(parts).std(), rel=1e-8)


def test_jobs_do_not_change_the_result(images: np.ndarray) -> None:
    one, two = compute_moments(Memory(images)), compute_moments(Memory(images), jobs=2)
    assert one.mean.tobytes() == two.mean.tobytes()
    assert one.square.tobytes() == two.square.tobytes()
    assert (one.histogram == two.histogram).all()
    assert one.samples == two.samples == 150


def test_unreadable_samples_are_named_and_left_out(images: np.ndarray) -> None:
    moments = compute_moments(Memory(images, broken=(5, 140)))
    assert [name for name, _ in moments.unreadable] == ["patch_5", "patch_140"]
    assert moments.samples == 148
    kept = np.delete(images, (5, 140), axis=0)[:, 1]
    assert moments.mean[1] == pytest.approx(kept[np.isfinite(kept)].astype(np.float64).mean(), rel=1e-12)


def test_sample_is_drawn_without_replacement_and_repeats() -> None:
    first = sample_indices(1000, 50, 3)
    assert len(np.unique(first)) == 50
    assert (first == sample_indices(1000, 50, 3)).all()
    assert not (first == sample_indices(1000, 50, 4)).all()
    assert (sample_indices(10, 50, 0) == np.arange(10)).all()
    with pytest.raises(UserError, match="sample=0"):
        sample_indices(10, 0, 0)


def test_band_without_a_valid_pixel_is_an_error() -> None:
    values = np.full((2, 2, 4, 4), np.nan, dtype=np.float32)
    values[:, 0] = -10 + np.arange(32).reshape(2, 4, 4)
    moments = Moments.of(values)
    with pytest.raises(UserError, match="band 1 has no valid pixel"):
        moments.statistics("test")


def test_file_is_what_the_registry_reads(images: np.ndarray, tmp_path: Path) -> None:
    dataset = Memory(images)
    content = report(dataset, compute_moments(dataset), drawn=False)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(content))
    read = registry.resolve_statistics(dataset.spec, path)
    assert list(read.mean) == content["mean"]
    assert list(read.p99) == content["p99"]
    assert "all 150 samples of demo, split train" in read.origin


def test_command_line(demo_root: Path, tmp_path: Path, run_script) -> None:
    out = tmp_path / "s.json"
    arguments = ("--dataset", "demo", "--data_path", demo_root, "--split", "train", "--sample", 20, "--jobs", 1)
    done = run_script("scripts/compute_statistics.py", *arguments, "--out", out)
    assert "VH: mean -" in done.stdout
    content = json.loads(out.read_text())
    assert content["samples"] == 20
    assert "random sample of 20 of" in content["origin"]
    dataset = registry.build_dataset("demo", demo_root, "train", statistics=str(out))
    assert list(dataset.statistics.mean) == content["mean"]


def test_default_split_is_what_pretraining_sees(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = realdata / "ssl4eo_s12" / "s1"
    out = tmp_path / "s.json"
    monkeypatch.setattr(sys, "argv", ["x", "--dataset", "s1_scenes", "--data_path", str(data), "--out", str(out)])
    compute_statistics.main()
    content = json.loads(out.read_text())
    assert content["split"] == "train"
    assert content["samples"] == 8


@pytest.mark.parametrize(("arguments", "message"), [
    (("--out", "s.txt"), "ends with .json"),
    (("--out", "nowhere/s.json"), "does not exist"),
    (("--out", "s.json", "--data_option", "unit"), "NAME=VALUE"),
    (("--out", "s.json", "--sample", "0"), "sample=0"),
    (("--out", "s.json", "--jobs", "0"), "jobs=0"),
])  # fmt: skip
def test_bad_arguments(
    demo_root: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    data = ("--dataset", "demo", "--data_path", str(demo_root))
    monkeypatch.setattr(sys, "argv", ["compute_statistics.py", *data, *arguments])
    with pytest.raises(UserError, match=message):
        compute_statistics.main()


@pytest.mark.slow
def test_registered_numbers_of_the_demo_data(tmp_path: Path) -> None:
    demo.generate(tmp_path / "data")
    registered = registry.get_spec("demo").statistics["demo"]
    dataset = registry.build_dataset("demo", tmp_path / "data", "train+val")
    found = compute_moments(dataset).statistics("test")
    for name in ("mean", "std", "p01", "p99"):
        assert getattr(found, name) == pytest.approx(getattr(registered, name), abs=0.002)
