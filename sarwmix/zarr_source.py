"""BigEarthNet patches in a Zarr store, formats 2 and 3: arrays ``sentinel1/<s1_name>/<band>`` (H, W) in dB.

The group of a patch has the attribute ``labels``: its class names (43 CORINE names).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sarwmix.datasets import UnreadableSample
from sarwmix.labels import parse_label_list
from util.errors import UserError

if TYPE_CHECKING:
    import zarr

GROUP = "sentinel1"


def is_zarr(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a Zarr store with BigEarthNet patches."""
    root = Path(path)
    return (root / GROUP).is_dir() and ((root / ".zgroup").is_file() or (root / "zarr.json").is_file())


class ZarrPatches:
    """Reads patches from a Zarr store on a local or mounted file system.

    Args:
        root: Folder of the store.
        bands: Band names in the order of the channels.
        size: Height and width of a patch.
    """

    def __init__(self, root: Path, bands: Sequence[str], size: int) -> None:
        self.root = str(root)
        self.bands = tuple(bands)
        self.size = size
        self._group: zarr.Group | None = None
        self._process = 0
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def _open(self) -> zarr.Group:
        # Zarr runs its input on a thread of its own, which does not exist after a fork: each process opens the store.
        if self._group is None or self._process != os.getpid():
            import zarr

            try:
                # Consolidated metadata of 590,000 groups would be read at once and kept in memory: not used.
                self._group = zarr.open_group(self.root, path=GROUP, mode="r", use_consolidated=False)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"Zarr store {self.root} cannot be opened: {error}") from error
            self._process = os.getpid()
        return self._group

    def read_into(self, name: str, out: np.ndarray) -> None:
        group = self._open()
        for channel, band in enumerate(self.bands):
            place = f"{self.root}/{GROUP}/{name}/{band}"
            try:
                array = group[f"{name}/{band}"]
                shape, fill = tuple(array.shape), array.fill_value  # type: ignore[union-attr]
                if shape != (self.size, self.size):
                    raise UnreadableSample(name, place, f"has shape {shape}, expected ({self.size}, {self.size})")
                values = np.asarray(array[...])  # type: ignore[index]
            except KeyError as error:
                raise UnreadableSample(name, place, "is not in the store") from error
            # A damaged chunk shows as whatever its decoder raises.
            except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
                raise UnreadableSample(name, place, f"cannot be read: {error}") from error
            if values.dtype.kind not in "fiu":
                raise UnreadableSample(name, place, f"holds {values.dtype} values, expected real numbers in dB")
            # Zarr delivers the fill value where a chunk is missing; no real patch is constant at that value.
            if values[0, 0] == fill and (values == fill).all():
                raise UnreadableSample(name, place, f"all values equal the fill value {fill}: the chunk is missing")
            out[channel] = values

    def missing(self, name: str) -> str | None:
        for band in self.bands:
            folder = f"{self.root}/{GROUP}/{name}/{band}"
            if not (os.path.isfile(f"{folder}/.zarray") or os.path.isfile(f"{folder}/zarr.json")):
                return folder
        return None

    def labels(self, name: str) -> list[str] | None:
        # The attribute file is read directly: opening the group through zarr takes ten times as long.
        folder = f"{self.root}/{GROUP}/{name}"
        try:
            try:
                with open(f"{folder}/zarr.json", encoding="utf-8") as file:
                    labels = json.load(file)["attributes"]["labels"]
            except FileNotFoundError:
                with open(f"{folder}/.zattrs", encoding="utf-8") as file:
                    labels = json.load(file)["labels"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableSample(name, folder, f"has no attribute 'labels': {error!r}") from error
        if isinstance(labels, str):
            return parse_label_list(labels)
        if not isinstance(labels, list):
            raise UnreadableSample(name, folder, f"attribute 'labels' is {labels!r}, expected a list of names")
        return [str(label) for label in labels]


def write_zarr(
    path: str | Path,
    patches: Iterable[tuple[str, np.ndarray, Sequence[str] | None]],
    *,
    bands: Sequence[str] = ("VH", "VV"),
    zarr_format: int = 3,
) -> int:
    """Write patches as a store that :class:`ZarrPatches` reads; patches that are there already are left alone.

    Args:
        path: Folder of the store; made when missing.
        patches: (s1_name, float32 (C, H, W) in dB, label names or None) of each patch.
        bands: Band names in the order of the channels.
        zarr_format: 2 or 3.

    Returns:
        The number of patches written.
    """
    import zarr

    if zarr_format not in (2, 3):
        raise UserError(f"Zarr format must be 2 or 3, not {zarr_format}")
    root = zarr.open_group(str(path), mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
    group = root.require_group(GROUP)
    written = 0
    for name, image, labels in patches:
        # The attribute is written last: a patch without it was interrupted and is written again.
        done = Path(path) / GROUP / name
        if _has_labels(done):
            continue
        patch = group.require_group(name)
        for channel, band in enumerate(bands):
            patch.create_array(
                band,
                data=np.ascontiguousarray(image[channel], dtype=np.float32),
                chunks=image.shape[1:],
                compressors=None,  # speckle does not compress: 0.75 of the size at best
                fill_value=np.nan,
                overwrite=True,
            )
        patch.attrs["labels"] = [] if labels is None else list(labels)
        written += 1
    return written


def _has_labels(folder: Path) -> bool:
    for name in (".zattrs", "zarr.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "labels" in content or "labels" in content.get("attributes", {}):
            return True
    return False
