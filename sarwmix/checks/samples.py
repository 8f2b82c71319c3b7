"""Find what is wrong with a data set before training does: lists, files, units, bands, pixels, labels, statistics.

Every finding names what it is about. An error is something that training would stumble over or learn wrongly from; a
warning is something to look at.
"""

from __future__ import annotations

import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sarwmix.checks.statistics import CHUNK, Moments, reading_processes, sample_indices
from sarwmix.data import registry
from sarwmix.data.base import MaskDataset, SarDataset, UnreadableSample
from sarwmix.data.labels import CLASSES_19, CLASSES_43
from sarwmix.data.spec import DECIBEL, unit_of
from util.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_TABLES = ("benv1", "benv2", "demo")
_EXAMPLES = 20
"""Names that a finding lists before it says how many more there are."""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble.

    Attributes:
        kind: "error" or "warning".
        topic: Short name, such as "unreadable" or "swapped bands".
        message: What was found, and what to do.
        names: Samples concerned.
    """

    kind: str
    topic: str
    message: str
    names: tuple[str, ...] = ()

    def text(self) -> str:
        """One line for the console."""
        listed = "; ".join(self.names[:_EXAMPLES])  # class names hold commas
        more = f" and {len(self.names) - _EXAMPLES} more" if len(self.names) > _EXAMPLES else ""
        return f"{self.kind}: {self.topic}: {self.message}" + (f": {listed}{more}" if listed else "")


def _error(topic: str, message: str, names: Sequence[str] = ()) -> Finding:
    return Finding("error", topic, message, tuple(names))


def _warning(topic: str, message: str, names: Sequence[str] = ()) -> Finding:
    return Finding("warning", topic, message, tuple(names))


@dataclass
class Facts:
    """Numbers of each sample that was read; arrays are (n,) or (n, C), and (n, K) for K classes of a label map."""

    index: NDArray[np.int64]
    mean: NDArray[np.float64]  # dB
    std: NDArray[np.float64]  # dB
    negative: NDArray[np.float64]  # share of the valid pixels
    invalid: NDArray[np.int64]  # pixels
    fingerprint: NDArray[np.uint32]  # of the pixels
    labelled: NDArray[np.int64]  # pixels of each class; K = 0 where labels are no maps

    @classmethod
    def join(cls, parts: Sequence[Facts]) -> Facts:
        """All samples of several parts."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass
class Examination:
    """What was read, what was found."""

    dataset: SarDataset | None
    moments: Moments | None
    facts: Facts | None
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)  # what was not looked at, in words

    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.kind == "error"]


def measure(dataset: SarDataset, indices: NDArray[np.int64]) -> tuple[Facts, Moments]:
    """Read samples and take their numbers; unreadable ones are noted in the moments."""
    images = np.empty((len(indices), *dataset.shape), dtype=np.float32)
    labelled = np.zeros((len(indices), len(dataset.spec.classes) if isinstance(dataset, MaskDataset) else 0), np.int64)
    if isinstance(dataset, MaskDataset):
        bad = _read_pairs(dataset, indices, images, labelled)
    else:
        bad = dataset.read_many(indices, images)
    keep = np.ones(len(indices), dtype=bool)
    keep[[position for position, _ in bad]] = False
    images = images[keep]
    moments = Moments.of(images, dataset.spec.units)
    moments.unreadable = [(error.name, f"{error.path}: {error.reason}") for _, error in bad]
    pixels = images.reshape(*images.shape[:2], images.shape[2] * images.shape[3])
    valid = np.isfinite(pixels)
    count = np.maximum(valid.sum(axis=2), 1)
    filled = np.where(valid, pixels, 0.0).astype(np.float64)
    mean = filled.sum(axis=2) / count
    deviation = np.where(valid, filled - mean[..., None], 0.0)
    facts = Facts(
        index=indices[keep],
        mean=mean,
        std=np.sqrt((deviation**2).sum(axis=2) / count),
        negative=(filled < 0).sum(axis=2) / count,
        invalid=(~valid).sum(axis=2),
        fingerprint=np.array([zlib.crc32(image.tobytes()) for image in images], dtype=np.uint32),
        labelled=labelled[keep],
    )
    return facts, moments


def _read_pairs(
    dataset: MaskDataset, indices: NDArray[np.int64], images: NDArray[np.float32], labelled: NDArray[np.int64]
) -> list[tuple[int, UnreadableSample]]:
    """As `read_many`, and the labelled pixels of each class."""
    bad = []
    label = np.empty(dataset.shape[1:], dtype=np.uint8)
    for position, index in enumerate(indices):
        try:
            dataset.read_pair(int(index), images[position], label)
        except UnreadableSample as error:
            bad.append((position, error))
            continue
        counted = label[np.isfinite(images[position]).all(axis=0)]
        labelled[position] = np.bincount(counted, minlength=256)[: labelled.shape[1]]
    return bad


_dataset: SarDataset | None = None


def _open_worker(dataset: SarDataset) -> None:
    global _dataset
    _dataset = dataset


def _work(indices: NDArray[np.int64]) -> tuple[Facts, Moments]:
    assert _dataset is not None
    return measure(_dataset, indices)


def read_samples(
    dataset: SarDataset,
    *,
    sample: int | None,
    seed: int,
    jobs: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Facts, Moments]:
    """Read all samples, or `sample` of them, with `jobs` processes; the result does not depend on `jobs`."""
    indices = sample_indices(len(dataset), sample, seed)
    processes = reading_processes(jobs, len(indices))
    pieces = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    parts: list[Facts] = []
    total = Moments.empty(dataset.shape[0])
    with ExitStack() as stack:
        if processes == 1 or len(pieces) == 1:
            results: Iterable[tuple[Facts, Moments]] = map(partial(measure, dataset), pieces)
        else:
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    min(processes, len(pieces)),
                    mp_context=get_context("spawn"),
                    initializer=_open_worker,
                    initargs=(dataset,),
                )
            )
            results = pool.map(_work, pieces)
        for facts, moments in results:
            parts.append(facts)
            total.add(moments)
            if progress is not None:
                progress(total.samples + len(total.unreadable), len(indices))
    return Facts.join(parts), total


def _check_files(
    parts: Sequence[SarDataset], *, sample: int | None, seed: int, jobs: int | None, unseen: list[str]
) -> list[Finding]:
    """Files and checksums that reading each image once leaves out; see `SarDataset.damaged`."""
    wrong: dict[str, str] = {}
    for part in parts:
        if type(part).damaged is SarDataset.damaged:
            continue
        indices = sample_indices(len(part), sample, seed)
        with ThreadPoolExecutor(jobs or min(8, reading_processes(None, 8 * 1024))) as pool:  # reading frees the GIL
            try:
                for found in pool.map(part.damaged, np.array_split(indices, max(1, len(indices) // CHUNK))):
                    wrong.update(found)
            except UserError as error:
                return [_error("damaged", str(error))]
        if len(indices) < len(part):
            unseen.append(
                f"{len(part) - len(indices):,} of {len(part):,} files of split {part.split} were not opened, and their "
                f"checksums not compared (--sample {sample})"
            )
    listed = [f"{name} ({reason})" for name, reason in wrong.items()]
    what = f"{len(listed)} sample(s) have a file that is not what was written"
    return [_error("damaged", what, listed)] if listed else []


# Lists -----------------------------------------------------------------------------------------------------------


def _read_table(path: Path) -> pd.DataFrame | None:
    """A metadata file with the official column names, or None when it is of another kind."""
    import pandas as pd

    try:
        table = (
            pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, skipinitialspace=True)
        )
    except (OSError, ValueError):
        return None  # the reader of the data set says what is wrong
    return table if {"s1_name", "labels"} <= set(table.columns) else None


def _label_names(cell: Any) -> list[str]:
    from sarwmix.data.labels import parse_label_list

    if isinstance(cell, str):
        try:
            return parse_label_list(cell)
        except UserError:
            return [cell]
    return [] if cell is None else [str(name) for name in cell]


def check_table(table: pd.DataFrame, where: str) -> tuple[list[Finding], NDArray[np.bool_]]:
    """Look for names that appear twice, unknown labels and splits.

    Args:
        table: Columns s1_name, labels, and perhaps split.
        where: What findings call it.

    Returns:
        Findings, and which rows are usable (bool (N,)).
    """
    names = table["s1_name"].astype(str).str.strip()
    findings: list[Finding] = []
    usable = np.ones(len(table), dtype=bool)
    twice = names[names.duplicated(keep="first")]
    if len(twice):
        findings.append(
            _error(
                "duplicated name",
                f"{where} lists {len(twice)} name(s) more than once; each sample must appear once, in one split",
                tuple(dict.fromkeys(twice)),
            )
        )
        usable &= ~names.duplicated(keep="first").to_numpy()
    known = {*CLASSES_19, *CLASSES_43}
    cells = table["labels"].map(_label_names)
    wrong = cells.map(lambda labels: [label for label in labels if label not in known])
    bad = wrong.map(bool).to_numpy()
    if bad.any():
        listed = tuple(
            f"{name} ({', '.join(repr(label) for label in labels)})"
            for name, labels in zip(names[bad], wrong[bad], strict=True)
        )
        findings.append(
            _error(
                "unknown label",
                f"{where} has {int(bad.sum())} sample(s) with labels outside the nomenclature of 19 (or 43) classes",
                listed,
            )
        )
        usable &= ~bad
    empty = ~cells.map(bool).to_numpy()
    if empty.any():
        findings.append(
            _warning("no label", f"{where} has {int(empty.sum())} sample(s) without any label", tuple(names[empty]))
        )
    if "split" in table.columns:
        from sarwmix.datasets.bigearthnet import SPLIT_NAMES

        strange = ~table["split"].astype(str).str.strip().str.lower().isin(SPLIT_NAMES).to_numpy()
        if strange.any():
            findings.append(
                _error(
                    "unknown split",
                    f"{where} has {int(strange.sum())} sample(s) in a split that is not train, validation or test",
                    tuple(names[strange]),
                )
            )
            usable &= ~strange
    return findings, usable


def compare_tables(table: pd.DataFrame, reference: pd.DataFrame, where: str) -> list[Finding]:
    """Compare names, labels and splits with the official metadata."""
    findings: list[Finding] = []

    def keyed(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.assign(s1_name=frame["s1_name"].astype(str).str.strip())
        return frame.drop_duplicates("s1_name").set_index("s1_name")

    ours, theirs = keyed(table), keyed(reference)
    foreign = ours.index.difference(theirs.index)
    if len(foreign):
        findings.append(
            _error(
                "unknown name", f"{where} lists {len(foreign)} name(s) that the reference does not have", tuple(foreign)
            )
        )
    common = ours.index.intersection(theirs.index)
    first = ours.loc[common, "labels"].map(lambda cell: frozenset(_label_names(cell)))
    second = theirs.loc[common, "labels"].map(lambda cell: frozenset(_label_names(cell)))
    differ = common[(first != second).to_numpy()]
    if len(differ):
        listed = tuple(
            f"{name} ({', '.join(sorted(first[name])) or 'none'} instead of {', '.join(sorted(second[name]))})"
            for name in differ
        )
        findings.append(
            _error("wrong label", f"{where}: the labels of {len(differ)} sample(s) differ from the reference", listed)
        )
    if "split" in ours.columns and "split" in theirs.columns:
        moved = common[(ours.loc[common, "split"].astype(str) != theirs.loc[common, "split"].astype(str)).to_numpy()]
        if len(moved):
            findings.append(
                _error(
                    "wrong split",
                    f"{where}: {len(moved)} sample(s) are in another split than in "
                    "the reference, which lets test patches into training",
                    tuple(moved),
                )
            )
    return findings


def _check_lists(
    name: str, data_path: Path, splits: Sequence[str], options: dict[str, Any], reference: Path | None, folder: Path
) -> list[Finding]:
    """Check metadata tables; broken rows are taken out of the table that the data set then reads (in `folder`)."""
    from sarwmix.datasets.bigearthnet import find_metadata

    try:
        family = "benv1" if name == "benv1" else "benv2"
        paths = find_metadata(data_path, options.get("metadata"), splits, dataset=family)
    except UserError:
        return []  # building the data set says the same
    findings: list[Finding] = []
    official = None
    if reference is not None:
        official = _read_table(reference)
        if official is None:
            raise UserError(
                f"--reference {reference} cannot be read as metadata with the columns s1_name and labels; "
                "expected the official metadata.parquet"
            )
    cleaned = []
    for number, path in enumerate(paths):
        table = _read_table(path)
        if table is None:
            cleaned.append(path)
            continue
        found, usable = check_table(table, path.name)
        findings += found
        if official is not None:
            findings += compare_tables(table, official, path.name)
        if usable.all():
            cleaned.append(path)
        elif usable.any():
            clean = folder / f"{number}_{path.name}"
            kept = table[usable]
            kept.to_parquet(clean, index=False) if path.suffix == ".parquet" else kept.to_csv(clean, index=False)
            cleaned.append(clean)
    if any(path.parent == folder for path in cleaned):
        options["metadata"] = cleaned
    return findings


# Pixels ----------------------------------------------------------------------------------------------------------


def check_samples(names: Sequence[str], facts: Facts, size: int, bands: Sequence[str] = ("VH", "VV")) -> list[Finding]:
    """Findings about single samples.

    Args:
        names: Names of all samples of the data set.
        facts: Numbers of those that were read.
        size: Pixels of one band of a sample.
        bands: Band names.
    """

    def named(mask: Any) -> tuple[str, ...]:
        return tuple(names[int(index)] for index in facts.index[mask])

    findings: list[Finding] = []
    sar = np.array([unit_of(band) == DECIBEL for band in bands])
    positive = (facts.negative < 0.05) & sar  # of each band
    linear = positive.any(axis=1)
    if linear.any():
        listed = []
        for row in np.flatnonzero(linear):
            of = "" if positive[row, sar].all() else f" ({', '.join(np.array(bands)[positive[row]])})"
            listed.append(names[int(facts.index[row])] + of)
        findings.append(
            _error(
                "linear instead of dB",
                f"{int(linear.sum())} sample(s) have hardly any negative value (in the bands named, "
                "else in all), so they look like linear power; dB = 10 log10(power) is expected",
                listed,
            )
        )
    level = ((facts.mean < -45) | (facts.mean > 5))[:, sar].any(axis=1) & ~linear
    if level.any():
        findings.append(
            _error(
                "implausible level",
                f"{int(level.sum())} sample(s) have a mean outside -45 to +5 dB, which calibrated backscatter has not",
                named(level),
            )
        )
    strange = ((facts.mean < 5) | (facts.mean > 15_000))[:, ~sar]
    if strange.any():
        findings.append(
            _error(
                "implausible reflectance",
                f"{int(strange.any(axis=1).sum())} sample(s) have a band with a mean outside 5 to 15,000; expected "
                "reflectance times 10,000",
                named(strange.any(axis=1)),
            )
        )
    swapped = np.zeros(len(facts.mean), dtype=bool)
    if "VH" in bands and "VV" in bands:
        swapped = (facts.mean[:, list(bands).index("VH")] > facts.mean[:, list(bands).index("VV")] + 1.0) & ~linear
    if swapped.any():
        findings.append(
            _error(
                "swapped bands",
                f"VH is brighter than VV by more than 1 dB in {int(swapped.sum())} "
                "sample(s); VH is some 6 dB darker by nature",
                named(swapped),
            )
        )
    flat = (facts.std < 1e-3).any(axis=1)
    if flat.any():
        findings.append(
            _error("constant image", f"{int(flat.sum())} sample(s) have one value throughout a band", named(flat))
        )
    holes = (facts.invalid > 0).any(axis=1)
    if holes.any():
        order = np.flatnonzero(holes)
        order = order[np.argsort(-facts.invalid[order].max(axis=1), kind="stable")]
        listed = [
            f"{names[int(facts.index[i])]} "
            f"({', '.join(f'{count} {band}' for count, band in zip(facts.invalid[i], bands, strict=True) if count)})"
            for i in order
        ]
        share = 100 * facts.invalid.sum() / max(facts.invalid.size * size, 1)
        findings.append(
            _warning(
                "invalid pixels",
                f"{int(holes.sum())} sample(s) have NaN or infinite pixels, "
                f"{share:.3g} % of all pixels read; they get weight 0 in training",
                listed,
            )
        )
    if facts.labelled.shape[1]:
        silent = facts.labelled.sum(axis=1) == 0
        if silent.any():
            findings.append(
                _warning(
                    "no labelled pixel",
                    f"{int(silent.sum())} sample(s) count nothing: all their pixels are ignored or have no data",
                    named(silent),
                )
            )
    repeated = Counter(facts.fingerprint.tolist())
    same = np.array([repeated[int(value)] > 1 for value in facts.fingerprint], dtype=bool)
    if same.any():
        findings.append(
            _warning("equal images", f"{int(same.sum())} sample(s) have the same pixels as another one", named(same))
        )
    return findings


def compare_statistics(dataset: SarDataset, moments: Moments) -> list[Finding]:
    """Compare mean and deviation with the registered ones, with room for the chance of a small sample."""
    findings: list[Finding] = []
    registered = dataset.statistics
    within = moments.within / np.maximum(moments.count, 1)
    between = np.sqrt(np.maximum(moments.std() ** 2 - within, 0.0))
    for number, band in enumerate(dataset.spec.bands):
        mean, std = float(moments.mean[number]), float(moments.std()[number])
        unit = unit_of(band)
        least = 1.0 if unit == DECIBEL else 0.2 * registered.std[number]
        room = least + 3.0 * float(between[number]) / np.sqrt(max(moments.samples, 1))
        if abs(mean - registered.mean[number]) > room:
            findings.append(
                _warning(
                    "other mean",
                    f"{band}: {mean:.2f} {unit} here, {registered.mean[number]:.2f} {unit} "
                    f"in use ({registered.origin}); more than {room:.1f} {unit} apart. Compute statistics "
                    "with scripts/compute_statistics.py",
                )
            )
        ratio = std / registered.std[number]
        if not 0.75 < ratio < 1.33 and moments.samples >= 30:
            findings.append(
                _warning(
                    "other deviation",
                    f"{band}: {std:.2f} {unit} over all pixels "
                    f"({np.sqrt(within[number]):.2f} {unit} within images) here, "
                    f"{registered.std[number]:.2f} {unit} in use ({registered.origin})",
                )
            )
    return findings


def _is_absent(reason: str) -> bool:
    """Whether a sample's files are not there, by the words of the readers."""
    return any(words in reason for words in ("does not exist", "is not in the store", "is not in the LMDB"))


def _holds_out(spec: registry.DatasetSpec) -> bool:
    """Whether val is a part of train that an option holds out."""
    return "val_frac" in spec.options


# All -------------------------------------------------------------------------------------------------------------


def examine(
    name: str,
    data_path: str | Path,
    *,
    splits: Sequence[str] | None = None,
    sample: int | None = None,
    seed: int = 0,
    jobs: int | None = 1,
    options: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Examine a data set.

    Args:
        name: Registered name.
        data_path: Its data.
        splits: Splits to look at; all by default (train alone for unlabelled data).
        sample: Samples to read; None reads all.
        seed: Seed of the choice.
        jobs: Processes that read; None: as many as are worth it.
        options: Options of the data set.
        reference: Official metadata to compare names, labels and splits with.
        progress: Called with (samples done, samples in all).

    Raises:
        UserError: Unknown data set or option; trouble with the data becomes a finding.
    """
    given = dict(options or {})
    spec = registry.get_spec(name, given.get("bands"), given)
    registry.check_options(spec, given, data_path)  # a wrong name is no finding about the data
    spec = registry.get_spec(name, given.get("bands"), given, data_path)
    if reference is not None and name not in _TABLES:
        raise UserError(f"--reference compares metadata of {', '.join(_TABLES)}; data set {name!r} has none")
    if splits:
        wanted = tuple(splits)
    elif spec.task == "unlabelled":
        wanted = ("train",)
    else:
        # Some data sets have no validation split of their own, only one that is held out on request.
        wanted = tuple(one for one in spec.splits if one != "val" or "val_frac" in given or not _holds_out(spec))
    result = Examination(None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        if name in _TABLES and Path(data_path).exists() and not registry.is_packed(data_path):
            result.findings += _check_lists(
                name, Path(data_path), wanted, given, None if reference is None else Path(reference), Path(folder)
            )
        if "check" in spec.options and not registry.is_packed(data_path):
            given.setdefault("check", "none")  # reading tells more than looking for files
        if registry.is_packed(data_path) and sample is None:
            given.setdefault("check", "all")
        parts: dict[str, SarDataset] = {}
        without_labels = {**given, "labels": "none"} if "labels" in spec.options else None
        reading = given
        for split in wanted:
            try:
                parts[split] = registry.build_dataset(name, data_path, split, **given)
            except UserError as error:
                result.findings.append(_error("cannot be opened", f"split {split}: {error}"))
                if without_labels is not None:  # wrong labels must not hide what is wrong with the pixels
                    with suppress(UserError):
                        parts[split] = registry.build_dataset(name, data_path, split, **without_labels)
                        reading = without_labels
            if split in parts:
                result.counts[split] = len(parts[split])
        if not parts:
            return result
        # One data set of all splits that exist, so that a sample is drawn from them together.
        joined = "+".join(parts)
        if joined in parts:
            result.dataset = parts[joined]
        else:
            result.dataset = registry.build_dataset(name, data_path, joined, **reading)
    # Statistics and pictures of pairs are about their images, each once and in dB.
    dataset = result.dataset = result.dataset.single_images()
    for split, expected in registry.OFFICIAL_COUNTS.get(name, {}).items():
        if split in result.counts and result.counts[split] != expected:
            result.findings.append(
                _warning(
                    "other count",
                    f"split {split} has {result.counts[split]:,} samples, "
                    f"officially {expected:,}; fine for a part of the data",
                )
            )
    result.facts, result.moments = read_samples(dataset, sample=sample, seed=seed, jobs=jobs, progress=progress)
    result.findings += _check_files(list(parts.values()), sample=sample, seed=seed, jobs=jobs, unseen=result.unseen)
    left = len(dataset) - len(result.facts.index) - len(result.moments.unreadable)
    if left:
        images = f"{left:,} of {len(dataset):,} samples were not opened (--sample {sample})"
        result.unseen.append(images + (", nor the checksums of their blocks" if registry.is_packed(data_path) else ""))
    for topic, absent, what in (("missing", True, "have no file"), ("unreadable", False, "cannot be used")):
        listed = [f"{one} ({reason})" for one, reason in result.moments.unreadable if _is_absent(reason) == absent]
        if listed:
            result.findings.append(_error(topic, f"{len(listed)} sample(s) {what}", listed))
    if result.moments.samples:
        size = dataset.shape[1] * dataset.shape[2]
        result.findings += check_samples(dataset.names, result.facts, size, dataset.spec.bands)
        result.findings += compare_statistics(dataset, result.moments)
    end = 0
    for split, part in parts.items():
        start, end = end, end + len(part)
        if result.facts.labelled.shape[1]:
            here = (result.facts.index >= start) & (result.facts.index < end)
            counts = result.facts.labelled[here].sum(axis=0)  # pixels
        elif part.labels is None:
            continue
        else:
            labels = part.labels
            counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(spec.classes))
        result.classes[split] = dict(zip(spec.classes, (int(count) for count in counts), strict=True))
        missing = tuple(one for one, count in result.classes[split].items() if count == 0)
        if missing:
            result.findings.append(
                _warning("class without sample", f"split {split} has no sample of {len(missing)} class(es)", missing)
            )
    skipped = getattr(dataset, "skipped", None)
    if skipped is not None:
        if skipped.scenes:
            result.findings.append(
                _warning("scene left out", f"{len(skipped.scenes)} scene(s) hold no usable tile", tuple(skipped.scenes))
            )
        if skipped.files:
            result.findings.append(
                _warning("file left out", f"{len(skipped.files)} file(s) belong to no scene", tuple(skipped.files))
            )
    return result
