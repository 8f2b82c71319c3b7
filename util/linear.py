"""Linear layers that use oneDNN's matrix product for float32 training on a CPU.

PyTorch sends float32 linear layers on x86 to MKL, after a pass that copies the bias into the output. oneDNN's product
(which PyTorch already uses for bfloat16 and for compiled models) adds the bias itself and is faster for the shapes of
these models; BENCHMARKS.md has figures. Two things stay with MKL: the gradient of the weight, and products of many rows
on processors without AVX-512.

Everything else (CUDA, autocast, torch.compile, torch.export, builds without oneDNN) goes through
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


def _rows(dy: Tensor) -> Tensor:
    """Gradient of the output as (rows, O); an expanded gradient has no rows in memory until here."""
    return dy.reshape(-1, dy.shape[-1]).contiguous()


def _input_gradient(dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """dx = dy W."""
    return _product(dy, weight.t(), None).view(shape)


def _layer_gradients(dy: Tensor, x: Tensor | None, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """dW = dy^T x, unless x is None, and db = sum of dy over rows."""
    return (None if x is None else dy.t() @ x.reshape(-1, x.shape[-1])), (dy.sum(0) if needs_bias else None)


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = _rows(grads[0])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = _input_gradient(dy, weight, x.shape) if needs_x else None
        return dx, *_layer_gradients(dy, x if needs_weight else None, needs_bias)


class _GeluOneDnnLinear(torch.autograd.Function):
    """y = gelu(h) W^T + b. Keeps h alone: gelu(h), the widest array of a block, is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _product(F.gelu(hidden), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        dy = _rows(grads[0])
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        of_layer = _layer_gradients(dy, F.gelu(hidden) if needs_weight else None, needs_bias)
        dhidden = None
        if needs_hidden:
            dhidden = _input_gradient(dy, weight, hidden.shape)
            torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)  # in place
        return dhidden, *of_layer


class _NormOneDnnLinear(torch.autograd.Function):
    """y = layer_norm(x) W^T + b. Keeps x and its moments; the normalised x is computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight)
        ctx.eps = eps
        return _product(normed, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight = ctx.saved_tensors
        dy = _rows(grads[0])
        needs_x, needs_scale, needs_shift, _, needs_weight, needs_bias = ctx.needs_input_grad
        normed = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0] if needs_weight else None
        of_layer = _layer_gradients(dy, normed, needs_bias)
        dx = dscale = dshift = None
        if needs_x or needs_scale or needs_shift:
            dnormed = _input_gradient(dy, weight, x.shape)
            dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
                dnormed, x, scale.shape, mean, rstd, scale, shift, [needs_x, needs_scale, needs_shift]
            )
        return dx, dscale, dshift, None, *of_layer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the fastest way: (..., I), (O, I), (O,) -> (..., O)."""
    return _OneDnnLinear.apply(x, weight, bias) if _fits(x, weight) else F.linear(x, weight, bias)


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of gelu(hidden), with less memory for the backward pass where `linear` goes to oneDNN."""
    if _fits(hidden, weight):
        return _GeluOneDnnLinear.apply(hidden, weight, bias)
    return F.linear(F.gelu(hidden), weight, bias)


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """layer(norm(x)), with less memory for the backward pass where `linear` goes to oneDNN."""
    if _fits(x, layer.weight) and norm.elementwise_affine:
        return _NormOneDnnLinear.apply(x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)
    return F.linear(norm(x), layer.weight, layer.bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        _WANTED
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_available()
    )


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters and names, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
