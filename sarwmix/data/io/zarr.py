"""BigEarthNet patches in a Zarr store, formats 2 and 3: arrays ``sentinel1/<s1_name>/<band>`` (H, W) in dB.

The group of a patch has the attribute ``labels``: its class names (43 CORINE names).

Opening an array through zarr takes over a millisecond, which is far longer than reading it. An array of one float32
chunk with a usual compressor, which is how BigEarthNet is stored, is therefore read directly: its metadata file says
how, its chunk file is decoded by numcodecs as zarr does it. Everything else goes through zarr, with equal values.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sarwmix.data.base import UnreadableSample
from sarwmix.data.labels import parse_label_list
from util.errors import UserError

if TYPE_CHECKING:
    import zarr

GROUP = "sentinel1"


def is_zarr(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a Zarr store with BigEarthNet patches."""
    root = Path(path)
    return (root / GROUP).is_dir() and ((root / ".zgroup").is_file() or (root / "zarr.json").is_file())


Decoder = Callable[[bytes], Any]


def plain_layout(metadata: bytes, size: int) -> tuple[str, Decoder | None] | None:
    """How the only chunk of an array is stored: its file name and its decompression (None: not compressed).

    Args:
        metadata: Content of ``.zarray`` (format 2) or ``zarr.json`` (format 3).
        size: Height and width that the array must have.

    Returns:
        None when the array is anything but one little-endian float32 chunk in C order with at most one known codec.
    """
    try:
        content = json.loads(metadata)
        if content["zarr_format"] == 2:
            separator = content.get("dimension_separator", ".")
            plain = (
                content["shape"] == content["chunks"] == [size, size]
                and content["dtype"] == "<f4"
                and content["order"] == "C"
                and not content["filters"]
                and separator in (".", "/")
            )
            codec = content["compressor"]
            kind = None if codec is None else codec["id"]
            chunk = f"0{separator}0"
        else:
            grid, keys, codecs = content["chunk_grid"], content["chunk_key_encoding"], content["codecs"]
            separator = keys.get("configuration", {}).get("separator", "/")
            plain = (
                content["node_type"] == "array"
                and content["shape"] == grid["configuration"]["chunk_shape"] == [size, size]
                and grid["name"] == "regular"
                and content["data_type"] == "float32"
                and keys["name"] == "default"
                and separator in (".", "/")
                and not content.get("storage_transformers")
                and 1 <= len(codecs) <= 2
                and codecs[0] == {"name": "bytes", "configuration": {"endian": "little"}}
            )
            kind = codecs[1]["name"] if len(codecs) == 2 else None
            chunk = f"c{separator}0{separator}0"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    if not plain or kind not in (None, *_DECOMPRESSORS):
        return None
    return chunk, None if kind is None else _decoder(kind)


_DECOMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "lz4")  # decoding needs none of the settings of compression


def _decoder(kind: str) -> Decoder:
    import numcodecs
    import numcodecs.blosc

    # Threads for 58 kB do not pay, and the pool of a parent process does not exist after a fork.
    numcodecs.blosc.use_threads = False
    decode = numcodecs.get_codec({"id": kind}).decode
    return partial(_decode_blosc, decode) if kind == "blosc" else decode


def _decode_blosc(decode: Decoder, data: bytes) -> Any:
    # Blosc reads as many bytes as its header says, also beyond the end of a truncated chunk.
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError(f"blosc chunk of {len(data)} bytes is truncated")
    return decode(data)


class ZarrPatches:
    """Reads patches from a Zarr store on a local or mounted file system.

    Args:
        root: Folder of the store.
        bands: Band names in the order of the channels.
        size: Height and width of a patch.
        plain: Whether arrays of one chunk are read directly where that applies; off, zarr reads everything.
    """

    def __init__(self, root: Path, bands: Sequence[str], size: int, *, plain: bool = True) -> None:
        self.root = str(root)
        self.bands = tuple(bands)
        self.size = size
        self.plain = plain
        self._metadata_name = ".zarray" if (Path(root) / ".zgroup").is_file() else "zarr.json"
        # Arrays of one store mostly have equal metadata: what the last one meant is kept.
        self._metadata: bytes | None = None
        self._layout: tuple[str, Decoder | None] | None = None
        self._group: zarr.Group | None = None
        self._process = 0
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "_metadata": None, "_layout": None}

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

    def _read_plain(self, name: str, folder: str, out: np.ndarray) -> bool:
        """Read an array of one chunk directly; False when zarr must look at it."""
        try:
            with open(f"{folder}/{self._metadata_name}", "rb") as file:
                metadata = file.read()
            if metadata != self._metadata:
                self._metadata, self._layout = metadata, plain_layout(metadata, self.size)
            if self._layout is None:
                return False
            chunk, decode = self._layout
            with open(f"{folder}/{chunk}", "rb") as file:
                data: Any = file.read()
        except OSError:
            return False
        try:
            if decode is not None:
                data = decode(data)
            out[...] = np.frombuffer(data, dtype="<f4").reshape(self.size, self.size)
        # Each decoder has its own way of saying that a chunk is damaged.
        except (OSError, EOFError, ValueError, TypeError, RuntimeError, zlib.error) as error:
            raise UnreadableSample(name, f"{folder}/{chunk}", f"cannot be read: {error}") from error
        return True

    def read_into(self, name: str, out: np.ndarray) -> None:
        for channel, band in enumerate(self.bands):
            place = f"{self.root}/{GROUP}/{name}/{band}"
            if self.plain and self._read_plain(name, place, out[channel]):
                continue
            try:
                group = self._open()
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
