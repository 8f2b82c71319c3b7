"""What a pixel of Sentinel-1 may be: values that stand for no data, and the unit that values look like.

Backscatter has a narrow range. Calibrated sigma nought or gamma nought lies between about -45 and +5 dB in the median
of a scene, its power between 0 and a few units, and speckle spreads power more than amplitude. Whatever lies outside
was written by something else: a border, a mask, a sensor's digital numbers, a quantised copy. Nothing here guesses in
silence: values that stand for no data become NaN and are counted, a unit that contradicts the declared one is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sarwmix.data.spec import DB_RANGE
from util.errors import UserError
from util.log import get_logger

if TYPE_CHECKING:
    from sarwmix.data.base import SarDataset

UNITS = ("dB", "linear", "amplitude")
"""Units of stored backscatter; amplitude is the root of linear power."""
FILLS = (0.0, -9999.0, -999.0, -99.0, -32768.0, -32767.0, 9999.0, 32767.0, 65535.0)
"""Values that processors write where they have no data, whether or not a file declares them."""
_HUGE = 1e30  # -3.4e38 and its like
_LEAST = 100  # pixels that a judgement needs
_DOOR_SAMPLES = 8


def blank_fills(
    values: NDArray[np.float32], unit: str | None, found: Counter[float] | None = None, *, zero_is_dark: bool = False
) -> None:
    """Make NaN in place of values that stand for no data; such a value in one band holds for the pixel.

    Args:
        values: (C, height, width) of Sentinel-1 bands, as stored.
        unit: One of `UNITS`; None while it is not known: then only values that no unit has are blanked.
        found: Takes how many pixels had which value.
        zero_is_dark: 0 in one band alone is the darkest water, as in the published data of flood pairs.
    """
    bad = np.isin(values, np.array(FILLS[zero_is_dark:], np.float32)) | (np.abs(values) >= _HUGE)
    if zero_is_dark:
        bad |= (values == 0).all(axis=0)
    if unit is not None:
        # Noise removal leaves power just below zero, not this.
        low, high = DB_RANGE if unit == "dB" else (-1.0, np.inf)
        outside = (values <= low) | (values > high)
        # Most of a window outside is another unit, which `check_unit` names; fills stand beside backscatter.
        if outside.any() and outside.mean() < 0.5:
            bad |= outside
    where = bad.any(axis=0)
    if not where.any():
        return
    if found is not None:
        for value, count in zip(*np.unique(values[bad], return_counts=True), strict=True):
            found[float(value)] += int(count)
    values[:, where] = np.nan


def to_decibel(values: NDArray[np.float32], unit: str) -> NDArray[np.float32]:
    """Stored values in dB; NaN where power or amplitude is not positive."""
    if unit == "dB":
        return values
    factor = 10.0 if unit == "linear" else 20.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values > 0, factor * np.log10(values), np.float32(np.nan)).astype(np.float32)


def describe_fills(found: Counter[float]) -> str:
    """For a message: the values and how many pixels had each."""
    return ", ".join(f"{value:g} ({count:,} pixels)" for value, count in found.most_common(4))


def recognise(pixels: NDArray[np.float32], bands: Sequence[str] = ("VH", "VV")) -> str:
    """What values look like: one of `UNITS`, or "dB x 100", "digital numbers", "normalised", "unknown".

    Args:
        pixels: Valid values (bands, n), as stored.
        bands: Their names.
    """
    medians = np.median(pixels, axis=1)
    low, high = float(np.quantile(pixels, 0.01)), float(pixels.max())
    if (medians <= -100).any() and (medians < -45).all():
        return "dB x 100"
    if (medians < 0).mean() >= 0.5 and low < -1:
        return "dB"
    if (medians > 15).all():
        return "digital numbers"
    # What is left is not negative, but for what noise removal leaves: power, amplitude or something in 0 .. 1.
    cross = [number for number, band in enumerate(bands) if band in ("VH", "HV")]
    faint = float(medians[cross[0]] if cross else medians.min())
    if high <= 1.0 + 1e-6 and faint > 0.3:
        return "normalised"
    spread = np.quantile(pixels, 0.99, axis=1) / np.maximum(medians, 1e-12)
    bright = all(level > {"VH": 0.09, "HV": 0.09}.get(band, 0.17) for band, level in zip(bands, medians, strict=True))
    if bright and high < 5 and (spread < 3).all():
        return "amplitude"
    return "linear" if high < 1e4 else "unknown"


_REMEDY = {
    "dB": "give unit=dB",
    "linear": "give unit=linear",
    "amplitude": "give unit=amplitude",
    "dB x 100": "divide by 100 and write dB (or set the band's scale to 0.01, which is then applied)",
    "digital numbers": "calibrate the product to sigma nought or gamma nought first; a change of the unit is no remedy",
    "normalised": "go back to the calibrated values: what was scaled to 0 .. 1 cannot be turned into backscatter",
}
_SEEN = {"linear": "linear power", "dB": "dB", "amplitude": "amplitude (the root of power)",
         "normalised": "values normalised to 0 .. 1"}  # fmt: skip


def check_unit(
    pixels: NDArray[np.float32],
    unit: str,
    where: str,
    bands: Sequence[str] = ("VH", "VV"),
    *,
    remedies: dict[str, str] | None = None,
) -> str | None:
    """Compare values with the declared unit.

    Args:
        pixels: Valid values (bands, n) of Sentinel-1 bands, as stored.
        unit: Declared unit.
        where: What the message calls the data.
        bands: Their names.
        remedies: What to do about each kind of values, where it is not the option ``unit``.

    Returns:
        A warning, or None.

    Raises:
        UserError: The values contradict the declaration.
    """
    if pixels.shape[1] == 0:
        return None
    medians = np.median(pixels, axis=1)
    negative = float((pixels < 0).mean())
    named = " and ".join(f"{value:.4g} ({band})" for band, value in zip(bands, medians, strict=True))
    shown = f"median {named}, {100 * negative:.1f} % negative"
    seen = recognise(pixels, bands)
    if seen not in (unit, "unknown"):
        raise UserError(
            f"{where}: the unit is declared as {unit}, but the values look like {_SEEN.get(seen, seen)} ({shown}); "
            f"{(remedies or _REMEDY).get(seen, _REMEDY[seen])}"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        level = {"linear": 10, "amplitude": 20}[unit] * np.log10(medians) if unit != "dB" else medians
    of = dict(zip(bands, level, strict=True))
    if not all(-45 < value < 5 for value in of.values() if np.isfinite(value)):
        return (
            f"{where}: {shown} is outside -45 to +5 dB; calibrated backscatter (sigma nought or gamma nought) is "
            "expected, digital numbers are not"
        )
    for cross, like in (("VH", "VV"), ("HV", "HH")):
        if {cross, like} <= set(of) and of[cross] > of[like] + 1:
            return f"{where}: {cross} is brighter than {like} ({shown}); the bands may be swapped"
    return None


def check_at_door(data: SarDataset) -> None:
    """Look at a few samples of a data set that delivers dB, whatever it is stored in, before anything is learned.

    Args:
        data: Any data set; samples that cannot be read are left to whoever reads them.

    Raises:
        UserError: The values are not dB; says what they look like.
    """
    from sarwmix.data.spec import DECIBEL, unit_of

    images = data.single_images()
    radar = [number for number, band in enumerate(images.spec.bands) if unit_of(band) == DECIBEL]
    if not radar:
        return
    chosen = np.unique(np.linspace(0, len(images) - 1, _DOOR_SAMPLES).astype(np.int64))
    values = np.empty((len(chosen), *images.shape), np.float32)
    bad = {position for position, _ in images.read_many(chosen, values)}
    kept = values[[number for number in range(len(chosen)) if number not in bad]][:, radar]
    pixels = kept.transpose(1, 0, 2, 3).reshape(len(radar), -1)
    pixels = pixels[:, np.isfinite(pixels).all(axis=0)]
    if pixels.shape[1] < _LEAST:
        return
    convert = "convert when the data are written: dB = 10 log10(power)"
    remedies = {"linear": convert, "amplitude": "convert when the data are written: dB = 20 log10(amplitude)"}
    where = f"{data.source or data.spec.name} ({data.spec.name})"
    warning = check_unit(pixels, "dB", where, [images.spec.bands[number] for number in radar], remedies=remedies)
    if warning is not None:
        get_logger().warning("%s", warning)
