"""What public weight files were trained on: bands in order, unit, statistics, clipping, size, source, licence.

A file says it itself (checkpoints and exports of this program), or its row in ``sarwmix/tables/weights.csv`` does,
found by its name and, where known, by the beginning of its SHA-256. Nobody guesses: the rest has to be declared.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import hash_of_file

TABLE = Path(__file__).resolve().parents[1] / "tables" / "weights.csv"
RADAR_UNITS = ("dB", "linear", "amplitude")


@dataclass(frozen=True)
class Passport:
    """A row of the table.

    Attributes:
        pattern: of the file's name, or of its folder and name.
        sha256: beginning of the file's hash; "": not known.
        what: method and data.
        model: name for ``--model``; "": several.
        bands: in the order of the first layer's inputs.
        unit: of the values before they were standardised.
        mean, std: of each band, in `unit`; empty: not known.
        clip: what was done beside standardising; "": nothing.
        input_size: side in training, px; "": not known.
        size_mb: of the file; "": not known.
        source: where to get it.
        licence: of the weights, as their source states it.
    """

    pattern: str
    sha256: str
    what: str
    model: str
    bands: tuple[str, ...]
    unit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clip: str
    input_size: str
    size_mb: str
    source: str
    licence: str


@lru_cache(maxsize=1)
def known_weights() -> tuple[Passport, ...]:
    """All rows of the table."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(float(part) for part in text.split())

    return tuple(
        Passport(**{**row, "bands": tuple(row["bands"].split()), "mean": numbers(row["mean"]),
                    "std": numbers(row["std"])})  # type: ignore[arg-type]
        for row in rows
    )  # fmt: skip


def find_passport(path: str | Path) -> Passport | None:
    """The row of a weight file, by its name; by its content, where it was renamed and its hash is known.

    A file with a known name and another hash is not that file: its bands are not known.
    """
    place = Path(path)
    names = (place.name, f"{place.parent.name}/{place.name}")
    named = next((row for row in known_weights() if any(fnmatch(name, row.pattern) for name in names)), None)
    if named is not None and not named.sha256:
        return named
    digest = hash_of_file(place)
    return next((row for row in known_weights() if row.sha256 and digest.startswith(row.sha256)), None)


def bands_of_file(
    path: str, own: Sequence[str], declared: str | None, *, inputs: int | None, bands: Sequence[str], unit: str
) -> tuple[str, ...]:
    """Which bands a weight file saw.

    Args:
        path: the file.
        own: bands that it names itself.
        declared: --weight_bands.
        inputs: channels of its first layer; None: not known.
        bands: of the data set.
        unit: of the data set.

    Returns:
        Names in the order of the inputs; empty where nobody knows and nothing depends on the order: another number of
        bands (which --adapt_bands may spread), or a single one.

    Raises:
        UserError: `declared` contradicts the file or its passport; the unit does; nobody knows the order of two or more
            bands.
    """
    said = tuple(band.strip() for band in declared.split(",")) if declared else ()
    if own:
        if said and said != tuple(own):
            raise UserError(
                f"{path} was trained on bands {', '.join(own)}, as it says itself; --weight_bands says "
                f"{', '.join(said)}; leave --weight_bands out"
            )
        return tuple(own)
    row = find_passport(path)
    if row is not None:
        if said and said != row.bands:
            raise UserError(
                f"{path} is {row.what}, which saw {', '.join(row.bands)} in this order ({row.source}); --weight_bands "
                f"says {', '.join(said)}; leave it out, or rename the file if it is another one"
            )
        if row.unit in RADAR_UNITS and unit in RADAR_UNITS and row.unit != unit:
            raise UserError(f"{path} is {row.what}, trained on {row.unit}; the data set delivers {unit}")
        if not said and row.bands != tuple(bands) and sorted(row.bands) == sorted(bands):
            raise UserError(
                f"{path} is {row.what}, which saw {', '.join(row.bands)}, in this order; the data set delivers "
                f"{', '.join(bands)}. Give --weight_bands {','.join(row.bands)} to put its first layer into order, or "
                f"--bands {','.join(row.bands)} to read the data in the file's order"
            )
        # Optical bands under a radar model are spread by --adapt_bands, which says so itself.
        return row.bands if inputs in (None, len(row.bands)) else ()
    if said:
        return said
    if inputs is not None and inputs == len(bands) > 1:
        raise UserError(
            f"{path} has {inputs} bands and names none, and it is none of the files of sarwmix/tables/weights.csv; say "
            f"which bands it saw, in their order: --weight_bands {','.join(reversed(bands))} or --weight_bands "
            f"{','.join(bands)}"
        )
    return ()


def statistics_of(path: str | Path, bands: Sequence[str]) -> Mapping[str, Any]:
    """Mean and std that a known file was trained with, in the order of `bands`; empty: not known."""
    row = find_passport(path)
    if row is None or not row.mean or set(bands) != set(row.bands):
        return {}
    order = [row.bands.index(band) for band in bands]
    return {"mean": [row.mean[place] for place in order], "std": [row.std[place] for place in order]}
