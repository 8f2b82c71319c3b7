"""Run by the fault tests in processes of their own: main_pretrain with a microscopic model and a fault put in.

    python fault_program.py '{"kind": "kill", "rank": 1, "batch": 5}' --dataset demo ...

``slow`` (seconds) makes every batch late, so that a signal finds the run in mid-epoch; ``scan`` (seconds) makes opening
the data take that long.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A few thousand parameters: a step takes milliseconds, and everything around it is the real thing.
MICRO = {
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": (8, 8, 8, 4),
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def use_micro_model() -> None:
    import models_mixmim

    models_mixmim.MODELS["mixmim_tiny"] = dict(MICRO)


def own_rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("RANK") or 0)


def strike(kind: str) -> None:
    if kind == "exit":
        os._exit(9)
    elif kind == "sys.exit":
        sys.exit(0)
    elif kind == "exception":
        raise RuntimeError("the fault of this test")
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind in ("SIGTERM", "SIGUSR1"):
        os.kill(os.getpid(), getattr(signal, kind))
    else:
        raise ValueError(kind)


def inject(fault: dict[str, Any]) -> None:
    """Make this process strike when it reads batch number ``batch``; ``nan``: its loss is NaN in that step."""
    import torch

    from models_mixmim import MixMIM
    from sarwmix.data.base import SarDataset

    kind, mine = fault.get("kind"), own_rank() == fault.get("rank", 0)
    count = 0
    original = SarDataset.get_batch

    def get_batch(self: SarDataset, *args: Any, **options: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        time.sleep(fault.get("slow", 0.0))
        if mine and kind not in (None, "nan") and count == fault["batch"]:
            strike(kind)
        return original(self, *args, **options)

    SarDataset.get_batch = get_batch  # type: ignore[method-assign]
    if kind == "nan" and mine:
        forward = MixMIM.forward

        def poisoned(self: MixMIM, images: torch.Tensor, *args: Any, **options: Any) -> Any:
            return forward(self, images * float("nan") if count == fault["batch"] else images, *args, **options)

        MixMIM.forward = poisoned  # type: ignore[method-assign, assignment]


def slow_scan(seconds: float) -> None:
    """Opening the data takes that long, as the scan of a large folder does."""
    import main_pretrain

    original = main_pretrain.open_data

    def open_data(args: argparse.Namespace) -> Any:
        print("scanning", flush=True)
        time.sleep(seconds)
        return original(args)

    main_pretrain.open_data = open_data


if __name__ == "__main__":
    use_micro_model()
    chosen = json.loads(sys.argv[1])
    inject(chosen)
    if "scan" in chosen:
        slow_scan(chosen["scan"])
    sys.argv = ["main_pretrain.py", *sys.argv[2:]]
    import main_pretrain
    from util.cli import run_cli

    run_cli(main_pretrain.main, resumable=True)
