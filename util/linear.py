"""Linear layers that use oneDNN's matrix product for float32 training on a CPU.

PyTorch sends float32 linear layers on x86 to MKL, after a pass that copies the bias into the output. oneDNN's product
(which PyTorch already uses for bfloat16 and for compiled models) adds the bias itself and is faster for the shapes of
these models; BENCHMARKS.md has figures. Two things stay with MKL: the gradient of the weight, and products of many rows
on processors without AVX-512.

Everything else (CUDA, autocast, torch.compile, torch.export, torch.func, builds without oneDNN) goes through
`torch.nn.functional.linear`. The results agree to float rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WANTED = True
# Rows up to which oneDNN is quicker than MKL where the processor has no AVX-512 (which MKL leaves unused on AMD's).
_FEW_ROWS = 256


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def onednn_available() -> bool:
    """Whether this build of PyTorch has oneDNN's linear operator (it is not part of PyTorch's public interface)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Inside, everything goes through `torch.nn.functional.linear`: to compare, and to count operations."""
    global _WANTED
    before, _WANTED = _WANTED, False
    try:
        yield
    finally:
        _WANTED = before


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., I) x (O, I) -> (..., O), plus bias (O,); outside of autograd."""
    if not _has_avx512() and x.numel() > _FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (rows, O)
        dx = dweight = None
        if needs_x:
            # Under grad mode the gradient will itself be differentiated: by an operator whose gradient PyTorch knows.
            dx = dy @ weight if torch.is_grad_enabled() else _product(dy.contiguous(), weight.t(), None)
            dx = dx.view(x.shape)
        if needs_weight:
            dweight = dy.t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight, dy.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the fastest way: (..., I), (O, I), (O,) -> (..., O)."""
    return _OneDnnLinear.apply(x, weight, bias) if _fits(x, weight) else F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        _WANTED
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and onednn_available()
    )


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters and names, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
