"""Safe and quick reading of single-band float32 GeoTIFF patches.

BigEarthNet stores each band as an uncompressed float32 TIFF of 58,024 bytes whose strips follow one another: the 57,600
pixel bytes start at byte 424. For such files a complete check of the header and one ``preadv`` replace GDAL. Any other
file (compressed, tiled, big-endian, BigTIFF, integer, with a no-data value, scale, mask or overview) goes through
rasterio, which reads everything and delivers the same values.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from util.files import require_regular
from util.text import first_line

MAX_PIXELS = 1 << 26  # of an image that is read whole: 8192 x 8192
_MAX_BANDS = 64
_FREE_BYTES = 64 << 20  # of pixels, whatever the length of the file
_BEST_RATIO = 1100  # deflate makes 1,032 bytes of one at best; what says more is empty, or a trap
HEADER_BYTES = 4096  # larger than the header of any patch seen; a longer one goes through rasterio

# Tags that the quick path must understand, with the value it needs (None: checked separately).
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 274, 277, 278, 279
_PLANAR, _PREDICTOR, _SAMPLE_FORMAT = 284, 317, 339
_REQUIRED = {_BITS: 32, _COMPRESSION: 1, _SAMPLES: 1, _SAMPLE_FORMAT: 3}
_OPTIONAL = {_PHOTOMETRIC: (0, 1), _FILL_ORDER: (1,), _ORIENTATION: (1,), _PLANAR: (1, 2), _PREDICTOR: (1,)}
# Text and georeferencing do not change pixel values: description, software, date, resolution, GeoTIFF keys.
_IGNORED = {254, 270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 33550, 33922, 34264, 34735, 34736, 34737}
_TYPE_FORMAT = {3: "H", 4: "I"}  # SHORT, LONG


def driver_of(path: str | Path) -> str:
    """The one format that a raster file may have: a .tif that is a VRT or WMS inside could read others, or ask servers.

    Args:
        path: of the file; its suffix decides.
    """
    return "PNG" if Path(path).suffix.lower() == ".png" else "GTiff"


class GeoTiffError(Exception):
    """A file that cannot be used as one band of a patch; the message says why."""


@contextlib.contextmanager
def open_raster(path: str | Path, *, whole: bool = True) -> Iterator[Any]:
    """Open a raster, as rasterio does, after all that a file from outside can be else has been refused.

    Only a regular file, of the one format that its name says; no files beside it; a size that its length can hold.
    `open_dataset` with an end.

    Args:
        path: The file.
        whole: Whether it will be read in one piece, so that its size is bounded, too; off for windows.

    Raises:
        GeoTiffError: Missing, no regular file, another format, truncated, or larger than it can be.
    """
    from rasterio.errors import RasterioError

    source = open_dataset(path, whole=whole)
    try:
        yield source
    except RasterioError as error:
        raise GeoTiffError(f"cannot be read (truncated or damaged?): {first_line(error)}") from error
    finally:
        source.close()


def open_dataset(path: str | Path, *, whole: bool = True) -> Any:
    """What `open_raster` opens, to be closed by the caller."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        length = require_regular(path).st_size
    except (OSError, ValueError) as error:
        raise GeoTiffError(_reason(error)) from error
    if os.path.lexists(f"{path}.msk"):  # of any format, which GDAL would follow wherever it leads
        raise GeoTiffError("has its mask in a file beside it (.msk), which is not read; write it into the GeoTIFF")
    try:
        # Set for this thread while it opens; GDAL remembers that there are no files beside it.
        with (
            _quiet_about_places(),
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"),
        ):
            source = rasterio.open(path, driver=driver_of(path))
    except RasterioError as error:
        raise GeoTiffError(f"cannot be read (truncated or damaged?): {first_line(error)}") from error
    try:
        check_declared(source, length, whole=whole)
    except GeoTiffError:
        source.close()
        raise
    return source


@contextlib.contextmanager
def _quiet_about_places() -> Iterator[None]:
    """Plain pixels are allowed; who needs a place says so. Filters belong to the process: threads set one for good."""
    if threading.current_thread() is not threading.main_thread():
        _quiet_for_good()
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset has no geotransform")
        yield


def _quiet_for_good() -> None:
    # Each time: whoever leaves `catch_warnings` in the main thread puts the filters of before back, without this one.
    warnings.filterwarnings("ignore", message="Dataset has no geotransform")


def check_declared(source: Any, length: int, *, whole: bool) -> None:
    """Compare the size that a header declares with the length of the file, before memory is taken.

    Args:
        source: What rasterio opened.
        length: Bytes of the file.
        whole: Whether it will be read in one piece.

    Raises:
        GeoTiffError: It cannot hold that many pixels, or is too large to be read whole.
    """
    shown = f"{source.height:,}x{source.width:,} pixels in {source.count:,} band(s)"
    if source.count > _MAX_BANDS or (whole and source.height * source.width > MAX_PIXELS):
        raise GeoTiffError(f"says that it has {shown}; expected at most {MAX_PIXELS:,} in {_MAX_BANDS}")
    size = source.height * source.width * sum(np.dtype(_numpy_type(kind)).itemsize for kind in source.dtypes)
    if size > _FREE_BYTES + _BEST_RATIO * length:
        raise GeoTiffError(f"says that it has {shown}, which a file of {length:,} bytes cannot hold")


def _numpy_type(kind: str) -> str:
    return "complex64" if kind.startswith("complex_int") else kind


class NotPlain(Exception):
    """A file that the quick path does not handle, so that rasterio must read it."""


@dataclass(frozen=True)
class Layout:
    """Where the pixels of a plain file lie, with the header bytes that prove it.

    A second file whose bytes are equal in the same places has the same layout, so its check is a comparison of bytes.

    Attributes:
        offset: First byte of the pixels.
        proof: (start, end, bytes) pieces of the header: signature, directory, strip offsets and strip lengths; those
            that touch are one piece (in the official files all of them).
    """

    offset: int
    proof: tuple[tuple[int, int, bytes], ...]

    def matches(self, header: bytes | bytearray | memoryview) -> bool:
        return all(header[start:stop] == piece for start, stop, piece in self.proof)


def parse_layout(header: bytes, height: int, width: int) -> Layout:
    """Check the header of a plain file completely and find its pixels.

    Args:
        header: The first bytes of the file, at least the whole directory and its strip tables.
        height: Rows that the file must have.
        width: Columns that the file must have.

    Raises:
        NotPlain: Anything differs from one uncompressed little-endian float32 band in contiguous strips.
    """
    if sys.byteorder != "little" or header[:4] != b"II*\x00":
        raise NotPlain("not a little-endian classic TIFF")
    if len(header) < 10:
        raise NotPlain("shorter than a TIFF header")
    (directory,) = struct.unpack_from("<I", header, 4)
    if directory + 2 > len(header):
        raise NotPlain("directory lies beyond the header")
    (count,) = struct.unpack_from("<H", header, directory)
    end = directory + 2 + 12 * count + 4
    if end > len(header):
        raise NotPlain("directory lies beyond the header")
    if struct.unpack_from("<I", header, end - 4)[0] != 0:
        raise NotPlain("more than one image (overview or mask)")
    proof = [(0, 8), (directory, end)]
    values: dict[int, tuple[int, ...]] = {}
    for entry in range(count):
        place = directory + 2 + 12 * entry
        tag, kind, number, _ = struct.unpack_from("<HHII", header, place)
        if tag in _IGNORED:
            continue
        if tag in values or kind not in _TYPE_FORMAT or number == 0:
            raise NotPlain(f"tag {tag} of type {kind}")
        pattern = f"<{number}{_TYPE_FORMAT[kind]}"
        size = struct.calcsize(pattern)
        start = place + 8 if size <= 4 else struct.unpack_from("<I", header, place + 8)[0]
        if start + size > len(header):
            raise NotPlain(f"values of tag {tag} lie beyond the header")
        values[tag] = struct.unpack_from(pattern, header, start)
        if size > 4:
            proof.append((start, start + size))
    for tag, wanted in _REQUIRED.items():
        if values.pop(tag, None) != (wanted,):
            raise NotPlain(f"tag {tag} is not {wanted}")
    for tag, allowed in _OPTIONAL.items():
        found = values.pop(tag, None)
        if found is not None and (len(found) != 1 or found[0] not in allowed):
            raise NotPlain(f"tag {tag} is {found}")
    if values.pop(_WIDTH, None) != (width,) or values.pop(_HEIGHT, None) != (height,):
        raise NotPlain("another size")
    rows = values.pop(_ROWS_PER_STRIP, (height,))[0]
    offsets, lengths = values.pop(_STRIP_OFFSETS, ()), values.pop(_STRIP_BYTES, ())
    if values:
        raise NotPlain(f"unknown tags {sorted(values)}")
    strips = -(-height // rows) if rows else 0
    if not strips or len(offsets) != strips or len(lengths) != strips:
        raise NotPlain("strip tables of another length")
    position = offsets[0]
    for strip in range(strips):
        size = 4 * width * min(rows, height - strip * rows)
        if offsets[strip] != position or lengths[strip] != size:
            raise NotPlain("strips that do not follow one another")
        position += size
    if offsets[0] < end:
        raise NotPlain("strips that overlap the directory")
    pieces: list[tuple[int, int]] = []
    for start, stop in sorted(proof):
        if pieces and start <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(stop, pieces[-1][1]))
        else:
            pieces.append((start, stop))
    return Layout(offsets[0], tuple((start, stop, bytes(header[start:stop])) for start, stop in pieces))


class PatchReader:
    """Reads single-band patches of one size; remembers the layout of the last plain file.

    Args:
        height: Rows of every file.
        width: Columns of every file.
        plain: Whether the quick path is used where it applies; off, rasterio reads everything (same values).
    """

    def __init__(self, height: int, width: int, *, plain: bool = True) -> None:
        self.height = height
        self.width = width
        self.plain = plain
        self._layout: Layout | None = None
        self._head = bytearray(HEADER_BYTES)
        self._head_view = memoryview(self._head)
        self._pixel_bytes = 4 * height * width

    def __reduce__(self) -> tuple[Any, ...]:
        # Buffers cannot be pickled and hold nothing worth keeping: a spawned process starts with fresh ones.
        return partial(PatchReader, plain=self.plain), (self.height, self.width)

    def read_into(self, path: str, out: np.ndarray) -> None:
        """Fill ``out`` with the file's pixels; no-data becomes NaN, other values (NaN and inf too) stay as stored.

        Args:
            path: The file.
            out: float32 (height, width), C-contiguous.

        Raises:
            GeoTiffError: The file is missing, truncated, has another shape or number of bands, or is no raster.
        """
        if not (self.plain and self._read_plain(path, out)):
            out[...] = read_band(path, self.height, self.width)

    def _read_plain(self, path: str, out: np.ndarray) -> bool:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not wait
        except (OSError, ValueError) as error:
            raise GeoTiffError(_reason(error)) from error
        try:
            pixels = out.data.cast("B")
            layout = self._layout
            if layout is not None and layout.offset <= HEADER_BYTES:
                # One call reads the header and, if the layout is that of the file before, the pixels into their place.
                head = self._head_view[: layout.offset]
                size = os.preadv(file, [head, pixels], 0)
                if size == layout.offset + self._pixel_bytes and layout.matches(head):
                    return True
            size = os.preadv(file, [self._head_view], 0)
            try:
                layout = parse_layout(bytes(self._head_view[:size]), self.height, self.width)
            except NotPlain:
                return False
            if os.preadv(file, [pixels], layout.offset) != self._pixel_bytes:
                return False  # truncated: rasterio says so in its own words
            self._layout = layout
            return True
        except OSError as error:
            raise GeoTiffError(_reason(error)) from error
        finally:
            os.close(file)


def read_band(path: str | Path, height: int, width: int) -> np.ndarray:
    """Read a single-band raster with rasterio, whatever its storage.

    Returns:
        float32 (height, width); declared no-data and masked pixels are NaN, a declared scale and offset are applied.

    Raises:
        GeoTiffError: The file is missing, truncated, has another shape or number of bands, or is no raster.
    """
    with open_raster(path) as source:
        if source.count != 1:
            raise GeoTiffError(f"has {source.count} bands, expected 1")
        if (source.height, source.width) != (height, width):
            raise GeoTiffError(f"has shape {source.height}x{source.width}, expected {height}x{width}")
        if "complex" in source.dtypes[0]:
            raise GeoTiffError(f"holds {source.dtypes[0]} values, expected real numbers in dB")
        band = source.read(1)
        mask = source.read_masks(1)
        scale, offset = source.scales[0], source.offsets[0]
    image = band.astype(np.float32)
    if (scale, offset) != (1.0, 0.0):
        image = (band.astype(np.float64) * scale + offset).astype(np.float32)
    # A NaN no-data value masks NaN pixels, which are NaN already.
    image[mask == 0] = np.nan
    return image


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "file does not exist"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"
