"""Statistics of a data set in one pass: pooled mean and variance, percentiles, invalid pixels left out.

Mean and variance of the parts are combined by the formula of Chan, Golub and LeVeque (1983), "Algorithms for computing
the sample variance", in float64, so that neither the number of pixels nor the number of processes changes the result.
Percentiles come from a histogram of 0.01 dB, which bounds their error by 0.01 dB.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sarwmix.data.spec import DECIBEL, Statistics
from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.data.base import SarDataset

HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_STEP = -100.0, 60.0, 0.01
"""dB. Values outside are counted at the ends; mean and variance take them as they are."""
BINS = round((HISTOGRAM_HIGH - HISTOGRAM_LOW) / HISTOGRAM_STEP)
REFLECTANCE_STEP = 20_000 / BINS
CHUNK = 64
"""Samples of one piece of work; part of the definition of the result, because it fixes the order of the sums."""


@dataclass
class Moments:
    """What is known of the pixels seen so far; every array is per band (C,).

    Attributes:
        count: Valid pixels.
        invalid: NaN pixels.
        mean: dB.
        square: Sum of squared deviations from the mean, dB^2.
        within: The same, from the mean of each image.
        minimum: dB.
        maximum: dB.
        histogram: (C, BINS) pixels.
        samples: Images read.
        unreadable: (name, reason) of images that could not be used.
    """

    count: NDArray[np.int64]
    invalid: NDArray[np.int64]
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    within: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    histogram: NDArray[np.int64]
    samples: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    units: tuple[str, ...] = ()

    def axis(self, band: int) -> tuple[float, float]:
        """Lower end and step of a band's histogram, in its unit (dB, or reflectance x 1e4: 0 to 20,000 by 1.25)."""
        if self.units and self.units[band] != DECIBEL:
            return 0.0, REFLECTANCE_STEP
        return HISTOGRAM_LOW, HISTOGRAM_STEP

    @classmethod
    def empty(cls, bands: int) -> Moments:
        """No pixel seen yet."""
        return cls(
            count=np.zeros(bands, np.int64),
            invalid=np.zeros(bands, np.int64),
            mean=np.zeros(bands),
            square=np.zeros(bands),
            within=np.zeros(bands),
            minimum=np.full(bands, np.inf),
            maximum=np.full(bands, -np.inf),
            histogram=np.zeros((bands, BINS), np.int64),
        )

    @classmethod
    def of(cls, images: np.ndarray, units: tuple[str, ...] = ()) -> Moments:
        """Moments of images (B, C, H, W); NaN and infinite pixels count as invalid.

        Args:
            units: Of each band; dB where not given.
        """
        result = cls.empty(images.shape[1])
        result.samples, result.units = len(images), units
        for band in range(images.shape[1]):
            planes = images[:, band].reshape(len(images), images.shape[2] * images.shape[3])
            valid = np.isfinite(planes)
            count = valid.sum(axis=1)
            result.count[band] = total = int(count.sum())
            result.invalid[band] = planes.size - total
            if total == 0:
                continue
            values = planes if total == planes.size else np.where(valid, planes, np.float32(0))
            mean = values.sum(axis=1, dtype=np.float64) / np.maximum(count, 1)  # of each image
            deviation = values - mean[:, None]
            if total != planes.size:
                deviation[~valid] = 0.0
                values = planes[valid]
            result.within[band] = np.einsum("ij,ij->", deviation, deviation)
            result.mean[band] = (mean * count).sum() / total
            result.square[band] = result.within[band] + (count * (mean - result.mean[band]) ** 2).sum()
            result.minimum[band], result.maximum[band] = values.min(), values.max()
            # Clipped before the cast: an integer cannot hold every float.
            low, step = result.axis(band)
            scaled = np.clip((values.ravel() - low) * (1 / step), 0, BINS - 1)
            result.histogram[band] = np.bincount(scaled.astype(np.int32), minlength=BINS)
        return result

    def add(self, other: Moments) -> None:
        """Take in the pixels of `other`: delta^2 * n_a * n_b / (n_a + n_b) joins the two sums of squares."""
        total = self.count + other.count
        divisor = np.maximum(total, 1)
        delta = other.mean - self.mean
        self.square += other.square + delta**2 * (self.count * (other.count / divisor))
        self.mean += delta * (other.count / divisor)
        self.within += other.within
        self.count = total
        self.invalid += other.invalid
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.histogram += other.histogram
        self.units = self.units or other.units
        self.samples += other.samples
        self.unreadable += other.unreadable

    def std(self) -> NDArray[np.float64]:
        """Population standard deviation over all valid pixels (C,), dB."""
        return np.sqrt(self.square / np.maximum(self.count, 1))

    def percentile(self, percent: float) -> NDArray[np.float64]:
        """Percentile of the valid pixels (C,), dB, linear within a bin of 0.01 dB.

        Args:
            percent: 0-100.
        """
        result = np.empty(len(self.count))
        for band, histogram in enumerate(self.histogram):
            cumulated = np.cumsum(histogram)
            wanted = percent / 100.0 * cumulated[-1]
            index = int(np.searchsorted(cumulated, wanted, side="left"))
            index = min(index, BINS - 1)
            before = cumulated[index] - histogram[index]
            inside = (wanted - before) / max(int(histogram[index]), 1)
            low, step = self.axis(band)
            value = low + (index + inside) * step
            result[band] = np.clip(value, self.minimum[band], self.maximum[band])
        return result

    def statistics(self, origin: str) -> Statistics:
        """The numbers that training needs.

        Args:
            origin: Where the pixels come from.

        Raises:
            UserError: A band has no valid pixel, or only one value.
        """
        if (self.count == 0).any():
            band = int(np.flatnonzero(self.count == 0)[0])
            raise UserError(
                f"statistics: band {band} has no valid pixel in {self.samples} samples; "
                "check the data with scripts/check_data.py"
            )

        def plain(values: NDArray[np.float64]) -> tuple[float, ...]:
            return tuple(round(float(value), 4) for value in values)

        low, middle, high = (plain(self.percentile(percent)) for percent in (1, 50, 99))
        return Statistics(plain(self.mean), plain(self.std()), low, high, origin, middle)


def read_moments(dataset: SarDataset, indices: NDArray[np.int64]) -> Moments:
    """Moments of some samples; unreadable ones are left out and noted by name."""
    images = np.empty((len(indices), *dataset.shape), dtype=np.float32)
    bad = dataset.read_many(indices, images)
    if bad:
        keep = np.ones(len(indices), dtype=bool)
        keep[[position for position, _ in bad]] = False
        images = images[keep]
    result = Moments.of(images, dataset.spec.units)
    result.unreadable = [(error.name, f"{error.path}: {error.reason}") for _, error in bad]
    return result


_worker_dataset: SarDataset | None = None


def _open_worker(dataset: SarDataset) -> None:
    global _worker_dataset
    _worker_dataset = dataset


def _work(indices: NDArray[np.int64]) -> Moments:
    assert _worker_dataset is not None
    return read_moments(_worker_dataset, indices)


def sample_indices(count: int, sample: int | None, seed: int) -> NDArray[np.int64]:
    """All indices, or `sample` of them drawn without replacement, in ascending order.

    Raises:
        UserError: `sample` is not positive.
    """
    if sample is not None and sample < 1:
        raise UserError(f"sample={sample}: expected a number of samples of 1 or more")
    if sample is None or sample >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))


def reading_processes(jobs: int | None, samples: int) -> int:
    """Processes to read with: as told, or as many as may be used and are worth their start (1,024 samples each).

    Raises:
        UserError: `jobs` is not positive.
    """
    if jobs is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(usable, samples // 1024))
    if jobs < 1:
        raise UserError(f"jobs={jobs}: expected 1 or more")
    return jobs


def compute_moments(
    dataset: SarDataset,
    *,
    sample: int | None = None,
    seed: int = 0,
    jobs: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Read a data set, or a random sample of it, once.

    The result does not depend on `jobs`: pieces of 64 samples are summed in the order of the data set.

    Args:
        dataset: Data to read.
        sample: Samples to draw; None reads all.
        seed: Seed of the draw.
        jobs: Processes that read; None: as many as are worth it.
        progress: Called with (samples done, samples in all).

    Raises:
        UserError: `sample` or `jobs` is out of range.
    """
    indices = sample_indices(len(dataset), sample, seed)
    processes = reading_processes(jobs, len(indices))
    pieces = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    total = Moments.empty(dataset.shape[0])

    def collect(parts: Any) -> None:
        for part in parts:
            total.add(part)
            if progress is not None:
                progress(total.samples + len(total.unreadable), len(indices))

    if processes == 1 or len(pieces) == 1:
        collect(read_moments(dataset, piece) for piece in pieces)
    else:
        # Spawned, because a forked copy of a process with threads (torch has some) can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(processes, len(pieces)), mp_context=context, initializer=_open_worker, initargs=(dataset,)
        ) as pool:
            collect(pool.map(_work, pieces))
    return total


def report(dataset: SarDataset, moments: Moments, *, drawn: bool) -> dict[str, Any]:
    """The content of a statistics file: what the registry reads, and what a reader wants to know besides.

    Args:
        dataset: Where the pixels come from.
        moments: The sums.
        drawn: Whether only a random sample was read.
    """
    from sarwmix.data.spec import statistics_file_content

    of = f"a random sample of {moments.samples} of {len(dataset)}" if drawn else f"all {moments.samples}"
    origin = f"computed over all valid pixels of {of} samples of {dataset.spec.name}, split {dataset.split}"
    content: dict[str, Any] = statistics_file_content(moments.statistics(origin), dataset.spec)
    within = np.sqrt(moments.within / np.maximum(moments.count, 1))
    extra: Mapping[str, Any] = {
        "split": dataset.split,
        "samples": moments.samples,
        "valid_pixels": moments.count.tolist(),
        "invalid_pixels": moments.invalid.tolist(),
        "minimum": [round(float(value), 4) for value in moments.minimum],
        "maximum": [round(float(value), 4) for value in moments.maximum],
        "std_within_images": [round(float(value), 4) for value in within],
        "unreadable": [f"{name}: {reason}" for name, reason in moments.unreadable],
    }
    return {**content, **extra}
