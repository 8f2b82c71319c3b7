"""Floating-point operations of a forward pass, counted with PyTorch's counter (2 for a multiply-add)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from util.linear import plain_products


def count_flops(model: nn.Module, run: Callable[[], Any], *, samples: int = 1) -> tuple[float, str]:
    """Count the forward pass of a sample.

    Only matrix products, convolutions and attention are counted, as everywhere in the field.

    Args:
        model: its modules head the rows of the table; equal blocks of a stage share a row.
        run: calls the model.
        samples: how many samples that call works on.

    Returns:
        (operations of a sample, table of modules with their share as text).
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain_products(), counter:
            run()
    finally:
        model.train(training)
    total = counter.get_total_flops() / samples
    rows = {name: flops / samples for name, flops in _parts(counter.get_flop_counts(), type(model).__name__).items()}
    rows["(rest)"] = total - sum(rows.values())
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {f / 1e9:9.4f} GFLOP  {100 * f / total:5.1f} %" for name, f in rows.items() if f]
    return total, "\n".join(lines)


def _parts(counts: Mapping[str, Mapping[Any, int]], root: str) -> dict[str, int]:
    """Operations of the modules that the root calls itself, numbers at their end left out."""
    names = sorted((name for name in counts if name.startswith(f"{root}.")), key=lambda name: name.count("."))
    called: list[str] = []
    parts: dict[str, int] = {}
    for name in names:
        if any(name.startswith(f"{outer}.") for outer in called):
            continue
        called.append(name)
        part = re.sub(r"\.\d+$", "", name.removeprefix(f"{root}."))
        parts[part] = parts.get(part, 0) + sum(counts[name].values())
    return dict(sorted(parts.items()))
