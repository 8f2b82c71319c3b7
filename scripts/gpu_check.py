"""A quarter of an hour on a card: is it right, how fast is it, what is next? One command, nothing but torch and numpy.

    python scripts/gpu_check.py --out results.json                      # every section, about ten minutes on an H100
    python scripts/gpu_check.py --only step profile --budget 300
    python scripts/gpu_check.py --dry --out results.json                # the same sections on a CPU, with a tiny model

Every section runs guarded: what goes wrong is written down and the next one begins, in a fresh process where CUDA
itself has failed. Results are written after each section. Speeds are medians over steps timed by events on the device,
on random inputs, by the loop that trains (util.training.Trainer); they count only beside equal and finite losses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from util.args import Parser, positive_int
from util.cli import run_cli
from util.errors import UserError
from util.files import read_json, write_json

MEAN, STD = (-19.1966, -12.5144), (5.4501, 5.0019)  # of BigEarthNet v2, dB
POISONED = 86  # exit code of a process whose card no longer answers
FORMS = ("explicit", "sdpa", "kernel")
# Attention of mixmim_base at batch 256: window, rows of the bias, heads, tokens of a sample, width of a head
SHAPES = {
    "stage 1": (64, 1, 4, 1024, 32),
    "stage 2, masked": (64, 4, 8, 256, 32),
    "stage 3, sorted": (32, 2, 16, 64, 32),
    "stage 3, unmasked": (64, 1, 16, 64, 32),
    "stage 4, sorted": (8, 2, 32, 16, 32),
    "decoder": (16, 0, 16, 16, 32),
}


@dataclass
class Check:
    """What a section may use.

    Attributes:
        dry: whether this is a rehearsal on a CPU.
        model: the model of most sections.
        batch: images of a step.
        deadline: end of the budget, as `time.time` counts; `left` says how many seconds remain.
        results: of the sections so far.
    """

    dry: bool
    model: str
    batch: int
    deadline: float
    results: dict[str, Any]

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def synchronize(self) -> None:
        import torch

        if not self.dry:
            torch.cuda.synchronize()

    def gib(self) -> float:
        import torch

        return 0.0 if self.dry else torch.cuda.max_memory_allocated() / 2**30

    def fresh(self) -> None:
        """Forget compiled graphs and cached memory of the variant before."""
        import gc

        import torch

        gc.collect()
        torch.compiler.reset()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, work: Callable[[], Any], *, repeats: int = 20) -> float:
        """Median seconds of a piece of work, by events on a card."""
        import torch

        repeats = 2 if self.dry else repeats
        for _ in range(1 if self.dry else 5):
            work()
        self.synchronize()
        found: list[Any] = []
        for _ in range(repeats):
            if self.dry:
                began = time.perf_counter()
                work()
                found.append(time.perf_counter() - began)
            else:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                work()
                last.record()
                found.append((first, last))
        self.synchronize()
        return statistics.median(t if self.dry else t[0].elapsed_time(t[1]) / 1e3 for t in found)


SECTIONS: dict[str, Callable[[Check], Any]] = {}


def section(work: Callable[[Check], Any]) -> Callable[[Check], Any]:
    SECTIONS[work.__name__] = work
    return work


def relative(found: Any, exact: Any) -> float:
    """||found - exact|| / ||exact||; infinite where anything is not finite."""
    import torch

    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


# ------------------------------------------------------------------------------------------------------- the sections


@section
def environment(check: Check) -> Any:
    """What this is, and its two ceilings: bytes copied and bf16 products a second."""
    import numpy as np
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    size = 64 if check.dry else 8192
    a = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
    found["bf16_tflops"] = 2 * size**3 / check.seconds(lambda: a @ b) / 1e12
    source = torch.randn((1 if check.dry else 1024) * 2**20, device=check.device)
    target = torch.empty_like(source)
    found["copy_tb_s"] = 2 * 4 * source.numel() / check.seconds(lambda: target.copy_(source)) / 1e12
    if not check.dry:
        found["card"] = torch.cuda.get_device_name()
        found["gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _attention_case(check: Check, shape: tuple[int, ...], dtype: Any, batch: int) -> tuple[Any, Any, Any]:
    import torch

    window, rows, heads, tokens, width = shape
    qkv = torch.randn(batch, tokens, 3 * heads * width, device=check.device).to(dtype).requires_grad_()
    bias = torch.randn(rows, heads, window, window, device=check.device) if rows else None
    if bias is not None:
        if rows > 1 and window == 64:
            bias[..., : window // 2] -= 1e4  # tokens of another image
        bias.requires_grad_()
    dout = torch.randn(batch, tokens, heads * width, device=check.device).to(dtype)
    return qkv, bias, dout


def _attend(form: str, qkv: Any, bias: Any, dout: Any, shape: tuple[int, ...]) -> list[Any]:
    """Output and gradients."""
    import torch

    from sarwmix.window_attention import attention_form, window_attention

    sources = [qkv] if bias is None else [qkv, bias]
    with attention_form(form):
        out = window_attention(qkv, bias, shape[2], window=shape[0])
    return [out, *torch.autograd.grad(out, sources, dout)]


@section
def attention_errors(check: Check) -> Any:
    """Each form against the definition in float64, ragged batches, and whether repeats are equal bit by bit."""
    import torch

    from sarwmix.window_attention import explicit_window_attention

    found = {}
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = {**SHAPES, "16 with bias": (16, 1, 4, 16, 32), "8 x 128": (8, 16, 4, 128, 16)}
    for name, shape in cases.items():
        for kind, dtype in types.items():
            qkv, bias, dout = _attention_case(check, shape, dtype, 3)
            exact_qkv = qkv.detach().double().requires_grad_()
            exact_bias = None if bias is None else bias.detach().double().requires_grad_()
            exact = [explicit_window_attention(exact_qkv, exact_bias, shape[2], window=shape[0])]
            exact += torch.autograd.grad(
                exact[0], [exact_qkv] if bias is None else [exact_qkv, exact_bias], dout.double()
            )
            row: dict[str, Any] = {}
            for form in FORMS:
                try:
                    once, again = (_attend(form, qkv, bias, dout, shape) for _ in range(2))
                except RuntimeError as error:
                    row[form] = {"error": str(error)[:200]}
                    continue
                row[form] = {
                    **{
                        part: relative(*both)
                        for part, *both in zip(("out", "dqkv", "dbias"), once, exact, strict=False)
                    },
                    "repeats": all(torch.equal(a, b) for a, b in zip(once, again, strict=True)),
                }
            found[f"{name}, {kind}"] = row
    return found


@section
def parity(check: Check) -> Any:
    """The published implementation's numbers (tests/parity) in float32 on this device, and bf16 beside them."""
    import numpy as np
    import torch
    from conftest import PARITY, parity_weights

    from models_mixmim import MixMIM, model_config
    from sarwmix.window_attention import attention_form

    recorded = np.load(PARITY / "pretrain_base.npz")
    rng = np.random.default_rng(int(recorded["seed"]))
    x = torch.from_numpy(rng.standard_normal((2, 2, 128, 128)).astype(np.float32)).to(check.device)
    w = torch.from_numpy((1 + rng.random(x.shape) * 1.7).astype(np.float32)).to(check.device)
    mask = torch.from_numpy(recorded["mask"])
    found: dict[str, Any] = {}
    model = MixMIM(**model_config("mixmim_base"), norm_pix_loss=True)
    parity_weights(model, int(recorded["salt"]))
    model.to(check.device)
    with torch.no_grad():
        out = model(x, w, mask=mask, return_pred=True)
        cells = model.prepare_mask(mask)
        latent = model.encode(model.embed(x, cells), cells)
    found["float32 against the record"] = {
        "loss": abs(out.loss.item() / float(recorded["loss_norm"]) - 1),
        "latent": relative(latent[..., :8], torch.from_numpy(recorded["latent_head"])),
        "pred": relative(out.pred[..., :8], torch.from_numpy(recorded["pred_head"])),
    }

    def gradients(amp: Any) -> tuple[float, Any]:
        model.zero_grad()
        with torch.autocast(check.device.type, amp, enabled=amp is not None):
            loss = model(x, w, mask=mask).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, exact = gradients(None)
    for form in FORMS:
        with attention_form(form):
            low, grad = gradients(torch.bfloat16)
        found[f"bf16 {form} against float32"] = {"loss": abs(low / loss - 1), "gradient": relative(grad, exact)}
    return found


@section
def attention_speed(check: Check) -> Any:
    """Microseconds of forward and of both, each form at the six shapes of mixmim_base."""
    import torch

    from sarwmix.window_attention import attention_form, window_attention

    found = {}
    for name, shape in SHAPES.items():
        batch = 2 if check.dry else check.batch * (2 if name == "decoder" else 1)
        qkv, bias, dout = _attention_case(check, shape, torch.bfloat16, batch)
        row: dict[str, Any] = {}
        for form in FORMS:
            try:
                with torch.no_grad(), attention_form(form):
                    row[f"{form} forward"] = 1e6 * check.seconds(
                        lambda: window_attention(qkv, bias, shape[2], window=shape[0])  # noqa: B023
                    )
                row[f"{form} both"] = 1e6 * check.seconds(lambda: _attend(form, qkv, bias, dout, shape))  # noqa: B023
            except RuntimeError as error:
                row[form] = str(error)[:200]
        found[name] = row
    return found


class Steps:
    """Pretraining or fine-tuning by the project's loop on one batch that lies on the device.

    Args:
        check: see `Check`.
        name: of the model.
        batch: images, or pairs of images, of a step.
        kind: "pretrain", "patches" (fine-tuning on 19 labels) or "pairs" (flood or no flood).
        size: side of an image that the model sees, px.
        compiled: whether blocks are compiled.
        graph: whether forward and backward pass run as a CUDA graph.
        amp: "bf16" or "off".
        lr: learning rate, constant.
        checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self, check: Check, *, name: str = "", batch: int = 0, kind: str = "pretrain", size: int = 128,
        compiled: bool, graph: bool = False, amp: str = "bf16", lr: float = 1e-5, checkpointing: bool = False,
    ) -> None:  # fmt: skip
        import torch

        from models_mixmim import MixMIM, model_config
        from sarwmix.models.settings import ModelSettings
        from sarwmix.tasks.base import build_task
        from sarwmix.transforms import SarTransform
        from sarwmix.weighting import WeightOptions
        from util.distributed import Processes
        from util.optim import build_adamw, parameter_groups
        from util.precision import precision
        from util.training import Trainer, arrange

        check.fresh()
        torch.manual_seed(0)
        self.check, self.batch, self.kind, self.size = check, batch or check.batch, kind, size
        name = name or check.model
        self.task: Any = None
        if kind == "pretrain":
            self.model: Any = MixMIM(**model_config(name), norm_pix_loss=True)
        else:
            classes = [f"class {number}" for number in range(19 if kind == "patches" else 2)]
            self.task = build_task("multilabel" if kind == "patches" else "pair", classes)
            self.model = self.task.build_model(ModelSettings(name, size, 2, drop_path_rate=0.1))
            torch.nn.init.normal_(self.model.head.weight, std=0.01)
        self.model.to(check.device)
        self.model.activation_checkpointing = checkpointing
        if compiled:
            self.model.compile_blocks()
        self.folder = tempfile.TemporaryDirectory()
        self.optimizer = build_adamw(parameter_groups(self.model, weight_decay=0.05), lr=lr, betas=(0.9, 0.95))
        processes = Processes(device=check.device)
        trained, graphs = arrange(self.model, processes, cuda_graph=graph)
        self.trainer = Trainer(
            trained,
            self.optimizer,
            processes=processes,
            output_dir=self.folder.name,
            lr_at=lambda epoch: lr,
            amp_dtype=precision(amp, check.device)[0],
            graphs=graphs,
        )
        weighting = WeightOptions() if kind == "pretrain" else None
        self.transform = SarTransform(size=size, mean=MEAN, std=STD, weighting=weighting, all_finite=kind == "pretrain")
        self.epoch = 0

    def one(self) -> dict[str, Any]:
        """A random batch on the device."""
        import torch

        generator = torch.Generator().manual_seed(1)
        side = self.size if self.kind == "pairs" else 120
        image = torch.randn(self.batch, 2, side, side, generator=generator) * 5 - 15
        batch = {"name": [f"sample_{i}" for i in range(self.batch)], "replaced": []}
        if self.kind == "pairs":
            power = (10 ** (image / 10)).to(self.check.device)
            label = torch.randint(0, 2, (self.batch,), generator=generator)
            return {**batch, "image1": power, "image2": power.flip(0), "label": label.to(self.check.device)}
        label = torch.randint(0, 2, (self.batch, 19), generator=generator).float()
        return {**batch, "image": image.to(self.check.device), "label": label.to(self.check.device)}

    def run(self, batches: Any, steps: int) -> tuple[dict[str, float], list[float], list[float]]:
        """Train; statistics of the epoch, milliseconds of each step on the device, and of the host."""
        import torch

        from engine_finetune import Augmentation
        from engine_finetune import train_one_epoch as finetune_epoch
        from engine_pretrain import train_one_epoch as pretrain_epoch
        from util.log import Progress

        marks: list[Any] = []
        host: list[float] = []

        def mark(done: int) -> bool:
            host.append(time.perf_counter())
            if not self.check.dry:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append(event)
            return False

        train_one_epoch: Any = pretrain_epoch
        more: dict[str, Any] = {}
        if self.task is not None:
            train_one_epoch, more = finetune_epoch, {"task": self.task, "augmentation": Augmentation()}
        result = train_one_epoch(
            self.trainer, batches, transform=self.transform, seed=0, epoch=self.epoch, steps=steps,
            progress=Progress(steps, title="", enabled=False), on_step=mark, **more,
        )  # fmt: skip
        self.epoch += 1
        self.check.synchronize()
        between = [1e3 * (b - a) for a, b in zip(host, host[1:], strict=False)]
        on_device = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)] or between
        return result.stats, on_device, between

    def measure(self, steps: int = 40) -> dict[str, float]:
        """Images a second of a fixed batch."""
        began = time.perf_counter()
        steps = 3 if self.check.dry else steps
        batch = self.one()
        self.run([batch] * 2, 2)
        warm = time.perf_counter() - began
        stats, device, host = self.run([batch] * steps, steps)
        milliseconds = statistics.median(device)
        return {
            "images_per_s": 1e3 * self.batch / milliseconds,
            "ms": milliseconds,
            "host_ms": statistics.median(host),
            "gib": self.check.gib(),
            "loss": stats["train_loss"],
            "data_wait": stats["data_wait"],
            "warm_up_s": warm,
        }


Variant = tuple[str, bool, bool]  # form of attention, compiled, as a CUDA graph


def variant_name(form: str, compiled: bool, graph: bool) -> str:
    return f"{form}, {'compiled' if compiled else 'eager'}{', graph' if graph else ''}"


VARIANTS: dict[str, Variant] = {
    variant_name(*variant): variant
    for variant in (
        ("kernel", True, True),
        ("kernel", False, True),
        ("kernel", True, False),
        ("sdpa", False, False),
        ("explicit", False, False),
        ("kernel", False, False),
        ("sdpa", True, False),
        ("explicit", True, False),
    )
}


def _table(check: Check, names: list[str], reserve: float, steps: int = 40, **more: Any) -> dict[str, Any]:
    """Some variants of a step, each measured; those for which there is no time are named."""
    from sarwmix.window_attention import attention_form

    found: dict[str, Any] = {}
    for name in names:
        form, compiled, graph = VARIANTS[name]
        if check.dry and (compiled or graph or form == "sdpa"):
            continue
        if check.left < reserve and found:
            found[name] = {"skipped": "no time left"}
            continue
        try:
            with attention_form(form):
                found[name] = Steps(check, compiled=compiled, graph=graph, **more).measure(steps)
        except RuntimeError as error:
            found[name] = {"error": str(error)[:500]}
        print(f"  {name}: {shorten(found[name])}", flush=True)
    return found


@section
def step(check: Check) -> Any:
    """A pretraining step by each form of attention, compiled and eager, launched one by one and as a CUDA graph."""
    return _table(check, list(VARIANTS), reserve=120)


def best_form(check: Check) -> Variant:
    """The fastest variant of section `step`; the chosen default where it has not run."""
    rates = {n: r.get("images_per_s", 0.0) for n, r in (check.results.get("step") or {}).items() if isinstance(r, dict)}
    if not any(rates.values()):
        return ("explicit", False, False) if check.dry else ("kernel", True, True)
    return VARIANTS[max(rates, key=lambda n: rates[n])]


@contextlib.contextmanager
def best(check: Check, **more: Any) -> Iterator[Steps]:
    from sarwmix.window_attention import attention_form

    form, compiled, graph = best_form(check)
    with attention_form(form):
        yield Steps(check, compiled=compiled, graph=graph, **more)


KINDS = {
    "attention": r"_forward_kernel|_backward_kernel|fmha|flash|attention|softmax",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitK",
    "copies": r"memcpy|memset",
    "compiler's": r"triton_",
}


def _sums_of(recorded: Any, check: Check, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kind of work, and its largest kernels."""
    spent: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        time_us = event.self_cpu_time_total if check.dry else event.self_device_time_total
        if time_us > 0:
            spent[event.key] = (time_us / 1e3 / steps, event.count // steps)
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, (ms, _) in spent.items():
        sums[next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")] += ms
    largest = sorted(spent.items(), key=lambda item: -item[1][0])[:16]
    return {
        "ms": sum(ms for ms, _ in spent.values()),
        "launches": sum(count for _, count in spent.values()),
        "kinds_ms": sums,
        "largest": [{"kernel": name[:110], "ms": ms, "calls": count} for name, (ms, count) in largest],
    }


@section
def profile(check: Check) -> Any:
    """The largest kernels of a step, and what kinds of work they are."""
    import torch
    from torch.profiler import ProfilerActivity

    with best(check) as steps:
        batch = steps.one()
        steps.run([batch] * 4, 4)
        kinds = [ProfilerActivity.CPU] if check.dry else [ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as recorded:
            steps.run([batch] * 4, 4)
    return {"variant": best_form(check), **_sums_of(recorded, check, 4)}


@section
def repeats(check: Check) -> Any:
    """Five steps twice, and five steps with a pause after three: equal bit by bit?"""
    import copy

    import torch

    from sarwmix.window_attention import attention_form

    def weights(steps: Steps) -> dict[str, Any]:
        return {key: value.detach().cpu().clone() for key, value in steps.model.state_dict().items()}

    def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
        return [key for key in a if not torch.equal(a[key], b[key])]

    found: dict[str, Any] = {}
    runs = []
    for _ in range(2):
        with best(check, lr=1e-3) as steps:
            batch = steps.one()
            steps.run([batch] * 3, 3)
            kept = copy.deepcopy((steps.model.state_dict(), steps.optimizer.state_dict()))
            steps.run([batch] * 2, 2)
            runs.append(weights(steps))
    different = differing(*runs)
    found["repeat"] = {"equal": not different, "different": different[:12], "of": len(runs[0])}
    with best(check, lr=1e-3) as steps:
        steps.model.load_state_dict(kept[0])
        steps.optimizer.load_state_dict(kept[1])
        steps.epoch = 1
        steps.run([batch] * 2, 2)
        different = differing(runs[1], weights(steps))
    found["resume"] = {"equal": not different, "different": different[:12]}
    form, compiled, graph = best_form(check)
    if graph:  # the same kernels launched one by one
        with attention_form(form):
            steps = Steps(check, compiled=compiled, lr=1e-3)
            steps.run([batch] * 3, 3)
            steps.run([batch] * 2, 2)
            different = differing(runs[1], weights(steps))
        found["without the graph"] = {"equal": not different, "different": different[:12]}
    return found


@section
def loop(check: Check) -> Any:
    """The whole loop from a packed store and from the card's memory, against a fixed batch."""
    import numpy as np

    from sarwmix.data.base import SarDataset
    from sarwmix.data.loader import build_loader
    from sarwmix.data.packed import PackedDataset, pack
    from sarwmix.data.registry import get_spec

    spec = get_spec("demo")
    rows = 12 if check.dry else 10 * check.batch
    pixels = np.random.default_rng(0).normal(-15, 5, (rows, 2, 120, 120)).astype(np.float32)

    class Random(SarDataset):
        @property
        def shape(self) -> tuple[int, int, int]:
            return 2, 120, 120

        def read_into(self, index: int, out: np.ndarray) -> None:
            out[...] = pixels[index]

    found: dict[str, Any] = {}
    names = [f"S1A_IW_GRDH_1SDV_20200101T000000_33UUP_{i // 100:02d}_{i % 100:02d}" for i in range(rows)]
    statistics_ = spec.statistics[spec.default_statistics]
    with tempfile.TemporaryDirectory() as folder:
        pack([Random(spec, "train", statistics_, names, None, source=folder)], Path(folder) / "packed", jobs=1)
        data = PackedDataset(spec, Path(folder) / "packed", "train", statistics_)
        batch = 4 if check.dry else check.batch
        with best(check, batch=batch) as steps:
            found["fixed batch"] = {"images_per_s": steps.measure(20)["images_per_s"]}
            for cache in ("device", "none"):
                loader = build_loader(
                    data, batch_size=batch, shuffle=True, drop_last=True, pin_memory=not check.dry,
                    device=check.device, cache=cache,
                )  # fmt: skip
                rates, waits = [], []
                for epoch in range(4):
                    loader.set_epoch(epoch)
                    stats, device, _ = steps.run(iter(loader), len(loader))
                    rates += device[1:]
                    waits.append(stats["data_wait"])
                loader.close()
                found[f"cache {cache}"] = {
                    "images_per_s": 1e3 * batch / statistics.median(rates),
                    "mean_images_per_s": 1e3 * batch / statistics.mean(rates),
                    "data_wait": waits[1:],
                }
    return found


FINE_TUNING = [name for name in VARIANTS if name in ("kernel, compiled, graph", "kernel, eager, graph",
                                                     "kernel, compiled", "sdpa, eager", "explicit, eager")]  # fmt: skip


@section
def pairs(check: Check) -> Any:
    """Fine-tuning on SEN12-FLOOD pairs of 512 px, pairs a second."""
    size, batches = (128, (1,)) if check.dry else (512, (8, 16))
    return {f"batch {n}": _table(check, FINE_TUNING, 60, 20, kind="pairs", size=size, batch=n) for n in batches}


@section
def curves(check: Check) -> Any:
    """200 steps on the same images: do the losses of bf16 and of float32 agree?"""
    import torch

    from sarwmix.window_attention import attention_form

    count, batch = (3, 2) if check.dry else (200, check.batch)
    generator = torch.Generator().manual_seed(3)
    # Blocks of equal backscatter under speckle: something to learn, unlike noise.
    level = torch.randn(8 * batch, 2, 8, 8, generator=generator).repeat_interleave(15, 2).repeat_interleave(15, 3)
    pictures = (level * 4 - 15 + torch.randn(level.shape, generator=generator) * 2).to(check.device)
    fastest = best_form(check)
    found: dict[str, Any] = {}
    for name, (form, compiled, graph), amp in (
        ("float32", ("sdpa", False, False), "off"),
        ("bf16 sdpa", ("sdpa", False, False), "bf16"),
        ("bf16 " + variant_name(*fastest), fastest, "bf16"),
    ):
        if check.dry and found:
            continue
        with attention_form(form):
            steps = Steps(check, batch=batch, compiled=compiled, graph=graph, amp=amp, lr=5e-4)
            losses = []
            for first in range(0, count, 20):
                sets = [pictures[(8 * i // 8 % 8) * batch :][:batch] for i in range(first, first + 20)]
                batches = [{"image": images, "name": ["x"] * batch, "replaced": []} for images in sets]
                losses.append(steps.run(batches, min(20, count))[0]["train_loss"])
        found[name] = {"every_20_steps": losses, "last": losses[-1]}
    first_loss = found["float32"]["last"]
    found["differences"] = {name: row["last"] / first_loss - 1 for name, row in found.items()}
    return found


@section
def sizes(check: Check) -> Any:
    """Larger models and batches by the best variant; what recomputing blocks saves."""
    found: dict[str, Any] = {}
    wanted: list[tuple[str, str, int, bool]] = [
        ("large, batch 256", "mixmim_large", 256, False),
        ("huge, batch 256", "mixmim_huge", 256, False),
        ("base, batch 512", "mixmim_base", 512, False),
        ("base, batch 256, checkpointing", "mixmim_base", 256, True),
        ("huge, batch 256, checkpointing", "mixmim_huge", 256, True),
    ]
    if check.dry:
        wanted = [("tiny, checkpointing", check.model, 2, True)]
    for name, model, batch, checkpointing in wanted:
        if check.left < 60 and found:
            found[name] = {"skipped": "no time left"}
            continue
        try:
            with best(check, name=model, batch=batch, checkpointing=checkpointing) as steps:
                found[name] = steps.measure(20)
        except RuntimeError as error:
            found[name] = {"error": str(error)[:300]}
        print(f"  {name}: {found[name]}", flush=True)
    return found


@section
def finetuning(check: Check) -> Any:
    """Fine-tuning on patches of 128 px, images a second; does a graph of the whole step gain anything?"""
    batches = (2,) if check.dry else (64, 128)
    return {f"batch {n}": _table(check, FINE_TUNING, 60, 20, kind="patches", batch=n) for n in batches}


@section
def candidates(check: Check) -> Any:
    """Microseconds of the kernel by warps and programs: is the choice in sarwmix/window_attention.py the right one?

    Twenty launches as one CUDA graph: launched from Python they would measure the host.
    """
    import torch

    from sarwmix import window_attention as module

    found: dict[str, Any] = {}
    if check.dry or module.triton is None:
        return found

    def microseconds(work: Callable[[], Any]) -> float:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                work()
        return 1e6 / 20 * check.seconds(graph.replay, repeats=10)

    chosen = dict(module.LAUNCH)
    try:
        for name in ("stage 1", "stage 3, sorted", "stage 4, sorted", "decoder"):
            shape = SHAPES[name]
            window = shape[0]
            qkv, bias, dout = _attention_case(check, shape, torch.bfloat16, check.batch)
            qkv, bias = qkv.detach(), None if bias is None else bias.detach()
            for tile, warps in [(64, 2), (64, 4), (64, 8)] + [(32, n) for n in (1, 2, 4) if window <= 32]:
                module.LAUNCH[window] = module.Launch(tile, warps, 8)
                found[f"{name}, forward, tile {tile}, {warps} warps"] = microseconds(
                    lambda: torch.ops.sarwmix.window_attention(qkv, bias, shape[2], shape[0])  # noqa: B023
                )
            for tile, warps in [(64, 4), (64, 8)] + [(32, n) for n in (2, 4, 8) if window <= 32]:
                for programs in (528, 1056, 2112) if bias is not None else (1056,):
                    module.LAUNCH[window] = module.Launch(tile, 4, warps, programs)
                    found[f"{name}, backward, tile {tile}, {warps} warps, {programs} programs"] = microseconds(
                        lambda: torch.ops.sarwmix.window_attention_backward(
                            qkv,  # noqa: B023
                            bias,  # noqa: B023
                            dout,  # noqa: B023
                            shape[2],  # noqa: B023
                            shape[0],  # noqa: B023
                            bias is not None,  # noqa: B023
                        )
                    )
    finally:
        module.LAUNCH.update(chosen)
    return found


# ------------------------------------------------------------------------------------------------------------ running


def run_sections(args: argparse.Namespace, names: list[str], deadline: float) -> int:
    """Run sections in this process; the results file grows with each."""
    out = Path(args.out)
    results = read_json(out) if out.is_file() else {}
    check = Check(args.dry, args.model, args.batch, deadline, results)
    for name in names:
        if name in results:
            continue
        if check.left < 15:
            results[name] = {"skipped": f"{max(check.left, 0):.0f} s of the budget left"}
            write_json(out, results)
            continue
        results[name] = {"error": "the process ended in this section"}
        write_json(out, results)
        print(f"== {name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", flush=True)
        began = time.time()
        failed = ""
        try:
            results[name] = SECTIONS[name](check)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sections shall run
            failed = traceback.format_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
            print(failed[-2500:], flush=True)
        results.setdefault("seconds", {})[name] = round(time.time() - began, 1)
        write_json(out, results)
        print(json.dumps(shorten(results[name]))[:6000], flush=True)
        if "CUDA error" in failed or "illegal memory" in failed:
            return POISONED
    return 0


def shorten(value: Any) -> Any:
    """Numbers with four digits, for the console."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="gpu_check.json", help="results, written after every section")
    parser.add_argument("--budget", type=positive_int, default=540, metavar="SECONDS", help="sections shrink to fit")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU with a tiny model; speeds mean nothing")
    parser.add_argument("--model", help="of most sections (mixmim_base; mixmim_tiny with --dry)")
    parser.add_argument("--batch", type=positive_int, help="images of a step (256; 4 with --dry)")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of a child
    return parser


def main() -> int | None:
    args = get_parser().parse_args()
    args.model = args.model or ("mixmim_tiny" if args.dry else "mixmim_base")
    args.batch = args.batch or (4 if args.dry else 256)
    names = args.only or list(SECTIONS)
    if args.deadline is not None:
        raise SystemExit(run_sections(args, names, args.deadline))
    import torch

    if not args.dry and not torch.cuda.is_available():
        raise UserError("no CUDA device here; --dry rehearses the sections on a CPU")
    out, deadline = Path(args.out), time.time() + args.budget
    out.unlink(missing_ok=True)
    # A card that has failed stays failed for its process: the sections that are left run in another.
    command = [sys.executable, __file__, *sys.argv[1:], "--deadline", str(deadline)]
    for _ in range(len(names) + 1):
        if subprocess.run(command).returncode == 0:
            break
    results = read_json(out)
    results["command"] = "python scripts/gpu_check.py " + " ".join(sys.argv[1:])
    write_json(out, results)
    print(f"\nresults in {out}; seconds: {results.get('seconds')}")
    return None


if __name__ == "__main__":
    run_cli(main)
