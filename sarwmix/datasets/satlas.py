"""Satlas land cover: Sentinel-2 tiles of 512 px with label maps, grouped into 5 classes.

Layout (SatlasPretrain): ``sentinel2/<image>/{tci,b05,b06,b07,b08,b11,b12}/<column>_<row>.png``,
``static/<column>_<row>/land_cover.png``, ``metadata/{train,test}_lowres.json`` (lists of [column, row]).

Pixels are 8-bit: ``tci`` is ESA's true-colour image, in which 255 is a reflectance of 0.3558; the other bands are the
stored values divided by 32. Both are brought back to reflectance x 10^4 (top of atmosphere), the unit of the Sentinel-2
chips of Sen1Floods11, so that a model can go on there. A pixel that is 0 in every band has no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sarwmix.data.base import MaskDataset, SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import fraction, held_out, map_labels, read_raster, whole_number
from sarwmix.data.spec import DatasetSpec, EmptySplit, Statistics, parse_split
from util.errors import UserError
from util.files import JSON_LIMIT, parse_json, read_bytes
from util.log import get_logger

TCI_BANDS = ("B04", "B03", "B02")  # red, green, blue
TCI_SCALE = 3558 / 255
BAND_SCALE = 32.0
CATEGORIES = ("invalid", "water", "developed", "tree", "shrub", "grass", "crop", "bare", "snow", "wetland", "mangroves",
              "moss")  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "background": ("bare", "snow", "wetland", "mangroves", "moss"),
    "water": ("water",),
    "developed": ("developed",),
    "tree, shrub, grass": ("tree", "shrub", "grass"),
    "crop": ("crop",),
}
"""Classes of the data set and the categories of Satlas that they hold; ``invalid`` is ignored."""
IGNORED = 255


def label_table(classes: Sequence[str]) -> dict[int, int]:
    """Value in ``land_cover.png`` -> number of the class whose group names its category."""
    owner = {category: classes.index(name) for name, members in GROUPS.items() for category in members}
    return {value: owner.get(category, IGNORED) for value, category in enumerate(CATEGORIES)}


class Satlas(MaskDataset):
    """Tiles with land cover; names are ``<column>_<row>``."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        names: Sequence[str],
        images: Sequence[str],
        *,
        on_error: str = "raise",
    ) -> None:
        """
        Args:
            images: Folder below ``sentinel2`` that each tile is read from.
        """
        super().__init__(spec, split, statistics, names, on_error=on_error, source=root)
        self.root = str(root)
        folders = sorted(set(images))
        self.folders = folders
        self.image_of = np.array([folders.index(folder) for folder in images], dtype=np.int64)
        self.table = label_table(spec.classes)

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        name = self.names[index]
        folder = f"{self.root}/sentinel2/{self.folders[int(self.image_of[index])]}"
        path = ""
        empty = np.ones(image.shape[1:], dtype=bool)
        try:
            colour: np.ndarray | None = None
            for channel, band in enumerate(self.spec.bands):
                if band in TCI_BANDS:
                    path = f"{folder}/tci/{name}.png"
                    colour = self._read(path, image.shape[1:], bands=3) if colour is None else colour
                    values, scale = colour[TCI_BANDS.index(band)], TCI_SCALE
                else:
                    path = f"{folder}/{band.lower()}/{name}.png"
                    values, scale = self._read(path, image.shape[1:], bands=1)[0], BAND_SCALE
                empty &= values == 0
                image[channel] = values * np.float32(scale)
            path = f"{self.root}/static/{name}/land_cover.png"
            label[...] = map_labels(self._read(path, image.shape[1:], bands=1)[0], self.table)
        except GeoTiffError as error:
            raise UnreadableSample(name, path, str(error)) from error
        image[:, empty] = np.nan
        finish_image(image, name, folder, self.spec.bands)

    @staticmethod
    def _read(path: str, shape: tuple[int, ...], *, bands: int) -> np.ndarray:
        raster = read_raster(path)
        if len(raster.values) != bands or raster.values.shape[1:] != shape or raster.values.dtype != np.uint8:
            found = "x".join(map(str, raster.values.shape))
            raise GeoTiffError(
                f"holds {found} values of type {raster.values.dtype}, expected {bands}x{shape[0]}x{shape[1]} of uint8"
            )
        return raster.values


def read_tiles(path: Path) -> list[str]:
    """Tile names of a split list, a JSON list of [column, row].

    Raises:
        UserError: The file is missing or holds something else.
    """
    try:
        listed = parse_json(read_bytes(path, JSON_LIMIT))
        return [f"{int(column)}_{int(row)}" for column, row in listed]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a JSON list of [column, row] of the split's tiles") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no JSON list of [column, row]: {error}") from error


def find_images(root: Path) -> dict[str, str]:
    """Tile -> folder of the image it is read from: of several the last by time of acquisition, as the static labels
    belong to the most recent image.

    Raises:
        UserError: There is no image.
    """
    found: dict[str, tuple[str, str]] = {}
    folder = root / "sentinel2"
    images = sorted(path for path in folder.iterdir() if (path / "tci").is_dir()) if folder.is_dir() else []
    if not images:
        raise UserError(f"{root} does not hold Satlas: there is no sentinel2/<image>/tci/<column>_<row>.png")
    for image in images:
        parts = image.name.split("_")
        time = parts[2] if len(parts) > 2 else image.name  # S2A_MSIL1C_20160808T181452_...
        for tile in (image / "tci").iterdir():
            if tile.suffix == ".png" and (time, image.name) > found.get(tile.stem, ("", "")):
                found[tile.stem] = (time, image.name)
    return {tile: name for tile, (_, name) in found.items()}


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    val_frac: float | str | None = None,
    seed: int | str = 0,
    missing: str = "error",
) -> SarDataset:
    """Open Satlas land cover.

    Args:
        spec: The registry's entry.
        data_path: Folder with sentinel2, static and metadata.
        split: ``train``, ``test``, or ``val`` with ``val_frac``.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        val_frac: Share of train that becomes val.
        seed: Decides that share.
        missing: ``error``, or ``skip``: listed tiles without image or land cover are left out, and counted in the log.

    Raises:
        UserError: No such layout, absent tiles, an empty split.
    """
    if missing not in ("error", "skip"):
        raise UserError(f"option missing must be error or skip, not {missing!r}")
    images = find_images(data_path)
    share = fraction("val_frac", val_frac)
    names: list[str] = []
    for part in parse_split(spec, split):
        listed = read_tiles(data_path / "metadata" / f"{'test' if part == 'test' else 'train'}_lowres.json")
        absent = [
            tile
            for tile in listed
            if tile not in images or not (data_path / "static" / tile / "land_cover.png").is_file()
        ]
        if absent and missing == "error":
            raise UserError(
                f"{len(absent)} of {len(listed)} tiles of split {part!r} have no image or no land_cover.png in "
                f"{data_path}; the first is {absent[0]}. Complete the data, or leave such tiles out with "
                "--data_option missing=skip (not every tile of Satlas has land cover)"
            )
        if absent:
            get_logger().warning("satlas %s: %d of %d listed tiles are left out", part, len(absent), len(listed))
        lost = set(absent)
        kept = [tile for tile in listed if tile not in lost]
        if part != "test":
            held = np.zeros(len(kept), dtype=bool)
            if share is not None and kept:
                held = held_out(len(kept), share, seed=whole_number("seed", seed))
            kept = [tile for tile, out in zip(kept, held, strict=True) if out == (part == "val")]
        if not kept:
            hint = "; --val_frac 0.1 holds out a tenth of train" if part == "val" else ""
            raise EmptySplit(f"split {part!r} of satlas in {data_path} has no tile{hint}")
        names += kept
    return Satlas(spec, split, statistics, data_path, names, [images[name] for name in names], on_error=on_error)
