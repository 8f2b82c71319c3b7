"""Measure where time and memory go, side by side with a textbook implementation of the same model and data path.

    python scripts/benchmark.py                          # every part that this machine can run, about 15 minutes
    python scripts/benchmark.py --part step --batch 8    # one part
    python scripts/benchmark.py --part gpu --model mixmim_base --batch 256

Each comparison alternates A (textbook), B (ours), A (again) in one process or in fresh processes, and reports the
median of the per-round ratios B / A with a 95 % bootstrap interval. The second A against the first is the control: its
interval should contain 1; a gain inside that interval is no gain. Speed without equal numbers is void: losses and
tensors are compared in the same run.

A, the textbook: tests/plain_mixmim.py (window copies, explicit masked softmax), single-tensor AdamW, a norm per
parameter, one sample at a time through rasterio, resize, flips, weights and standardisation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from util.args import MIXMIM_NAMES, Parser, positive_int
from util.cli import run_cli
from util.errors import UserError
from util.files import write_json

PARTS = ("step", "memory", "loader", "packing", "startup", "evaluation", "gpu")
MEAN, STD = (-19.1966, -12.5144), (5.4501, 5.0019)


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    import numpy as np

    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (draws, len(values))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


Measure = Callable[[], float]
Round = tuple[float, float, float]  # textbook, ours, textbook again


def summarise(name: str, rows: list[Round], *, unit: str = "s") -> dict[str, Any]:
    """Median of the per-round ratios ours / textbook with its interval and the control's; printed and returned."""
    ratios = [ours / ((first + again) / 2) for first, ours, again in rows]
    control = [again / first for first, _, again in rows]
    textbook = statistics.median([x for first, _, again in rows for x in (first, again)])
    ours = statistics.median([ours for _, ours, _ in rows])
    ratio, (low, high), (control_low, control_high) = statistics.median(ratios), bootstrap(ratios), bootstrap(control)
    print(
        f"{name:46s} textbook {textbook:10.4g} {unit}  ours {ours:10.4g} {unit}  ratio {ratio:.3f} "
        f"[{low:.3f}, {high:.3f}]  control [{control_low:.3f}, {control_high:.3f}]",
        flush=True,
    )
    return {
        "name": name,
        "unit": unit,
        "rounds": len(rows),
        "textbook": textbook,
        "ours": ours,
        "ratio": ratio,
        "ratio_95": [low, high],
        "control_95": [control_low, control_high],
    }


def compare(name: str, a: Measure, b: Measure, rounds: int, *, unit: str = "s") -> dict[str, Any]:
    """Alternate A B A for some rounds after one warm-up; ``a`` and ``b`` return what they measured, in ``unit``."""
    a(), b()
    return summarise(name, [(a(), b(), a()) for _ in range(rounds)], unit=unit)


# ---------------------------------------------------------------------- training step


class Step:
    """One training step: forward, backward, gradient norm, AdamW."""

    def __init__(self, kind: str, model: str, batch: int, *, bf16: bool = False) -> None:
        import torch
        from plain_mixmim import PlainMixMIM

        from models_mixmim import MixMIM, model_config
        from util.optim import build_adamw, parameter_groups

        self.kind, self.bf16 = kind, bf16
        torch.manual_seed(0)
        source = MixMIM(**model_config(model), norm_pix_loss=True)
        self.mask = source.draw_mask(generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 2, 128, 128, generator=generator)
        self.weights = torch.rand(batch, 16, 2, generator=generator) + 1
        self.model: torch.nn.Module
        self.optimizer: torch.optim.Optimizer
        if kind == "ours":
            self.model = source
            self.optimizer = build_adamw(parameter_groups(source, weight_decay=0.05), lr=1e-5, betas=(0.9, 0.95))
        else:
            self.model = PlainMixMIM(**model_config(model), norm_pix_loss=True)
            self.model.load_state_dict(source.state_dict())
            grid = self.weights.transpose(1, 2).reshape(batch, 2, 4, 1, 4, 1).expand(batch, 2, 4, 32, 4, 32)
            self.weights = grid.reshape(batch, 2, 128, 128).contiguous()
            self.optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad], lr=1e-5, betas=(0.9, 0.95), foreach=False
            )
        self.forward_seconds = self.optimizer_seconds = self.last_loss = 0.0

    def loss(self) -> Any:
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            if self.kind == "ours":
                return self.model(self.images, self.weights, mask=self.mask).loss
            return self.model(self.images, self.weights, self.mask)[0]

    def __call__(self) -> float:
        import torch

        from util.optim import gradient_norm

        began = time.perf_counter()
        loss = self.loss()
        self.forward_seconds = time.perf_counter() - began
        loss.backward()
        middle = time.perf_counter()
        self.last_loss = float(loss.detach())
        if self.kind == "ours":
            gradient_norm(self.model.parameters())
        else:
            torch.norm(torch.stack([torch.norm(p.grad) for p in self.model.parameters() if p.grad is not None]))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_seconds = time.perf_counter() - middle
        return time.perf_counter() - began


class Worker:
    """A process that makes one training step per line it is sent: each side keeps its own allocator and threads."""

    def __init__(self, kind: str, model: str, batch: int, threads: int, *, bf16: bool = False) -> None:
        command = [sys.executable, __file__, "--child", "step", kind, model, str(batch), str(threads), str(int(bf16))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"a measuring process ended with code {self.process.wait()}; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def child_step(kind: str, model: str, batch: str, threads: str, bf16: str) -> None:
    import torch

    from util.memory import keep_freed_memory

    torch.set_num_threads(int(threads))
    if kind == "ours":
        keep_freed_memory()  # as our entry scripts do
    step = Step(kind, model, int(batch), bf16=bf16 == "1")
    for _ in sys.stdin:
        seconds = step()
        values = {"step": seconds, "forward": step.forward_seconds, "optimizer": step.optimizer_seconds}
        print(json.dumps({**values, "loss": step.last_loss}), flush=True)


def part_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole step, forward and optimizer, float32 and bfloat16 on the CPU."""
    results = []
    for batch in args.batch or [8, 2]:
        for bf16 in [False, True] if "avx512_bf16" in cpu_flags() else [False]:
            a = Worker("textbook", args.model, batch, args.threads)
            b = Worker("ours", args.model, batch, args.threads, bf16=bf16)
            first, other = a()["loss"], b()["loss"]
            if abs(first - other) > (1e-2 if bf16 else 1e-5) * abs(first):
                raise UserError(f"losses differ ({first} against {other}): the comparison would be void")
            rounds = [(a(), b(), a()) for _ in range(args.rounds)]
            a.close()
            b.close()
            label = f"{args.model}, batch {batch}, {'bf16 against fp32' if bf16 else 'fp32'}"
            for part in ("step",) if bf16 else ("step", "forward", "optimizer"):
                results.append(summarise(f"{label}: {part}", [(x[part], y[part], z[part]) for x, y, z in rounds]))
    return results


def part_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak resident memory of two steps in a fresh process, less that of the imports."""

    results = []
    for batch in args.batch or [8]:

        def peak(kind: str, batch: int = batch) -> float:
            return float(child("memory", kind, args.model, str(batch), str(args.threads))["mib"])

        label = f"{args.model} peak memory, batch {batch}"
        results.append(compare(label, partial(peak, "textbook"), partial(peak, "ours"), 3, unit="MiB"))
    return results


def child_memory(kind: str, model: str, batch: str, threads: str) -> dict[str, Any]:
    import resource

    import plain_mixmim  # noqa: F401 - both sides import the same
    import torch

    import models_mixmim
    from util.memory import keep_freed_memory

    if kind == "ours":
        keep_freed_memory()
    torch.set_num_threads(int(threads))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Only one model lives: the other side's is built from the same seed by the same code and dropped.
    step = Step(kind, model, int(batch))
    step(), step()
    del models_mixmim
    return {"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own) / 1024}


# ---------------------------------------------------------------------- data


def demo(folder: Path, patches: int) -> Path:
    from sarwmix.synthetic.benv2 import generate

    root = folder / "demo"
    if not root.exists():
        generate(root, patches=patches, seed=0, jobs=os.cpu_count() or 1)
    return root


def split_by_split(root: Path) -> list[Any]:
    from sarwmix.data.registry import build_dataset

    return [build_dataset("demo", root, split) for split in ("train", "val", "test")]


def textbook_sample(folder: Path, name: str) -> Any:
    """Open the two GeoTIFFs of a patch with rasterio."""
    import numpy as np
    import rasterio

    bands = []
    for band in ("VH", "VV"):
        with rasterio.open(folder / f"{name}_{band}.tif") as file:
            bands.append(file.read(1))
    return np.stack(bands)


def part_loader(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Patches delivered by one process: raw, and with the transforms of pretraining."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from sarwmix.data.io.lmdb import LmdbPatches, write_lmdb
    from sarwmix.data.io.zarr import ZarrPatches, write_zarr
    from sarwmix.data.loader import build_loader
    from sarwmix.data.packed import pack
    from sarwmix.data.registry import build_dataset
    from sarwmix.transforms import SarTransform, draw_flips
    from sarwmix.weighting import WeightOptions, compute_weights
    from util.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as the entry scripts do; both sides run in this process
    results = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = demo(Path(scratch), args.patches)
        tiff = build_dataset("demo", root, "train+val+test")
        pack(split_by_split(root), Path(scratch) / "packed", jobs=1)
        packed = build_dataset("demo", Path(scratch) / "packed", "train+val+test")
        folders = {path.name: path for path in root.glob("*/*") if path.is_dir()}
        if not np.array_equal(tiff.read(5), textbook_sample(folders[tiff.names[5]], tiff.names[5])):
            raise UserError("the fast path and rasterio read different pixels: the comparison would be void")
        number = {name: index for index, name in enumerate(tiff.names)}
        write_lmdb(Path(scratch) / "lmdb", tiff.names, lambda name: tiff.read(number[name]))
        write_zarr(Path(scratch) / "zarr", ((name, tiff.read(index), None) for name, index in number.items()))
        readers = {
            "LMDB of safetensors": LmdbPatches(Path(scratch) / "lmdb", ("VH", "VV"), 120),
            "Zarr": ZarrPatches(Path(scratch) / "zarr", ("VH", "VV"), 120),
        }
        transform = SarTransform(size=128, mean=MEAN, std=STD, weighting=WeightOptions(level="pixel"))
        count = min(512, len(tiff))
        order = np.random.default_rng(0).permutation(len(tiff))[:count]
        mean, std = torch.tensor(MEAN).view(2, 1, 1), torch.tensor(STD).view(2, 1, 1)

        def textbook(with_transform: bool) -> float:
            began = time.perf_counter()
            for first in range(0, count, 64):
                batch = []
                for index in order[first : first + 64]:
                    name = tiff.names[int(index)]
                    image = torch.from_numpy(textbook_sample(folders[name], name))
                    if with_transform:
                        image = F.interpolate(image[None], size=(128, 128), mode="bilinear", antialias=True)[0]
                        image = image.flip(-1) if torch.rand(1) < 0.5 else image
                        image = image.flip(-2) if torch.rand(1) < 0.5 else image
                        weights = compute_weights(image, mode="per_channel")
                        batch.append((image.sub(mean).div(std), weights))
                    else:
                        batch.append((image, image))
                torch.stack([x for x, _ in batch])
                if with_transform:
                    torch.stack([w for _, w in batch])
            return (time.perf_counter() - began) / count * 1e6

        def ours(dataset: Any, with_transform: bool) -> float:
            loader = build_loader(dataset, batch_size=64, shuffle=True, drop_last=True)
            generator = torch.Generator().manual_seed(0)
            seen = 0
            began = time.perf_counter()
            for _ in range(1 if dataset is tiff else 4):
                for batch in loader:
                    if with_transform:
                        transform(batch["image"], draw_flips(len(batch["image"]), generator))
                    seen += len(batch["image"])
            spent = time.perf_counter() - began
            loader.close()
            return spent / seen * 1e6

        def others(reader: Any) -> float:
            began = time.perf_counter()
            for first in range(0, count, 64):
                chosen = order[first : first + 64]
                images = np.empty((len(chosen), 2, 120, 120), dtype=np.float32)
                for image, index in zip(images, chosen, strict=True):
                    reader.read_into(tiff.names[int(index)], image)
            return (time.perf_counter() - began) / count * 1e6

        for label, reader in readers.items():
            pair = partial(textbook, False), partial(others, reader)
            results.append(compare(f"{label}, raw, per patch", *pair, max(3, args.rounds // 2), unit="us"))
        for with_transform in (False, True):
            what = "with transforms" if with_transform else "raw"
            for label, dataset in (("GeoTIFF fast path", tiff), ("packed store", packed)):
                name = f"{label}, {what}, per patch"
                pair = partial(textbook, with_transform), partial(ours, dataset, with_transform)
                results.append(compare(name, *pair, max(3, args.rounds // 2), unit="us"))
                print(f"    {1e6 / results[-1]['ours']:,.0f} patches/s, {1 / results[-1]['ratio']:.1f} x textbook")
    return results


def part_packing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Patches packed per second by one process from the page cache."""
    import shutil

    from sarwmix.data.packed import pack

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = demo(Path(scratch), args.patches)
        datasets = split_by_split(root)
        rates = []
        for _ in range(1 + args.rounds):
            shutil.rmtree(Path(scratch) / "packed", ignore_errors=True)
            began = time.perf_counter()
            pack(datasets, Path(scratch) / "packed", jobs=1)
            rates.append(sum(map(len, datasets)) / (time.perf_counter() - began))
    rate = statistics.median(rates[1:])
    print(f"packing, one process, page cache: {rate:,.0f} patches/s (median of {args.rounds})")
    return [{"name": "packing", "unit": "patches/s", "ours": rate, "range": [min(rates[1:]), max(rates[1:])]}]


# ---------------------------------------------------------------------- start-up


def part_startup(args: argparse.Namespace) -> list[dict[str, Any]]:
    """--help, and process start to first optimizer step, each in fresh processes."""
    help_seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "main_pretrain.py"), "--help"], stdout=subprocess.DEVNULL, check=True
        )
        help_seconds.append(time.perf_counter() - began)
    print(f"main_pretrain.py --help: {statistics.median(help_seconds):.3f} s (median of 5)")
    results: list[dict[str, Any]] = [{"name": "--help", "unit": "s", "ours": statistics.median(help_seconds)}]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = demo(Path(scratch), 96)
        write_listing(Path(scratch))

        def first_step(kind: str) -> float:
            began = time.perf_counter()
            child("startup", kind, str(root), scratch)
            return time.perf_counter() - began

        rounds = max(3, args.rounds // 2)
        label = "start to first optimizer step, mixmim_tiny"
        results.append(compare(label, lambda: first_step("textbook"), lambda: first_step("ours"), rounds))
    return results


def write_listing(folder: Path) -> None:
    """A patch list as long as the official one of BigEarthNet v2, as parquet (ours) and as CSV (textbook)."""
    import pandas

    from sarwmix.data.labels import CLASSES_19
    from sarwmix.data.registry import OFFICIAL_COUNTS

    names, splits = [], []
    for split, count in OFFICIAL_COUNTS["benv2"].items():
        splits += [split] * count
        names += [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{split}_{i}" for i in range(count)]
    labels = [[CLASSES_19[(i + k) % 19] for k in range(3)] for i in range(len(names))]
    table = pandas.DataFrame({"s1_name": names, "split": splits, "labels": labels})
    table.to_parquet(folder / "listing.parquet")
    table.to_csv(folder / "listing.csv", index=False)


def child_startup(kind: str, root: str, scratch: str) -> dict[str, Any]:
    if kind == "ours":
        import main_pretrain
        import util.training
        from sarwmix.datasets.bigearthnet import read_metadata

        read_metadata([Path(scratch) / "listing.parquet"], ("train", "val"))

        class Done(Exception):
            pass

        original = util.training.Trainer.update

        def once(*arguments: Any) -> Any:
            original(*arguments)
            raise Done

        setattr(util.training.Trainer, "update", once)  # noqa: B010 - stops after the first step
        sys.argv = ["main_pretrain.py", "--dataset", "demo", "--data_path", root, "--output_dir", f"{scratch}/run"]
        sys.argv += ["--model", "mixmim_tiny", "--batch_size", "8", "--num_workers", "0"]
        sys.stdout = sys.stderr
        try:
            main_pretrain.main()
        except Done:
            sys.stdout = sys.__stdout__
        return {}
    # The published order: import everything, FLOP table by tracing, a list of Python rows, then the first step.
    import csv
    import importlib
    import logging

    for name in (
        "pandas",
        "torchvision",
        "timm",
        "sklearn.metrics",
        "rasterio",
        "zarr",
        "tensorboard",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
    import torch
    from fvcore.nn import FlopCountAnalysis, flop_count_table
    from plain_mixmim import PlainMixMIM

    from models_mixmim import model_config

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    import numpy as np

    from sarwmix.data.labels import CLASSES_19

    columns = {name: i for i, name in enumerate(CLASSES_19)}
    rows = []
    with (Path(scratch) / "listing.csv").open() as file:
        for name, _, text in list(csv.reader(file))[1:]:
            label = np.zeros(19)
            for found in re.findall(r"'([^']+)'", text):
                label[columns[found]] = 1
            rows.append((name, label))
    images = torch.stack([torch.from_numpy(textbook_sample(p, p.name)) for p in sorted(Path(root).glob("*/*"))[:8]])
    model = PlainMixMIM(**model_config("mixmim_tiny"))
    counted = FlopCountAnalysis(model, (torch.zeros(2, 2, 128, 128), torch.ones(2, 2, 128, 128), torch.ones(16)))
    flop_count_table(counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    resized = torch.nn.functional.interpolate(images, size=(128, 128), mode="bilinear")
    model(resized, None, (torch.arange(16) % 2).float())[0].backward()
    optimizer.step()
    return {"rows": len(rows)}


# ---------------------------------------------------------------------- whole loops


def part_gpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    """See `benchmark_training.part_gpu`."""
    from benchmark_training import part_gpu

    return part_gpu(args.model, (args.batch or [256])[0], budget=600)


def part_evaluation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """See `benchmark_training.part_evaluation`."""
    from benchmark_training import part_evaluation

    return part_evaluation(model="mixmim_tiny", scratch=args.scratch, rounds=args.rounds)


# ---------------------------------------------------------------------- command


def child(part: str, *arguments: str) -> dict[str, Any]:
    """Run a measurement in a fresh process of this script; its last line of output is JSON."""
    command = [sys.executable, __file__, "--child", part, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"a measuring process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}


def machine() -> dict[str, Any]:
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{model}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }


def main() -> int | None:
    if sys.argv[1:2] == ["--child"]:
        arguments = sys.argv[3:]
        if sys.argv[2] == "step":
            child_step(*arguments)
        else:
            print(json.dumps(child_memory(*arguments) if sys.argv[2] == "memory" else child_startup(*arguments)))
        return None
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure")
    parser.add_argument("--model", choices=MIXMIM_NAMES, default="mixmim_base")
    parser.add_argument("--batch", type=positive_int, nargs="+", help="batch sizes (not given: 8 and 2; GPU: 256)")
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds of A B A")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads of both sides")
    parser.add_argument("--patches", type=positive_int, default=2048, help="generated patches for loader and packing")
    parser.add_argument("--scratch", default=None, metavar="DIR", help="where to put generated data (RAM disk is best)")
    parser.add_argument("--json", default=None, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    if args.scratch is not None and not Path(args.scratch).is_dir():
        raise UserError(f"--scratch {args.scratch} is not a folder")
    report: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv), "results": []}
    print(json.dumps(report["machine"]))
    parts = {
        "step": part_step,
        "memory": part_memory,
        "loader": part_loader,
        "packing": part_packing,
        "startup": part_startup,
        "evaluation": part_evaluation,
        "gpu": part_gpu,
    }
    for name in args.part:
        report["results"] += parts[name](args)
    if args.json:
        write_json(args.json, report)
    return None


if __name__ == "__main__":
    run_cli(main)
