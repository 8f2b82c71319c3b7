"""OMBRIA: Sentinel-1 VV before and after floods, with masks of Copernicus EMS (doi 10.1109/JSTARS.2022.3155559).

Layout, as a clone of github.com/geodrak/OMBRIA has it, in ``<data_path>`` or ``<data_path>/OmbriaS1``:
``{train,test}/{BEFORE,AFTER,MASK}/S1_{before,after,mask}_<number>.png``, 256 px, 8 bits.

Each image was stretched from its own minimum to its own maximum of dB, so that its level is lost. Here 0..255 stands
for -30..0 dB; "dB" is an assumption. Images with consecutive numbers are often neighbours, and the official split is
drawn over them: 67 % of its test images have a neighbour in train. Blocks of 50 numbers are roughly events;
``by=events``, the default, keeps them whole.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sarwmix.data.base import MaskDataset, SarDataset, UnreadableSample
from sarwmix.data.spec import DatasetSpec, EmptySplit, Statistics, parse_split
from util.errors import UserError
from util.files import open_file
from util.log import get_logger

BLACK, WHITE = -30.0, 0.0
"""dB that 0 and 255 stand for."""
BLOCK = 50
OFFICIAL = ("train", "test")
EVENTS = {3: "val", 4: "test"}
"""Block number modulo 5 -> split; all others are train."""


def agrees(number: int) -> bool:
    """Whether the mask fits the image: measured by how well darkness after the flood finds it (AUC .81 - .99)."""
    return number < 450 or 700 <= number < 750


class Ombria(MaskDataset):
    """Pairs with flood masks; names are ``<block>_<number>``, such as ``e02_0115``."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        found: Sequence[tuple[str, int]],
        *,
        on_error: str = "raise",
    ) -> None:
        names = [f"e{number // BLOCK:02d}_{number:04d}" for _, number in found]
        super().__init__(spec, split, statistics, names, on_error=on_error, source=root)
        self.found = list(found)

    def path(self, index: int, kind: str) -> str:
        """File of a pair: ``kind`` is BEFORE, AFTER or MASK."""
        part, number = self.found[index]
        return f"{self.source}/{part}/{kind}/S1_{kind.lower()}_{number:04d}.png"

    def _read(self, index: int, kind: str) -> np.ndarray:
        from PIL import Image

        path = self.path(index, kind)
        try:
            # Of a larger image only the header is read.
            with open_file(path) as stream, Image.open(stream, formats=("PNG",)) as image:
                if image.size != self.shape[:0:-1]:
                    raise ValueError(f"has shape {image.size[::-1]}, expected (256, 256)")
                values = np.asarray(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zlib.error, struct.error) as error:
            raise UnreadableSample(self.names[index], path, str(error)) from error
        if values.dtype != np.uint8 or values.shape != self.shape[1:]:
            what = f"is {values.dtype} {values.shape}, expected uint8 (256, 256)"
            raise UnreadableSample(self.names[index], path, what)
        return values

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        for channel, band in enumerate(self.spec.bands):
            image[channel] = BLACK + self._read(index, band) * np.float32((WHITE - BLACK) / 255)
        label[...] = self._read(index, "MASK") > 127


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    by: str = "events",
    masks: str = "all",
) -> SarDataset:
    """Open OMBRIA.

    Args:
        spec: The registry's entry.
        data_path: Folder with ``train`` and ``test``, or the clone.
        split: Wanted splits.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        by: ``events``: whole blocks of 50 numbers, 3 of 5 train, one each val and test; ``official``: the published
            folders train and test, which leak.
        masks: ``all``, or ``agreeing``: without the numbers whose masks do not fit the images (450-699, 750-).

    Raises:
        UserError: No such layout, unknown options, a split without pairs, or pairs that are not whole.
    """
    if by not in ("events", "official") or masks not in ("all", "agreeing"):
        raise UserError(f"ombria: by={by} masks={masks}; expected by=events or official, masks=all or agreeing")
    wanted = parse_split(spec, split)
    root = next((place for place in (data_path, data_path / "OmbriaS1") if (place / "train" / "BEFORE").is_dir()), None)
    if root is None:
        raise UserError(f"{data_path} does not hold OMBRIA: there is no train/BEFORE in it or in its folder OmbriaS1")
    found: list[tuple[str, int]] = []
    for part in OFFICIAL:
        files = sorted((root / part / "BEFORE").glob("S1_before_*.png"))
        numbers = [int(file.stem.rsplit("_", 1)[1]) for file in files]
        found += [(part, number) for number in numbers]
    lost = [f"{root}/{part}/{kind}/S1_{kind.lower()}_{number:04d}.png" for part, number in found
            for kind in (*spec.bands, "MASK")]  # fmt: skip
    lost = [path for path in lost if not Path(path).is_file()]
    if lost:
        raise UserError(f"{len(lost)} files of OMBRIA are missing; the first is {lost[0]}; clone it again")
    if by == "official":
        get_logger().warning("ombria: 67 % of the official test images have a neighbour in train; by=events has none")
    kept = []
    for part, number in sorted(found, key=lambda item: item[1]):
        of = part if by == "official" else EVENTS.get(number // BLOCK % 5, "train")
        if of in wanted and (masks == "all" or agrees(number)):
            kept.append((part, number))
    if not kept:
        hint = "; the official split has no val: by=events has one" if by == "official" else ""
        raise EmptySplit(f"split {split!r} of ombria has no pair in {root}{hint}")
    return Ombria(spec, split, statistics, root, kept, on_error=on_error)
