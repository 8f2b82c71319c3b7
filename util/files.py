"""Files: atomic writing, JSON, JSON lines, checksums, and names that must stay below their root."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from util.errors import UserError

JSON_LIMIT = 32 << 20  # bytes; the longest that is known, SEN12-FLOOD's list, has 1 MB
JSON_DEPTH = 32  # nested lists and objects
TEXT_LIMIT = 1 << 28  # bytes of a list or table of text; BigEarthNet's longest has 0.1 GB

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
        if target.exists():
            require_regular(target)  # a device or pipe would be replaced by a file
            if not os.access(target, os.W_OK):
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


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | os.PathLike[str], *, limit: int | None = None) -> io.BufferedReader:
    """Open a regular file to read its bytes; what a name from outside may be else would wait, or never end.

    Args:
        path: the file; a link to one is followed.
        limit: bytes that it may have.

    Raises:
        OSError: missing, not readable, no regular file (EINVAL) or longer than `limit` (EFBIG); `strerror` says which.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "its name holds a NUL byte", name)
    # Looked at before it is opened, since opening a device can do something; without waiting, since it may change.
    _require_regular(os.stat(name), name, None)
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor), name, limit)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_regular(status: os.stat_result, name: str, limit: int | None) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, expected a regular file", name)
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, expected at most {limit:,}", name)


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """For readers that take a path and open it themselves: its state, where it is a regular file.

    Raises:
        OSError: missing, or no regular file; `strerror` says which.
    """
    status = os.stat(path)
    _require_regular(status, os.fspath(path), None)
    return status


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_file`.
    """
    with open_file(path, limit=limit) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:  # it grew, or tells no size
        raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that are expected", os.fspath(path))
    return content


def parse_json(content: bytes | str, *, depth: int = JSON_DEPTH, pairs: Any = None) -> Any:
    """The value of a JSON text that others may have written.

    Args:
        content: UTF-8 where it is bytes.
        depth: nested lists and objects that are allowed; deeper ones exhaust whoever walks through them.
        pairs: `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: no UTF-8, no JSON, nested too deeply, or text with half a character (a lone surrogate), which no
            file and no terminal takes.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {depth} levels") from None
    escapes = "\\ud" in text or "\\uD" in text
    if escapes or text.count("[") + text.count("{") > depth:
        _check_tree(value, depth, escapes)
    return value


def _check_tree(value: Any, depth: int, escapes: bool) -> None:
    level = [value]
    for _ in range(depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                if escapes:
                    below += item
            elif isinstance(item, list):
                below += item
            elif escapes and isinstance(item, str) and not item.isascii():
                item.encode()  # UnicodeEncodeError is a ValueError
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {depth} levels")


def read_json(path: str | os.PathLike[str], *, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, too large, no regular file, or is not JSON.
    """
    try:
        return parse_json(read_bytes(path, limit))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected a JSON file") from error
    except ValueError as error:
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
                os.ftruncate(descriptor, size)  # half a line would be read as damage
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; lines cut short by a kill are left out.

    Raises:
        OSError: as `open_file`.
    """
    return whole_records(path)[0]


def whole_records(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """As `read_jsonl`, and how many lines were no object.

    Raises:
        OSError: as `open_file`.
    """
    records, others = [], 0
    for line in read_bytes(path, TEXT_LIMIT).decode("utf-8", "replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            others += 1
    return records, others


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_of_file(path: str | os.PathLike[str]) -> str:
    """`sha256_file`, read once a process while the file stays as it is: weights have gigabytes, and several ask."""
    state = os.stat(path)
    return _hash_at(os.fspath(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_at(path: str, size: int, changed: int) -> str:
    return sha256_file(path)


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
