"""The files of a run's folder, as they must be: JSON that another program or a half-finished copy may have changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import read_json, whole_records

_LONGEST = 10_000_000  # epochs
_NUMBER = "a number or null"
_FACTS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("dataset", "model", "protocol", "task", "head", "pool", "initialisation"), (str,)),
    **dict.fromkeys(("initialisation_sha256", "select_on", "statistics_origin"), (str,)),
    **dict.fromkeys(("training_seconds", "train_frac"), (int, float)),
    **dict.fromkeys(("classes", "bands"), (list,)),
    **dict.fromkeys(("results", "splits", "samples", "selected_on", "data_options"), (dict,)),
    "seed": (int,),
}
_TEXTS = ("dataset", "model", "output_dir", "finetune", "protocol", "data_path", "statistics", "bands", "pool", "head")
_NUMBERS = ("seed", "epochs", "stop_epoch", "warmup_epochs", "batch_size", "train_frac", "lr", "blr", "mask_ratio")


def read_settings(file: Path) -> dict[str, Any]:
    """args.json: flags by name.

    Raises:
        UserError: missing, no JSON, or values that a flag cannot have.
    """
    args = read_json(file)
    if not isinstance(args, dict):
        raise UserError(f"{file} must hold an object with the settings of a run")
    for name, value in args.items():
        if name in _TEXTS and not isinstance(value, (str, type(None))):
            raise _odd(file, name, value, "text")
        if name in _NUMBERS and value is not None and not _is_number(value):
            raise _odd(file, name, value, "a number")
    return args


def read_epochs(file: Path) -> tuple[list[dict[str, Any]], int]:
    """log.txt: the last line of each epoch, in their order, and how many lines cannot be read.

    Raises:
        UserError: no regular file, or too long.
    """
    try:
        records, incomplete = whole_records(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    good = [
        record
        for record in records
        if type(record.get("epoch")) is int
        and 0 <= record["epoch"] < _LONGEST
        and all(_is_number(value) for name, value in record.items() if isinstance(value, (int, float, bool)))
    ]
    # A resumed run may have written an epoch again: the last line counts.
    by_epoch = {record["epoch"]: record for record in good}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], incomplete + len(records) - len(good)


def read_metrics(file: Path) -> Any:
    """metrics.json or metrics_eval.json.

    Raises:
        UserError: missing, no JSON, or an entry that is not what this program writes; named.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        return content  # who reads it says that there are no results
    for name, kinds in _FACTS.items():
        value = content.get(name)
        number = isinstance(value, (int, float))
        if value is not None and (not isinstance(value, kinds) or (number and not _is_number(value))):
            raise _odd(file, name, value, " or ".join(kind.__name__ for kind in kinds))
    for name in ("classes", "bands"):
        if not all(isinstance(item, str) for item in content.get(name) or ()):
            raise _odd(file, name, content[name], "names")
    for checkpoint, entry in content["results"].items():
        if "\0" in checkpoint or not isinstance(entry, dict):
            raise _odd(file, f"results.{checkpoint}", entry, "an object")
        for split, found in entry.items():
            if isinstance(found, dict) and "scalars" in found:
                _check_result(file, f"results.{checkpoint}.{split}", found)
            elif split in ("test", "val"):
                raise _odd(file, f"results.{checkpoint}.{split}", found, "an object with scalars")
    return content


def _check_result(file: Path, where: str, found: dict[str, Any]) -> None:
    scalars, rows, ends = found["scalars"], found.get("per_class"), found.get("intervals_95")
    if not isinstance(scalars, dict):
        raise _odd(file, f"{where}.scalars", scalars, "an object")
    for name, value in scalars.items():
        if value is not None and not _is_number(value):
            raise _odd(file, f"{where}.scalars.{name}", value, _NUMBER)
    if rows is not None:
        if not isinstance(rows, list):
            raise _odd(file, f"{where}.per_class", rows, "a list")
        for number, row in enumerate(rows):
            place = f"{where}.per_class[{number}]"
            if not isinstance(row, dict) or not isinstance(row.get("class"), str) or not _is_number(row.get("support")):
                raise _odd(file, place, row, "an object with class and support")
            if row.keys() != rows[0].keys():
                raise _odd(file, place, sorted(row), "the same metrics as of the first class")
            for name, value in row.items():
                if name != "class" and value is not None and not _is_number(value):
                    raise _odd(file, f"{place}.{name}", value, _NUMBER)
    if ends is not None:
        if not isinstance(ends, dict):
            raise _odd(file, f"{where}.intervals_95", ends, "an object")
        for name, pair in ends.items():
            good = isinstance(pair, list) and len(pair) == 2 and all(end is None or _is_number(end) for end in pair)
            if pair is not None and not (good and (name in scalars)):
                raise _odd(file, f"{where}.intervals_95.{name}", pair, "two numbers of a metric that is there")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that every calculation takes."""
    return type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value)


def _odd(file: Path, where: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"{file}: {where[:120]!r} is {repr(value)[:60]}, expected {expected}; the file was changed or damaged: "
        "evaluate the run again (main_finetune.py --eval), or leave it out"
    )
