"""S1list.json, split lists and the pairing rule of SEN12-FLOOD.

Nothing here reads an image. A *sequence* is one folder (one place), a *frame* one Sentinel-1 acquisition of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import JSON_LIMIT, parse_json, read_bytes
from util.text import read_text

S1LIST = "S1list.json"
SPLITS = ("train", "test")
TRAIN_ID_LENGTH = 4  # ids written with four digits are train (267 of 335), the others (0..67) test
FRAME_KEYS = ("date", "FLOODING", "filename")


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong in the input that the user should know about.

    Attributes:
        kind: Short machine-readable reason, such as ``"missing file"``.
        where: Folder, file or id.
        message: What was found, what was expected, what to do.
    """

    kind: str
    where: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """For the manifest."""
        return {"kind": self.kind, "where": self.where, "message": self.message}

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Frame:
    """One Sentinel-1 acquisition.

    Attributes:
        date: ``YYYY-MM-DD``.
        product: Product name, the beginning of the tile's file name.
        flooding: Whether the flood is visible in this acquisition.
    """

    date: str
    product: str
    flooding: bool


@dataclass(frozen=True)
class SequenceInfo:
    """One folder of the data set.

    Attributes:
        folder: Its id, also the name of its directory.
        frames: Acquisitions in the order of their numbers in S1list.json, each product once.
        polygon: Corners (longitude, latitude) in degrees, possibly empty.
    """

    folder: str
    frames: tuple[Frame, ...]
    polygon: tuple[tuple[float, float], ...] = ()


@dataclass
class Catalogue:
    """The content of S1list.json after its checks."""

    sequences: dict[str, SequenceInfo]
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Split:
    """Which folder belongs to which split, and where that is written.

    Attributes:
        folders: Split name -> folder ids, sorted.
        origin: Sentence for the log and the manifest.
        problems: What was wrong in the lists.
    """

    folders: dict[str, tuple[str, ...]]
    origin: str
    problems: tuple[Problem, ...] = ()

    def of(self) -> dict[str, str]:
        """Folder id -> split."""
        return {folder: split for split in SPLITS for folder in self.folders[split]}


def read_s1list(path: str | Path) -> Catalogue:
    """Read and check S1list.json.

    Frame keys ("1", "2", ...) are strings in any order; frames come in the order of these numbers.
    Entries that cannot be used are left out and listed.

    Raises:
        UserError: The file is missing, is not JSON, or has another structure altogether.
    """
    path = Path(path)
    try:
        content = read_bytes(path, JSON_LIMIT)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; expected the {S1LIST} of SEN12-FLOOD: put it into the raw folder or into "
            "datasets/, or name it with --s1list"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); expected the {S1LIST} of SEN12-FLOOD") from error
    return parse_s1list(content, path)


def parse_s1list(data: bytes, path: Path) -> Catalogue:
    """:func:`read_s1list` for content that has been read already; ``path`` is what messages call it."""
    try:
        content = parse_json(data, pairs=_pairs_to_dict)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); expected the {S1LIST} of SEN12-FLOOD") from error
    if not isinstance(content, dict) or not content or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path} holds no table of sequences; expected an object of folder id -> frames, as {S1LIST}")
    catalogue = Catalogue({})
    for key in getattr(content, "repeated", []):
        message = f"folder {key!r} appears twice in {path.name}; the first is used; remove one"
        catalogue.problems.append(Problem("listed twice", key, message))
    for key, entry in content.items():
        folder = key.strip()
        if folder != key:
            catalogue.problems.append(
                Problem(
                    "stray spaces", repr(key), f"id {key!r} in {path.name} has spaces; {folder!r} is used; remove them"
                )
            )
        if not _is_plain_name(folder):
            catalogue.problems.append(
                Problem("bad id", repr(key), f"id {key!r} in {path.name} is no folder name; left out; correct it")
            )
        elif folder in catalogue.sequences:
            catalogue.problems.append(
                Problem("listed twice", folder, f"folder {folder!r} appears twice in {path.name}; the first is used")
            )
        else:
            catalogue.sequences[folder] = _sequence(folder, entry, path.name, catalogue.problems)
    return catalogue


class _Repeated(dict[str, Any]):
    """A JSON object in which a key appeared twice; the first value is kept."""

    def __init__(self, values: dict[str, Any], repeated: list[str]) -> None:
        super().__init__(values)
        self.repeated = repeated


def _pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    repeated = []
    for key, value in pairs:
        if key in values:
            repeated.append(key)
        else:
            values[key] = value
    return _Repeated(values, repeated) if repeated else values


def _sequence(folder: str, entry: dict[str, Any], source: str, problems: list[Problem]) -> SequenceInfo:
    for key in getattr(entry, "repeated", []):
        problems.append(
            Problem("listed twice", folder, f"key {key!r} appears twice in {folder} of {source}; the first is used")
        )
    found: dict[str, Frame] = {}
    contradictory: set[str] = set()
    for key in sorted((k for k in entry if k.strip().isdecimal() and len(k) < 10), key=lambda k: (int(k), k)):
        frame = _frame(folder, key, entry[key], source, problems)
        if frame is None:
            continue
        if frame.product not in found:
            found[frame.product] = frame
        elif found[frame.product].flooding == frame.flooding:
            problems.append(
                Problem(
                    "listed twice",
                    f"{folder}/{frame.product}",
                    f"frame {key} of {source} repeats this product; it is used once; remove one entry",
                )
            )
        else:
            contradictory.add(frame.product)
            problems.append(
                Problem(
                    "contradictory labels",
                    f"{folder}/{frame.product}",
                    f"frame {key} of {source} repeats this product with another FLOODING value; left out; correct it",
                )
            )
    # in the order of their numbers, as the published pairs are: where dates and numbers disagree, the number decides
    frames = tuple(f for f in found.values() if f.product not in contradictory)
    return SequenceInfo(folder, frames, _polygon(entry.get("geo")))


def _frame(folder: str, key: str, value: Any, source: str, problems: list[Problem]) -> Frame | None:
    where = f"{folder}, frame {key}"
    if not isinstance(value, dict) or any(name not in value for name in FRAME_KEYS):
        problems.append(
            Problem("bad frame", where, f"{source} has {str(value)[:60]!r}; expected {', '.join(FRAME_KEYS)}; left out")
        )
        return None
    if not isinstance(value["FLOODING"], bool):
        problems.append(
            Problem("bad frame", where, f"FLOODING is {value['FLOODING']!r}; expected true or false; left out")
        )
        return None
    product = str(value["filename"]).strip()
    if product != value["filename"]:
        problems.append(
            Problem("stray spaces", where, f"file name {value['filename']!r} has spaces; {product!r} is used")
        )
    if not _is_plain_name(product):
        problems.append(
            Problem("bad frame", where, f"file name {product!r} is no plain name; expected a product; left out")
        )
        return None
    return Frame(str(value["date"]).strip(), product, value["FLOODING"])


def _is_plain_name(name: str) -> bool:
    """Whether ``name`` is safe as part of a file name (no separator, no '..', no '__' that would blur pair names)."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in '/\\\0,\n"') and "__" not in name


def _polygon(geo: Any) -> tuple[tuple[float, float], ...]:
    try:
        ring = geo["coordinates"][0]
        return tuple((float(point[0]), float(point[1])) for point in ring)
    except (TypeError, KeyError, IndexError, ValueError):
        return ()


def read_id_list(path: str | Path) -> tuple[list[str], list[Problem]]:
    """Read one folder id per line, no header. Stray spaces and repetitions are cleaned and listed.

    Raises:
        UserError: The file is missing, unreadable or empty.
    """
    path = Path(path)
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise UserError(f"split list {path} does not exist; expected one folder id per line, no header") from None
    except (OSError, UserError) as error:
        raise UserError(f"split list {path} cannot be read ({error}); expected one folder id per line") from error
    ids: dict[str, None] = {}  # in their order; a list would be searched for each line
    problems = []
    for number, line in enumerate(lines, 1):
        folder = line.strip()
        if not folder:
            continue
        if folder != line:
            problems.append(
                Problem(
                    "stray spaces",
                    f"{path.name}:{number}",
                    f"id {line!r} has spaces; expected the id alone; read as {folder!r}; remove the spaces",
                )
            )
        if folder in ids:
            problems.append(
                Problem("listed twice", f"{path.name}:{number}", f"id {folder!r} is repeated; it is used once")
            )
        else:
            ids[folder] = None
    if not ids:
        raise UserError(f"split list {path} is empty; expected one folder id per line")
    return list(ids), problems


def derive_split(folders: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Four-digit ids are train, the others test (267 and 68 of the full data set)."""
    ids = sorted(folders)
    return {
        "train": tuple(f for f in ids if len(f) == TRAIN_ID_LENGTH),
        "test": tuple(f for f in ids if len(f) != TRAIN_ID_LENGTH),
    }


def resolve_split(catalogue: Catalogue, train_csv: str | Path | None, test_csv: str | Path | None) -> Split:
    """The split: from the two lists, or derived from how the ids are written when there are none.

    Args:
        catalogue: What S1list.json holds.
        train_csv: List of training folders, or None.
        test_csv: List of test folders, or None; both or neither.

    Raises:
        UserError: One list without the other, or a folder in both.
    """
    if train_csv is None and test_csv is None:
        folders = derive_split(catalogue.sequences)
        return Split(folders, "derived: ids written with four digits are train, the others test")
    if train_csv is None or test_csv is None:
        raise UserError(
            f"only one split list is given ({train_csv or test_csv}); give both --train_csv and --test_csv, or neither"
        )
    problems: list[Problem] = []
    lists: dict[str, tuple[str, ...]] = {}
    for split, path in zip(SPLITS, (train_csv, test_csv), strict=True):
        ids, found = read_id_list(path)
        problems += found
        for folder in ids:
            if folder not in catalogue.sequences:
                problems.append(
                    Problem(
                        "unknown id",
                        f"{Path(path).name}: {folder}",
                        f"id {folder!r} is not in {S1LIST}; expected one of its ids; left out; correct the list",
                    )
                )
        lists[split] = tuple(sorted(f for f in ids if f in catalogue.sequences))
    both = sorted(set(lists["train"]) & set(lists["test"]))
    if both:
        raise UserError(
            f"{len(both)} folder(s) are in both {train_csv} and {test_csv}, such as {', '.join(both[:5])}; "
            "a place must be in one split only: correct the lists"
        )
    origin = f"lists {Path(train_csv).name} and {Path(test_csv).name}"
    return Split(lists, origin, tuple(problems))


def make_pairs(flooding: Sequence[bool]) -> list[tuple[int, int, int]]:
    """The pairing rule for one sequence.

    The first image shows no flood; the second shows one (label 1) or not (label 0). No image is paired with itself and
    an unordered pair appears once, the frame of the lower number first. Flood pairs are formed whatever their order in
    time: the first image is the one without flood. n dry and m flooded frames give n * m + n * (n - 1) / 2 pairs.

    Args:
        flooding: For each frame, in the order of the numbers, whether it shows the flood.

    Returns:
        (first, second, label) as indices into ``flooding``, sorted.
    """
    dry = [i for i, flood in enumerate(flooding) if not flood]
    wet = [i for i, flood in enumerate(flooding) if flood]
    pairs = [(a, b, 0) for n, a in enumerate(dry) for b in dry[n + 1 :]]
    pairs += [(a, b, 1) for a in dry for b in wet]
    return sorted(pairs)


def pair_name(folder: str, first: str, second: str, label: int) -> str:
    """``<folder>__<fileA>__<fileB>__<label>``, the file name of a pair without ``.npy``."""
    return f"{folder}__{first}__{second}__{label}"


def parse_pair_name(name: str) -> tuple[str, str, str, int]:
    """Inverse of :func:`pair_name`.

    Raises:
        ValueError: The name has another form.
    """
    parts = name.split("__")
    if len(parts) != 4 or parts[3] not in ("0", "1") or not all(parts):
        raise ValueError(f"{name!r} is not of the form <folder>__<fileA>__<fileB>__<0 or 1>")
    return parts[0], parts[1], parts[2], int(parts[3])
