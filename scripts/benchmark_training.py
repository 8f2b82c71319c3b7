"""Parts `evaluation` and `gpu` of scripts/benchmark.py: the real loops of this project, with their data."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.errors import UserError
from util.log import Progress

if TYPE_CHECKING:
    import torch

    from sarwmix.data.base import SarDataset
    from sarwmix.datasets.sen12flood import PairDataset

ROOT = Path(__file__).resolve().parent.parent
PEAK_TFLOPS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}  # bf16 dense; others: no utilisation is printed
WARM_UP, TIMED = 15, 40  # steps; the first compile, and fill the caches of the allocator


def silent(steps: int) -> Progress:
    return Progress(steps, title="", enabled=False)


def pretraining_rate(
    name: str, data: SarDataset, *, batch: int, device: torch.device, cache: str, compiled: bool, folder: Path
) -> dict[str, float]:
    """Pretrain by the project's own loop.

    Args:
        name: of the model.
        data: patches, enough for `TIMED` steps.
        batch: samples of a step.
        device: where to train.
        cache: see `sarwmix.data.loader.build_loader`.
        compiled: whether blocks are compiled.
        folder: for what a run writes.

    Returns:
        ``images_per_s``, ``data_wait`` (share of the time), ``train_loss``, ``gflop`` (of an image, both ways).
    """
    import torch

    from engine_pretrain import train_one_epoch
    from models_mixmim import MixMIM, model_config
    from sarwmix.data.loader import build_loader
    from sarwmix.transforms import SarTransform
    from sarwmix.weighting import WeightOptions
    from util.distributed import Processes
    from util.flops import count_flops
    from util.optim import build_adamw, parameter_groups
    from util.precision import precision
    from util.training import Trainer

    torch.manual_seed(0)
    model = MixMIM(**model_config(name), norm_pix_loss=True)
    forward = count_flops(model, partial(model, torch.zeros(2, 2, 128, 128)), samples=2)[0]
    model.to(device)
    if compiled:
        model.compile_blocks()
    loader = build_loader(
        data,
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        pin_memory=device.type == "cuda",
        device=device,
        cache=cache,
    )
    trainer = Trainer(
        model,
        build_adamw(parameter_groups(model, weight_decay=0.05), lr=1e-5, betas=(0.9, 0.95)),
        processes=Processes(device=device),
        output_dir=folder,
        lr_at=lambda epoch: 1e-5,
        amp_dtype=precision("auto", device)[0],
    )
    transform = SarTransform(
        size=128,
        mean=data.statistics.mean,
        std=data.statistics.std,
        weighting=WeightOptions(),
        all_finite=data.all_finite,
    )
    stats = {}
    for epoch, steps in enumerate((WARM_UP, TIMED)):
        loader.set_epoch(epoch)
        stats = train_one_epoch(
            trainer, iter(loader), transform=transform, seed=0, epoch=epoch, steps=steps, progress=silent(steps)
        ).stats
    loader.close()
    return {
        **{name: stats[name] for name in ("images_per_s", "data_wait", "train_loss")},
        "gflop": 3 * forward / 1e9,  # backward is twice the forward
    }


def part_gpu(patches: int, *, batches: list[int], model: str, scratch: str | None) -> list[dict[str, Any]]:
    """Images/s, model FLOP utilisation and data stalls of pretraining, eager and compiled, from GPU memory and from a
    packed store; pairs/s of SEN12-FLOOD."""
    import torch

    from sarwmix.data.packed import pack
    from sarwmix.data.registry import build_dataset
    from sarwmix.synthetic.benv2 import generate

    if not torch.cuda.is_available():
        print("gpu: no CUDA device here; this part is ready to run where there is one")
        return []
    device = torch.device("cuda")
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name()), None)
    results = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder) / "demo"
        generate(root, patches=max(patches, max(batches) * TIMED), seed=0, jobs=8)
        pack(
            [build_dataset("demo", root, split) for split in ("train", "val", "test")], Path(folder) / "packed", jobs=8
        )
        data = build_dataset("demo", Path(folder) / "packed", "train+val+test")
        for batch in batches:
            for compiled in (False, True):
                for cache in ("device", "none"):
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    found = pretraining_rate(
                        model, data, batch=batch, device=device, cache=cache, compiled=compiled, folder=Path(folder)
                    )
                    used = found["gflop"] * found["images_per_s"] / 1e3
                    gib = torch.cuda.max_memory_allocated() / 2**30
                    name = f"{model}, batch {batch}, bf16, {'compiled' if compiled else 'eager'}, cache {cache}"
                    share = f", {100 * used / peak:.1f} % of {peak:.0f} TFLOP/s" if peak else ""
                    print(
                        f"{name}: {found['images_per_s']:,.0f} images/s{share}, {100 * found['data_wait']:.1f} % of "
                        f"the time waiting for data, {gib:.1f} GiB, loss {found['train_loss']:.4f}",
                        flush=True,
                    )
                    results.append({"name": name, "unit": "images/s", "tflops": used, "gib": gib, **found})
        pairs = make_pairs(Path(folder), sequences=4, frames=14, size=512)
        for compiled in (False, True):
            rate = pair_rate(model, pairs, batch=8, device=device, compiled=compiled, folder=Path(folder))
            name = f"{model}, SEN12 pairs of 512 px, batch 8, bf16, {'compiled' if compiled else 'eager'}"
            print(f"{name}: {rate['pairs_per_s']:,.0f} pairs/s, loss {rate['train_loss']:.4f}", flush=True)
            results.append({"name": name, "unit": "pairs/s", **rate})
        results.append(pair_evaluation(model, pairs, batch=16, device=device, rounds=3))
    return results


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


def pair_rate(
    name: str, data: PairDataset, *, batch: int, device: torch.device, compiled: bool, folder: Path
) -> dict[str, float]:
    """``pairs_per_s`` and ``train_loss`` of fine-tuning on pairs that lie on the device."""
    import numpy as np

    from engine_finetune import Augmentation, train_one_epoch
    from util.distributed import Processes
    from util.optim import build_adamw, parameter_groups
    from util.precision import precision
    from util.training import Trainer

    task, model, transform = pair_model(name, data.size, device)
    if compiled:
        model.compile_blocks()
    found = data.get_batch(np.arange(batch) % len(data))
    one = found | {key: found[key].to(device) for key in ("image1", "image2", "label")}
    trainer = Trainer(
        model,
        build_adamw(parameter_groups(model, weight_decay=0.05), lr=1e-5),
        processes=Processes(device=device),
        output_dir=folder,
        lr_at=lambda epoch: 1e-5,
        amp_dtype=precision("auto", device)[0],
    )
    stats = {}
    for epoch, steps in enumerate((WARM_UP, TIMED)):
        stats = train_one_epoch(
            trainer,
            [one] * steps,
            task=task,
            transform=transform,
            augmentation=Augmentation(),
            seed=0,
            epoch=epoch,
            steps=steps,
            progress=silent(steps),
        ).stats
    return {"pairs_per_s": stats["images_per_s"], "train_loss": stats["train_loss"]}


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
        loader = build_loader(data, batch_size=batch, shuffle=False, drop_last=False, device=device)
        began = time.perf_counter()
        found = evaluate(
            model,
            loader if shared else iter(loader),  # without its data set every pair stands alone
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
