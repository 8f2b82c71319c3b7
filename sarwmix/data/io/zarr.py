"""BigEarthNet patches in a Zarr store, formats 2 and 3: arrays ``sentinel1/<s1_name>/<band>`` (H, W) in dB.

The group of a patch has the attribute ``labels``: its class names (43 CORINE names).

Opening an array through zarr takes over a millisecond, which is far longer than reading it. An array of one float32
chunk with a usual compressor, which is how BigEarthNet is stored, is therefore read directly: its metadata file says
how, its chunk file is decoded by numcodecs as zarr does it. Everything else goes through zarr, with equal values.
"""

from __future__ import annotations

import math
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
from util.files import open_file, parse_json, read_bytes, write_error
from util.text import first_line

if TYPE_CHECKING:
    import zarr

GROUP = "sentinel1"
_METADATA_LIMIT = 1 << 20  # bytes of the metadata of an array or group
_CHUNKS_LIMIT = 4 << 20  # bytes of all chunks of one band; the largest layout known has 58 kB
_CODECS_2 = ("blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma")
_CODECS_3 = ("bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed")
_NUMBERS_3 = ("float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)))


def is_zarr(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a Zarr store with BigEarthNet patches."""
    root = Path(path)
    return (root / GROUP).is_dir() and ((root / ".zgroup").is_file() or (root / "zarr.json").is_file())


Decoder = Callable[..., Any]


def plain_layout(metadata: bytes, size: int) -> tuple[str, Decoder | None] | None:
    """How the only chunk of an array is stored: its file name and its decompression (None: not compressed).

    Args:
        metadata: Content of ``.zarray`` (format 2) or ``zarr.json`` (format 3).
        size: Height and width that the array must have.

    Returns:
        None when the array is anything but one little-endian float32 chunk in C order with at most one known codec.
    """
    try:
        content = parse_json(metadata)
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
    return partial(_decode, kind, decode)


def _decode(kind: str, decode: Decoder, data: bytes, *, size: int = 0) -> Any:
    """Decompress a chunk that says, or turns out, to have `size` bytes; 0: unknown.

    Raises:
        ValueError: It has another length, which is known before memory is taken; a decoder's own errors besides.
    """
    # Blosc reads as many bytes as its header says, also beyond the end of a truncated chunk.
    if kind == "blosc" and (len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data)):
        raise ValueError(f"blosc chunk of {len(data)} bytes is truncated")
    if size:
        if kind in ("gzip", "zlib"):
            stream = zlib.decompressobj(31 if kind == "gzip" else 15)
            content = stream.decompress(data, size + 1)
            if len(content) != size or not stream.eof:
                raise ValueError(f"{kind} chunk does not hold the {size} bytes that are expected, or is truncated")
            return content
        declared = _declared(kind, data)
        if declared is not None and declared != size:
            raise ValueError(f"{kind} chunk says that it has {declared:,} bytes, expected {size:,}")
    return decode(data)


def _declared(kind: str, data: bytes) -> int | None:
    """How many bytes a compressed chunk says that it has; None where it does not."""
    if kind == "blosc":
        return int.from_bytes(data[4:8], "little")
    if kind == "lz4":
        return int.from_bytes(data[:4], "little")
    if kind == "zstd" and data[:4] == b"\x28\xb5\x2f\xfd" and len(data) > 5:
        single, width = data[4] >> 5 & 1, (0, 2, 4, 8)[data[4] >> 6]
        width = max(width, single)
        start = 5 + (1 - single) + (0, 1, 2, 4)[data[4] & 3]
        if width:
            return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
        raise ValueError("zstd chunk does not say how long it is")
    return None


def check_metadata(content: Any, size: int) -> None:
    """Refuse an array that is not one of numbers behind known codecs, before zarr looks at it.

    Zarr asks a registry for whatever codec, filter or type a store names; an old one runs a pickle there.

    Args:
        content: Of ``.zarray`` (format 2) or ``zarr.json`` (format 3).
        size: Height and width that the array must have.

    Raises:
        ValueError: Says what is refused.
    """
    if not isinstance(content, dict):
        raise ValueError("its metadata are no object")
    shape = content.get("shape")
    if shape != [size, size]:
        raise ValueError(f"has shape {_short(shape)}, expected ({size}, {size})")
    if content.get("zarr_format") == 2:
        kind, chunks, compressor = content.get("dtype"), content.get("chunks"), content.get("compressor")
        if not isinstance(kind, str) or kind[:1] not in "<>|" or kind[1:] not in _NUMBERS_2:
            raise ValueError(f"holds values of type {_short(kind)}, expected real numbers in dB")
        if content.get("filters"):
            raise ValueError(f"has filters {_short(content['filters'])}, expected none")
        if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") not in _CODECS_2):
            raise ValueError(f"has compressor {_short(compressor)}, expected one of {', '.join(_CODECS_2)}")
        if content.get("order") not in ("C", "F") or content.get("dimension_separator", ".") not in (".", "/"):
            raise ValueError("has an order or a separator that is not known")
    elif content.get("zarr_format") == 3:
        grid = content.get("chunk_grid")
        if content.get("node_type") != "array" or content.get("data_type") not in _NUMBERS_3:
            raise ValueError(f"holds values of type {_short(content.get('data_type'))}, expected real numbers in dB")
        if content.get("storage_transformers"):
            raise ValueError("has storage transformers, expected none")
        if not isinstance(grid, dict) or grid.get("name") != "regular" or not isinstance(grid["configuration"], dict):
            raise ValueError(f"has chunks {_short(grid)}, expected regular ones")
        chunks = grid["configuration"].get("chunk_shape")
        _check_codecs(content.get("codecs"), chunks)
    else:
        raise ValueError(f"has Zarr format {_short(content.get('zarr_format'))}, expected 2 or 3")
    _check_chunks(chunks, size)


_NUMBERS_2 = ("f2", "f4", "f8", *(f"{sign}{width}" for sign in "iu" for width in (1, 2, 4)))


def _check_codecs(codecs: Any, chunks: Any) -> None:
    if not isinstance(codecs, list) or not 1 <= len(codecs) <= 8:
        raise ValueError(f"has codecs {_short(codecs)}, expected a list of them")
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if name not in _CODECS_3:
            raise ValueError(f"has the codec {_short(name)}, expected one of {', '.join(_CODECS_3)}")
        if name == "sharding_indexed":
            inner = codec.get("configuration")
            if not isinstance(inner, dict):
                raise ValueError("has a codec without its configuration")
            _check_chunks(inner.get("chunk_shape"), max(chunks) if _is_shape(chunks) else 0)
            for part in ("codecs", "index_codecs"):
                if any(isinstance(one, dict) and one.get("name") == name for one in inner.get(part) or ()):
                    raise ValueError("has shards within shards")
                _check_codecs(inner.get(part), None)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _check_chunks(chunks: Any, size: int) -> None:
    # A chunk may be larger than the array; memory is taken for the whole chunk.
    if not _is_shape(chunks) or max(chunks) > 4 * size or math.prod(size // side + 1 for side in chunks) > 1024:
        raise ValueError(f"has chunks of shape {_short(chunks)} for {size} x {size} values")


def _short(value: Any) -> str:
    return repr(value)[:60]


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

            old = self._metadata_name == ".zarray"
            try:
                name = ".zgroup" if old else "zarr.json"
                content = parse_json(read_bytes(f"{self.root}/{GROUP}/{name}", _METADATA_LIMIT))
                if content.get("zarr_format") != (2 if old else 3) or content.get("node_type", "group") != "group":
                    raise ValueError(f"{GROUP}/{name} does not describe a group of format {2 if old else 3}")
                if content.get("consolidated_metadata"):
                    raise ValueError(f"{GROUP}/{name} has metadata of what is below it; remove them from there")
                if old and os.path.lexists(attributes := f"{self.root}/{GROUP}/.zattrs"):
                    parse_json(read_bytes(attributes, _METADATA_LIMIT))
                # Consolidated metadata of 590,000 groups would be read at once and kept in memory: not used.
                self._group = zarr.open_group(
                    self.root, path=GROUP, mode="r", use_consolidated=False, zarr_format=2 if old else 3
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"Zarr store {self.root} cannot be opened: {error}") from error
            self._process = os.getpid()
        return self._group

    def _read_plain(self, name: str, folder: str, out: np.ndarray) -> bool:
        """Read an array of one chunk directly; False when zarr must look at it."""
        try:
            with open_file(f"{folder}/{self._metadata_name}", limit=_METADATA_LIMIT) as file:
                metadata = file.read()
            if metadata != self._metadata:
                self._metadata, self._layout = metadata, plain_layout(metadata, self.size)
            if self._layout is None:
                return False
            chunk, decode = self._layout
            with open_file(f"{folder}/{chunk}", limit=_CHUNKS_LIMIT) as file:
                data: Any = file.read()
        except OSError:
            return False
        try:
            if decode is not None:
                data = decode(data, size=4 * self.size * self.size)
            out[...] = np.frombuffer(data, dtype="<f4").reshape(self.size, self.size)
        # Each decoder has its own way of saying that a chunk is damaged.
        except (OSError, EOFError, ValueError, TypeError, RuntimeError, MemoryError, zlib.error) as error:
            raise UnreadableSample(name, f"{folder}/{chunk}", f"cannot be read: {error}") from error
        return True

    def _check_array(self, name: str, folder: str) -> None:
        """Refuse what zarr must not look at: unknown codecs and types, links, pipes, sizes beyond reason."""
        try:
            check_metadata(parse_json(read_bytes(f"{folder}/{self._metadata_name}", _METADATA_LIMIT)), self.size)
            total = entries = 0
            for place, folders, files in os.walk(folder):
                entries += len(folders) + len(files)
                for file in files:
                    with open_file(os.path.join(place, file)) as stream:
                        total += os.fstat(stream.fileno()).st_size
                if total > _CHUNKS_LIMIT or entries > 4096:
                    raise ValueError(f"has more than {_CHUNKS_LIMIT:,} bytes or 4,096 chunks")
        except FileNotFoundError:
            raise UnreadableSample(name, folder, "is not in the store") from None
        except OSError as error:
            raise UnreadableSample(name, folder, f"cannot be read: {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError) as error:
            raise UnreadableSample(name, folder, str(error)) from error

    def read_into(self, name: str, out: np.ndarray) -> None:
        for channel, band in enumerate(self.bands):
            place = f"{self.root}/{GROUP}/{name}/{band}"
            if self.plain and self._read_plain(name, place, out[channel]):
                continue
            self._check_array(name, place)
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
            except UserError:
                raise
            except Exception as error:
                raise UnreadableSample(name, place, f"cannot be read: {first_line(error)}") from error
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
                labels = parse_json(read_bytes(f"{folder}/zarr.json", _METADATA_LIMIT))["attributes"]["labels"]
            except FileNotFoundError:
                labels = parse_json(read_bytes(f"{folder}/.zattrs", _METADATA_LIMIT))["labels"]
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
    written = 0
    try:
        root = zarr.open_group(str(path), mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
        group = root.require_group(GROUP)
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
    except OSError as error:
        raise write_error(Path(path), error) from error
    return written


def _has_labels(folder: Path) -> bool:
    for name in (".zattrs", "zarr.json"):
        try:
            content = parse_json(read_bytes(folder / name, _METADATA_LIMIT))
        except (OSError, ValueError):
            continue
        inner = content.get("attributes") if isinstance(content, dict) else None
        if isinstance(content, dict) and ("labels" in content or (isinstance(inner, dict) and "labels" in inner)):
            return True
    return False
