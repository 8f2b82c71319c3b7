"""Files: atomic writing, JSON, JSON lines, checksums, and names that must stay below their root."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from util.errors import UserError

TEMP_SUFFIX = ".partial"  # what atomic_write leaves when the process is killed; safe to delete

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "input/output error of the device",
    errno.ENOENT: "the folder does not exist",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EFBIG: "the file is larger than the file system or the limit (ulimit -f) allows",
    errno.EISDIR: "the path is a folder",
}


class WriteError(UserError):
    """A file could not be written; the file of that name is what it was before."""


def write_error(path: Path, error: OSError) -> WriteError:
    """The message for a file or folder that could not be written, with the system's reason."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return WriteError(
        f"cannot write {path}: {reason}. The previous file of that name, if any, is untouched. "
        "Free space or choose another output directory, then run again."
    )


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Create a folder (and its parents) and return it; `WriteError` says why it cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise WriteError(f"cannot create the folder {folder}: {reason}. Choose another folder.") from error
    return folder


def _sync_directory(folder: Path) -> None:
    """Make a rename durable. Some network file systems refuse to sync a folder; the rename is then still atomic."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _final_mode(target: Path) -> int:
    """Permission bits for a new version of `target`: those of the old file, else what the umask gives."""
    with contextlib.suppress(FileNotFoundError):
        return target.stat().st_mode & 0o777
    return 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file so that a reader sees the old content or the whole new content, never a part.

    Temporary file in the same folder, flush, fsync, rename, fsync of the folder. A symbolic link is followed (the link
    stays, its target is replaced), permission bits of an existing file are kept, and a write-protected file is refused.

    Args:
        path: the file to write.
        mode: `"wb"` or `"w"` (UTF-8).

    Raises:
        WriteError: disk full, no permission, missing folder...; nothing has changed then.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}")
    target = Path(os.path.realpath(path))
    temporary: str | None = None
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        permissions = _final_mode(target)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=TEMP_SUFFIX, dir=target.parent)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), permissions)
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        temporary = None
        _sync_directory(target.parent)
    except OSError as error:
        raise write_error(Path(path), error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def file_set(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Write several files with programs that need paths (GDAL): all are complete before the first one appears.

    Yields:
        A hidden working folder inside `folder`; its files move to `folder` at the end, in alphabetical order. After an
        error nothing moves; a kill leaves the hidden folder, which is safe to delete.

    Raises:
        WriteError: disk full, no permission...; nothing has changed then.
    """
    target = make_directory(folder)
    try:
        work = Path(tempfile.mkdtemp(prefix=".", suffix=TEMP_SUFFIX, dir=target))
    except OSError as error:
        raise write_error(target, error) from error
    try:
        yield work
        written = sorted(path for path in work.iterdir() if path.is_file())
        for path in written:
            _sync_file(path)
            path.chmod(_final_mode(target / path.name))
        for path in written:
            os.replace(path, target / path.name)
        _sync_directory(target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears whole or not at all.

    Yields:
        A hidden folder beside `path` that gets its name at the end.

    Raises:
        UserError: `path` exists and is not an empty folder.
        WriteError: disk full, no permission...; nothing has changed then.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; give a new folder, or delete that one first")
    parent = make_directory(target.absolute().parent)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMP_SUFFIX, dir=parent))
    except OSError as error:
        raise write_error(target, error) from error
    try:
        yield work
        for written in work.iterdir():
            _sync_file(written)
            written.chmod(0o666 & ~_umask())
        work.chmod(0o777 & ~_umask())
        os.replace(work, target)
        _sync_directory(parent)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: str | os.PathLike[str]) -> int:
    """Delete what killed writers left in `folder` (not below it); returns how many files went."""
    count = 0
    for leftover in Path(folder).glob(f".*{TEMP_SUFFIX}"):
        with contextlib.suppress(OSError):
            leftover.unlink()
            count += 1
    return count


def link_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give `source` the second name `target`, atomically: a hard link, or a copy where links are not supported.

    Raises:
        WriteError: neither a link nor a copy could be made; an older `target` is untouched.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.link{TEMP_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            with open(source, "rb") as original, atomic_write(target) as copy:
                shutil.copyfileobj(original, copy, length=1 << 22)
            return
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        # A rename between two names of one file does nothing and leaves the temporary name behind.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null. Paths become text, NumPy and torch scalars numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return _plain(value.item())
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities become null."""
    with atomic_write(path, "w") as stream:
        stream.write(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected a JSON file") from error
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def append_jsonl(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Append one JSON object as one line.

    One `write` call on an append-only descriptor: a kill leaves at most a half last line, and the next call starts on
    a fresh line.

    Raises:
        WriteError: the line could not be written completely.
    """
    line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; lines cut short by a kill are left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """Join a name that came from a file (CSV, JSON, parquet, zip) to `root`, refusing to leave `root`.

    Absolute names, `..`, drive letters, NUL bytes and symbolic links that lead outside are refused. `root` itself may
    be a symbolic link: it is the user's choice.

    Args:
        root: folder that must contain the result.
        name: relative name, `/` as separator.

    Returns:
        `root / name` (not resolved).

    Raises:
        UserError: the name would leave `root`.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"the name {name!r} is refused: {why}; expected a relative name inside {root}")

    if not isinstance(name, str) or not name:
        raise refuse("it is empty or not text")
    if "\0" in name:
        raise refuse("it holds a NUL byte")
    parts = name.replace("\\", "/").split("/")
    if name[0] in "/\\" or (len(parts[0]) > 1 and parts[0][1] == ":"):
        raise refuse("it is an absolute path")
    if ".." in parts:
        raise refuse("it climbs out with '..'")
    joined = Path(root) / name
    base = os.path.realpath(root)
    if os.path.commonpath([base, os.path.realpath(joined)]) != base:
        raise refuse("a symbolic link leads outside")
    return joined
