"""Kill a preparation with SIGKILL at a numbered moment, run it again, and compare the result; run by the kill tests.

Every call that changes the file system counts as a moment: the process dies just before the call or, for a write, after
half of its bytes. Each run is a forked child of this process, which has no threads and has opened no data set.

    python sen12_kill_driver.py '{"raw_root": ..., "options": {...}, "scratch": ..., "moments": [...] or step}'

Prints JSON: the number of moments of an uninterrupted run, the moments tried, and what differed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rasterio  # noqa: F401 - imported once here instead of in every child

from sarwmix.sen12flood import stages

Call = Callable[..., Any]


class Moments:
    """Counts file-system changes and dies at a given one."""

    def __init__(self, fatal: int | None) -> None:
        self.count = 0
        self.fatal = fatal

    def install(self) -> None:
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate", "utime", "fsync"):
            setattr(os, name, self._wrap(getattr(os, name)))
        os.pwrite = self._wrap(os.pwrite, half=lambda call, file, data, at: call(file, data[: len(data) // 2], at))
        os.writev = self._wrap(os.writev, half=lambda call, file, parts: call(file, parts[:2]))
        Path.write_bytes = self._wrap(
            Path.write_bytes, half=lambda call, path, data: call(path, data[: len(data) // 2])
        )

    def _wrap(self, call: Call, half: Call | None = None) -> Call:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self.fatal:
                if half is not None:
                    half(call, *arguments, **keywords)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapped


def child(options: dict[str, Any], fatal: int | None, report: Path | None) -> int:
    """Run one preparation in a fork; returns the wait status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the child ends
        moments = Moments(fatal)
        moments.install()
        paths = {k: Path(v) if k in ("raw_root", "zip", "work", "out") else v for k, v in options.items()}
        stages.prepare(stages.PrepareOptions(**paths))
        if report is not None:
            report.write_text(str(moments.count))
        code = 0
    finally:
        os._exit(code)


def tree(root: Path) -> dict[str, str]:
    """Every file with its checksum; the marker of the work folder holds times of the input and is left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name != "work.json":
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    scratch = Path(request["scratch"])

    def options(name: str) -> dict[str, Any]:
        return {**request["options"], "work": str(scratch / name / "work"), "out": str(scratch / name / "out")}

    report = scratch / "moments"
    assert child(options("whole"), None, report) == 0
    count = int(report.read_text())
    wanted = tree(scratch / "whole")
    moments = request["moments"]
    if isinstance(moments, int):
        moments = list(range(1, count + 1, moments))
    failures = []
    for moment in moments:
        base = scratch / "killed"
        shutil.rmtree(base, ignore_errors=True)
        status = child(options("killed"), moment, None)
        if os.WTERMSIG(status) != signal.SIGKILL:
            failures.append(f"moment {moment}: was not killed (status {status})")
            continue
        status = child(options("killed"), None, None)
        found = tree(base)
        if status != 0:
            failures.append(f"moment {moment}: running again ended with {status}")
        elif found != wanted:
            differing = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            failures.append(f"moment {moment}: {differing[:5]}")
    print(json.dumps({"count": count, "tried": moments, "failures": failures}))


if __name__ == "__main__":
    main()
