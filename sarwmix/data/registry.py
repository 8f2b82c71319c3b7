"""The one list of data sets: bands, unit, statistics with their origin, classes, splits and the builder of each.

``--dataset`` is the only switch a user turns; everything else (task, classes, statistics) follows from the entry here.

Builders are named by ``"module:function"`` and imported when they are first needed, so that reading this module costs
nothing (no torch, no numpy). A builder has this signature::

    def build(spec: DatasetSpec, data_path: Path, split: str, *, statistics: Statistics, on_error: str,
              <the options listed in spec.options, each with a default>) -> SarDataset

``statistics`` and ``on_error`` are resolved and checked here for every data set. A directory that holds a packed store
(its ``manifest.json`` says so) is opened by :func:`sarwmix.data.packed.build` instead, whatever the data set.

Statistics are per band, in the band's unit, in the order of ``bands``; Sentinel-1 bands are VH, VV in dB wherever no
other order is asked for. A data set with more bands than it shows by default names band sets (``--bands``).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarwmix.data.labels import CLASSES_19
from sarwmix.data.spec import (
    BANDS,
    PAIR_BANDS,
    REFLECTANCE,
    SAR_BANDS,
    DatasetSpec,
    Statistics,
    parse_split,
    resolve_statistics,
)
from sarwmix.preprocessing import Preprocessing
from util.errors import UserError
from util.files import JSON_LIMIT, parse_json, read_bytes

if TYPE_CHECKING:
    from sarwmix.data.base import SarDataset

COMMON_OPTIONS = ("statistics", "on_error", "bands")
PACKED_OPTIONS = ("check",)
ON_ERROR = ("raise", "replace", "skip")


_SPECS: dict[str, DatasetSpec] = {}


def register(spec: DatasetSpec) -> DatasetSpec:
    """Add a data set; a name that exists already is refused."""
    if spec.name in _SPECS:
        raise ValueError(f"data set {spec.name!r} is registered twice")
    _SPECS[spec.name] = spec
    return spec


def names(task: str | None = None) -> tuple[str, ...]:
    """Names of all data sets, or of those with one task, in the order of registration."""
    return tuple(name for name, spec in _SPECS.items() if task is None or spec.task == task)


def get_spec(
    name: str,
    bands: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    data_path: str | Path | None = None,
) -> DatasetSpec:
    """The entry of a data set, with the chosen bands and the classes that options leave.

    Args:
        name: A registered name.
        bands: See :meth:`DatasetSpec.with_bands`.
        options: Options of the data set; those that change its classes are looked at.
        data_path: Where the data are: task, classes and size of anybody's own data are found there.

    Raises:
        UserError: The name is unknown; the message lists what exists.
    """
    if name not in _SPECS:
        raise UserError(f"unknown data set {name!r}{_hint(name, _SPECS)}; there are: {', '.join(_SPECS)}")
    spec = _SPECS[name].with_bands(bands).with_options(options or {})
    if not spec.describer or data_path is None:
        return spec
    path = Path(data_path).expanduser()
    if is_packed(path):
        return _of_store(spec, path)
    describe = _function(spec.describer)
    return describe(spec, path, {key: value for key, value in (options or {}).items() if value is not None})


def _function(place: str) -> Any:
    """What ``"module:function"`` names."""
    module_name, function_name = place.split(":")
    return getattr(importlib.import_module(module_name), function_name)


def _of_store(spec: DatasetSpec, store: Path) -> DatasetSpec:
    """The entry of anybody's own data that have been packed."""
    from sarwmix.data.packed import read_manifest

    manifest = read_manifest(store)
    task = {"none": "unlabelled", "multi-hot": "multilabel", "number": "multiclass"}[manifest.labels]
    return replace(spec, task=task, classes=manifest.classes, size=manifest.shape[2])


def build_dataset(name: str, data_path: str | Path, split: str, **options: Any) -> SarDataset:
    """Open a data set.

    Args:
        name: A registered name, see :func:`names`.
        data_path: Folder or store with the data, or the directory of a packed store.
        split: One split, or several joined with ``+`` (``"train+val"``).
        **options: Checked by name: ``statistics`` (preset name or path of a JSON file), ``on_error``
            (``"raise"``, ``"replace"``, or ``"skip"`` for label maps, see :class:`sarwmix.data.base.MaskDataset`),
            ``bands`` (a band set, or band names) and the options of this data set's builder. None counts as not given.

    Returns:
        A map-style data set of dict samples, see :class:`sarwmix.data.base.SarDataset`.

    Raises:
        UserError: Unknown data set, split or option, or data that are missing or wrong.
    """
    given = {key: value for key, value in options.items() if value is not None}
    bands = given.pop("bands", None)
    check_options(get_spec(name, bands, given), given)
    spec = get_spec(name, bands, given, data_path if str(data_path).strip() else None)
    parse_split(spec, split)
    statistics = resolve_statistics(spec, given.pop("statistics", None))
    on_error = given.pop("on_error", "raise")
    if on_error not in ON_ERROR:
        raise UserError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
    if on_error == "skip" and spec.task != "segmentation":
        raise UserError(f"on_error skip is for data sets of label maps, {name!r} has none; choose raise or replace")
    if not str(data_path).strip():
        raise UserError(f"data set {name!r} needs a data path, got an empty one")
    root = Path(data_path).expanduser()
    if not root.exists():
        raise UserError(f"data path {root} of data set {name!r} does not exist; give an existing folder or store")
    builder = spec.builder
    if is_packed(root):
        builder = "sarwmix.data.packed:build"
        _check_packed_options(given, root)
    data = _function(builder)(spec, root, split, statistics=statistics, on_error=on_error, **given)
    if spec.name != "s1_scenes" or is_packed(root):  # scenes are looked at as they are stored, each of them
        from sarwmix.data.pixels import check_at_door  # NumPy; reading this module costs nothing

        check_at_door(data)
    return data


def option_defaults(spec: DatasetSpec) -> dict[str, Any]:
    """What the builder of a data set takes for each option that is not given."""
    parameters = inspect.signature(_function(spec.builder)).parameters
    return {name: parameters[name].default for name in spec.options}


def check_options(spec: DatasetSpec, given: Mapping[str, Any], data_path: str | Path | None = None) -> None:
    """Refuse options that a data set, or a packed store of it, does not have.

    Args:
        spec: Its entry.
        given: Options by name.
        data_path: Where the data are; None: only the names are looked at.

    Raises:
        UserError: An unknown option; the message lists what exists.
    """
    known = (*COMMON_OPTIONS, *spec.options)
    for key in given:
        if key not in known:
            raise UserError(
                f"data set {spec.name!r} has no option {key!r}{_hint(key, known)}; it accepts: {', '.join(known)}"
            )
    if data_path is not None and is_packed(data_path):
        _check_packed_options([key for key in given if key not in COMMON_OPTIONS], Path(data_path))


def _check_packed_options(given: Iterable[str], root: Path) -> None:
    for key in given:
        if key not in PACKED_OPTIONS:
            raise UserError(
                f"option {key!r} has no effect on the packed store {root}: it decides what is packed; "
                "give it to scripts/pack_dataset.py"
            )


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is the directory of a packed store, finished or not (docs/file_formats.md)."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        content = parse_json(read_bytes(manifest, JSON_LIMIT))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("format", "")).startswith("sarwmix-packed/")


def parse_options(items: Sequence[str]) -> dict[str, str]:
    """Turn the ``NAME=VALUE`` texts of ``--data_option`` into options for :func:`build_dataset`.

    Raises:
        UserError: A text has no name or no ``=``, or a name appears twice.
    """
    options: dict[str, str] = {}
    for item in items:
        name, sign, value = (part.strip() for part in item.partition("="))
        if not sign or not name:
            raise UserError(f"--data_option {item!r} is not NAME=VALUE, for example unit=linear")
        if name in options:
            raise UserError(f"--data_option {name} is given twice: {options[name]!r} and {value!r}")
        options[name] = value
    return options


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Published numbers -----------------------------------------------------------------------------------------------

BENV2_STATISTICS = Statistics.from_normal(
    (-19.1966, -12.5144), (5.4501, 5.0019), origin="SAR-W-MixMAE, BigEarthNet v2, over all pixels"
)
REBEN_STATISTICS = Statistics.from_normal(
    (-19.3526, -12.6439), (5.5905, 5.1335), origin="reBEN publication, BigEarthNet v2, over all pixels"
)
BENV1_STATISTICS = Statistics.from_normal(
    (-19.2309, -12.5951),
    (3.1672, 2.9644),
    origin="SAR-W-MixMAE, BigEarthNet v1, as the released weights need it; "
    "the deviations look like within-image deviations",
)
DEMO_STATISTICS = Statistics(
    (-17.5800, -11.6996),
    (3.6750, 3.8483),
    (-26.5557, -22.4032),
    (-9.0494, -2.7155),
    "computed over all pixels of the 624 train and validation patches of the default demo data (768 patches, seed 0)",
)
S2_10M_20M = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
S2_L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S2_L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
REBEN_BANDS = (*BANDS, *S2_L2A)
REBEN_BAND_SETS = {
    "s1": BANDS,
    "s2": S2_10M_20M,
    "all": (*BANDS, *S2_10M_20M),
    "s1_full": BANDS,
    "s2_full": S2_L2A,
    "all_full": REBEN_BANDS,
}
REBEN_ALL_STATISTICS = Statistics.from_normal(
    (-19.3526, -12.6439, 361.0768, 438.3721, 614.0557, 588.4096, 942.8433, 1769.9316, 2049.5515, 2193.2920, 2235.5566,
     2241.4553, 1568.2268, 997.7325),
    (5.5905, 5.1335, 575.0687, 607.0269, 603.2968, 684.5688, 738.4327, 1100.4560, 1275.8054, 1369.3717, 1356.5441,
     1316.3933, 1070.1613, 813.5276),
    origin="reBEN publication, BigEarthNet v2 training split, all bands brought to 120 px by nearest neighbour",
)  # fmt: skip
SSL4EO_STATISTICS = Statistics.from_normal(
    (-20.26, -12.59), (5.91, 5.26), origin="FG-MAE for EuroSAT-SAR (statistics of SSL4EO-S12)"
)
FLOODS_S1_STATISTICS = Statistics.from_normal(
    (round(0.5235 * 51 - 50, 4), round(0.6851 * 51 - 50, 4)),
    (round(0.1102 * 51, 4), round(0.0820 * 51, 4)),
    origin="Sen1Floods11 training notebook (given there after clipping to -50..1 dB and scaling to 0..1)",
)
FLOODS_CHIPS_STATISTICS = Statistics(
    (-18.9735, -11.0671),
    (6.0291, 4.4791),
    (-37.5909, -24.1117),
    (-10.4460, -3.3060),
    "computed over all valid pixels of 10 hand-labelled chips of Sen1Floods11 (of 446)",
)
FLOODS_BANDS = (*BANDS, *S2_L1C)
FLOODS_STATISTICS = Statistics.from_normal(
    (*FLOODS_S1_STATISTICS.mean, 1645.0718, 1412.9560, 1379.5798, 1235.3792, 1481.0990, 2399.1728, 2858.7557, 2634.5379,
     3090.2815, 491.1151, 65.2506, 2044.9580, 1191.2015),
    (*FLOODS_S1_STATISTICS.std, 697.7374, 740.6382, 737.0365, 869.2279, 777.8555, 910.5416, 1069.0993, 1009.6586,
     1179.8815, 338.0113, 146.3465, 977.2074, 765.9938),
    origin="Sen1Floods11: Sentinel-1 from the training notebook, Sentinel-2 (TOA) from TerraTorch's data module",
)  # fmt: skip
_TWICE = BENV2_STATISTICS.take([0, 1, 1, 0])
ANY_POLARISATION = replace(
    _TWICE, origin=f"{_TWICE.origin}; HH and HV as VV and VH: compute your own (scripts/compute_statistics.py)"
)
OMBRIA_STATISTICS = Statistics(
    (-14.5122, -12.1963),
    (5.8634, 5.9157),
    (-27.2938, -25.8900),
    (-3.0560, -2.2370),
    "computed over all pixels of the 694 pairs, with 0..255 taken as -30..0 dB",
    (-14.3566, -11.2982),
)
SATLAS_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
SATLAS_STATISTICS = FLOODS_STATISTICS.take([FLOODS_BANDS.index(band) for band in SATLAS_BANDS])
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip
BLOCK = "10 km block"
SCENE = ("scene", r"(?:[^_]+_){4}[^_]+(?=_)")  # S1A_IW_GRDH_1SDV_20170613T165043 of _33UUP_61_39
DFC_CLASSES = (
    "forest", "shrubland", "savanna", "grassland", "wetland", "cropland", "urban", "snow and ice", "barren", "water",
)  # fmt: skip
SPLITS = ("train", "val", "test")
OFFICIAL_COUNTS: dict[str, dict[str, int]] = {
    # v2: rows of the official metadata.parquet; v1: lines of the official split lists.
    "benv2": {"train": 237_871, "val": 122_342, "test": 119_825},
    "benv1": {"train": 269_695, "val": 123_723, "test": 125_866},
}

register(
    DatasetSpec(
        name="benv2",
        task="multilabel",
        bands=BANDS,
        statistics={"benv2": BENV2_STATISTICS, "reben": REBEN_STATISTICS, "benv1": BENV1_STATISTICS},
        default_statistics="benv2",
        classes=CLASSES_19,
        splits=SPLITS,
        size=120,
        builder="sarwmix.datasets.bigearthnet:build_benv2",
        description="BigEarthNet v2 (reBEN), Sentinel-1 and Sentinel-2: GeoTIFF tree or LMDB, with metadata",
        options=(
            "metadata",
            "id_col",
            "exclude_snow_cloud",
            "check",
            "labels",
            "missing",
            "limit",
            "tiles",
            "countries",
        ),  # fmt: skip
        band_sets=REBEN_BAND_SETS,
        all_bands=REBEN_BANDS,
        band_statistics={"reben": REBEN_ALL_STATISTICS},
        cluster=SCENE,
    )
)
register(
    DatasetSpec(
        name="benv1",
        task="multilabel",
        bands=BANDS,
        statistics={"published": BENV1_STATISTICS, "benv2": BENV2_STATISTICS, "reben": REBEN_STATISTICS},
        default_statistics="published",
        classes=CLASSES_19,
        splits=SPLITS,
        size=120,
        builder="sarwmix.datasets.bigearthnet:build_benv1",
        description="BigEarthNet v1 Sentinel-1: Zarr store (format 2 or 3) with CSV split lists",
        options=("metadata", "id_col", "check", "labels", "missing", "limit", "tiles"),
        cluster=SCENE,
    )
)
register(
    DatasetSpec(
        name="demo",
        task="multilabel",
        bands=BANDS,
        statistics={"demo": DEMO_STATISTICS, "benv2": BENV2_STATISTICS},
        default_statistics="demo",
        classes=CLASSES_19,
        splits=SPLITS,
        size=120,
        builder="sarwmix.synthetic.benv2:build",
        description="generated Sentinel-1 patches in the layout of BigEarthNet v2 (scripts/make_demo_data.py)",
        options=("metadata", "check"),
        cluster=("site", SCENE[1]),
    )
)
register(
    DatasetSpec(
        name="s1_scenes",
        task="unlabelled",
        bands=BANDS,
        statistics={"benv2": BENV2_STATISTICS, "benv1": BENV1_STATISTICS},
        default_statistics="benv2",
        classes=(),
        splits=SPLITS,
        size=120,
        builder="sarwmix.datasets.scenes:build",
        description="any folder of Sentinel-1 GeoTIFFs, cut into tiles on the fly",
        all_bands=SAR_BANDS,
        band_statistics={"benv2": ANY_POLARISATION},
        options=("unit", "tile", "stride", "band_order", "min_valid", "holdout", "seed"),
    )
)
register(
    DatasetSpec(
        name="folder",
        task="unlabelled",
        bands=BANDS,
        statistics={"benv2": BENV2_STATISTICS, "benv1": BENV1_STATISTICS},
        default_statistics="benv2",
        classes=(),
        splits=SPLITS,
        size=120,
        builder="sarwmix.datasets.folder:build",
        describer="sarwmix.datasets.folder:describe",
        description="your own images (GeoTIFF, PNG, npy) with class folders, a list of labels, or masks",
        all_bands=SAR_BANDS,
        band_statistics={"benv2": ANY_POLARISATION},
        options=("list", "classes", "unit", "band_order", "range", "size", "seed", "missing"),
        cluster=("group", r".+?(?=::)"),
    )
)
register(
    DatasetSpec(
        name="sen12flood",
        task="pair",
        bands=BANDS,
        statistics={"benv1": BENV1_STATISTICS, "benv2": BENV2_STATISTICS},
        default_statistics="benv1",
        classes=("no flood", "flood"),
        splits=SPLITS,
        size=512,
        builder="sarwmix.datasets.sen12flood:build",
        description="SEN12-FLOOD pairs of Sentinel-1 images of one place, linear power in the files",
        options=("val_frac",),
        cluster=("place", r".+?(?=__)"),
    )
)
register(
    DatasetSpec(
        name="eurosat_sar",
        task="multiclass",
        bands=BANDS,
        statistics={"fgmae": SSL4EO_STATISTICS, "benv2": BENV2_STATISTICS},
        default_statistics="fgmae",
        classes=EUROSAT_CLASSES,
        splits=SPLITS,
        size=64,
        builder="sarwmix.datasets.eurosat:build",
        cluster=(BLOCK, ""),
        description="EuroSAT-SAR: 64 px GeoTIFFs with VV and VH in dB, one folder a class",
        options=("seed", "val_frac", "band_order", "lists"),
        band_sets={"s1": BANDS},
        preprocessing=Preprocessing("quantiles", geometry="resized_crop"),
    )
)
register(
    DatasetSpec(
        name="dfc2020",
        task="segmentation",
        bands=BANDS,
        statistics={"ssl4eo": SSL4EO_STATISTICS, "benv2": BENV2_STATISTICS},
        default_statistics="ssl4eo",
        classes=DFC_CLASSES,
        splits=SPLITS,
        size=256,
        builder="sarwmix.datasets.dfc2020:build",
        cluster=(BLOCK, ""),
        description="DFC2020 / SEN12MS land cover: 256 px Sentinel-1 patches with label maps",
        options=("label_set", "no_savanna", "val_frac", "seed", "test_folder", "check"),
        band_sets={"s1": BANDS},
        class_options={"no_savanna": ("savanna",)},
        preprocessing=Preprocessing("clip", clip=(-25.0, 0.0), geometry="window"),
    )
)
register(
    DatasetSpec(
        name="sen1floods11",
        task="segmentation",
        bands=BANDS,
        statistics={"published": FLOODS_S1_STATISTICS, "chips": FLOODS_CHIPS_STATISTICS, "benv2": BENV2_STATISTICS},
        default_statistics="published",
        classes=("no water", "water"),
        splits=(*SPLITS, "bolivia"),
        size=512,
        builder="sarwmix.datasets.sen1floods11:build",
        description="Sen1Floods11 hand-labelled chips: Sentinel-1, Sentinel-2 or both, water masks",
        options=("lists", "missing", "skip"),
        band_sets={"s1": BANDS, "s2": S2_L1C, "s1s2": FLOODS_BANDS, "satlas": SATLAS_BANDS},
        all_bands=FLOODS_BANDS,
        band_statistics={"published": FLOODS_STATISTICS},
        preprocessing=Preprocessing(geometry="window"),
        cluster=("event", r"[^_]+(?=_)"),
    )
)
register(
    DatasetSpec(
        name="satlas",
        task="segmentation",
        bands=SATLAS_BANDS,
        unit=REFLECTANCE,
        statistics={"sen1floods11": SATLAS_STATISTICS},
        default_statistics="sen1floods11",
        classes=("background", "water", "developed", "tree, shrub, grass", "crop"),
        splits=SPLITS,
        size=512,
        builder="sarwmix.datasets.satlas:build",
        cluster=("block of 10 x 10 tiles", r"(\d*)\d_(\d*)\d$"),  # names are column_row
        description="Satlas land cover: 512 px Sentinel-2 tiles with label maps, grouped into 5 classes",
        options=("val_frac", "seed", "missing"),
        band_sets={"s2": SATLAS_BANDS, "rgb": ("B04", "B03", "B02")},
        preprocessing=Preprocessing(geometry="window"),
    )
)
register(
    DatasetSpec(
        name="ombria",
        task="segmentation",
        bands=PAIR_BANDS,
        statistics={"ombria": OMBRIA_STATISTICS},
        default_statistics="ombria",
        classes=("no flood", "flood"),
        splits=SPLITS,
        size=256,
        builder="sarwmix.datasets.ombria:build",
        description="OMBRIA: Sentinel-1 VV before and after a flood as two bands, flood masks",
        options=("by", "masks"),
        preprocessing=Preprocessing(geometry="window"),
        cluster=("event", r"e\d+(?=_)"),
    )
)
