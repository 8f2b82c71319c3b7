"""Base class of all data sets: dict samples in dB with named bands, whole batches by index, and bad samples by name.

A data set's index (names, labels, splits) lives in a few numpy arrays and never in lists of Python objects: reading a
Python object writes its reference count, which makes every loader process copy the memory page that holds it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from sarwmix.data.spec import DB_RANGE, SAR_BANDS, DatasetSpec, EmptySplit, Statistics
from sarwmix.preprocessing import Preprocessing
from util.errors import UserError

Replaced = list[tuple[str, str]]
MAX_TRIES = 8  # neighbours tried for an unreadable sample before giving up
IGNORED = 255  # in label maps: the pixel counts neither in the loss nor in a metric


class UnreadableSample(UserError):
    """One sample cannot be used: its file is missing, truncated, of a wrong shape, or holds no valid pixel.

    Attributes:
        name: The sample's name.
        path: The file, or the place inside a store.
        reason: What is wrong, in words.
    """

    def __init__(self, name: str, path: str | Path, reason: str) -> None:
        super().__init__(f"sample {name} cannot be used: {path}: {reason}")
        self.name = name
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableSample], tuple[str, str, str]]:
        return type(self), (self.name, self.path, self.reason)


class NoValidPixel(UnreadableSample):
    """A sample whose files are in order, but one of its bands holds no valid pixel at all."""


class NameList(Sequence[str]):
    """Strings in one byte buffer with offsets: 8 bytes and the text for each, whatever the number of processes.

    Args:
        buffer: uint8 (bytes,), the UTF-8 text of all names without separators.
        offsets: int64 (N + 1,), name i is ``buffer[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray) -> None:
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> NameList:
        encoded = [name.encode() for name in names]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(name) for name in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    @classmethod
    def join(cls, parts: Sequence[NameList]) -> NameList:
        """The names of several lists, one after the other."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.concatenate([np.asarray(part.buffer) for part in parts]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> NameList: ...

    def __getitem__(self, index: int | slice) -> str | NameList:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        position = int(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        start, stop = int(self.offsets[position]), int(self.offsets[position + 1])
        return self.buffer[start:stop].tobytes().decode()

    def take(self, indices: np.ndarray) -> NameList:
        """The names at the given positions, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        if len(indices) and (np.diff(indices) == 1).all():  # neighbours, as in a file of one split
            return NameList(
                self.buffer[starts[0] : stops[-1]].copy(), self.offsets[indices[0] :][: len(indices) + 1] - starts[0]
            )
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(stops - starts, out=offsets[1:])
        return NameList(np.frombuffer(b"".join(self._pieces(starts, stops)), dtype=np.uint8), offsets)

    def _pieces(self, starts: np.ndarray, stops: np.ndarray) -> list[bytes]:
        # Short-lived objects: quicker than index arithmetic on every byte, and gone before a process is forked.
        text = self.buffer.tobytes()
        return [text[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def first_duplicate(self) -> str | None:
        """A name that appears more than once, or None."""
        pieces = self._pieces(self.offsets[:-1], self.offsets[1:])
        if len(set(pieces)) == len(pieces):
            return None
        return next(name for name, count in Counter(pieces).items() if count > 1).decode()

    def digest(self) -> str:
        """SHA-256 over all names and their order."""
        value = hashlib.sha256(np.ascontiguousarray(self.offsets, dtype="<i8").tobytes())
        value.update(np.ascontiguousarray(self.buffer).tobytes())
        return value.hexdigest()


class BatchNames(Sequence[str]):
    """Names of a batch's samples, decoded when somebody asks: a training step does so only for a message.

    Args:
        names: names of a data set.
        used: int64 (B,), positions of the batch's samples.
    """

    def __init__(self, names: Sequence[str], used: np.ndarray) -> None:
        self._names, self._used = names, used

    def __len__(self) -> int:
        return len(self._used)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._names[int(i)] for i in self._used[index]]
        return self._names[int(self._used[index])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a loader's worker sends the names of its batch, not those of the data set


EMPTY_BAND = "an image has a band without any finite pixel"  # why such a sample cannot be used


class SharedImages(NamedTuple):
    """Images that several samples have in common, for a cache that keeps each of them once.

    Attributes:
        keys: Entries of a batch that hold images.
        rows: int64 (N, number of keys), row of each sample's images.
        read: Images of given rows, float32 (B, C, H, W).
    """

    keys: tuple[str, ...]
    rows: np.ndarray
    read: Callable[[np.ndarray], torch.Tensor]


def labels_digest(labels: np.ndarray) -> str:
    """SHA-256 of labels, numbers or multi-hot, whatever their type: equal labels have equal digests."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


class SarDataset(torch.utils.data.Dataset):
    """Map-style data set of SAR patches in dB.

    A subclass implements :meth:`read`, or :meth:`read_into` when it can fill a given array without a copy. Samples keep
    their order for a given source, so that an index means the same sample in every process and run.

    Args:
        spec: The registry's entry.
        split: The split, as the user gave it (``"train+val"``).
        statistics: The statistics in use.
        names: Sample names, unique.
        labels: uint8 (N, classes) multi-hot, int64 (N,) class numbers, or None when unlabelled.
        on_error: ``"raise"``, or ``"replace"``: an unreadable sample is replaced by the next readable one (index + 1,
            + 2, ... modulo N, at most 8 tries) and reported.
        source: What errors call the data, usually the path.

    Raises:
        UserError: No sample, names twice, or labels that do not fit.
    """

    gathers = False  # whether a whole batch costs little more than the copy of its bytes, so that a thread can read it

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        names: NameList | Sequence[str],
        labels: np.ndarray | None,
        *,
        on_error: str = "raise",
        source: str | Path = "",
    ) -> None:
        self.spec = spec
        self.split = split
        self.statistics = statistics
        self.names = names if isinstance(names, NameList) else NameList.of(names)
        self.labels = labels
        self.on_error = on_error
        self.source = str(source)
        if len(self.names) == 0:
            raise EmptySplit(f"split {split!r} of data set {spec.name!r} in {source} is empty: no sample was found")
        if labels is not None and len(labels) != len(self.names):
            raise UserError(f"{source}: {len(labels)} labels for {len(self.names)} samples")
        duplicate = self.names.first_duplicate()
        if duplicate is not None:
            raise UserError(f"{source}: sample {duplicate!r} appears twice in split {split!r}; each must appear once")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return len(self.spec.bands), self.spec.size, self.spec.size

    @property
    def shared_images(self) -> SharedImages | None:
        """For data sets whose samples share images; None: each has its own, in the batch's ``image``."""
        return None

    @property
    def all_finite(self) -> bool:
        """Whether every pixel of every sample is known to be valid, so that nobody needs to look for others."""
        return False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def whole(self) -> SarDataset:
        """The split of which this is a part, or itself."""
        return self

    def single_images(self) -> SarDataset:
        """The data set itself where a sample is an image; its distinct images, in dB, where samples share them."""
        return self

    @property
    def clusters(self) -> Sequence[str] | None:
        """Scene, place or event of each sample, which intervals are computed over; None: each sample is on its own."""
        if self.spec.cluster is None or not self.spec.cluster[1]:
            return None  # "": files know their place, and a store of pixels does not hold it
        found = (re.match(self.spec.cluster[1], name) for name in self.names)
        return [
            name if match is None else "_".join(match.groups()) or match[0]
            for match, name in zip(found, self.names, strict=True)
        ]

    @property
    def cluster_kind(self) -> str:
        """What `clusters` are, for tables; "image" where neither names nor files say which images belong together."""
        of = self.clusters
        known = self.spec.cluster is not None and of is not None and len(set(of)) < len(of)
        return self.spec.cluster[0] if known and self.spec.cluster else "image"

    def identity(self) -> dict[str, str | int]:
        """Plain values that tell whether two runs see the same samples in the same order, whatever the storage."""
        return {
            "dataset": self.spec.name,
            "split": self.split,
            "count": len(self),
            "names_sha256": self.names.digest(),
        }

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says about its data: identity, band names in order, unit, statistics, a hash of labels that
        need no sample, and the preprocessing where it is not the usual one (z-score, resize)."""
        facts: dict[str, Any] = {
            **self.identity(),
            "bands": list(self.spec.bands),
            "unit": self.spec.unit,
            "statistics": self.statistics.as_dict(),
        }
        if self.labels is not None:
            facts["labels_sha256"] = labels_digest(self.labels)
        if self.spec.preprocessing != Preprocessing():
            facts["preprocessing"] = self.spec.preprocessing.as_dict()
        return facts

    def strata(self) -> np.ndarray:
        """What parts of the split are stratified on: the labels, one row or number a sample.

        Raises:
            UserError: The data set has no labels.
        """
        if self.labels is None:
            raise UserError(f"--train_frac needs labels; split {self.split} of {self.spec.name} has none")
        return self.labels

    # Reading -----------------------------------------------------------------------------------------------------

    def read(self, index: int) -> np.ndarray:
        """One image, float32 (C, H, W) in dB; NaN marks invalid pixels.

        Raises:
            UnreadableSample: The sample cannot be used.
        """
        image = np.empty(self.shape, dtype=np.float32)
        self.read_into(index, image)
        return image

    def read_into(self, index: int, out: np.ndarray) -> None:
        """Fill ``out``, float32 (C, H, W) C-contiguous, with one image in dB; NaN marks invalid pixels.

        Raises:
            UnreadableSample: The sample cannot be used.
        """
        if type(self).read is SarDataset.read:
            raise NotImplementedError(f"{type(self).__name__} must implement read or read_into")
        out[...] = self.read(index)

    def read_many(self, indices: np.ndarray, out: np.ndarray) -> list[tuple[int, UnreadableSample]]:
        """Fill ``out`` (B, C, H, W) with several images.

        Returns:
            (position in ``indices``, error) of each sample that cannot be used; its rows of ``out`` are undefined.
        """
        bad: list[tuple[int, UnreadableSample]] = []
        for position, index in enumerate(indices):
            try:
                self.read_into(int(index), out[position])
            except UnreadableSample as error:
                bad.append((position, error))
        return bad

    def damaged(self, indices: np.ndarray) -> Replaced:
        """What a check finds in the files of some samples that reading each image once leaves out: files that hold the
        same image again, checksums.

        Returns:
            (name, reason) of each sample with a file that is not what was written.
        """
        return []

    def fill(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, Replaced]:
        """Fill ``out`` (B, C, H, W) with the images at ``indices`` and treat unreadable ones as ``on_error`` says.

        Returns:
            The indices of the samples that were really read, int64 (B,), and (name, reason) of those replaced.

        Raises:
            UnreadableSample: A sample cannot be used and ``on_error`` is ``"raise"``, or no neighbour can be used.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"sample indices must lie in [0, {len(self)}), got {indices.min()} to {indices.max()}")
        bad = self.read_many(indices, out)
        if not bad:
            return indices, []
        if self.on_error != "replace":
            raise bad[0][1]
        used = indices.copy()
        replaced: Replaced = []
        for position, error in bad:
            replaced.append((error.name, f"{error.path}: {error.reason}"))
            used[position] = self._read_neighbour(int(indices[position]), out[position], error)
        return used, replaced

    def _read_neighbour(self, index: int, out: np.ndarray, error: UnreadableSample) -> int:
        for step in range(1, min(MAX_TRIES, len(self) - 1) + 1):
            neighbour = (index + step) % len(self)
            if not self.read_many(np.array([neighbour]), out[None]):
                return neighbour
        raise UnreadableSample(
            error.name, error.path, f"{error.reason}; the next {MAX_TRIES} samples cannot be used either"
        )

    # Samples and batches -----------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: ``image`` float32 (C, H, W) in dB with NaN at invalid pixels, ``valid`` bool (C, H, W), ``name``,
        and, when the data set is labelled, ``label``: float32 (classes,) multi-hot or an int64 scalar."""
        position = int(index)
        if position < 0:
            position += len(self)
        batch = self.get_batch(np.array([position]))
        image = batch["image"][0]
        sample: dict[str, Any] = {"image": image, "valid": torch.isfinite(image), "name": batch["name"][0]}
        if "label" in batch:
            sample["label"] = batch["label"][0]
        return sample

    def get_batch(self, indices: np.ndarray, out: np.ndarray | None = None) -> dict[str, Any]:
        """A whole batch.

        Args:
            indices: int64 (B,).
            out: Optional float32 (B, C, H, W) C-contiguous array that is filled and becomes ``image`` without a copy.

        Returns:
            ``image`` float32 (B, C, H, W) in dB, NaN at invalid pixels; ``label`` (unless unlabelled) float32 (B,
            classes) or int64 (B,); ``name`` B strings; ``index`` int64 (B,), the samples really read; ``replaced`` list
            of (name, reason), empty unless samples were unreadable.
        """
        indices = np.asarray(indices, dtype=np.int64)
        images = np.empty((len(indices), *self.shape), dtype=np.float32) if out is None else out
        used, replaced = self.fill(indices, images)
        return self.make_batch(torch.from_numpy(images), used, replaced)

    def make_batch(self, images: torch.Tensor, used: np.ndarray, replaced: Replaced) -> dict[str, Any]:
        """The batch dict around images that have been read."""
        batch: dict[str, Any] = {"image": images}
        labels = self.batch_labels(used)
        if labels is not None:
            batch["label"] = labels
        batch["name"] = BatchNames(self.names, used)
        batch["index"] = torch.from_numpy(np.array(used, dtype=np.int64))
        batch["replaced"] = replaced
        return batch

    def batch_labels(self, indices: np.ndarray) -> torch.Tensor | None:
        """Labels at the given indices as the loss wants them: float32 multi-hot or int64; None when unlabelled."""
        if self.labels is None:
            return None
        rows = np.asarray(self.labels[indices])
        return torch.from_numpy(rows.astype(np.float32 if rows.ndim == 2 else np.int64))

    def subset(self, indices: np.ndarray) -> SarDataset:
        """The samples at the given positions as a data set of its own (label fractions, a few samples for a test)."""
        return SarSubset(self, indices)


class SarSubset(SarDataset):
    """Some samples of another data set, in a given order."""

    def __init__(self, parent: SarDataset, indices: np.ndarray) -> None:
        positions = np.asarray(indices, dtype=np.int64)
        super().__init__(
            parent.spec,
            parent.split,
            parent.statistics,
            parent.names.take(positions),
            None if parent.labels is None else np.asarray(parent.labels[positions]),
            on_error=parent.on_error,
            source=parent.source,
        )
        self.parent = parent
        self.positions = positions
        self.gathers = parent.gathers

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parent.shape

    @property
    def all_finite(self) -> bool:
        return self.parent.all_finite

    @property
    def whole(self) -> SarDataset:
        return self.parent.whole

    @property
    def clusters(self) -> Sequence[str] | None:
        of = self.parent.clusters
        return None if of is None else [of[int(position)] for position in self.positions]

    def read_into(self, index: int, out: np.ndarray) -> None:
        self.parent.read_into(int(self.positions[index]), out)

    def read_many(self, indices: np.ndarray, out: np.ndarray) -> list[tuple[int, UnreadableSample]]:
        return self.parent.read_many(self.positions[indices], out)


class MaskDataset(SarDataset):
    """Images with a label map each: batches hold ``label`` uint8 (B, H, W), class numbers and 255 for ignored pixels.

    A subclass implements :meth:`read_pair`. A sample whose image or map cannot be used counts as one unreadable sample.

    With ``on_error="skip"``, for evaluations, an image without any valid pixel is delivered as NaN with a map that is
    ignored everywhere, so that it counts in no metric, and batches hold ``skipped`` uint8 (B,), 1 for such samples;
    other unreadable samples are errors.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        names: NameList | Sequence[str],
        *,
        on_error: str = "raise",
        source: str | Path = "",
    ) -> None:
        super().__init__(spec, split, statistics, names, None, on_error=on_error, source=source)

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        """Fill ``image`` float32 (C, H, W), NaN at invalid pixels, and ``label`` uint8 (H, W), 255 at ignored pixels.

        Raises:
            UnreadableSample: The sample cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement read_pair")

    def read_into(self, index: int, out: np.ndarray) -> None:
        self.read_pair(index, out, np.empty(self.shape[1:], dtype=np.uint8))

    def strata(self) -> np.ndarray:
        """All samples are alike: parts of the split are drawn at random."""
        return np.zeros(len(self), dtype=np.int64)

    def get_batch(self, indices: np.ndarray, out: np.ndarray | None = None) -> dict[str, Any]:
        """As :meth:`SarDataset.get_batch`, with label maps."""
        indices = np.asarray(indices, dtype=np.int64)
        images = np.empty((len(indices), *self.shape), dtype=np.float32) if out is None else out
        labels = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        skipped = np.zeros(len(indices), dtype=np.uint8)
        used = indices.copy()
        replaced: Replaced = []
        for position, index in enumerate(indices):
            used[position], error = self._read_or_replace(int(index), images[position], labels[position])
            if error is not None and self.on_error == "skip":
                skipped[position] = 1
            elif error is not None:
                replaced.append((error.name, f"{error.path}: {error.reason}"))
        batch = self.make_batch(torch.from_numpy(images), used, replaced)
        batch["label"] = torch.from_numpy(labels)
        if self.on_error == "skip":
            batch["skipped"] = torch.from_numpy(skipped)
        return batch

    def _read_or_replace(self, index: int, image: np.ndarray, label: np.ndarray) -> tuple[int, UnreadableSample | None]:
        """Read a sample, or what stands for it; returns what was read and the error of the sample itself."""
        first: UnreadableSample | None = None
        for step in range(min(MAX_TRIES, len(self) - 1) + 1):
            chosen = (index + step) % len(self)
            try:
                self.read_pair(chosen, image, label)
                return chosen, first
            except UnreadableSample as error:
                if self.on_error == "skip" and isinstance(error, NoValidPixel):
                    image[...], label[...] = np.nan, IGNORED
                    return chosen, error
                if self.on_error != "replace":
                    raise
                first = first or error
        assert first is not None
        raise UnreadableSample(
            first.name, first.path, f"{first.reason}; the next {MAX_TRIES} samples cannot be used either"
        )

    def subset(self, indices: np.ndarray) -> SarDataset:
        return MaskSubset(self, indices)


class MaskSubset(MaskDataset):
    """Some samples of another data set with label maps, in a given order."""

    def __init__(self, parent: MaskDataset, indices: np.ndarray) -> None:
        positions = np.asarray(indices, dtype=np.int64)
        super().__init__(
            parent.spec,
            parent.split,
            parent.statistics,
            parent.names.take(positions),
            on_error=parent.on_error,
            source=parent.source,
        )
        self.parent = parent
        self.positions = positions

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parent.shape

    @property
    def whole(self) -> SarDataset:
        return self.parent.whole

    @property
    def clusters(self) -> Sequence[str] | None:
        of = self.parent.clusters
        return None if of is None else [of[int(position)] for position in self.positions]

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        self.parent.read_pair(int(self.positions[index]), image, label)


def finish_image(image: np.ndarray, name: str, path: str | Path | Callable[[], str], bands: Sequence[str] = ()) -> None:
    """Turn +-inf, and dB that no sensor gives, into NaN in place; refuse an image with a band without a valid pixel.

    Args:
        image: float32 (C, H, W) in dB.
        name: The sample's name, for the error.
        path: Its file or place, or a function that tells it (called only for the error).
        bands: Names of its bands; those of Sentinel-1 are held to `DB_RANGE`.

    Raises:
        NoValidPixel: A band holds no valid pixel.
    """
    finite = np.isfinite(image)
    radar = [number for number, band in enumerate(bands) if band in SAR_BANDS]
    low, high = DB_RANGE
    # A comparison with NaN is false, too: then `finite` tells.
    if radar and not (low <= image[radar].min() and image[radar].max() <= high):
        finite[radar] &= (image[radar] >= low) & (image[radar] <= high)
    if finite.all():
        return
    image[~finite] = np.nan
    empty = ~finite.reshape(len(image), -1).any(axis=1)
    if empty.any():
        place = path() if callable(path) else path
        named = [bands[number] if bands else str(number) for number in np.flatnonzero(empty).tolist()]
        raise NoValidPixel(name, place, f"no valid pixel in band {', '.join(named)} (all NaN, or no dB)")
