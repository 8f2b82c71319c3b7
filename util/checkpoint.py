"""Checkpoints: safe loading, atomic writing with a checksum inside the file, and rotation in the background.

A checkpoint is an ordinary `torch.save` archive (a zip file) that holds tensors and plain values only. Its SHA-256 and
its progress (epoch, step) stand in the archive's comment. Inside the file rather than in a second one, because two
files cannot be replaced in one step: a kill between the two renames would make a good checkpoint look damaged. Plain
`torch.load(path, weights_only=True)` reads the file as any other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import struct
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from util.errors import UserError
from util.files import (
    atomic_write,
    link_file,
    make_directory,
    open_file,
    parse_json,
    remove_partial_files,
    safe_join,
    sha256_file,
)
from util.log import get_logger

FORMAT = "sarwmix/1"
RECENT = "recent"  # folder of the last K checkpoints, below the output directory
CHECKSUMS_FILE = Path(__file__).resolve().parent / "CHECKSUMS.txt"

_FOOTER = re.compile(rb"sarwmix checkpoint; (run=([0-9a-z]*); epoch=(-?\d+); step=(\d+)); sha256=([0-9a-f]{64})")
_FOOTER_SPACE = 512  # bytes at the end of a file in which the footer must lie
_CHUNK = 1 << 22


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or holds something that must not be loaded."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What the footer of our checkpoints says, read without loading the file."""

    run: str  # identity of the run, kept when it is resumed
    epoch: int  # last finished epoch; -1: none
    step: int  # steps done in the unfinished epoch; 0 at an epoch's end
    sha256: str
    covered: int  # bytes from the start of the file that the hash covers

    @property
    def progress(self) -> tuple[int, int]:
        """Sorts checkpoints of one run by age."""
        return (self.epoch, self.step)

    @property
    def facts(self) -> str:
        """The part of the footer that the hash covers, too."""
        return f"run={self.run}; epoch={self.epoch}; step={self.step}"


class _HashingWriter:
    """File object that hashes what passes, except the last two bytes: the zip comment's length, which is set last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._tail = b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        try:
            if count < 2:
                joined = self._tail + bytes(view)
                self._pass(memoryview(joined[:-2]))
                self._tail = joined[-2:]
            else:
                self._pass(memoryview(self._tail))
                self._pass(view[:-2])
                self._tail = bytes(view[-2:])
        except OSError as error:
            # torch.save turns exceptions of a file object into a RuntimeError of its own; keep the reason.
            self.error = error
            raise
        return count

    def _pass(self, view: memoryview) -> None:
        self._digest.update(view)
        self._stream.write(view)

    def flush(self) -> None:
        self._stream.flush()

    def finish(self, run: str, epoch: int, step: int) -> None:
        """Write the footer as the archive's comment."""
        if self._tail != b"\0\0":
            raise RuntimeError("torch.save wrote an archive with a comment of its own; the footer has no place")
        facts = CheckpointInfo(run, epoch, step, "", 0).facts
        self._digest.update(facts.encode())
        comment = f"sarwmix checkpoint; {facts}; sha256={self._digest.hexdigest()}".encode()
        self._stream.write(struct.pack("<H", len(comment)) + comment)


def read_info(path: str | os.PathLike[str]) -> CheckpointInfo | None:
    """Footer of a checkpoint of ours; `None` for any other file (or one cut short)."""
    with open_file(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _FOOTER_SPACE))
        tail = stream.read()
    match = _FOOTER.search(tail)
    if match is None or match.end() != len(tail):
        return None
    covered = size - len(match[0]) - 2
    return CheckpointInfo(match[2].decode(), int(match[3]), int(match[4]), match[5].decode(), covered)


def _hash_of_content(path: Path, info: CheckpointInfo) -> str:
    digest = hashlib.sha256()
    left = info.covered
    with open_file(path) as stream:
        while left > 0:
            block = stream.read(min(_CHUNK, left))
            if not block:
                break
            digest.update(block)
            left -= len(block)
    digest.update(info.facts.encode())
    return digest.hexdigest()


def released_checksums(table: Path = CHECKSUMS_FILE) -> dict[str, str]:
    """File name -> SHA-256 of the released checkpoints (CHECKSUMS.txt)."""
    if not table.is_file():
        return {}
    rows = (line.split() for line in table.read_text(encoding="utf-8").splitlines())
    return {row[1].lstrip("*"): row[0].lower() for row in rows if len(row) == 2}


def _refuse(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot load the checkpoint {path}: {why}. Give an intact checkpoint of this program or a released one."
    )


def verify_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo | None:
    """Check that a file is whole, without unpickling anything.

    Ours are checked against the hash inside; released files against CHECKSUMS.txt (another hash warns); others against
    the CRC-32 of each record.

    Returns:
        The footer, or `None` for a file that this program did not write.

    Raises:
        CheckpointError: missing, not a file, empty, truncated, altered, or not a torch archive.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(
                f"the checkpoint {path} does not exist; check the path (--resume auto starts fresh when there is none)"
            )
        if not path.is_file():
            raise _refuse(path, "it is not a regular file")
        if path.stat().st_size == 0:
            raise _refuse(path, "it is empty (0 bytes)")
        with open_file(path) as stream:
            magic = stream.read(4)
        if magic != b"PK\x03\x04":
            raise _refuse(
                path, "it is not a torch.save archive (zip); other pickles are not read because they can run code"
            )
        info = read_info(path)
        _check_records(path)
        if info is not None:
            if _hash_of_content(path, info) != info.sha256:
                raise _refuse(path, "its content does not match the SHA-256 stored in it; the file is damaged")
            return info
        expected = released_checksums().get(path.name)
        if expected is not None:
            actual = sha256_file(path)
            if actual == expected:
                return None
            get_logger().warning(
                "%s has the name of a released checkpoint but another SHA-256 (%s, expected %s)", path, actual, expected
            )
        _check_archive(path)
    except OSError as error:
        raise _refuse(path, error.strerror or str(error)) from error
    return None


_NOT_A_ZIP = (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, ValueError, EOFError,
              struct.error)  # fmt: skip


def _check_records(path: Path) -> None:
    """Whether the records are as torch.save writes them: stored, and together no longer than the file. A checksum in
    the file says that it is whole, not that it is harmless."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except _NOT_A_ZIP as error:
        raise _refuse(path, f"the archive is truncated or damaged ({error})") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _refuse(path, "its records are compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise _refuse(path, f"its records say that they have more than the {size:,} bytes of the file")


def _check_archive(path: Path) -> None:
    """CRC of every record, which torch does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except _NOT_A_ZIP as error:
        raise _refuse(path, f"the archive is truncated or damaged ({error})") from error
    if broken is not None:
        raise _refuse(path, f"the record {broken} is damaged (CRC-32)")


_NAMESPACE_NOTE = "only tensors, numbers, text, lists and dicts are loaded"
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|operand)[: ]+([\w.]+)")


def load_checkpoint(
    path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu", verify: bool = True
) -> dict[str, Any]:
    """Load a checkpoint of ours or a released one; nothing in the file is executed.

    Args:
        path: the file.
        map_location: device of the tensors.
        verify: check the checksum first. Switch off only for a file that another rank has just verified.

    Returns:
        The stored dict. An `argparse.Namespace` (released files, under `args`) becomes a dict.

    Raises:
        CheckpointError: missing, damaged, not a dict, or holding objects other than tensors and plain values.
    """
    path = Path(path)
    info = verify_checkpoint(path) if verify else None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except MemoryError as error:
        raise _refuse(path, "there is not enough memory for what it says it holds") from error
    except Exception as error:
        # The unpickler of damaged or hostile bytes fails in every way there is; each means: refused.
        found = _GLOBAL.search(str(error))
        if found is not None:
            name = found[1] or found[2]
            raise _refuse(path, f"it holds an object of type {name}; {_NAMESPACE_NOTE}") from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refuse(path, f"it cannot be read ({type(error).__name__}: {first_line})") from error
    if not isinstance(content, dict):
        raise _refuse(path, f"it holds a {type(content).__name__}, expected a dict with at least the key 'model'")
    try:
        plain = _plain(content, "checkpoint", [_MOST_VALUES])
        _check_tensors(plain, path.stat().st_size)
    except (TypeError, RecursionError, OSError) as error:
        raise _refuse(path, f"{error}; {_NAMESPACE_NOTE}") from error
    _check_entries(plain, path)
    if verify and info is None and plain.get("format") == FORMAT:
        raise _refuse(path, "this program wrote it, but its checksum is missing: the end of the file is damaged")
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(plain.get(name), dict):
            plain[name] = checked_weights(plain[name], path)
    return plain


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors that a file of `size` bytes cannot hold: views that repeat a few numbers, and unusual kinds.

    Raises:
        TypeError: says what is wrong.
    """
    total = 0
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta" or tensor.is_nested:
            raise TypeError(f"it holds a tensor of an unusual kind ({tensor.layout}, {tensor.dtype})")
        total += tensor.numel() * tensor.element_size()
        if total > 8 * size + (1 << 20):
            raise TypeError(f"its tensors say that they hold more than a file of {size:,} bytes can")


# What entries of our checkpoints are; those of other programs are looked at where they are used.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        ("model", "optimizer", "scaler", "rng", "counted", "sampler", "batch", "data", "model_config", "schedule",
         "recipe", "selection", "weighting", "args", "best"), dict,
    ),
    **dict.fromkeys(("epoch", "step", "skipped_steps", "world_size", "seed"), int),
    **dict.fromkeys(("kind", "task", "protocol", "run_id", "format"), str),
    **dict.fromkeys(("classes", "lineage", "names"), (list, tuple)),
    **{"test_run": bool, "seconds": (int, float)},
}  # fmt: skip


def _check_entries(content: dict[str, Any], path: Path) -> None:
    """Compare the types of our entries with what they have to be; of other programs those that are not are left out.

    Raises:
        CheckpointError: names the entry.
    """
    ours = content.get("format") == FORMAT or content.get("kind") in ("pretrain", "finetune")
    for name, kind in _ENTRIES.items():
        value = content.get(name)
        if value is None:
            continue
        good = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
        if good and kind == (list, tuple):
            good = all(isinstance(item, str) for item in value)
        if good and name in ("epoch", "step", "skipped_steps"):
            good = -1 <= value < 1 << 40
        if good:
            continue
        if ours:
            raise _refuse(path, f"its entry {name!r} is {_short(value)}, which this program never writes")
        if not isinstance(value, torch.Tensor):  # a file of weights alone may have any names
            del content[name]
    if not ours:
        return
    model = content.get("model")
    if model is not None and not all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        raise _refuse(path, "its 'model' holds something other than weights")
    config = content.get("model_config") or {}
    check_model_config(config, model or {}, str(path))
    data = content.get("data") or {}
    bands = data.get("bands", [])
    if not isinstance(data.get("statistics", {}), dict) or not isinstance(bands, (list, tuple)):
        raise _refuse(path, "its entry 'data' does not say which bands and statistics it was trained with")


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (torch.Tensor, dict, list, tuple)) else repr(value)[:60]


LARGEST_INPUT = 4096  # side of what a model may take, px
_MOST_BANDS = 64


def check_model_config(config: Any, state: Mapping[str, Any], source: str) -> None:
    """Compare what a file says about its model with what a model can be, and with its weights, before it is built.

    Args:
        config: `model_config` of a checkpoint or an export: name, img_size, in_chans, ...
        state: weights by name.
        source: what the message calls the file.

    Raises:
        CheckpointError: names the value.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{source}: its model_config {why}; give a file written by this program")

    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise refuse(f"is {_short(config)}, expected a table")
    for name in ("name", "head", "pool"):
        value = config.get(name, "")
        if not isinstance(value, str) and (name == "name" or value is not None):
            raise refuse(f"says {name} {_short(value)}, expected text")
    for name, most in {"img_size": LARGEST_INPUT, "in_chans": _MOST_BANDS}.items():
        value = config.get(name, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise refuse(f"says {name} {_short(value)}, expected a whole number from 1 to {most}")
    for key, position in state.items():
        if key.endswith("absolute_pos_embed") and "img_size" in config:
            weight = state.get(key.removesuffix("absolute_pos_embed") + "patch_embed.proj.weight")
            sides: tuple[int, ...] = tuple(getattr(weight, "shape", ()))
            places: tuple[int, ...] = tuple(getattr(position, "shape", ()))
            # The pair model's are of a tile, not of the whole image; they are never more.
            if (
                len(sides) == 4
                and len(places) == 3
                and sides[-1]
                and (config["img_size"] // sides[-1]) ** 2 < places[1]
            ):
                raise refuse(f"says img_size {config['img_size']}, but its weights have {places[1]} places")


@contextlib.contextmanager
def taking_apart(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around code that uses stored entries: what does not fit there is the file's fault.

    Raises:
        CheckpointError: instead of the errors that wrong types, missing keys and other shapes cause.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # a full GPU is nothing that the file could help
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        why = f"{type(error).__name__}: {lines[0][:200]}"
        raise _refuse(Path(path), f"its entries do not fit this run or one another ({why})") from error


def checked_weights(state: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Weights under the names that the bare model has, all of them finite.

    Args:
        state: name -> tensor; names may begin with what compiled and parallel models put before them.
        path: for the message.

    Raises:
        CheckpointError: weights that are NaN or infinite, named: samples are not to blame for what follows from them.
    """
    found = type(state)()
    for key, value in state.items():
        name = str(key)
        while name.startswith(("_orig_mod.", "module.")):
            name = name.split(".", 1)[1]
        found[name.replace("._orig_mod.", ".")] = value
    bad = [
        name
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not bool(torch.isfinite(value.sum()))
        and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise _refuse(
            Path(path),
            f"{len(bad)} of its {len(found)} weights hold NaN or infinite values, first {bad[0]}: the run that wrote "
            "it had diverged. Take an earlier checkpoint",
        )
    return found


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Whether a safetensors file is a regular file, as long as its header says.

    Raises:
        OSError: missing, no regular file.
        ValueError: its header is longer than the file, or no JSON.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise ValueError(f"its header says that it has {length:,} bytes, the file has {size:,}")
        header = parse_json(stream.read(length))
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        fits = max(ends, default=0) == size - 8 - length
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError("its header is no table of tensors") from error
    if not fits:
        raise ValueError(f"its header does not say that it has the {size:,} bytes of the file")


def load_model_state(model: torch.nn.Module, checkpoint: dict[str, Any], *, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint's `model` into a module of the same kind; every key and shape must fit.

    Raises:
        CheckpointError: no weights, or keys or shapes that do not fit, named.
    """
    state = checkpoint.get("model")
    if not isinstance(state, dict):
        raise _refuse(Path(path), "it has no 'model' with weights")
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model needs {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing keys", missing), ("unknown keys", extra), ("other shapes", shapes))
        if found
    ]
    if problems:
        what = f"its weights do not fit {type(model).__name__}: {'; '.join(problems)}"
        raise _refuse(Path(path), f"{what}; check --model, bands and --input_size")
    model.load_state_dict(state)


_MOST_VALUES = 4_000_000  # entries of a checkpoint; a list of itself, many times over, would have no end


def _plain(value: Any, where: str, left: list[int]) -> Any:
    """Copy of a nested value with Namespaces as dicts; `TypeError` names the place of anything that is not plain.

    `left` holds how many values may still come.
    """
    left[0] -= 1
    if left[0] < 0:
        raise TypeError(f"it holds more than {_MOST_VALUES:,} values")
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        copy: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            if not isinstance(key, (str, int, float, bool, tuple)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}")
            copy[key] = _plain(item, f"{where}[{key!r}]", left)
        return copy
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]", left) for index, item in enumerate(value))
    if isinstance(value, (torch.device, torch.dtype, torch.Size)):
        return str(value)
    raise TypeError(f"{where} is of type {type(value).__name__}")


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with its checksum inside.

    Args:
        path: the file; an older one stays until the new one is complete on disk.
        state: tensors and plain values; `run_id`, `epoch` (last finished, -1: none) and `step` are repeated in the
            footer.

    Raises:
        WriteError: disk full, no permission...; the older file is untouched.
        TypeError: `state` holds something that could not be loaded again safely.
    """
    plain = _plain(state, "state", [_MOST_VALUES])
    # Saved from the CPU, so that plain torch.load reads the file on a machine without a GPU.
    plain = _replaced(plain, (tensor.cpu() for tensor in list(_tensors(plain))))
    with atomic_write(path) as stream:
        writer = _HashingWriter(stream)
        try:
            torch.save(plain, writer)  # type: ignore[arg-type]
        except RuntimeError:
            if writer.error is not None:
                raise writer.error from None
            raise
        writer.finish(str(plain.get("run_id", "")), int(plain.get("epoch", -1)), int(plain.get("step", 0)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside a nested value, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Copy of a nested value with the next of `tensors` in place of each of its own."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return type(value)((key, _replaced(item, tensors)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, tensors) for item in value)
    return value


class _HostCopy:
    """Copies of tensors in one block of host memory that is used again by the next checkpoint.

    The block is what makes the copy quick: filling memory for the first time costs several times the copy itself, and a
    large block comes in huge pages.
    """

    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)

    def take(self, value: Any) -> Any:
        """A copy of `value` whose tensors lie in the block; valid until the next call."""
        tensors = list(_tensors(value))
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts = np.cumsum([0, *(-(-size // self._ALIGNMENT) * self._ALIGNMENT for size in sizes)])
        if len(self._block) < starts[-1]:
            self._block = np.empty(int(starts[-1]), dtype=np.uint8)
        copies = []
        for tensor, start, size in zip(tensors, starts[:-1], sizes, strict=True):
            # A NumPy slice becomes a tensor with a storage of its own, which is what torch.save writes.
            piece = torch.from_numpy(self._block[start : start + size])
            copies.append(piece.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach()))
        return _replaced(value, iter(copies))


class _Pending(NamedTuple):
    """A state and the files it shall be in."""

    state: dict[str, Any]
    names: tuple[str, ...]
    recent: bool


class CheckpointManager:
    """Writes checkpoints in the background and keeps the last K.

    `<output_dir>/recent/epochs_0003_step_000120.pth` is: 3 epochs finished, 120 steps of the next one done. Other names
    (`checkpoint.pth`, `checkpoint_64.pth`, `checkpoint_best.pth`) are hard links to such a file, so they cost nothing.

    The training loop waits only for a copy in memory: on the device when it has room for one (the transfer then runs on
    a side stream of the writer thread), else in host memory. A failed write is logged and tried again at the next save;
    training goes on, because stopping would lose more. After `max_failures` in a row, and at the end, it is an error.

    Only rank 0 makes one.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], *, keep: int = 2, asynchronous: bool = True, max_failures: int = 3
    ) -> None:
        """Create the folders and delete what a killed writer left.

        Args:
            output_dir: the run's folder.
            keep: how many files stay in `recent/`; with 1, a damaged newest one has no predecessor.
            asynchronous: write in a thread; off: `save` returns when the file is on disk.
            max_failures: consecutive failed writes after which `save` raises.
        """
        if keep < 1:
            raise UserError(f"--keep_checkpoints must be at least 1, got {keep}")
        self.output_dir = make_directory(output_dir)
        self.recent_dir = make_directory(self.output_dir / RECENT)
        self.keep = keep
        self.blocked_seconds = 0.0  # how long the last save() kept the caller
        self._asynchronous = asynchronous
        self._max_failures = max_failures
        self._failures = 0
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._host = _HostCopy()
        self._unwritten: _Pending | None = None  # what failed and was not only there to resume from
        for folder in (self.output_dir, self.recent_dir):
            remove_partial_files(folder)

    def save(
        self, state: dict[str, Any], *, names: Sequence[str] = (), recent: bool = True, wait: bool = False
    ) -> None:
        """Save `state`.

        Args:
            state: see `save_checkpoint`; may live on the device and change after the call.
            names: file names in `output_dir` that shall hold it too.
            recent: also keep it in `recent/`, from where `--resume auto` continues.
            wait: return when it is on disk (end of training, stop request).

        Raises:
            WriteError: with `wait`, or after too many failures in a row.
        """
        if not recent and not names:
            raise ValueError("nothing to write: give names, or recent=True")
        started = time.monotonic()
        self._join()
        if self._error is not None and self._failures >= self._max_failures:
            raise self._error
        self._write_again()
        plain = _plain(state, "state", [_MOST_VALUES])
        if self._asynchronous and not wait:
            on_device = [tensor for tensor in _tensors(plain) if tensor.is_cuda]
            needed = sum(tensor.numel() * tensor.element_size() for tensor in on_device)
            ready = None
            if on_device and torch.cuda.mem_get_info(on_device[0].device)[0] > 2 * needed:
                snapshot = _replaced(plain, (tensor.clone() for tensor in list(_tensors(plain))))
                ready = torch.cuda.current_stream(on_device[0].device).record_event()
            else:
                snapshot = self._host.take(plain)
            pending = [_Pending(snapshot, tuple(names), recent)]
            self._thread = threading.Thread(target=self._write, args=(pending, ready, True), name="checkpoint-writer")
            self._thread.start()
        else:
            self._write([_Pending(plain, tuple(names), recent)], None, False)
        self.blocked_seconds = time.monotonic() - started
        if wait:
            self.wait()

    def renew_names(self, path: Path, names: Sequence[str]) -> None:
        """Give a file in `recent/` the names that it was written for.

        The names are links made after the file: a kill between the two leaves them on an older checkpoint.

        Args:
            path: the checkpoint that a run continues; one outside `recent/` was not written by this manager.
            names: what `save` got with it.
        """
        if path.resolve().parent != self.recent_dir.resolve():
            return
        for name in names:
            link = safe_join(self.output_dir, name)
            if not link.exists() or not link.samefile(path):
                link_file(path, link)

    @property
    def busy(self) -> bool:
        """Whether a write is still going on; another `save` would wait for it."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the writer.

        Raises:
            WriteError: the last write failed.
        """
        self._join()
        self._write_again()
        if self._error is not None:
            raise self._error

    close = wait

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, handed: list[_Pending], ready: torch.cuda.Event | None, is_copy: bool) -> None:
        """Write what is in `handed`, and take it out: a thread keeps its arguments, and this may be GPU memory."""
        pending = handed.pop()
        try:
            if ready is not None:
                # A stream of its own, so that training does not wait for the transfer; a new thread starts on GPU 0.
                device = next(tensor.device for tensor in _tensors(pending.state) if tensor.is_cuda)
                side = torch.cuda.Stream(device)
                side.wait_event(ready)
                with torch.cuda.stream(side):
                    pending = pending._replace(state=self._host.take(pending.state))
                side.synchronize()
            self._put(pending)
        except Exception as error:  # noqa: BLE001 - carried to the training thread, which raises it
            self._error = error
            self._failures += 1
            # The next epoch cannot stand in for the best one; what is only there to resume from is better when newer.
            if pending.names and is_copy:
                self._unwritten = pending
            get_logger().error("checkpoint not written (%d in a row): %s", self._failures, error)

    def _put(self, pending: _Pending) -> None:
        state, names = pending.state, pending.names
        epoch, step = int(state.get("epoch", -1)), int(state.get("step", 0))
        if pending.recent:
            first = self.recent_dir / f"epochs_{epoch + 1:04d}_step_{step:06d}.pth"
            links = names
        else:
            first = self.output_dir / names[0]
            links = names[1:]
        save_checkpoint(first, state)
        for name in links:
            link_file(first, self.output_dir / name)
        if pending.recent:
            self._prune(first)
        self._error = None
        self._failures = 0

    def _write_again(self) -> None:
        """Write what has failed once more, while its copy is still there."""
        pending, self._unwritten = self._unwritten, None
        if pending is None:
            return
        try:
            self._put(pending)
        except Exception as error:  # noqa: BLE001 - the run goes on; who reads the file later checks its epoch
            self._error = error
            get_logger().error("%s of epoch %d is lost: %s", ", ".join(pending.names), pending.state["epoch"], error)
        else:
            get_logger().info("%s of epoch %d written after all", ", ".join(pending.names), pending.state["epoch"])

    def _prune(self, newest: Path) -> None:
        """Keep the K newest files by time of writing, `newest` among them."""
        files = sorted(
            (path for path in self.recent_dir.glob("epochs_*_step_*.pth") if path != newest),
            key=lambda path: path.stat().st_mtime_ns,
            reverse=True,
        )
        for path in files[self.keep - 1 :]:
            with contextlib.suppress(OSError):
                path.unlink()


def set_aside(output_dir: str | os.PathLike[str], names: Sequence[str]) -> Path | None:
    """Move the checkpoints of an earlier run, and what belongs to them, out of the way of a new one.

    Args:
        output_dir: the run's folder.
        names: further files and folders of a run; those that exist move, too.

    Returns:
        `<output_dir>/previous/<number>`, where they are now; None when there was no checkpoint.
    """
    folder = Path(output_dir)
    named = [path.name for path in sorted(folder.glob("checkpoint*.pth"))]
    if not named and not any((folder / RECENT).glob("epochs_*_step_*.pth")):
        return None
    taken = [int(path.name) for path in (folder / "previous").glob("*") if path.name.isdigit()]
    target = make_directory(folder / "previous" / str(max(taken, default=0) + 1))
    for name in (*named, RECENT, *names):
        if (folder / name).exists():
            os.replace(folder / name, target / name)
    return target


def find_latest(output_dir: str | os.PathLike[str]) -> Path | None:
    """Newest whole checkpoint of a run, for `--resume auto`.

    Looks at `recent/` and at `checkpoint*.pth` except the `best` ones. When the folder holds checkpoints of several
    runs (one was started afresh in it), only those of the run that wrote last count. They are tried from the newest
    progress down, each verified by its hash; a damaged file is named in a warning.

    Returns:
        The path, or `None` when the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    output_dir = Path(output_dir)
    paths = sorted((output_dir / RECENT).glob("epochs_*_step_*.pth"))
    paths += [path for path in sorted(output_dir.glob("checkpoint*.pth")) if "best" not in path.name]
    candidates: list[tuple[CheckpointInfo, float, Path]] = []
    damaged: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for path in paths:
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        info = read_info(path) if path.is_file() else None
        if info is None:
            damaged.append(path)
            get_logger().warning("%s is damaged (its end is missing); looking for the previous checkpoint", path)
        else:
            candidates.append((info, status.st_mtime, path))
    newest_run = max(candidates, key=lambda item: item[1])[0].run if candidates else ""
    candidates = [item for item in candidates if item[0].run == newest_run]
    for _, _, path in sorted(candidates, key=lambda item: item[0].progress, reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged.append(path)
            get_logger().warning("%s Looking for the previous checkpoint.", error)
            continue
        if damaged:
            get_logger().warning("falling back to %s", path)
        return path
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole (damaged: {', '.join(map(str, damaged))}); "
            "restore one, or move them away to start from the beginning"
        )
    return None


def resolve_resume(resume: str | None, output_dir: str | os.PathLike[str]) -> Path | None:
    """Turn `--resume` into a file: empty: none; `auto`: the newest whole checkpoint or none; a path: must be whole."""
    if not resume:
        return None
    if resume == "auto":
        return find_latest(output_dir)
    verify_checkpoint(resume)
    return Path(resume)
