"""One writer a folder: a lock that ends with the process that holds it, also after kill -9."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import threading
import time
from pathlib import Path

from util.errors import UserError
from util.files import make_directory, write_error

LOCK_NAME = ".lock"
BEAT = 5.0  # seconds between signs of life where the file system knows no locks
_MISSED = 3  # beats after which a holder is taken for dead there
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """The right to write a folder, held from construction to `release` or the end of the process.

    It is `flock` on `<folder>/.lock`, which the kernel releases with the process; NFS clients pass it to the server
    since Linux 2.6.12. Where a file system knows no locks, the holder touches the file every few seconds instead, and
    a file that nobody touched for three of these times is taken over.
    """

    def __init__(
        self, folder: str | os.PathLike[str], what: str, *, wait: float = 0.0, workers_write: bool = False
    ) -> None:
        """
        Args:
            folder: made when it is not there.
            what: what the holder does there, for the one who comes second: "training".
            wait: seconds to wait for the holder before refusing.
            workers_write: processes forked from this one keep the lock while they live.

        Raises:
            UserError: another process writes there; it is named.
            WriteError: the folder cannot be written at all.
        """
        self._path = make_directory(folder) / LOCK_NAME
        self._token = f"process {os.getpid()} on {socket.gethostname()}, {what}, since {time.strftime('%F %T')}"
        self._file = -1
        self._stop = threading.Event()
        self._owner = os.getpid()
        deadline = time.monotonic() + wait
        try:
            while not self._try():
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"{Path(folder)} is being written by {self._holder()}; one writer at a time: wait until it "
                        "ends, stop it, or give another folder"
                    )
                time.sleep(0.1)
        except OSError as error:
            raise write_error(Path(folder), error) from error
        if not workers_write:
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.release)

    def _try(self) -> bool:
        """One attempt; False: somebody else holds it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{self._path} is not a regular file, expected a lock; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the name in between: then this is a lock on nothing.
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                raise FileNotFoundError
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._token.encode(), 0)
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                return self._try_by_beats()
            raise
        except UserError:
            os.close(descriptor)
            raise
        self._file = descriptor
        return True

    def _try_by_beats(self) -> bool:
        """Without locks: watch whether a holder shows signs of life, else put the own name into the file."""

        def seen() -> tuple[str, int]:
            return self._holder(), self._path.stat().st_mtime_ns

        before = seen()
        if before[0]:
            end = time.monotonic() + _MISSED * BEAT
            while time.monotonic() < end:
                time.sleep(min(0.2, BEAT))
                if seen() != before:
                    return False
        self._path.write_text(self._token, encoding="utf-8")
        time.sleep(min(0.5, BEAT))  # of several who wrote at once the last one stays
        if self._holder() != self._token:
            return False
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return True

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text(encoding="utf-8", errors="replace")[:500]
        return "another process"

    def _forget(self) -> None:
        """In a forked process: the lock is the parent's."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1

    def release(self) -> None:
        """Give the folder free; forked processes and later calls change nothing."""
        if os.getpid() != self._owner or self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if self._holder() == self._token:
                self._path.unlink()
        self._forget()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def program() -> str:
    """Name of this program, for messages."""
    return Path(sys.argv[0]).name or "python"
