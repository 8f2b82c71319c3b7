"""DFC2020 / SEN12MS land cover: Sentinel-1 patches of 256 px with label maps of 10 classes.

Layout: ``ROIs0000_{autumn,spring,winter,summer}/{s1,dfc,lc}_<place>/*.tif`` for training, ``{s1,dfc,lc}_0/*.tif`` for
evaluation, in the first of ``data_path``, ``ROIs0000_validation`` and ``ROIs0000_test`` that has them. Image
``..._s1_<place>_p<n>.tif`` goes with label ``..._dfc_<place>_p<n>.tif`` (hand-made, values 1 to 10) or ``..._lc_...``
(MODIS, 17 IGBP classes in band 1).

The two label sets overlap in their values but mean different things, so that files of the other set are refused by
their values; published runs have mixed them and lost two thirds of their score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from sarwmix.data.base import MaskDataset, SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import (
    band_numbers,
    blocks_of,
    check_same_grid,
    fraction,
    held_out,
    list_files,
    map_labels,
    read_raster,
    whole_number,
)
from sarwmix.data.spec import DatasetSpec, EmptySplit, Statistics, parse_split, parse_switch
from util.errors import UserError
from util.log import get_logger

SEASONS = ("autumn", "spring", "winter", "summer")
TOP = "."
TEST_PLACES = ("", "ROIs0000_validation", "ROIs0000_test")
S1_ORDER = ("VV", "VH")
IGNORED = 255
LABEL_SETS = {"dfc": "dfc", "igbp": "lc"}
IGBP_TO_DFC = (0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)
SAVANNA = 3
DFC_CLASSES = 10
PROBED = 64  # label files whose values tell which label set they are


def label_table(label_set: str, *, no_savanna: bool) -> dict[int, int]:
    """Value in a label file -> class number; unlabelled (0), and savanna where it is left out, are ignored.

    Args:
        label_set: ``"dfc"`` (0 to 10) or ``"igbp"`` (0 to 17).
        no_savanna: Drop class 3 and close the gap.
    """
    grouped = range(DFC_CLASSES + 1) if label_set == "dfc" else IGBP_TO_DFC
    table = {}
    for value, number in enumerate(grouped):
        if number == 0 or (no_savanna and number == SAVANNA):
            table[value] = IGNORED
        else:
            table[value] = number - 1 - int(no_savanna and number > SAVANNA)
    return table


class Dfc2020(MaskDataset):
    """Patches with label maps; names are paths of the Sentinel-1 files without suffix, relative to the data folder."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        names: Sequence[str],
        *,
        label_set: str,
        no_savanna: bool,
        on_error: str = "raise",
    ) -> None:
        super().__init__(spec, split, statistics, names, on_error=on_error, source=root)
        self.root = str(root)
        self.label_set = label_set
        self.no_savanna = no_savanna
        self.table = label_table(label_set, no_savanna=no_savanna)

    def identity(self) -> dict[str, str | int]:
        return {**super().identity(), "label_set": self.label_set, "no_savanna": int(self.no_savanna)}

    @cached_property
    def clusters(self) -> Sequence[str] | None:  # type: ignore[override]
        return blocks_of(f"{self.root}/{name}.tif" for name in self.names)

    def label_path(self, name: str) -> str:
        """The label file of an image."""
        folder, _, stem = name.rpartition("/")
        kind = LABEL_SETS[self.label_set]
        above, _, place = folder.rpartition("/")
        own = f"{kind}_{place.removeprefix('s1_')}"
        return f"{self.root}/{above + '/' if above else ''}{own}/{stem.replace('_s1_', f'_{kind}_')}.tif"

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        name = self.names[index]
        path = f"{self.root}/{name}.tif"
        try:
            raster = read_raster(path)
            places = band_numbers(raster.names, self.spec.bands, S1_ORDER)
            height, width = raster.values.shape[1:]
            if (height, width) != image.shape[1:]:
                raise GeoTiffError(f"has {height}x{width} pixels, expected {image.shape[1]}x{image.shape[2]}")
            image[...] = raster.floats()[places]
            path = self.label_path(name)
            stored = read_raster(path, numbers=[1])
            check_same_grid(raster.grid, stored.grid, path)
            try:
                label[...] = map_labels(stored.values[0], self.table)
            except GeoTiffError as error:
                if self.label_set == "dfc" and stored.values[0].max() <= max(label_table("igbp", no_savanna=False)):
                    raise GeoTiffError(f"{error}. These are IGBP numbers; --label_set igbp reads them") from error
                raise
        except GeoTiffError as error:
            raise UnreadableSample(name, path, str(error)) from error
        finish_image(image, name, f"{self.root}/{name}.tif", self.spec.bands)

    def check_label_set(self) -> None:
        """Look at the values of some label files: those of the other set are refused.

        Raises:
            UserError: The values are those of the other label set.
        """
        highest = 0
        for index in np.unique(np.linspace(0, len(self) - 1, min(PROBED, len(self))).astype(int)):
            path = self.label_path(self.names[int(index)])
            try:
                value = int(read_raster(path, numbers=[1]).values[0].max())
            except GeoTiffError:
                continue  # reading the sample says so
            highest = max(highest, value)
            if self.label_set == "dfc" and value > DFC_CLASSES:
                raise UserError(
                    f"label file {path} holds the value {value}, but --label_set dfc knows 0 to {DFC_CLASSES}: these "
                    "are IGBP numbers (1 to 17). Use --label_set igbp, or the files of the DFC set"
                )
        if self.label_set == "igbp" and highest <= DFC_CLASSES:
            raise UserError(
                f"{min(PROBED, len(self))} label files in {self.root} hold no value above {DFC_CLASSES}, though IGBP "
                "numbers water 17, crops 12 and cities 13: these look like labels of the DFC set. Use --label_set dfc "
                "with the dfc_* files (--data_option check=none reads them as IGBP all the same)"
            )


def find_images(data_path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Sentinel-1 files of the seasons, and of each evaluation folder that is there, as names.

    Raises:
        UserError: The layout does not match.
    """
    root = data_path
    if not any((root / f"ROIs0000_{season}").is_dir() for season in SEASONS) and (root / "DFC_Public_Dataset").is_dir():
        raise UserError(f"give {root / 'DFC_Public_Dataset'} as data path, the folder that holds ROIs0000_*")
    seasons = [root / f"ROIs0000_{season}" for season in SEASONS if (root / f"ROIs0000_{season}").is_dir()]
    train = [
        f"{season.name}/{place.name}/{file.stem}"
        for season in seasons
        for place in sorted(season.iterdir())
        if place.is_dir() and place.name.startswith("s1_")
        for file in list_files(place)
    ]
    tests = {}
    for place in TEST_PLACES:
        found = [f"{place + '/' if place else ''}s1_0/{file.stem}" for file in list_files(root / place / "s1_0")]
        if found:
            tests[place or TOP] = found
    if not train and not tests:
        raise UserError(
            f"{root} does not hold DFC2020: there is neither ROIs0000_{{{','.join(SEASONS)}}}/s1_*/*.tif nor s1_0/*.tif"
        )
    return train, tests


def choose_test(tests: Mapping[str, Sequence[str]], test_folder: str | None, data_path: Path) -> list[str]:
    """The patches of one evaluation folder; several hold much the same patches, which must not count twice.

    Args:
        tests: Names of the patches by folder, the preferred one first; may be empty.
        test_folder: The wanted one, or None for the first.
        data_path: For messages.

    Raises:
        UserError: The wanted one is not there.
    """
    if test_folder is not None and test_folder not in tests:
        raise UserError(
            f"option test_folder is {test_folder!r}; {data_path} has evaluation patches (s1_0) in "
            f"{', '.join(tests) or 'no folder'} (. is {data_path} itself)"
        )
    if not tests:
        return []
    chosen = test_folder or next(iter(tests))
    stems = {name.rpartition("/")[2] for name in tests[chosen]}
    for other, found in tests.items():
        if other != chosen:
            get_logger().warning(
                "dfc2020 test: %d patches of %s/s1_0; %d of %s/s1_0 are left out (%d of them have the same names); "
                "--data_option test_folder=%s takes those instead",
                len(stems),
                chosen,
                len(found),
                other,
                sum(name.rpartition("/")[2] in stems for name in found),
                other,
            )
    return list(tests[chosen])


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    label_set: str = "dfc",
    no_savanna: bool | str = False,
    val_frac: float | str | None = None,
    seed: int | str = 0,
    test_folder: str | None = None,
    check: str = "sample",
) -> SarDataset:
    """Open DFC2020.

    Args:
        spec: The registry's entry, its classes without savanna where that is left out.
        data_path: Folder with ROIs0000_* and s1_0.
        split: Wanted splits: ``train`` (the seasons), ``test`` (the evaluation folder), ``val`` with ``val_frac``.
        statistics: The statistics in use (they fill invalid pixels; values are clipped to -25..0 dB).
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        label_set: ``"dfc"`` or ``"igbp"``.
        no_savanna: Leave class savanna out.
        val_frac: Share of train that becomes val.
        seed: Decides that share.
        test_folder: Evaluation folder: ``.`` (``data_path`` itself), ``ROIs0000_validation`` or ``ROIs0000_test``; the
            first of these that is there by default.
        check: ``"sample"`` looks at the values of some label files, ``"none"`` does not.

    Raises:
        UserError: No such layout, label files of the other set, an empty split.
    """
    if label_set not in LABEL_SETS:
        raise UserError(f"--label_set is {label_set!r}; expected dfc (hand-made labels) or igbp (MODIS land cover)")
    if check not in ("sample", "none"):
        raise UserError(f"option check must be sample or none, not {check!r}")
    train, tests = find_images(data_path)
    wanted = parse_split(spec, split)
    test = choose_test(tests, test_folder, data_path) if "test" in wanted else []
    share = fraction("val_frac", val_frac)
    parts: dict[str, list[str]] = {"train": train, "test": test, "val": []}
    if share is not None:
        out = held_out(len(train), share, seed=whole_number("seed", seed))
        parts["val"] = [name for name, held in zip(train, out, strict=True) if held]
        parts["train"] = [name for name, held in zip(train, out, strict=True) if not held]
    names: list[str] = []
    for part in wanted:
        if not parts[part]:
            hint = "--val_frac 0.1 holds out a tenth of train" if part == "val" else "see docs/data_neighbours.md"
            raise EmptySplit(f"split {part!r} of dfc2020 in {data_path} is empty; {hint}")
        names += parts[part]
    data = Dfc2020(
        spec,
        split,
        statistics,
        data_path,
        names,
        label_set=label_set,
        no_savanna=parse_switch("no_savanna", no_savanna),
        on_error=on_error,
    )
    if check == "sample":
        data.check_label_set()
    return data
