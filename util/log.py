"""One rank-aware logger, a progress display, JSON lines per epoch, and a TensorBoard writer made when first used."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from util.files import WriteError, append_jsonl, atomic_write, make_directory, read_jsonl, write_error
from util.locks import FolderLock, program

LOGGER_NAME = "sarwmix"
_lock: FolderLock | None = None  # of the folder that this process logs to


def get_logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(LOGGER_NAME)


def setup_logging(output_dir: str | os.PathLike[str] | None = None, *, rank: int = 0) -> logging.Logger:
    """Set up the logger of this process.

    Rank 0 speaks on standard output and, with `output_dir`, in `<output_dir>/run.log`. Other ranks only report
    warnings and errors, on standard error, with their rank. Who logs to a folder is its one writer until the process
    ends or logs elsewhere.

    Args:
        output_dir: folder of the run.
        rank: this process.

    Returns:
        The logger.

    Raises:
        UserError: another process writes `output_dir`.
        WriteError: it cannot be written.
    """
    global _lock
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    console = logging.StreamHandler(sys.stdout if rank == 0 else sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_Console(rank))
    logger.addHandler(console)
    if _lock is not None:
        _lock.release()
        _lock = None
    if output_dir is not None and rank == 0:
        _lock = FolderLock(output_dir, program())
        try:
            record = _File(Path(output_dir) / "run.log", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise write_error(Path(output_dir) / "run.log", error) from error
        record.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(record)
    return logger


def record_in_file(message: str) -> None:
    """Write an error to `run.log` alone (rank 0), for what has been said on the console already."""
    entry = logging.LogRecord(LOGGER_NAME, logging.ERROR, "", 0, message, None, None)
    for handler in get_logger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(entry)


class _File(logging.FileHandler):
    """A record that may be lost: a full disk must not fill the console with tracebacks, or end the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record


class _Console(logging.Formatter):
    """Plain text for information; level and rank where they matter."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        prefix = f"[rank {self._rank}] " if self._rank else ""
        if record.levelno > logging.INFO:
            prefix += f"{record.levelname.lower()}: "
        return prefix + text


def memory_mib() -> tuple[float, float]:
    """Peak memory of this process in MiB: (host resident set, device; 0 without CUDA)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux reports KiB
    torch = sys.modules.get("torch")
    device = 0.0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.max_memory_allocated() / 2**20
    return host, device


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Shows where an epoch stands: a bar on a terminal, else one line now and then (first, every `interval`, last)."""

    def __init__(
        self,
        total: int,
        *,
        title: str,
        start: int = 0,
        enabled: bool = True,
        interval: float = 10.0,
        stream: IO[str] | None = None,
    ) -> None:
        """Begin.

        Args:
            total: steps of the epoch.
            title: e.g. `Epoch 3/64`.
            start: steps already done before (resume in mid-epoch).
            enabled: off on all ranks but 0.
            interval: seconds between lines when the output is not a terminal.
            stream: where to write; standard output by default.
        """
        self._total = total
        self._title = title
        self._start = start
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stdout
        # mpirun gives its processes a pseudo-terminal wherever its own output goes: plain lines there.
        self._terminal = self._stream.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ
        self._interval = 0.2 if self._terminal else interval
        self._began = time.monotonic()
        self._shown = -float("inf")
        self._drawn = False

    @property
    def wants(self) -> bool:
        """Whether `update` would show something now: ask before fetching numbers from the device."""
        return self._enabled and time.monotonic() - self._shown >= self._interval

    def update(self, done: int, *, samples: int = 0, values: Mapping[str, float] | None = None) -> None:
        """Show the state after `done` steps when it is time.

        Args:
            done: steps of the epoch done, `start` included.
            samples: samples seen by all processes since `start`; gives samples/s.
            values: numbers to show, e.g. loss and lr.
        """
        if not self._enabled or (not self.wants and done < self._total):
            return
        now = time.monotonic()
        self._shown = now
        spent = max(now - self._began, 1e-9)
        fresh = max(done - self._start, 0)
        parts = [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        if samples:
            parts.append(f"{samples / spent:.1f} images/s")
        if fresh:
            parts.append(f"ETA {format_duration(spent / fresh * (self._total - done))}")
        host, device = memory_mib()
        parts.append(f"{device:.0f} MiB GPU" if device else f"{host:.0f} MiB")
        text = "  ".join(parts)
        if self._terminal:
            width = shutil.get_terminal_size().columns
            filled = round(24 * done / max(self._total, 1))
            bar = "#" * filled + "." * (24 - filled)
            self._stream.write(("\r" + f"{self._title} [{bar}] {done}/{self._total}  {text}")[:width].ljust(width))
            self._drawn = True
        else:
            self._stream.write(f"{self._title} [{done}/{self._total}]  {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()


class EpochLog:
    """`log.txt`: one JSON object a line and epoch. Made on rank 0.

    A disk that is full costs a line, not the run: what could not be written is reported and training goes on.
    """

    def __init__(self, output_dir: str | os.PathLike[str], *, start_epoch: int = 0) -> None:
        """Begin or continue the file.

        Args:
            output_dir: folder of the run.
            start_epoch: first epoch that will be written. Lines of this and later epochs (of a run that was killed
                after it wrote them, or of an older run in the same folder) move to `log.superseded.txt`, so that
                `log.txt` has each epoch once.
        """
        self.path = Path(make_directory(output_dir)) / "log.txt"
        if not self.path.exists():
            return
        records = read_jsonl(self.path)
        kept = [record for record in records if record.get("epoch", -1) < start_epoch]
        if len(kept) == len(records):
            return
        try:
            for record in records:
                if record not in kept:
                    append_jsonl(self.path.with_name("log.superseded.txt"), record)
            with atomic_write(self.path, "w") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in kept)
        except WriteError as error:
            get_logger().error("%s", error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one epoch."""
        try:
            append_jsonl(self.path, dict(record))
        except WriteError as error:
            get_logger().error("%s", error)


class ScalarWriter:
    """TensorBoard scalars. The package is imported and the file made at the first scalar; without a folder: nothing."""

    def __init__(self, log_dir: str | os.PathLike[str] | None, *, start: int | None = None) -> None:
        """Remember the folder.

        Args:
            log_dir: folder of the event files, or `None`.
            start: first step that will be written when a run is resumed: TensorBoard forgets what an earlier process
                wrote at this and later steps.
        """
        self._log_dir = log_dir
        self._start = start
        self._writer: Any = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars at `step` (the repository's x axis is 1000 * epoch)."""
        if self._log_dir is None:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                folder = os.fspath(make_directory(self._log_dir))
                self._writer = SummaryWriter(log_dir=folder, purge_step=self._start)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except (OSError, WriteError) as error:
            get_logger().error("TensorBoard file not written, and not tried again in this run: %s", error)
            self._log_dir = None

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
