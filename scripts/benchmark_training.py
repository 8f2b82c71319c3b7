"""Parts `evaluation` and `gpu` of scripts/benchmark.py: the real loops of this project, with their data."""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("error: this is a part of another command: python scripts/benchmark.py --part evaluation gpu")

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.errors import UserError
from util.files import read_json

if TYPE_CHECKING:
    import torch

    from sarwmix.datasets.sen12flood import PairDataset

ROOT = Path(__file__).resolve().parent.parent
GPU_SECTIONS = ("environment", "step", "repeats", "loop", "pairs", "finetuning", "profile")


def part_gpu(model: str, batch: int, budget: int) -> list[dict[str, Any]]:
    """Speed, equality, loop, pairs and profile on a card: sections of scripts/gpu_check.py."""
    import torch

    if not torch.cuda.is_available():
        print("gpu: no CUDA device here; this part is ready to run where there is one")
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--out", str(out), "--model", model]
        command += ["--batch", str(batch), "--budget", str(budget)]
        subprocess.run([*command, "--only", *GPU_SECTIONS], check=True)
        return [{"name": f"gpu_check: {name}", "found": value} for name, value in read_json(out).items()]


# ---------------------------------------------------------------------- SEN12-FLOOD pairs


def make_pairs(folder: Path, *, sequences: int, frames: int, size: int) -> PairDataset:
    """A store of generated pairs: test split, as many images per sequence as the real data has."""
    from sarwmix.data.registry import build_dataset
    from sarwmix.datasets.sen12flood import PairDataset
    from sarwmix.synthetic.sen12flood import DemoOptions, generate

    raw = generate(folder / "raw", DemoOptions(2, sequences, frames, size))
    command = [sys.executable, "-m", "sarwmix.sen12flood.prepare", "--raw-root", str(raw), "--layout", "store"]
    command += ["--work", str(folder / "work"), "--out", str(folder / "pairs"), "--size", str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the preparation of pairs ended with {done.returncode}: {done.stderr[-2000:]}")
    data = build_dataset("sen12flood", folder / "pairs", "test")
    assert isinstance(data, PairDataset)
    return data


def pair_model(name: str, size: int, device: torch.device) -> tuple[Any, Any, Any]:
    """Task, model and transform of pairs."""
    import torch

    from sarwmix.data.registry import get_spec
    from sarwmix.models.settings import ModelSettings
    from sarwmix.tasks.base import build_task
    from sarwmix.transforms import SarTransform

    torch.manual_seed(0)
    spec = get_spec("sen12flood")
    statistics_ = spec.statistics[spec.default_statistics]
    task = build_task("pair", spec.classes, {})
    model = task.build_model(ModelSettings(name, size, 2)).to(device)
    return task, model, SarTransform(size=size, mean=statistics_.mean, std=statistics_.std)


def pair_evaluation(name: str, data: PairDataset, *, batch: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of an evaluation that encodes each image once, and of one that encodes both images of every pair."""
    import numpy as np
    import torch

    from engine_finetune import evaluate
    from sarwmix.data.loader import build_loader
    from util.precision import precision

    task, model, transform = pair_model(name, data.size, device)
    torch.nn.init.normal_(model.head.weight)  # zero at first: all scores would be equal

    def run(shared: bool) -> tuple[float, Any]:
        loader = build_loader(
            data, batch_size=batch, shuffle=False, drop_last=False, device=device, each_image_once=shared
        )
        began = time.perf_counter()
        found = evaluate(
            model,
            loader,
            task=task,
            transform=transform,
            device=device,
            split="test",
            names=data.names,
            all_gather=lambda value: [value],
            all_gather_arrays=lambda value: [value],
            amp_dtype=precision("auto", device)[0],
        )
        return time.perf_counter() - began, found.outputs["scores"]

    run(True), run(False)
    ratios, times = [], []
    for _ in range(rounds):
        (shared, ours), (plain, theirs) = run(True), run(False)
        if not np.allclose(ours, theirs, atol=1e-4 if device.type == "cpu" else 1e-2):
            raise UserError("the two evaluations give different scores: the comparison would be void")
        ratios.append(plain / shared)
        times.append((shared, plain))
    images = len(np.unique(data.rows))
    ratio = statistics.median(ratios)
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    what = f"{name}, evaluation of {len(data)} pairs of {images} images"
    print(f"{what}: {seconds[0]:.3g} s, pair by pair {seconds[1]:.3g} s, {ratio:.1f} times", flush=True)
    return {"name": what, "unit": "s", "ours": seconds[0], "textbook": seconds[1], "times": ratio, "rounds": rounds}


def part_evaluation(*, model: str, scratch: str | None, rounds: int) -> list[dict[str, Any]]:
    """Evaluation with shared features against pair by pair, on the CPU."""
    import torch

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        pairs = make_pairs(Path(folder), sequences=3, frames=14, size=128)
        return [pair_evaluation(model, pairs, batch=16, device=torch.device("cpu"), rounds=rounds)]
