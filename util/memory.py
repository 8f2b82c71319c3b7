"""How the C allocator treats the large arrays of training on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc reuse freed arrays instead of giving them back to the kernel.

    By default each array above some hundred kB is a fresh mapping whose pages the kernel must fault in and clear, at
    every layer of every step; that costs more than many of the operations on them. Kept, the same pages serve again.
    Peak memory stays about the same, because a training step needs the same arrays again.

    Returns:
        Whether the C library accepted it; other C libraries have no such setting, and nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
