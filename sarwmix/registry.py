"""The one list of data sets: bands, unit, statistics with their origin, classes, splits and the builder of each.

``--dataset`` is the only switch a user turns; everything else (task, classes, statistics) follows from the entry here.

Builders are named by ``"module:function"`` and imported when they are first needed, so that reading this module costs
nothing (no torch, no numpy). A builder has this signature::

    def build(spec: DatasetSpec, data_path: Path, split: str, *, statistics: Statistics, on_error: str,
              <the options listed in spec.options, each with a default>) -> SarDataset

``statistics`` and ``on_error`` are resolved and checked here for every data set. A directory that holds a packed store
(its ``manifest.json`` says so) is opened by :func:`sarwmix.packed.build` instead, whatever the data set.

Statistics are per band, in the unit of the data set (dB), in the order of ``bands``: VH, VV.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarwmix.labels import CLASSES_19
from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.datasets import SarDataset

BANDS = ("VH", "VV")
TASKS = ("multilabel", "multiclass", "pair", "segmentation", "unlabelled")
COMMON_OPTIONS = ("statistics", "on_error")
PACKED_OPTIONS = ("check",)
ON_ERROR = ("raise", "replace")
NORMAL_1_PERCENT = 2.3263  # the 1 % quantile of a normal distribution lies this many deviations below its mean


class EmptySplit(UserError):
    """The data have no sample of the split that was asked for; other splits may be there."""


@dataclass(frozen=True)
class Statistics:
    """Mean, standard deviation and 1 % / 99 % percentiles of each band.

    Attributes:
        mean: Mean of each band, in the data set's unit (dB).
        std: Standard deviation of each band (dB).
        p01: 1 % percentile of each band (dB).
        p99: 99 % percentile of each band (dB).
        origin: Where the numbers come from, for the log and the checkpoint.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    p01: tuple[float, ...]
    p99: tuple[float, ...]
    origin: str

    def __post_init__(self) -> None:
        lengths = {len(self.mean), len(self.std), len(self.p01), len(self.p99)}
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(f"statistics need one mean, std, p01 and p99 for each band, got {asdict(self)}")
        values = (*self.mean, *self.std, *self.p01, *self.p99)
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"statistics must be finite numbers, got {asdict(self)}")
        if min(self.std) <= 0:
            raise UserError(f"every standard deviation must be positive, got {self.std}")
        if any(low >= high for low, high in zip(self.p01, self.p99, strict=True)):
            raise UserError(f"p01 must be below p99 in every band, got {self.p01} and {self.p99}")

    @classmethod
    def from_normal(cls, mean: tuple[float, ...], std: tuple[float, ...], *, origin: str) -> Statistics:
        """Statistics whose percentiles are those of a normal distribution (mean -+ 2.3263 std), said in ``origin``."""
        p01 = tuple(round(m - NORMAL_1_PERCENT * s, 4) for m, s in zip(mean, std, strict=True))
        p99 = tuple(round(m + NORMAL_1_PERCENT * s, 4) for m, s in zip(mean, std, strict=True))
        return cls(mean, std, p01, p99, f"{origin}; p01 and p99 by normal approximation (mean -+ 2.3263 std)")

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints and JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "statistics") -> Statistics:
        """Inverse of :meth:`as_dict`; keys beyond the five are ignored.

        Args:
            values: A mapping with ``mean``, ``std``, ``p01``, ``p99`` (lists of numbers) and ``origin``.
            source: What the error message calls the mapping, such as a file name.
        """
        try:
            lists = [tuple(float(number) for number in values[key]) for key in ("mean", "std", "p01", "p99")]
            origin = str(values["origin"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{source}: expected lists mean, std, p01, p99 (one number a band) and a text origin; {error!r}"
            ) from error
        return cls(lists[0], lists[1], lists[2], lists[3], origin)


@dataclass(frozen=True)
class DatasetSpec:
    """Everything the rest of the program needs to know about a data set.

    Attributes:
        name: The name given to ``--dataset``.
        task: One of :data:`TASKS`; it picks criterion, metrics and head.
        bands: Band names in the order of the sample's channels.
        unit: Unit of the samples that the data set delivers; always ``"dB"``.
        statistics: Named presets.
        default_statistics: The preset that is used unless the user asks for another.
        classes: Class names in the order of the label columns; empty when unlabelled.
        splits: Names of the splits; the user may join several with ``+``.
        size: Height and width of a sample in pixels.
        builder: ``"module:function"``.
        description: One line for help texts and errors.
        options: Names of the options that the builder accepts, beyond :data:`COMMON_OPTIONS`.
    """

    name: str
    task: str
    bands: tuple[str, ...]
    statistics: Mapping[str, Statistics]
    default_statistics: str
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    size: int
    builder: str
    description: str
    options: tuple[str, ...] = ()
    unit: str = field(default="dB")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"{self.name}: task {self.task!r} is none of {TASKS}")
        if self.unit != "dB":
            raise ValueError(f"{self.name}: samples are delivered in dB, not in {self.unit!r}")
        if self.default_statistics not in self.statistics:
            raise ValueError(f"{self.name}: no statistics preset {self.default_statistics!r}")
        for preset, values in self.statistics.items():
            if len(values.mean) != len(self.bands):
                raise ValueError(f"{self.name}: preset {preset!r} has {len(values.mean)} bands, not {len(self.bands)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{self.name}: a class name appears twice")
        if ":" not in self.builder:
            raise ValueError(f"{self.name}: builder {self.builder!r} is not of the form module:function")


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


def get_spec(name: str) -> DatasetSpec:
    """The entry of a data set.

    Raises:
        UserError: The name is unknown; the message lists what exists.
    """
    if name not in _SPECS:
        raise UserError(f"unknown data set {name!r}{_hint(name, _SPECS)}; there are: {', '.join(_SPECS)}")
    return _SPECS[name]


def parse_split(spec: DatasetSpec, split: str) -> tuple[str, ...]:
    """Split ``"train+val"`` into its names, checked against the data set.

    Raises:
        UserError: A name is unknown or appears twice.
    """
    wanted = tuple(part.strip() for part in split.split("+"))
    for part in wanted:
        if part not in spec.splits:
            raise UserError(
                f"data set {spec.name!r} has no split {part!r} (asked for {split!r}); "
                f"there are: {', '.join(spec.splits)}, also joined with '+'"
            )
    if len(set(wanted)) != len(wanted):
        raise UserError(f"split {split!r} names a part twice")
    return wanted


def read_statistics_file(path: str | Path, spec: DatasetSpec) -> Statistics:
    """Read statistics from a JSON file as ``scripts/compute_statistics.py`` writes it.

    The file holds an object with ``bands`` (list of names), ``unit`` ("dB"), ``mean``, ``std``, ``p01``, ``p99`` (one
    number a band) and ``origin``. Bands are matched by name, so that their order in the file does not matter.

    Raises:
        UserError: The file is missing, is no such object, lacks a band, or has another unit.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"statistics file {path} does not exist; data set {spec.name!r} has the presets "
            f"{', '.join(spec.statistics)}, or scripts/compute_statistics.py writes a file"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"statistics file {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("bands"), list):
        raise UserError(f"statistics file {path} must hold an object with bands, unit, mean, std, p01, p99, origin")
    if values.get("unit") != spec.unit:
        raise UserError(f"statistics file {path} is in unit {values.get('unit')!r}, expected {spec.unit!r}")
    found = [str(band) for band in values["bands"]]
    missing = [band for band in spec.bands if band not in found]
    if missing:
        raise UserError(f"statistics file {path} has bands {found}, but {', '.join(missing)} is needed")
    statistics = Statistics.from_dict(values, source=f"statistics file {path}")
    if len(statistics.mean) != len(found):
        raise UserError(f"statistics file {path} names {len(found)} bands but holds {len(statistics.mean)} means")
    order = [found.index(band) for band in spec.bands]

    def pick(numbers: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(numbers[i] for i in order)

    return Statistics(
        pick(statistics.mean), pick(statistics.std), pick(statistics.p01), pick(statistics.p99), statistics.origin
    )


def statistics_file_content(statistics: Statistics, spec: DatasetSpec) -> dict[str, Any]:
    """The object that :func:`read_statistics_file` reads back."""
    return {"dataset": spec.name, "bands": list(spec.bands), "unit": spec.unit, **statistics.as_dict()}


def resolve_statistics(spec: DatasetSpec, choice: str | Path | Statistics | None) -> Statistics:
    """The statistics a user asked for: a preset's name, the path of a JSON file, or None for the default preset."""
    if choice is None:
        return spec.statistics[spec.default_statistics]
    if isinstance(choice, Statistics):
        if len(choice.mean) != len(spec.bands):
            raise UserError(f"statistics have {len(choice.mean)} bands, data set {spec.name!r} has {len(spec.bands)}")
        return choice
    if str(choice) in spec.statistics:
        return spec.statistics[str(choice)]
    if str(choice).endswith(".json") or Path(choice).exists():
        return read_statistics_file(choice, spec)
    raise UserError(
        f"data set {spec.name!r} has no statistics preset {str(choice)!r}; "
        f"there are: {', '.join(spec.statistics)}, or give the path of a .json file"
    )


def build_dataset(name: str, data_path: str | Path, split: str, **options: Any) -> SarDataset:
    """Open a data set.

    Args:
        name: A registered name, see :func:`names`.
        data_path: Folder or store with the data, or the directory of a packed store.
        split: One split, or several joined with ``+`` (``"train+val"``).
        **options: Checked by name: ``statistics`` (preset name or path of a JSON file), ``on_error``
            (``"raise"`` or ``"replace"``) and the options of this data set's builder. None counts as not given.

    Returns:
        A map-style data set of dict samples, see :class:`sarwmix.datasets.SarDataset`.

    Raises:
        UserError: Unknown data set, split or option, or data that are missing or wrong.
    """
    spec = get_spec(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = (*COMMON_OPTIONS, *spec.options)
    for key in given:
        if key not in known:
            raise UserError(
                f"data set {name!r} has no option {key!r}{_hint(key, known)}; it accepts: {', '.join(known)}"
            )
    parse_split(spec, split)
    statistics = resolve_statistics(spec, given.pop("statistics", None))
    on_error = given.pop("on_error", "raise")
    if on_error not in ON_ERROR:
        raise UserError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
    if not str(data_path).strip():
        raise UserError(f"data set {name!r} needs a data path, got an empty one")
    root = Path(data_path).expanduser()
    if not root.exists():
        raise UserError(f"data path {root} of data set {name!r} does not exist; give an existing folder or store")
    builder = spec.builder
    if is_packed(root):
        builder = "sarwmix.packed:build"
        for key in given:
            if key not in PACKED_OPTIONS:
                raise UserError(
                    f"option {key!r} has no effect on the packed store {root}: it decides what is packed; "
                    "give it to scripts/pack_dataset.py"
                )
    module_name, function_name = builder.split(":")
    build = getattr(importlib.import_module(module_name), function_name)
    return build(spec, root, split, statistics=statistics, on_error=on_error, **given)


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is the directory of a packed store, finished or not (docs/file_formats.md)."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
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
        builder="sarwmix.bigearthnet:build_benv2",
        description="BigEarthNet v2 (reBEN) Sentinel-1: GeoTIFF tree or LMDB, with metadata.parquet or CSV",
        options=("metadata", "id_col", "exclude_snow_cloud", "check", "labels"),
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
        builder="sarwmix.bigearthnet:build_benv1",
        description="BigEarthNet v1 Sentinel-1: Zarr store (format 2 or 3) with CSV split lists",
        options=("metadata", "id_col", "check", "labels"),
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
        builder="sarwmix.demo:build",
        description="generated Sentinel-1 patches in the layout of BigEarthNet v2 (scripts/make_demo_data.py)",
        options=("metadata", "check"),
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
        builder="sarwmix.scenes:build",
        description="any folder of Sentinel-1 GeoTIFFs, cut into tiles on the fly",
        options=("unit", "tile", "stride", "band_order", "min_valid", "holdout", "seed"),
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
        builder="sarwmix.sen12flood.dataset:build",
        description="SEN12-FLOOD pairs of Sentinel-1 images of one place, linear power in the files",
        options=("val_frac",),
    )
)
