"""A seeded fuzzer over the files that commands read: damages one file at a time and looks at what its reader does.

A try ends well when the reader delivers a result or refuses with one clear line (`UserError`). It fails on any other
exception, a message of several lines, a signal, a minute, memory beyond the bound, a connection, or code that ran.

By hand: ``python -m tests.fuzzing --tries 200 --seed 1``.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes of address space that a reader may take beyond what the process has
SECONDS = 60.0  # that one try may take, on a busy machine, too


@dataclass
class Target:
    """One kind of file with the code that reads it.

    Attributes:
        name: for reports.
        make: writes intact files into a folder.
        use: reads them as a command does, and returns something that can be compared.
        files: patterns of the files that are damaged.
        changes: damage of this kind alone, such as another entry behind a right checksum.
        share: part of the tries that are made, where each takes long.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path], Any]
    files: Sequence[str] = ("**/*",)
    changes: Sequence[Callable[[random.Random, Path], None]] = ()
    share: float = 1.0


@dataclass
class Outcome:
    """What the tries of a target came to."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak: int = 0  # bytes of address space beyond the start


# Damage ----------------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a mark when it is unpickled."""

    mark = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (Evil.mark,)


ODD: Sequence[Any] = (
    None, True, -1, 0, 1, 10**12, 65_536, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "/etc/passwd", "\ud800", "a\nb", "{}", "$HOME", [], {}, [[]], {"a": 1}, [None], ["x"] * 3, {"id": "pickle"},
)  # fmt: skip


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _nodes(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 20)):
            yield from _nodes(value[index], (*path, index))


def change_value(rng: random.Random, value: Any) -> Any:
    """Replace, double, shorten or leave out one value somewhere in a nested one."""
    path = rng.choice(list(_nodes(value)))
    if not path:
        return rng.choice(ODD)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    old, how = parent[path[-1]], rng.randrange(4)
    if how == 0 and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[path[-1]] = rng.choice([old + 1, old - 1, -old, old * 2, old * 10**6, str(old)])
    elif how == 1 and isinstance(old, list) and old:
        parent[path[-1]] = rng.choice([old[:-1], old + old, old[::-1]])
    elif how == 2 and isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent[path[-1]] = rng.choice(ODD)
    return value


def _truncated(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 1, 8, rng.randrange(len(data) + 1), max(0, len(data) - 1)])])


def _flipped(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    reach = rng.choice([len(data), min(len(data), 512)])
    for _ in range(rng.choice([1, 1, 2, 8, 32])):
        data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _retyped(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(change_value(rng, json.loads(data[8 : 8 + length]))).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        elif path.name == "log.txt":
            lines = data.decode().splitlines()
            number = rng.randrange(len(lines))
            lines[number] = json.dumps(change_value(rng, json.loads(lines[number])))
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_text(json.dumps(change_value(rng, json.loads(data))))
    except (ValueError, UnicodeError):
        if data[:6] == b"\x93NUMPY":
            _other_header(rng, path, data)
        else:
            _cells(rng, path, data)


def _other_header(rng: random.Random, path: Path, data: bytes) -> None:
    text = data[10 : 10 + struct.unpack_from("<H", data, 8)[0]]
    swaps = [
        (b"<f4", b"|O8"),
        (b"<f4", b"<f8"),
        (b"<i8", b"<U9"),
        (b"|u1", b"<u8"),
        (b"False", b"True"),
        (b"(", b"[("),
        (b"'shape'", b"'shade'"),
        (b"}", b""),
        (b"(", b"(-"),
        (b"False", b"os"),
        (b"(", b"(10000000000000,"),
    ]
    old, new = rng.choice(swaps)
    changed = text.replace(old, new).rstrip() + b"\n"
    path.write_bytes(data[:8] + struct.pack("<H", len(changed)) + changed + data[10 + len(text) :])


def _cells(rng: random.Random, path: Path, data: bytes) -> None:
    """A table with other cells, or bytes in place of others."""
    if b"\0" not in data[:2000] and b"\n" in data:
        lines = data.decode("utf-8", "replace").splitlines()
        number = rng.randrange(len(lines))
        cells = lines[number].split(",")
        odd = ["", "nan", "-1", "1e400", '"', "=1+1", "../x", "ü\u2028", "9" * 5000]
        cells[rng.randrange(len(cells))] = rng.choice(odd)
        lines[number] = ",".join(cells if rng.random() < 0.7 else cells[:-1])
        path.write_text("\n".join(lines) + "\n")
    else:
        place = rng.randrange(len(data) + 1)
        path.write_bytes(data[:place] + rng.randbytes(rng.choice([1, 4, 64])) + data[place:])


def _resized(rng: random.Random, path: Path) -> None:
    """Other sizes in a header than the file has."""
    data = bytearray(path.read_bytes() or b"\0")
    huge = rng.choice([10**6, 65_535, 2**31 - 1, 0, 3])
    if data[:4] == b"II*\0" and len(data) > 200:  # TIFF: width and height
        (place,) = struct.unpack_from("<I", data, 4)
        for entry in range(min(struct.unpack_from("<H", data, place)[0], 64) if place + 2 < len(data) else 0):
            start = place + 2 + 12 * entry
            if start + 12 <= len(data) and struct.unpack_from("<H", data, start)[0] in (256, 257, 277, 278):
                struct.pack_into("<HHII", data, start, struct.unpack_from("<H", data, start)[0], 4, 1, huge)
    elif data[:4] == b"\x89PNG":
        struct.pack_into(">II", data, 16, huge, huge)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif data[:6] == b"\x93NUMPY":
        length = struct.unpack_from("<H", data, 8)[0]
        text = bytes(data[10 : 10 + length]).replace(b"(", b"(%d, " % (10**12)).rstrip() + b"\n"
        data = data[:8] + struct.pack("<H", len(text)) + text + data[10 + length :]
    elif rng.random() < 0.5:
        data = data + (bytes(rng.choice([1, 4096])) if rng.random() < 0.5 else data)
    else:
        path.write_bytes(data)
        with path.open("r+b") as stream:
            stream.truncate(4 << 30)  # sparse: 4 GB
        return
    path.write_bytes(data)


def _contradictory(rng: random.Random, path: Path) -> None:
    others = sorted(one for one in path.parent.glob(f"*{path.suffix}") if one != path and one.is_file())
    others = others or sorted(one for one in path.parent.rglob("*") if one != path and one.is_file())
    if others:
        path.write_bytes(rng.choice(others).read_bytes())
    else:
        path.unlink()


def _special(rng: random.Random, path: Path) -> None:
    path.unlink()
    how = rng.choice(["fifo", "device", "socket", "folder", "loop", "dangling", "outside", "missing"])
    if how == "fifo":
        os.mkfifo(path)
    elif how == "socket" and len(str(path)) < 100:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif how == "folder":
        path.mkdir()
    elif how in ("device", "loop", "dangling", "outside"):
        target = {"device": rng.choice(["/dev/zero", "/dev/random"]), "loop": path.name, "dangling": "nowhere",
                  "outside": "/etc/passwd"}[how]  # fmt: skip
        path.symlink_to(target)


def _pickled(rng: random.Random, path: Path) -> None:
    raw = pickle.dumps(Evil())
    if path.suffix == ".npy":
        text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
        raw = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + raw
    elif path.suffix in (".pth", ".npz", ".zip"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl" if path.suffix == ".pth" else "scores.npy", raw)
            archive.writestr("archive/version", "3\n")
        raw = buffer.getvalue()
    path.write_bytes(raw)


def _bomb(rng: random.Random, path: Path) -> None:
    """Little that becomes much: nested JSON, and what expands when it is decompressed."""
    zeros = bytes(64 << 20)
    if path.suffix in (".npz", ".zip", ".pth"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (16777216,), }\n"
            for name in ("scores.npy", "target.npy", "a/data.pkl", "SEN12FLOOD/S1list.json"):
                archive.writestr(name, b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + zeros)
        path.write_bytes(buffer.getvalue())
    elif path.suffix in (".gz", ".bz2"):
        packed = gzip.compress(zeros, 1) if path.suffix == ".gz" else bz2.compress(zeros, 1)
        path.write_bytes(packed * 40)  # members one after the other: 2.5 GB
    elif rng.random() < 0.3:
        packer = zlib.compressobj(9, wbits=31)
        path.write_bytes(packer.compress(zeros) + packer.flush())
    else:
        depth = rng.choice([33, 500, 100_000])
        path.write_text(rng.choice(['{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth, "[" * depth]))


def _foreign_raster(rng: random.Random, path: Path) -> None:
    """Text that GDAL takes for an image elsewhere."""
    url = f"http://127.0.0.1:{os.environ.get('FUZZ_PORT', '9')}/x.tif"
    where = rng.choice([f"/vsicurl/{url}", "/etc/passwd", url])
    vrt = (
        '<VRTDataset rasterXSize="120" rasterYSize="120"><VRTRasterBand dataType="Float32" band="1"><SimpleSource>'
        f"<SourceFilename>{where}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    wms = f'<GDAL_WMS><Service name="TMS"><ServerUrl>{url}</ServerUrl></Service><DataWindow/></GDAL_WMS>'
    text = rng.choice([vrt, wms])
    if path.suffix == ".tif" and rng.random() < 0.4:  # a sidecar instead
        Path(f"{path}{rng.choice(['.msk', '.ovr', '.aux.xml'])}").write_text(text)
    else:
        path.write_text(text)


DAMAGE: dict[str, Callable[[random.Random, Path], None]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "retyped": _retyped,
    "resized": _resized,
    "contradictory": _contradictory,
    "special file": _special,
    "pickle": _pickled,
    "bomb": _bomb,
    "VRT": _foreign_raster,
}


# Running ---------------------------------------------------------------------------------------------------------


PRELOADED = (
    *("torch", "rasterio", "zarr", "numcodecs", "lmdb", "pandas", "pyarrow.parquet", "safetensors.torch", "PIL.Image"),
    *("sarwmix.data.packed", "sarwmix.datasets.bigearthnet", "sarwmix.datasets.sen12flood", "sarwmix.datasets.scenes"),
    *("sarwmix.datasets.satlas", "sarwmix.datasets.dfc2020", "sarwmix.datasets.eurosat", "sarwmix.datasets.ombria"),
    *("sarwmix.inference.export", "sarwmix.reports.page", "sarwmix.tasks.pair"),
    *("sarwmix.finetune.probes", "sarwmix.synthetic.neighbours", "sarwmix.sen12flood.stages", "tests.test_report"),
)


class Hang(BaseException):
    """A try took too long."""


def _limit(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def server() -> Iterator[list[str]]:
    """A server on this machine; the list takes who connects."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        os.environ["FUZZ_PORT"] = str(listening.getsockname()[1])
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, address = listening.accept()
                    seen.append(str(address))
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()


def _restore(work: Path, intact: Path) -> None:
    shutil.rmtree(work)
    shutil.copytree(intact, work, symlinks=True)


def _comparable(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), zlib.crc32(np.ascontiguousarray(value).tobytes())
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return repr(value)


def address_space() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _tries(target: Target, folder: Path, tries: int, seed: int, report: Any) -> None:
    """All tries of a target, in a process of its own; one JSON line each, before and after."""
    from util.errors import UserError

    intact, work = folder / "intact", folder / "work"
    intact.mkdir(parents=True)
    target.make(intact)
    Evil.mark = str(folder / "EVIL")
    shutil.copytree(intact, work, symlinks=True)
    expected = _comparable(target.use(work))
    begin = address_space()
    # Libraries keep arenas and threads' stacks: what a first use took is no part of the bound.
    resource.setrlimit(resource.RLIMIT_AS, (begin + MEMORY, begin + MEMORY))
    signal.signal(signal.SIGALRM, _limit)
    paths = sorted({path for pattern in target.files for path in intact.glob(pattern) if path.is_file()})
    for number in range(tries):
        rng = random.Random(f"{target.name} {seed} {number}")
        path = work / rng.choice(paths).relative_to(intact)
        own = bool(target.changes) and rng.random() < 0.3
        kind = "behind a right checksum" if own else rng.choice(list(DAMAGE))
        what = f"{target.name} {number}: {path.relative_to(work)} {kind}"
        print(json.dumps({"begin": what}), file=report, flush=True)
        outcome, detail = "refused", ""
        try:
            if own:
                rng.choice(target.changes)(rng, work)
            else:
                DAMAGE[kind](rng, path)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            result = target.use(work)
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome = "right" if _comparable(result) == expected else "another result"
        except UserError as error:
            detail = str(error)
            if not detail or "\n" in detail or not detail.isprintable():
                outcome = "failed"
        except Hang:
            outcome, detail = "failed", f"more than {SECONDS:g} s"
        except BaseException:  # noqa: BLE001 - whatever it is, it is the finding
            outcome, detail = "failed", traceback.format_exc()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if (folder / "EVIL").exists():
            outcome, detail = "failed", "code in the file was run"
            (folder / "EVIL").rmdir()
        more = {"kind": kind, "outcome": outcome, "detail": detail, "space": address_space() - begin}
        print(json.dumps(more), file=report, flush=True)
        _restore(work, intact)


def fuzz(target: Target, folder: Path, *, tries: int, seed: int = 0) -> Outcome:
    """Damage the files of a target `tries` times; each target in a process of its own, which may die or hang."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = Outcome()
    with server() as seen:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException), open(folder / "report", "w", encoding="utf-8") as report:
                sys.addaudithook(_no_network)
                with open(os.devnull, "w", encoding="utf-8") as quiet, contextlib.redirect_stdout(quiet):
                    os.dup2(quiet.fileno(), 1)
                    os.dup2(quiet.fileno(), 2)
                    try:
                        _tries(target, folder, tries, seed, report)
                        code = 0
                    except BaseException:  # noqa: BLE001 - of the fuzzer itself
                        print(json.dumps({"begin": traceback.format_exc()}), file=report, flush=True)
            os._exit(code)
        status = _wait(child, folder / "report")
    lines = [json.loads(line) for line in (folder / "report").read_text().splitlines()]
    last = ""
    for line in lines:
        if "begin" in line:
            last = line["begin"]
            continue
        found.counts[line["outcome"]] += 1
        found.peak = max(found.peak, line["space"])
        if line["outcome"] == "failed":
            found.failures.append(f"{last}: {line['detail']}")
    if status:
        found.counts["failed"] += 1
        found.failures.append(f"{last}: the process ended with status {status}")
    if seen:
        found.counts["failed"] += 1
        found.failures.append(f"{target.name}: requests from {seen}")
    return found


def _wait(child: int, report: Path) -> int:
    """The status of the process; one that reports nothing for twice the limit hangs where no signal reaches."""
    began = time.time()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        last = report.stat().st_mtime if report.exists() else began
        if time.time() - max(began, last) > 2 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _no_network(event: str, details: Any) -> None:
    if event == "socket.connect" and not isinstance(details[1], str):
        raise RuntimeError(f"a connection to {details[1]}")


def main() -> None:
    """Run targets and print counts."""
    from tests.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    for module in PRELOADED:  # once, not in each process
        importlib.import_module(module)
    total: Counter[str] = Counter()
    for target in TARGETS:
        if args.only and target.name not in args.only:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tries = max(1, round(args.tries * target.share))
            found = fuzz(target, Path(folder) / "f", tries=tries, seed=args.seed)
        total += found.counts
        print(f"{target.name:24} {dict(found.counts)} peak {found.peak >> 20} MiB, {time.monotonic() - began:.1f} s")
        for failure in found.failures:
            print("   ", failure)
    print("all", dict(total), sum(total.values()))


if __name__ == "__main__":
    main()
