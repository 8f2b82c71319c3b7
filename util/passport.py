"""The passport of a run: which code, packages, command, device, data and parents its numbers come from.

    passport = take_passport(args, device=..., processes=..., data={"train": {"names_sha256": ..., ...}})

It goes to passport.json in the run's folder, into its checkpoints, metrics.json and the card of an export.
`scripts/rerun.py` repeats a run from it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from util.files import hash_of_file, read_json, write_json

FORMAT = "sarwmix-passport/1"
PASSPORT_FILE = "passport.json"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "scikit-learn", "rasterio", "zarr", "numcodecs", "pandas", "pyarrow",
    "safetensors", "lmdb", "mpi4py", "triton",
)  # fmt: skip
SHOWN = ("python", "torch", "timm")
PARENTS = ("finetune", "resume")  # flags that name a file whose numbers go into the run's
# What two runs with the same numbers may differ in.
INCIDENTAL = ("started", "machine.host", "command.folder", "command.words", "code.dirty", "code.commit")


def take_passport(
    args: argparse.Namespace,
    *,
    device: Any,
    processes: int = 1,
    data: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What is known when a run starts; plain values.

    Args:
        args: flags of an entry script.
        device: torch device that computes.
        processes: of the run.
        data: what identifies the samples of each split, such as hashes of their names, labels and pixels.
    """
    return {
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "packages": {"python": platform.python_version(), **package_versions()},
        "command": {"program": Path(sys.argv[0]).name, "words": sys.argv[1:], "folder": os.getcwd()},
        "machine": describe_machine(device, processes),
        "data": {name: dict(facts) for name, facts in (data or {}).items()},
        "parents": dict(_parents(args)),
    }


def write_passport(folder: Path, passport: Mapping[str, Any], *, resumed: bool) -> dict[str, Any]:
    """Write passport.json; of a run that goes on, with those of its earlier starts under ``before``.

    Args:
        folder: of the run.
        passport: of `take_passport`.
        resumed: whether the run continues a checkpoint.

    Returns:
        What was written.
    """
    whole, path = dict(passport), folder / PASSPORT_FILE
    if resumed and path.is_file():
        earlier = read_json(path)
        before = earlier.pop("before", []) if isinstance(earlier, dict) else []
        whole["before"] = [*before, earlier]
    write_json(path, whole)
    return whole


def _parents(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    for flag in PARENTS:
        path = str(getattr(args, flag, "") or "")
        if path and path != "auto" and Path(path).is_file():
            yield flag, {"path": path, "sha256": hash_of_file(path)}


@functools.lru_cache(maxsize=1)
def code_version() -> dict[str, Any]:
    """Version, git commit and whether files differ from it (None outside a checkout), and a hash over all sources.

    The hash names the code where git cannot: of an installed package, or of a checkout with changes.
    """
    found: dict[str, Any] = {"commit": _git("rev-parse", "HEAD"), "dirty": None, "sha256": source_hash()}
    if found["commit"] is not None:
        found["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    try:
        found["version"] = metadata.version("sar-w-mixmae")
    except metadata.PackageNotFoundError:
        found["version"] = None
    return found


def source_hash() -> str:
    """SHA-256 over names and contents of the modules that compute: `sarwmix`, `util`, and those beside them."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("main_*.py"), *ROOT.glob("engine_*.py"), *ROOT.glob("models_*.py")]
    files += [path for room in ("sarwmix", "util") for path in (ROOT / room).rglob("*.py")]
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _git(*words: str) -> str | None:
    """What git says of the checkout; None where there is none, or no git."""
    if not (ROOT / ".git").exists():  # an installed package inside somebody else's checkout is not that checkout
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Versions of what numbers depend on, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine(device: Any, processes: int) -> dict[str, Any]:
    """Host, platform, device and threads; numbers may differ between devices and thread counts."""
    import torch

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": str(device).split(":")[0],
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
    if found["device"] == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def passport_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two passports beyond time, place and command: name -> both values."""
    left, right = dict(flat(first)), dict(flat(second))
    names = [name for name in dict.fromkeys([*left, *right]) if not name.startswith(INCIDENTAL)]
    names = [name for name in names if not (name.startswith("parents.") and name.endswith(".path"))]
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def public_passport(passport: Mapping[str, Any]) -> dict[str, Any]:
    """The passport as exports hold it, which may be published: without host, and of paths their last part alone."""
    found = {key: value for key, value in passport.items() if key != "before"}
    command, machine = dict(found.get("command", {})), dict(found.get("machine", {}))
    machine.pop("host", None)
    command.pop("folder", None)
    command["words"] = [Path(word).name if "/" in str(word) else word for word in command.get("words", [])]
    parents = {
        flag: {**parent, "path": Path(str(parent.get("path"))).name}
        for flag, parent in found.get("parents", {}).items()
    }
    return {**found, "command": command, "machine": machine, "parents": parents}


def passport_lines(passport: Mapping[str, Any]) -> list[str]:
    """The passport in a few lines of Markdown, for model cards."""
    code, machine = passport.get("code", {}), passport.get("machine", {})
    commit = code.get("commit")
    state = {True: ", with changes", False: "", None: ""}[code.get("dirty")]
    packages = passport.get("packages", {})
    device = machine.get("gpu") or machine.get("processor") or machine.get("device")
    lines = [
        f"* code: version {code.get('version') or 'not installed'}"
        + (f", commit {commit}{state}" if commit else "")
        + f", sources {str(code.get('sha256'))[:16]}",
        "* packages: " + ", ".join(f"{name} {packages[name]}" for name in packages if name in SHOWN),
        f"* trained on {machine.get('processes', 1)} process(es), {device}, started {passport.get('started')}",
    ]
    for split, facts in passport.get("data", {}).items():
        lines.append(f"* {split}: {facts.get('count')} samples, names {str(facts.get('names_sha256'))[:16]}")
    for flag, parent in passport.get("parents", {}).items():
        lines.append(f"* --{flag}: {Path(parent['path']).name}, sha256 {parent['sha256'][:16]}")
    return lines
