"""Sen1Floods11, hand-labelled chips of 512 px: Sentinel-1 (VV, VH in dB), Sentinel-2 (13 bands, TOA x 10^4), water.

Layouts (docs/data_neighbours.md): the official one, ``data/flood_events/HandLabeled/{S1Hand,S2Hand,LabelHand}`` with
``splits/flood_handlabeled/flood_{train,valid,test,bolivia}_data.csv``, or the same folders directly in ``data_path``
with ``splits/flood_{train,valid,test}_data.{csv,txt}``. Labels: -1 no data (ignored), 0 no water, 1 water.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sarwmix.data.base import MaskDataset, NoValidPixel, SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import Grid, band_numbers, check_same_grid, list_files, map_labels, read_raster
from sarwmix.data.spec import SAR_BANDS, DatasetSpec, EmptySplit, Statistics, parse_split
from util.errors import UserError
from util.log import get_logger
from util.text import read_text, separator_of

S1_ORDER = ("VV", "VH")
S2_ORDER = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
LABELS = {-1: 255, 0: 0, 1: 1}
FOLDERS = ("S1Hand", "S2Hand", "LabelHand")
PLACES = ("", "data/flood_events/HandLabeled", "flood_events/HandLabeled", "HandLabeled",
          "v1.1/data/flood_events/HandLabeled")  # fmt: skip
LISTS = ("splits/flood_handlabeled", "splits", "v1.1/splits/flood_handlabeled")
OFFICIAL_NAMES = {"train": "train", "val": "valid", "test": "test", "bolivia": "bolivia"}
HOLD_OUT = "Bolivia_"


class Sen1Floods11(MaskDataset):
    """Chips with water masks; names are those of the chips, such as ``Ghana_103272``."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        names: Sequence[str],
        *,
        on_error: str = "raise",
    ) -> None:
        super().__init__(spec, split, statistics, names, on_error=on_error, source=root)
        self.root = str(root)
        self.groups = [
            (folder, order, [spec.bands.index(band) for band in spec.bands if (band in SAR_BANDS) == sar])
            for folder, order, sar in (("S1Hand", S1_ORDER, True), ("S2Hand", S2_ORDER, False))
        ]

    def path(self, name: str, folder: str) -> str:
        """File of a chip in one of the folders."""
        return f"{self.root}/{folder}/{name}_{folder}.tif"

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        name = self.names[index]
        path, grid = "", None
        try:
            for folder, order, channels in self.groups:
                if not channels:
                    continue
                path = self.path(name, folder)
                wanted = [self.spec.bands[channel] for channel in channels]
                grid = self._read_bands(path, wanted, order, image, channels, grid)
            path = self.path(name, "LabelHand")
            stored = read_raster(path, numbers=[1])
            assert grid is not None
            check_same_grid(grid, stored.grid, path)
            label[...] = map_labels(stored.values[0], LABELS)
        except GeoTiffError as error:
            raise UnreadableSample(name, path, str(error)) from error
        try:
            finish_image(image, name, self.path(name, "S1Hand"), self.spec.bands)
        except NoValidPixel as error:
            raise NoValidPixel(
                error.name, error.path, f"{error.reason}; --data_option skip={name} leaves the chip out"
            ) from error

    def _read_bands(
        self,
        path: str,
        wanted: Sequence[str],
        order: Sequence[str],
        image: np.ndarray,
        channels: Sequence[int],
        grid: Grid | None,
    ) -> Grid:
        raster = read_raster(path)
        height, width = raster.values.shape[1:]
        if (height, width) != image.shape[1:]:
            raise GeoTiffError(f"has {height}x{width} pixels, expected {image.shape[1]}x{image.shape[2]}")
        if grid is not None:
            check_same_grid(grid, raster.grid, path)
        places = band_numbers(raster.names, wanted, order)
        if order is S2_ORDER:
            # Zero is declared as no-data, but the cirrus band is 0 over much clear land: only all bands say no data.
            values = raster.values.astype(np.float32)
            values[:, (raster.values == 0).all(axis=0)] = np.nan
        else:
            values = raster.floats()
        image[list(channels)] = values[places]
        return raster.grid


def find_root(data_path: Path) -> Path:
    """The folder with S1Hand and LabelHand.

    Raises:
        UserError: There is none; the message lists where was looked.
    """
    for place in PLACES:
        if (data_path / place / "LabelHand").is_dir():
            return data_path / place
    looked = ", ".join(str(data_path / place / "LabelHand") for place in PLACES)
    raise UserError(f"{data_path} does not hold Sen1Floods11: there is none of {looked}")


def read_list(path: Path) -> list[str]:
    """Chip names of a list: first column of a CSV file, or one a line, with or without ``_S1Hand.tif``.

    Raises:
        UserError: The list is empty or not readable.
    """
    names = []
    try:
        lines = read_text(path).splitlines()
        for row in csv.reader(lines, delimiter=separator_of(lines[0] if lines else "")):
            if row and row[0].strip():
                name = Path(row[0].strip()).name.removesuffix(".tif")
                for folder in FOLDERS:
                    name = name.removesuffix(f"_{folder}")
                if len(name) > 200 or not name.isprintable():
                    raise UserError(f"split list {path} holds {name[:40]!r}..., which is no name of a chip")
                names.append(name)
    except (OSError, csv.Error) as error:
        raise UserError(f"split list {path} cannot be read: {error}") from error
    if not names:
        raise EmptySplit(f"split list {path} is empty")
    return names


def find_list(data_path: Path, split: str, lists: str | None) -> Path | None:
    """The list of a split, or None (only Bolivia can do without).

    Raises:
        UserError: There is no list; the message lists where was looked.
    """
    folders = [Path(lists).expanduser()] if lists else [base / place for base in (data_path, data_path.parent)
                                                        for place in LISTS]  # fmt: skip
    official = OFFICIAL_NAMES[split]
    stems = dict.fromkeys((f"flood_{official}_data", official, split))
    looked = [folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in (".csv", ".txt")]
    for path in looked:
        if path.is_file():
            return path
    if split == "bolivia":
        return None
    raise UserError(
        f"no list of split {split!r} of sen1floods11; looked for {', '.join(map(str, looked[:6]))}, ...; "
        "--data_option lists=DIR names the folder with flood_train_data.csv and the others"
    )


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    lists: str | None = None,
    missing: str = "error",
    skip: str = "",
) -> SarDataset:
    """Open Sen1Floods11.

    Args:
        spec: The registry's entry.
        data_path: See the layouts above.
        split: Wanted splits; ``bolivia`` is the country held out.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        lists: Folder with the split lists.
        missing: ``error``, or ``skip``: listed chips whose files are absent are left out, and counted in the log.
        skip: Chips to leave out, joined with commas.

    Raises:
        UserError: No such layout, no list, absent chips.
    """
    if missing not in ("error", "skip"):
        raise UserError(f"option missing must be error or skip, not {missing!r}")
    root = find_root(data_path)
    left_out = {part.strip() for part in skip.split(",") if part.strip()}
    folders = ["LabelHand"]
    folders += ["S1Hand"] if any(band in SAR_BANDS for band in spec.bands) else []
    folders += ["S2Hand"] if any(band not in SAR_BANDS for band in spec.bands) else []
    names: list[str] = []
    known: set[str] = set()
    for part in parse_split(spec, split):
        path = find_list(data_path, part, lists)
        if path is None:
            listed = [file.stem.removesuffix("_LabelHand") for file in list_files(root / "LabelHand")]
            listed = [name for name in listed if name.startswith(HOLD_OUT)]
        else:
            listed = read_list(path)
        known |= set(listed)
        absent = {}
        for name in listed:
            files = [root / folder / f"{name}_{folder}.tif" for folder in folders]
            lost = [file for file in files if not file.is_file()]
            if lost and name not in left_out:
                absent[name] = lost[0]
        if absent and len(absent) == len(listed) and part in spec.extra_splits:
            raise EmptySplit(f"none of the {len(listed)} chips of split {part!r} of sen1floods11 is in {root}")
        if absent and missing == "error":
            first = next(iter(absent.values()))
            raise UserError(
                f"{len(absent)} of {len(listed)} chips of {path or part} have no file in {root}; the first is {first}. "
                "Complete the data, or leave such chips out with --data_option missing=skip"
            )
        if absent:
            get_logger().warning(
                "sen1floods11 %s: %d of %d listed chips are absent and left out", part, len(absent), len(listed)
            )
        kept = [name for name in listed if name not in absent and name not in left_out]
        if not kept:
            raise EmptySplit(f"split {part!r} of sen1floods11 in {root} has no chip left ({path or HOLD_OUT + '*'})")
        names += kept
    return Sen1Floods11(spec, split, statistics, root, names, on_error=on_error)
