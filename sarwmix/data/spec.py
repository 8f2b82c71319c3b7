"""What the registry says of a data set: bands, unit, statistics with their origin, classes, splits, builder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sarwmix.preprocessing import Preprocessing
from util.errors import UserError
from util.files import JSON_LIMIT, parse_json, read_bytes

BANDS = ("VH", "VV")
TASKS = ("multilabel", "multiclass", "pair", "segmentation", "unlabelled")
DB_RANGE = (-80.0, 50.0)
"""Beyond these no C-band sensor measures anything (noise floor near -25 dB, corner reflectors near +40 dB)."""
DECIBEL, REFLECTANCE = "dB", "reflectance x 1e4"
SAR_BANDS = ("VH", "VV", "HH", "HV")
PAIR_BANDS = ("BEFORE", "AFTER")
"""The same polarisation on two dates, where a pair is one image of two bands."""
NOISE_DB = dict.fromkeys((*SAR_BANDS, *PAIR_BANDS), -25.0)
"""Noise equivalent sigma0 of each band in dB: between the -22 dB that Sentinel-1 IW was specified for and about -30 dB
in the middle of its sub-swaths; it is not known for a single image without its noise annotation."""
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
        p50: Median of each band; empty where only mean and deviation are known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    p01: tuple[float, ...]
    p99: tuple[float, ...]
    origin: str
    p50: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.mean), len(self.std), len(self.p01), len(self.p99), len(self.median)}
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(f"statistics need one mean, std, p01 and p99 for each band, got {asdict(self)}")
        values = (*self.mean, *self.std, *self.p01, *self.p99, *self.median)
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"statistics must be finite numbers, got {asdict(self)}")
        if min(self.std) <= 0:
            raise UserError(f"every standard deviation must be positive, got {self.std}")
        if any(low >= high for low, high in zip(self.p01, self.p99, strict=True)):
            raise UserError(f"p01 must be below p99 in every band, got {self.p01} and {self.p99}")
        if any(low >= mid for low, mid in zip(self.p01, self.median, strict=True)):
            raise UserError(f"p01 must be below the median in every band, got {self.p01} and {self.median}")

    @property
    def median(self) -> tuple[float, ...]:
        """Median of each band; where it is not known the mean, which it is for a normal distribution."""
        return self.p50 or self.mean

    @classmethod
    def from_normal(cls, mean: tuple[float, ...], std: tuple[float, ...], *, origin: str) -> Statistics:
        """Statistics whose percentiles are those of a normal distribution (mean -+ 2.3263 std), said in ``origin``."""
        p01 = tuple(round(m - NORMAL_1_PERCENT * s, 4) for m, s in zip(mean, std, strict=True))
        p99 = tuple(round(m + NORMAL_1_PERCENT * s, 4) for m, s in zip(mean, std, strict=True))
        return cls(mean, std, p01, p99, f"{origin}; p01 and p99 by normal approximation (mean -+ 2.3263 std)")

    def take(self, positions: Sequence[int]) -> Statistics:
        """The statistics of some bands, in the given order."""

        def pick(numbers: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(numbers[i] for i in positions)

        return Statistics(
            pick(self.mean),
            pick(self.std),
            pick(self.p01),
            pick(self.p99),
            self.origin,
            pick(self.p50) if self.p50 else (),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints and JSON."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return values if self.p50 else {key: value for key, value in values.items() if key != "p50"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "statistics") -> Statistics:
        """Inverse of :meth:`as_dict`; keys beyond the five are ignored.

        Args:
            values: A mapping with ``mean``, ``std``, ``p01``, ``p99`` (lists of numbers) and ``origin``.
            source: What the error message calls the mapping, such as a file name.
        """
        try:
            lists = [tuple(float(number) for number in values[key]) for key in ("mean", "std", "p01", "p99")]
            lists.append(tuple(float(number) for number in values.get("p50", ())))
            origin = str(values["origin"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{source}: expected lists mean, std, p01, p99 (one number a band) and a text origin; {error!r}"
            ) from error
        return cls(lists[0], lists[1], lists[2], lists[3], origin, lists[4])


def unit_of(band: str) -> str:
    """Unit of a band, by its name: backscatter in dB, or Sentinel-2 reflectance times 10,000."""
    return DECIBEL if band in (*SAR_BANDS, *PAIR_BANDS) else REFLECTANCE


def unit_of_bands(bands: Sequence[str]) -> str:
    """The units of several bands as one text."""
    return " and ".join(dict.fromkeys(unit_of(band) for band in bands))


@dataclass(frozen=True)
class DatasetSpec:
    """Everything the rest of the program needs to know about a data set.

    Attributes:
        name: The name given to ``--dataset``.
        task: One of :data:`TASKS`; it picks criterion, metrics and head.
        bands: Band names in the order of the sample's channels.
        unit: Units of the bands, see :func:`unit_of`: ``"dB"`` unless there are Sentinel-2 bands.
        statistics: Named presets.
        default_statistics: The preset that is used unless the user asks for another.
        classes: Class names in the order of the label columns; empty when unlabelled.
        splits: Names of the splits; the user may join several with ``+``.
        size: Height and width of a sample in pixels.
        builder: ``"module:function"``.
        description: One line for help texts and errors.
        options: Names of the options that the builder accepts, beyond :data:`COMMON_OPTIONS`.
        band_sets: Named choices of bands, in their order; empty: ``bands`` alone.
        all_bands: Every band that may be chosen; ``bands`` where empty.
        band_statistics: Presets over ``all_bands``; those that hold for a choice of bands are cut from them.
        class_options: Option name -> classes that it leaves out when it is on.
        preprocessing: How images become model inputs.
        band_set: Name of the chosen band set, "" for the default one.
        describer: ``"module:function"`` that completes the entry from the data themselves (task, classes, size), where
            they are anybody's; "": the entry is complete.
        cluster: What samples resemble each other by beyond their class (a scene, a place, an event), and a regular
            expression that finds it at the beginning of a sample's name (its groups, where it has any, joined by "_");
            "": the data set reads it from its files; None: samples are on their own.
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
    band_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    all_bands: tuple[str, ...] = ()
    band_statistics: Mapping[str, Statistics] = field(default_factory=dict)
    class_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    band_set: str = ""
    describer: str = ""
    cluster: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"{self.name}: task {self.task!r} is none of {TASKS}")
        if self.unit != unit_of_bands(self.bands):
            raise ValueError(f"{self.name}: bands {self.bands} are in {unit_of_bands(self.bands)}, not {self.unit!r}")
        if self.default_statistics not in self.statistics:
            raise ValueError(f"{self.name}: no statistics preset {self.default_statistics!r}")
        for preset, values in self.statistics.items():
            if len(values.mean) != len(self.bands):
                raise ValueError(f"{self.name}: preset {preset!r} has {len(values.mean)} bands, not {len(self.bands)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{self.name}: a class name appears twice")
        if ":" not in self.builder:
            raise ValueError(f"{self.name}: builder {self.builder!r} is not of the form module:function")
        known = self.all_bands or self.bands
        for chosen in (self.bands, *self.band_sets.values()):
            if set(chosen) - set(known) or len(set(chosen)) != len(chosen):
                raise ValueError(f"{self.name}: bands {chosen} are not a choice of {known}")
        for preset, values in self.band_statistics.items():
            if len(values.mean) != len(known):
                raise ValueError(f"{self.name}: preset {preset!r} has {len(values.mean)} bands, not {len(known)}")

    @property
    def units(self) -> tuple[str, ...]:
        """Unit of each band."""
        return tuple(unit_of(band) for band in self.bands)

    @property
    def extra_splits(self) -> tuple[str, ...]:
        """Splits beside train, val and test: held out for evaluation alone."""
        return tuple(split for split in self.splits if split not in ("train", "val", "test"))

    def with_bands(self, choice: str | Sequence[str] | None) -> DatasetSpec:
        """The entry with other bands.

        Args:
            choice: Name of a band set, band names joined with commas, a sequence of band names, or None: as it is.

        Raises:
            UserError: No such band set or band; the message lists what there is.
        """
        if choice is None:
            return self
        name, bands = "", tuple(choice)
        if isinstance(choice, str):
            name = choice.strip()
            bands = self.band_sets.get(name) or tuple(part.strip() for part in name.split(","))
        known = self.all_bands or self.bands
        wrong = [band for band in bands if band not in known]
        if wrong or len(set(bands)) != len(bands):
            sets = "; ".join(f"{key}: {', '.join(value)}" for key, value in self.band_sets.items())
            what = f"has no band {', '.join(wrong)}" if wrong else "cannot give a band twice"
            raise UserError(
                f"data set {self.name!r} {what} (asked for {','.join(bands)}); --bands takes "
                + (f"one of the sets {sets}, or " if sets else "")
                + f"names joined with commas, of {', '.join(known)}"
            )
        if bands == self.bands:
            return self
        tables: list[tuple[tuple[str, ...], Mapping[str, Statistics]]] = [
            (self.bands, self.statistics),
            (known, self.band_statistics),
        ]
        statistics = {
            preset: values.take([order.index(band) for band in bands])
            for order, table in tables
            for preset, values in table.items()
            if set(bands) <= set(order)
        }
        default = self.default_statistics if self.default_statistics in statistics else next(iter(statistics))
        return replace(
            self,
            bands=bands,
            all_bands=known,
            unit=unit_of_bands(bands),
            statistics=statistics,
            default_statistics=default,
            band_set=name if name in self.band_sets else ",".join(bands),
        )

    def with_options(self, options: Mapping[str, Any]) -> DatasetSpec:
        """The entry without the classes that options leave out."""
        classes = self.classes
        for option, absent in self.class_options.items():
            if parse_switch(option, options.get(option, False)):
                classes = tuple(name for name in classes if name not in absent)
        return self if classes == self.classes else replace(self, classes=classes)


def parse_switch(name: str, value: bool | str | None) -> bool:
    """An on/off option that may come as text from a command line; None is off.

    Raises:
        UserError: The text is neither yes nor no.
    """
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", "none"):
        return False
    raise UserError(f"option {name} must be true or false, not {value!r}")


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
        values = parse_json(read_bytes(path, JSON_LIMIT))
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
    return statistics.take([found.index(band) for band in spec.bands])


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
