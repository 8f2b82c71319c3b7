"""Linear layers that use oneDNN's matrix product for float32 training on a CPU.

PyTorch sends float32 linear layers on x86 to MKL, after a pass that copies the bias into the output. oneDNN's product
(which PyTorch already uses for bfloat16 and for compiled models) adds the bias itself and is faster for the shapes of
these models; BENCHMARKS.md has figures. The gradient of the weight stays with MKL, which is as fast there.

Everything else (CUDA, autocast, torch.compile, torch.export, builds without oneDNN) goes through
`torch.nn.functional.linear`. The results agree to float rounding.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# SARW_ONEDNN_LINEAR=0 goes back to PyTorch's own choice, for comparisons.
_WANTED = os.environ.get("SARW_ONEDNN_LINEAR", "1") != "0"


def onednn_available() -> bool:
    """Whether this build of PyTorch has oneDNN's linear operator (it is not part of PyTorch's public interface)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., I) x (O, I) -> (..., O), plus bias (O,)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b; gradients: dx = dy W, dW = dy^T x, db = sum of dy over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0]).contiguous()  # (rows, O); an expanded gradient has no rows in memory
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = _product(dy, weight.t(), None).view(x.shape) if needs_x else None
        dweight = dy.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the fastest way: (..., I), (O, I), (O,) -> (..., O)."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if (
        plain
        and _WANTED
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_available()
    ):
        return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters and names, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
