"""Random numbers as a pure function of (seed, epoch, step, rank, stream).

Nothing a training step draws depends on what was drawn before it, so a run that resumes in the middle of an epoch draws
what the uninterrupted run would have drawn, bit for bit.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """63-bit seed from any numbers and words; nearby inputs give unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: str) -> torch.Generator:
    """CPU generator for one purpose (`stream`: "mask", "flip", "mixup", ...) of one training step of one process."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch, step, rank, stream))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Re-seed the global generators for one training step (drop path and whatever else draws from them)."""
    seed_everything(derive_seed(seed, epoch, step, rank, "global"))


def rng_state() -> dict[str, Any]:
    """State of the global generators, as tensors and plain values (loads with `weights_only=True`)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys, dtype=np.int64))  # torch has no complete uint32
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, words, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. CUDA states are restored as far as this machine has the devices."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)
