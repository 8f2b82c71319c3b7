"""The data set of image pairs: from a folder of .npy pairs or from the store, the same samples bit by bit.

Samples hold linear power as stored. :func:`power_to_db` turns whole batches into decibel on the device.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sarwmix.data.base import EMPTY_BAND, NameList, Replaced, SarDataset, SharedImages, UnreadableSample, finish_image
from sarwmix.data.spec import DatasetSpec, Statistics, parse_split
from sarwmix.sen12flood import layout as files
from sarwmix.sen12flood.layout import PairRow
from sarwmix.sen12flood.metadata import parse_pair_name
from util.arrays import load_npy, read_npy_header
from util.errors import UserError
from util.files import open_file
from util.log import get_logger
from util.seeding import derive_seed

ZERO_POWER = 1e-6  # what a pixel of zero power counts as: -60 dB
PREPARE = "run scripts/prepare_sen12flood.sh"
_LARGEST = 4096  # S of an image; the published ones have 512
STORED = ("VH", "VV")  # bands of the files of both layouts, in their order


def power_to_db(power: Tensor) -> Tensor:
    """Linear power -> dB, any shape. Zero counts as 1e-6 (-60 dB); NaN, infinite and negative values become NaN."""
    db = 10.0 * torch.log10(torch.where(power == 0, ZERO_POWER, power))
    return torch.where(torch.isfinite(db), db, torch.nan)


class PairDataset(SarDataset):
    """Pairs of images of one place.

    A sample is ``image1``, ``image2`` float32 (C, S, S), the bands of ``spec`` in **linear power** as stored, ``label``
    int64 (1: the second image shows a flood), ``valid1``, ``valid2`` bool (finite and not negative), ``name``. A batch
    has no masks: :func:`power_to_db` marks invalid pixels.

    Args:
        spec: The registry's entry.
        split: The split as the user gave it.
        statistics: The statistics in use, in dB.
        root: The prepared folder.
        pairs: The samples.
        size: S.
        stored: Whether ``root`` is a store, which keeps each image once.
        on_error: See :class:`SarDataset`.
        manifested: Whether our preparation wrote the folder, with tables of checksums.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        pairs: Sequence[PairRow],
        *,
        size: int,
        stored: bool,
        on_error: str = "raise",
        manifested: bool = False,
    ) -> None:
        labels = np.array([pair.label for pair in pairs], dtype=np.int64)
        super().__init__(spec, split, statistics, [p.name for p in pairs], labels, on_error=on_error, source=root)
        self.root = root
        self.size = size
        self.stored = stored
        self.manifested = manifested
        self._channels = [STORED.index(band) for band in spec.bands]
        # Row of the first and second image in the store; (N, 2).
        self.rows = np.array([(pair.row1, pair.row2) for pair in pairs], dtype=np.int64)
        self._folders = NameList.of([pair.split for pair in pairs])
        self._images: np.ndarray | None = None

    def single_images(self) -> SarDataset:
        """Each distinct image in dB, as statistics and checks look at them."""
        return PairImages(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.spec.bands), self.size, self.size

    @property
    def shared_images(self) -> SharedImages | None:
        return SharedImages(("image1", "image2"), self.rows, self.read_rows) if self.stored else None

    # Reading -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the store themselves; a memory map must not be copied into them."""
        return {**self.__dict__, "_images": None}

    @property
    def images(self) -> np.ndarray:
        """The store as (M, 2, S, S), read on demand."""
        if self._images is None:
            try:
                self._images = load_npy(self.root / files.STORE, dtype="float32", mapped=True)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.root / files.STORE} cannot be read ({error}); {PREPARE} again") from error
        return self._images

    def read_rows(self, rows: np.ndarray) -> Tensor:
        """Images of the store, (B, C, S, S) float32 linear power."""
        return torch.from_numpy(np.ascontiguousarray(self.images[np.asarray(rows)[:, None], self._channels]))

    def read_into(self, index: int, out: np.ndarray) -> None:
        """Fill ``out`` (2, C, S, S): time, band, row, column; each image lies in one piece, both together need not."""
        if self.stored:
            for place, row in enumerate(self.rows[index]):
                for channel, band in enumerate(self._channels):
                    out[place, channel] = self.images[row, band]
        else:
            self._read_file(index, out)
        # One pass tells whether all is well: NaN, inf and -inf all leave a sum that is not finite.
        if not np.isfinite(out.sum(dtype=np.float64)):
            usable = np.isfinite(out).any(axis=(2, 3))
            if not usable.all():
                raise UnreadableSample(self.names[index], self.root, EMPTY_BAND)

    def damaged(self, indices: np.ndarray) -> Replaced:
        """Both images of each pair against the CRC-32 in images.csv; without such a table, whether the file is whole
        and holds pixels. Images of a store are looked at once, however many pairs share them."""
        known = files.image_checksums(self.root) if self.manifested else {}
        seen: dict[int, str | None] = {}  # by row of a store

        def wrong(index: int) -> str | None:
            folder, first, second, _ = parse_pair_name(self.names[index])
            both = np.empty((2, len(STORED), self.size, self.size), dtype=np.float32)
            try:
                if self.stored:
                    for place, row in enumerate(self.rows[index]):
                        if row not in seen:
                            both[place] = self.images[row]
                            seen[int(row)] = compare(both[place], f"{folder}/{(first, second)[place]}")
                    return next((found for row in self.rows[index] if (found := seen[int(row)]) is not None), None)
                self._read_file(index, both, every_band=True)
            except UnreadableSample as error:
                return f"{error.path}: {error.reason}"
            reasons = [compare(image, f"{folder}/{name}") for image, name in zip(both, (first, second), strict=True)]
            if not np.isfinite(both).any(axis=(2, 3)).all():
                reasons.append(f"{self.root}: {EMPTY_BAND}")
            return next((text for text in reasons if text is not None), None)

        def compare(image: np.ndarray, name: str) -> str | None:
            if name in known and zlib.crc32(image.tobytes()) != known[name]:
                return f"image {name} differs from its checksum; {PREPARE} again with --overwrite"
            return None

        reasons = [(self.names[int(index)], wrong(int(index))) for index in indices]
        return [(name, reason) for name, reason in reasons if reason is not None]

    def _read_file(self, index: int, out: np.ndarray, *, every_band: bool = False) -> None:
        name = self.names[index]
        path = self.root / self._folders[index] / f"{name}.npy"
        again = f"{PREPARE} again with --overwrite"
        try:
            with open_file(path) as stream:
                header = read_npy_header(stream)
                wanted = (2, len(STORED), self.size, self.size)
                if header.shape != wanted or header.fortran or header.dtype != np.dtype("<f4"):
                    what = f"holds {header.dtype} of shape {header.shape}, expected float32 of shape {wanted}; {again}"
                    raise UnreadableSample(name, path, what)
                count = sum(_read_bytes(stream, i) if every_band else self._read_image(stream, i) for i in out)
        except FileNotFoundError:
            raise UnreadableSample(name, path, f"does not exist; {again}") from None
        except (OSError, ValueError) as error:
            raise UnreadableSample(name, path, f"is no readable .npy file ({error}); {again}") from error
        whole = 4 * int(np.prod(wanted))
        if count != whole:
            raise UnreadableSample(name, path, f"is truncated: {count} of {whole} bytes of pixels; {again}")

    def _read_image(self, stream: BinaryIO, out: np.ndarray) -> int:
        """Read the next image of a file into ``out`` (C, S, S); returns how many bytes were there."""
        if self.spec.bands == STORED and out.flags.c_contiguous:
            return _read_bytes(stream, out)
        image = np.empty((len(STORED), self.size, self.size), dtype=np.float32)
        count = _read_bytes(stream, image)
        out[...] = image[self._channels]
        return count

    # Samples and batches -----------------------------------------------------------------------------------------

    def get_batch(self, indices: np.ndarray, out: np.ndarray | None = None) -> dict[str, Any]:
        """``image1``, ``image2`` float32 (B, C, S, S) linear power, ``label`` int64 (B,), ``name``, ``index``,
        ``replaced``; ``out``, if given, is float32 (2, B, C, S, S)."""
        indices = np.asarray(indices, dtype=np.int64)
        # All first images, then all second ones: either half is contiguous and goes to a GPU without another copy.
        images = np.empty((2, len(indices), *self.shape), dtype=np.float32) if out is None else out
        used, replaced = self.fill(indices, images.swapaxes(0, 1))
        return self.make_batch(torch.from_numpy(images), used, replaced)

    def make_batch(self, images: Tensor, used: np.ndarray, replaced: Replaced) -> dict[str, Any]:
        """The batch dict around images (2, B, C, S, S) that have been read."""
        batch = super().make_batch(images, used, replaced)
        both = batch.pop("image")
        return {"image1": both[0], "image2": both[1], **batch}

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = int(index) + (len(self) if int(index) < 0 else 0)
        batch = self.get_batch(np.array([position]))
        sample: dict[str, Any] = {"name": batch["name"][0], "label": batch["label"][0]}
        for number in ("1", "2"):
            image = batch[f"image{number}"][0]
            sample[f"image{number}"] = image
            sample[f"valid{number}"] = torch.isfinite(image) & (image >= 0)
        return sample

    def subset(self, indices: np.ndarray) -> PairDataset:  # type: ignore[override]
        """The pairs at the given positions."""
        picked = []
        for i in np.asarray(indices, dtype=np.int64):
            folder, first, second, label = parse_pair_name(self.names[int(i)])
            row1, row2 = (int(row) for row in self.rows[i])
            picked.append(PairRow(self._folders[int(i)], self.names[int(i)], folder, first, second, label, row1, row2))
        return PairDataset(
            self.spec,
            self.split,
            self.statistics,
            self.root,
            picked,
            size=self.size,
            stored=self.stored,
            on_error=self.on_error,
            manifested=self.manifested,
        )


def _read_bytes(stream: BinaryIO, out: np.ndarray) -> int:
    """Fill a contiguous array from a file; returns how many bytes were there."""
    return stream.readinto(out.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]  # of buffered files


def held_out_sequences(pairs: Sequence[PairRow], fraction: float) -> set[str]:
    """Training sequences that are held out for selection; whole ones, since pairs of one place resemble each other.

    Sequences with and without flood pairs are drawn separately, at least one of the former, in an order that follows
    from their ids alone: neither the seed of a run nor other sequences change it.

    Args:
        pairs: Pairs of the training split.
        fraction: Share of the sequences, between 0 and 1.

    Raises:
        UserError: A fraction that leaves no sequence for training or none for selection.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_frac is the share of training sequences held out, between 0 and 1: got {fraction}")
    flooded = {pair.folder for pair in pairs if pair.label == 1}
    dry = {pair.folder for pair in pairs} - flooded
    held: set[str] = set()
    for group, least in ((flooded, 1), (dry, 0)):
        order = sorted(group, key=lambda folder: (derive_seed("sen12flood", "val_frac", folder), folder))
        held.update(order[: max(least, round(fraction * len(order)))])
    if flooded <= held or not flooded:
        raise UserError(
            f"val_frac {fraction} of {len(flooded)} training sequence(s) with floods leaves none to train or to "
            "select; expected at least two: prepare more sequences, or select on test (--select_on test, as published)"
        )
    return held


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str,
    val_frac: float | str | None = None,
) -> PairDataset:
    """Open a prepared folder of either layout; the registry calls this.

    Args:
        spec: The registry's entry.
        data_path: What ``scripts/prepare_sen12flood.sh`` wrote; a folder with ``train/`` and ``test/`` of ``.npy``
            pairs made elsewhere is accepted, too.
        split: ``train``, ``val``, ``test``, also joined with ``+``.
        statistics: In dB.
        on_error: ``"raise"`` or ``"replace"``.
        val_frac: Share of the training sequences that make up ``val`` and are no part of ``train``.

    Raises:
        UserError: Nothing prepared there, an unfinished preparation, or ``val`` without ``val_frac``.
    """
    root = Path(data_path)
    manifest = files.read_manifest(root)
    if manifest is None:
        pairs, size, stored = *_scan(root), False
    else:
        if manifest.get("status") != files.COMPLETE:
            raise UserError(
                f"{root} is an unfinished preparation ({manifest.get('status')}); run the same command again"
            )
        problems = manifest.get("problems") or []
        if isinstance(problems, list) and problems:
            get_logger().warning("%s was prepared with %d problem(s); see its manifest.json", root, len(problems))
        pairs = files.read_pairs(root)
        size = _side(root, manifest)
        stored = manifest["layout"] == "store"
        if stored:
            _check_store(root, manifest, pairs)
    chosen = [pair for name in parse_split(spec, split) for pair in _of_split(pairs, name, val_frac)]
    return PairDataset(
        spec,
        split,
        statistics,
        root,
        chosen,
        size=size,
        stored=stored,
        on_error=on_error,
        manifested=manifest is not None,
    )


def _of_split(pairs: Sequence[PairRow], name: str, val_frac: float | str | None) -> list[PairRow]:
    if name == "test" or val_frac is None:
        if name == "val":
            raise UserError(
                "SEN12-FLOOD has no validation split; --val_frac 0.1 holds out a tenth of the training sequences as val"
            )
        return [pair for pair in pairs if pair.split == name]
    train = [pair for pair in pairs if pair.split == "train"]
    try:
        fraction = float(val_frac)
    except ValueError:
        raise UserError(f"val_frac is a number between 0 and 1, got {val_frac!r}") from None
    held = held_out_sequences(train, fraction)
    return [pair for pair in train if (pair.folder in held) == (name == "val")]


def _side(root: Path, manifest: dict[str, Any]) -> int:
    """S of a prepared folder.

    Raises:
        UserError: The manifest does not say what an image is.
    """
    shape, layout = manifest.get("image_shape"), manifest.get("layout")
    good = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int for side in shape)
    if not good or shape[0] != len(STORED) or shape[1] != shape[2] or not 0 < shape[1] <= _LARGEST:  # type: ignore[index]
        raise UserError(
            f"{root / files.MANIFEST} is damaged: image_shape is {str(shape)[:60]}, expected [2, S, S]; {PREPARE} again"
        )
    if layout not in ("npy", "store"):
        raise UserError(f"{root / files.MANIFEST} is damaged: layout is {str(layout)[:60]}; {PREPARE} again")
    return int(shape[1])  # type: ignore[index]


def _check_store(root: Path, manifest: dict[str, Any], pairs: Sequence[PairRow]) -> None:
    path = root / files.STORE
    try:
        with open_file(path) as stream:
            header = read_npy_header(stream)
            room = os.fstat(stream.fileno()).st_size - header.size
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {PREPARE} again with --overwrite") from error
    count = manifest.get("images")
    if type(count) is not int or count < 1:
        raise UserError(f"{root / files.MANIFEST} is damaged: images is {str(count)[:60]}; {PREPARE} again")
    wanted = (count, *manifest["image_shape"])
    if header.shape != wanted or header.fortran or header.dtype != np.dtype("<f4") or room != 4 * math.prod(wanted):
        raise UserError(
            f"{path} holds {header.dtype} of shape {header.shape} in {room} bytes, expected float32 of shape {wanted}; "
            f"{PREPARE} again with --overwrite"
        )
    if any(not 0 <= row < wanted[0] for pair in pairs for row in (pair.row1, pair.row2)):
        raise UserError(f"{root / files.PAIRS} names rows that {path} does not have; {PREPARE} again with --overwrite")


def _scan(root: Path) -> tuple[list[PairRow], int]:
    """Pairs in a folder without a manifest: ``{train,test}/<folder>__<fileA>__<fileB>__<label>.npy``."""
    pairs = []
    for split in ("train", "test"):
        folder = root / split
        names = sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
        for name in names:
            if not name.endswith(".npy") or name.startswith("."):
                continue
            try:
                sequence, first, second, label = parse_pair_name(name[:-4])
            except ValueError as error:
                raise UserError(f"{folder / name}: {error}; remove the file, or {PREPARE}") from None
            pairs.append(PairRow(split, name[:-4], sequence, first, second, label, -1, -1))
    if not pairs:
        raise UserError(
            f"{root} holds no prepared SEN12-FLOOD: no manifest.json of ours and no train/ or test/ with "
            f"<folder>__<fileA>__<fileB>__<label>.npy; {PREPARE} first"
        )
    first_pair = files.pair_path(root, pairs[0])
    try:
        shape = load_npy(first_pair, mapped=True).shape
    except (OSError, ValueError) as error:
        raise UserError(f"{first_pair} cannot be read ({error}); {PREPARE} again") from error
    if len(shape) != 4 or shape[:2] != (2, 2) or shape[2] != shape[3] or not 0 < shape[2] <= _LARGEST:
        raise UserError(f"{first_pair} has shape {shape}, expected (2, 2, S, S): time, (VH, VV), rows, columns")
    return pairs, int(shape[2])


class PairImages(SarDataset):
    """Images of pairs, (2, S, S) in dB; an image that several pairs share appears once.

    Args:
        pairs: Pairs in linear power.
    """

    def __init__(self, pairs: PairDataset) -> None:
        places: dict[str, tuple[int, int]] = {}
        for index in range(len(pairs)):
            folder, first, second, _ = parse_pair_name(pairs.names[index])
            for time, acquisition in enumerate((first, second)):
                places.setdefault(f"{folder}/{acquisition}", (index, time))
        super().__init__(
            pairs.spec,
            pairs.split,
            pairs.statistics,
            list(places),
            None,
            on_error=pairs.on_error,
            source=pairs.source,
        )
        self.pairs = pairs
        self.places = np.array(list(places.values()), dtype=np.int64)  # (N, 2): pair, first or second image

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pairs.shape

    def read_into(self, index: int, out: np.ndarray) -> None:
        pair, time = (int(value) for value in self.places[index])
        if self.pairs.stored:
            power = self.pairs.read_rows(self.pairs.rows[pair, time, None])[0]
        else:
            both = np.empty((2, *self.shape), dtype=np.float32)
            try:
                self.pairs.read_into(pair, both)
            except UnreadableSample as error:
                raise UnreadableSample(self.names[index], error.path, error.reason) from error
            power = torch.from_numpy(both[time])
        out[...] = power_to_db(power).numpy()
        finish_image(out, self.names[index], self.source, self.spec.bands)
