"""EuroSAT-SAR: Sentinel-1 patches of 64 px with the ten land-use classes of EuroSAT.

Layout: ``<data_path>/<Class>/<name>.tif`` for the ten classes, each file with VV and VH in dB. Bands are found by their
descriptions, else by their order (VV, VH). There is no official split: 80 % train and 20 % test, stratified by class
with a seed; ``val_frac`` holds out a part of train to select the best epoch. ``lists=fgmae`` is the split of FG-MAE
(scikit-learn's ``train_test_split`` of all patches in alphabetical order, seed 42), ``lists=FOLDER`` reads lists like
those of Copernicus-Bench (``eurosat-train.txt``, ``-val``, ``-test``: a patch's name in each line).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from sarwmix.data.base import SarDataset, UnreadableSample, finish_image
from sarwmix.data.io.geotiff import GeoTiffError
from sarwmix.data.io.rasters import band_numbers, blocks_of, fraction, held_out, list_files, read_raster, whole_number
from sarwmix.data.spec import DatasetSpec, EmptySplit, Statistics, parse_split
from util.errors import UserError
from util.text import read_text

FILE_ORDER = ("VV", "VH")
TEST_SHARE = 0.2
FGMAE = "fgmae"


class EuroSatSar(SarDataset):
    """Patches with one class each; names are ``<Class>/<file without .tif>``."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: str,
        statistics: Statistics,
        root: Path,
        names: Sequence[str],
        labels: np.ndarray,
        *,
        order: Sequence[str] = FILE_ORDER,
        on_error: str = "raise",
    ) -> None:
        super().__init__(spec, split, statistics, names, labels, on_error=on_error, source=root)
        self.order = tuple(order)

    @cached_property
    def clusters(self) -> Sequence[str] | None:  # type: ignore[override]
        return blocks_of(f"{self.source}/{name}.tif" for name in self.names)

    def read_into(self, index: int, out: np.ndarray) -> None:
        name = self.names[index]
        path = f"{self.source}/{name}.tif"
        try:
            raster = read_raster(path)
            places = band_numbers(raster.names, self.spec.bands, self.order)
            if raster.values.shape[1:] != out.shape[1:]:
                height, width = raster.values.shape[1:]
                raise GeoTiffError(f"has {height}x{width} pixels, expected {out.shape[1]}x{out.shape[2]}")
        except GeoTiffError as error:
            raise UnreadableSample(name, path, str(error)) from error
        out[...] = raster.floats()[places]
        finish_image(out, name, path, self.spec.bands)


def _fgmae_test(files_of: Sequence[Sequence[str]]) -> set[str]:
    """Test patches of FG-MAE's split."""
    from sklearn.model_selection import train_test_split

    ordered = sorted((name, label) for label, files in enumerate(files_of) for name in files)
    _, tested = train_test_split(
        [name for name, _ in ordered], train_size=1 - TEST_SHARE, stratify=[label for _, label in ordered],
        random_state=42,
    )  # fmt: skip
    return set(tested)


def _read_lists(folder: Path, wanted: Sequence[str], known: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the patches of each wanted split, from lists with a file name in each line.

    Raises:
        UserError: A list is missing, names an unknown patch, or shares one with another list.
    """
    by_stem = {name.split("/")[1]: name for name in known}
    found: dict[str, list[str]] = {}
    for part in ("train", "val", "test"):
        path = folder / f"eurosat-{part}.txt"
        if not path.is_file():
            if part in wanted:
                raise UserError(f"lists={folder}: there is no {path.name}; expected eurosat-train.txt, -val and -test")
            continue
        stems = [Path(line.strip()).stem for line in read_text(path).splitlines() if line.strip()]
        unknown = [stem for stem in stems if stem not in by_stem]
        if unknown:
            raise UserError(f"{path}: {len(unknown)} of {len(stems)} patches are not in the data, first {unknown[0]}")
        found[part] = [by_stem[stem] for stem in stems]
    seen: dict[str, str] = {}
    for part, names in found.items():
        for name in names:
            if name in seen:
                raise UserError(f"lists={folder}: {name} is in {seen[name]} and again in {part}")
            seen[name] = part
    return {part: found[part] for part in wanted}


def build(
    spec: DatasetSpec,
    data_path: Path,
    split: str,
    *,
    statistics: Statistics,
    on_error: str = "raise",
    seed: int | str = 0,
    val_frac: float | str | None = None,
    band_order: str | None = None,
    lists: str | None = None,
) -> SarDataset:
    """Open EuroSAT-SAR.

    Args:
        spec: The registry's entry.
        data_path: Folder with the class folders.
        split: Wanted splits.
        statistics: The statistics in use.
        on_error: See :class:`sarwmix.data.base.SarDataset`.
        seed: Decides the split.
        val_frac: Share of train that becomes val.
        band_order: Bands of files whose bands have no description, joined with commas; VV,VH by default.
        lists: ``fgmae``, or a folder with lists of patches; None: stratified by class with ``seed``.

    Raises:
        UserError: Class folders are missing or unknown, or a split is empty.
    """
    number, share = whole_number("seed", seed), fraction("val_frac", val_frac)
    order = FILE_ORDER if band_order is None else tuple(part.strip().upper() for part in band_order.split(","))
    if set(spec.bands) - set(order):
        raise UserError(f"band_order {band_order!r} lacks {', '.join(sorted(set(spec.bands) - set(order)))}")
    wanted = parse_split(spec, split)
    if "val" in wanted and share is None and lists in (None, FGMAE):
        raise EmptySplit("eurosat_sar has the splits train and test; --val_frac 0.1 holds out a tenth of train as val")
    found = sorted(path.name for path in data_path.iterdir() if path.is_dir() and not path.name.startswith("."))
    missing = [name for name in spec.classes if name not in found]
    unknown = [name for name in found if name not in spec.classes]
    if missing or unknown:
        parts = [f"without {', '.join(missing)}"] if missing else []
        parts += [f"with {', '.join(unknown)} besides"] if unknown else []
        raise UserError(
            f"{data_path} does not hold EuroSAT-SAR: it is {' and '.join(parts)}; expected one folder for each of "
            f"{', '.join(spec.classes)}"
        )
    files_of = [[f"{name}/{path.stem}" for path in list_files(data_path / name)] for name in spec.classes]
    for class_name, files in zip(spec.classes, files_of, strict=True):
        if len(files) < 2:
            raise UserError(f"{data_path / class_name} holds {len(files)} .tif file(s); a split needs two or more")
    tested = _fgmae_test(files_of) if lists == FGMAE else None
    names: dict[str, list[str]] = {part: [] for part in wanted}
    labels: dict[str, list[int]] = {part: [] for part in wanted}
    if lists not in (None, FGMAE):
        class_of = {name: label for label, files in enumerate(files_of) for name in files}
        names = _read_lists(Path(str(lists)).expanduser(), wanted, class_of)
        labels = {part: [class_of[name] for name in found] for part, found in names.items()}
        files_of = []
    for label, files in enumerate(files_of):
        of_test = held_out(len(files), TEST_SHARE, seed=number + 1000 * label)
        if tested is not None:
            of_test = np.array([name in tested for name in files])
        parts_of = np.where(of_test, "test", "train").astype(object)
        if share is not None:
            rest = np.flatnonzero(~of_test)
            parts_of[rest[held_out(len(rest), share, seed=number + 1000 * label)]] = "val"
        for name, part in zip(files, parts_of, strict=True):
            if part in names:
                names[part].append(name)
                labels[part].append(label)
    return EuroSatSar(
        spec,
        split,
        statistics,
        data_path,
        [name for part in wanted for name in names[part]],
        np.array([label for part in wanted for label in labels[part]], dtype=np.int64),
        order=order,
        on_error=on_error,
    )
