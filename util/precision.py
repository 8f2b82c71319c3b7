"""Mixed precision: which number type autocast uses, and whether gradients are scaled."""

from __future__ import annotations

import torch


def precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, torch.amp.GradScaler | None]:
    """Autocast type and gradient scaler for `--amp`.

    Args:
        amp: "auto" (bf16 on CUDA, full precision on the CPU), "bf16", "fp16" or "off".
        device: where the model lives.

    Returns:
        (autocast type or None for float32, scaler; only float16 needs one).
    """
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    if amp == "fp16":
        return torch.float16, torch.amp.GradScaler(device.type)
    return (torch.bfloat16 if amp == "bf16" else None), None
