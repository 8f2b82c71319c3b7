"""The downloaded zip: inventory, safety checks, and extraction of the files that the preparation needs."""

from __future__ import annotations

import os
import stat
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sarwmix.sen12flood.metadata import S1LIST, Problem
from util.errors import UserError
from util.files import JSON_LIMIT, require_regular

PUBLISHED_BYTES = 13_101_306_693
PUBLISHED_FILES = 36_460
BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of the zip that is extracted.

    Attributes:
        name: Its name in the zip.
        target: Its path below the raw folder.
        size: Bytes when extracted.
        crc32: Checksum recorded in the zip.
        mtime: Time of last change, as seconds since the epoch.
    """

    name: str
    target: str
    size: int
    crc32: int
    mtime: int


@dataclass(frozen=True)
class Inventory:
    """What the zip holds.

    Attributes:
        size: Bytes of the zip.
        files: Number of files.
        folders: Number of directories.
        extensions: (extension, count), most frequent first.
    """

    size: int
    files: int
    folders: int
    extensions: tuple[tuple[str, int], ...]

    def lines(self, name: str) -> list[str]:
        """For the output."""
        kinds = ", ".join(f"{count:,} {extension}" for extension, count in self.extensions)
        lines = [f"{name}: {self.size:,} bytes, {self.files:,} files, {self.folders:,} directories ({kinds})"]
        if (self.size, self.files) != (PUBLISHED_BYTES, PUBLISHED_FILES):
            lines.append(f"  the published SEN12FLOOD.zip has {PUBLISHED_BYTES:,} bytes and {PUBLISHED_FILES:,} files")
        return lines


_ENTRY_LIMIT = 1 << 30  # bytes; the largest tile of the published zip has a few MB


class Archive:
    """A checked zip.

    Args:
        path: The zip.

    Raises:
        UserError: Missing, no zip, truncated, encrypted, or with entries that would leave the work folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            require_regular(self.path)
            with zipfile.ZipFile(self.path) as archive:
                self.entries = archive.infolist()
        except FileNotFoundError:
            raise UserError(f"zip {self.path} does not exist; give the downloaded SEN12FLOOD.zip") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{self.path} cannot be opened as a zip ({error}); it is corrupt or incomplete: expected the "
                f"downloaded SEN12FLOOD.zip ({PUBLISHED_BYTES:,} bytes); download it again"
            ) from error
        self._check_entries()
        self.prefix = self._find_prefix()

    def _check_entries(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            name = entry.filename
            # zipfile itself shortens orig_filename at a NUL byte and turns the system's separator into '/'.
            raw = entry.orig_filename
            reason = ""
            if name.startswith("/") or "\\" in raw or "\0" in raw or name[1:2] == ":":
                reason = "an absolute path, or one with a backslash, drive letter or NUL byte"
            elif ".." in name.split("/"):
                reason = "a path that climbs out with '..'"
            elif stat.S_ISLNK(entry.external_attr >> 16):
                reason = "a symbolic link"
            elif entry.flag_bits & 1:
                reason = "encrypted"
            elif entry.file_size > _ENTRY_LIMIT or entry.file_size > 1100 * (entry.compress_size + 1024):
                # Deflate makes 1,032 bytes of one at best.
                reason = f"one that says it has {entry.file_size:,} bytes in {entry.compress_size:,}"
            elif name in seen:
                reason = "there twice"
            if reason:
                raise UserError(
                    f"entry {raw!r} of {self.path} is {reason}; expected plain relative names inside the work folder; "
                    "nothing was extracted: use the original SEN12FLOOD.zip"
                )
            seen.add(name)

    def _find_prefix(self) -> str:
        """Folder in the zip that holds the sequences: that of S1list.json, else the parent of the tiles' folders."""
        lists = sorted((e.filename for e in self.entries if PurePosixPath(e.filename).name == S1LIST), key=len)
        if lists:
            return lists[0][: -len(S1LIST)]
        for entry in self.entries:
            if entry.filename.endswith(("_corrected_VV.tif", "_corrected_VH.tif")):
                parent = str(PurePosixPath(entry.filename).parent.parent)
                return "" if parent == "." else parent + "/"
        raise UserError(
            f"{self.path} holds neither {S1LIST} nor a tile <product>_corrected_VV.tif; expected SEN12FLOOD.zip"
        )

    def inventory(self) -> Inventory:
        """Size, files, directories, files per extension."""
        files = [e.filename for e in self.entries if not e.is_dir()]
        count = Counter(_extension(name) for name in files)
        ordered = tuple(sorted(count.items(), key=lambda item: (-item[1], item[0])))
        return Inventory(self.path.stat().st_size, len(files), len(self.entries) - len(files), ordered)

    def read_s1list(self) -> bytes | None:
        """Content of S1list.json, or None when the zip has none.

        Raises:
            UserError: It is damaged.
        """
        name = self.prefix + S1LIST
        if all(e.filename != name for e in self.entries):
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.getinfo(name).file_size > JSON_LIMIT:
                    raise zipfile.BadZipFile(f"more than {JSON_LIMIT:,} bytes")
                return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UserError(
                f"{name} in {self.path} is corrupt ({error}); download the zip again, or give --s1list"
            ) from error

    def needed(self, folders: Iterable[str]) -> list[Member]:
        """The files that are extracted: VV and VH tiles and the first B04 tile of each folder, and S1list.json.

        The other Sentinel-2 bands, three quarters of the bytes, are never needed.
        """
        wanted = set(folders)
        members = []
        b04: dict[str, zipfile.ZipInfo] = {}
        for entry in self.entries:
            if entry.is_dir() or not entry.filename.startswith(self.prefix):
                continue
            inner = entry.filename[len(self.prefix) :]
            folder, _, name = inner.partition("/")
            if inner == S1LIST or (folder in wanted and name.endswith(("_corrected_VV.tif", "_corrected_VH.tif"))):
                members.append(_member(entry, inner))
            elif folder in wanted and name.startswith("S2_") and name.endswith("_B04.tif"):
                b04[folder] = min(entry, b04.get(folder, entry), key=lambda e: e.filename)
        members += [_member(entry, entry.filename[len(self.prefix) :]) for entry in b04.values()]
        return sorted(members, key=lambda member: member.target)


def _extension(name: str) -> str:
    base = PurePosixPath(name).name
    return "." + base.rpartition(".")[2] if "." in base else "(none)"


def _member(entry: zipfile.ZipInfo, target: str) -> Member:
    mtime = int(time.mktime((*entry.date_time, 0, 0, -1)))
    return Member(entry.filename, target, entry.file_size, entry.CRC, mtime)


def is_extracted(member: Member, root: Path, *, check_content: bool) -> bool:
    """Whether a member lies below ``root`` as extracted: size and time, and with ``check_content`` its checksum."""
    path = root / member.target
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != member.size or int(status.st_mtime) != member.mtime:
        return False
    if not check_content:
        return True
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
    return value == member.crc32


def extract(zip_path: str, members: list[Member], root: str, check_existing: bool) -> tuple[int, list[Problem]]:
    """Extract some members; each appears whole or not at all, and its checksum is that of the zip.

    Args:
        zip_path: The zip.
        members: What to extract.
        root: Raw folder.
        check_existing: Verify the checksum of files that are there already, instead of their size and time alone.

    Returns:
        Number of files that were there already, and the members that are corrupt.

    Raises:
        OSError: The raw folder cannot be written, such as a full disk.
    """
    base = Path(root)
    problems = []
    kept = 0
    with zipfile.ZipFile(zip_path) as archive:
        for member in members:
            target = base / member.target
            if is_extracted(member, base, check_content=check_existing):
                kept += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.partial")
            try:
                stream = archive.open(member.name)
                with stream, open(temporary, "wb") as output:
                    while block := _read_block(stream):
                        output.write(block)
            except _CorruptMember as error:
                temporary.unlink(missing_ok=True)
                target.unlink(missing_ok=True)
                problems.append(
                    Problem(
                        "corrupt in the zip", member.target, f"{error}; expected a whole file; download the zip again"
                    )
                )
                continue
            except (zipfile.BadZipFile, NotImplementedError) as error:
                problems.append(
                    Problem(
                        "corrupt in the zip", member.target, f"{error}; expected a whole file; download the zip again"
                    )
                )
                continue
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            os.utime(temporary, (member.mtime, member.mtime))
            os.replace(temporary, target)
    return kept, problems


class _CorruptMember(Exception):
    """The compressed data or their checksum are wrong."""


def _read_block(stream: IO[bytes]) -> bytes:
    try:
        return stream.read(BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _CorruptMember(str(error)) from error
