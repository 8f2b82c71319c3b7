"""How images of a data set become model inputs, where it is not by z-score and resize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from util.errors import UserError

NORMALISATIONS = ("zscore", "clip", "quantiles")


GEOMETRIES = ("resize", "resized_crop", "window")


@dataclass(frozen=True)
class Preprocessing:
    """How images of a data set become model inputs; kept in checkpoints, so that every tool restores it.

    Attributes:
        normalisation: ``"zscore"``: (x - mean) / std. ``"clip"``: x clipped to ``clip`` and scaled to [0, 1].
            ``"quantiles"``: each band of each image clipped to its own 1 and 99 % quantiles, then
            (x - (mean - 2 std)) / (4 std) clipped to [0, 1] (EuroSAT-SAR in FG-MAE).
        clip: low and high, the same for all bands, in their unit; only for ``"clip"``.
        geometry: ``"resize"``: to the input size; flips in training. ``"resized_crop"``: a random crop of 8 to 100 %
            of the area resized to the input size and a horizontal flip in training; resized to 8/7 of the input size
            (256 for 224) and cut to its centre in evaluation. ``"window"``: for label maps; random windows of the input
            size and flips in training, overlapping windows that cover the whole image in evaluation, in the images' own
            resolution; images smaller than the input size are enlarged to it.
    """

    normalisation: str = "zscore"
    clip: tuple[float, float] | None = None
    geometry: str = "resize"

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS or self.geometry not in GEOMETRIES:
            raise UserError(
                f"preprocessing {asdict(self)} is not known; normalisation is one of {', '.join(NORMALISATIONS)}, "
                f"geometry one of {', '.join(GEOMETRIES)}"
            )
        if (self.clip is not None) != (self.normalisation == "clip") or (self.clip and self.clip[0] >= self.clip[1]):
            raise UserError(
                f"preprocessing {asdict(self)}: clip = (low, high) belongs to normalisation clip, and only there"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {
            "normalisation": self.normalisation,
            "clip": None if self.clip is None else list(self.clip),
            "geometry": self.geometry,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Preprocessing:
        """Inverse of :meth:`as_dict`; None (checkpoints without the entry) is z-score and resize."""
        if values is None:
            return cls()
        try:
            clip = values["clip"]
            return cls(
                str(values["normalisation"]),
                None if clip is None else (float(clip[0]), float(clip[1])),
                str(values["geometry"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"preprocessing {values!r} is not understood: {error!r}") from error
