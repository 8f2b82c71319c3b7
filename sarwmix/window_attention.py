"""Softmax attention inside windows with a learned bias: one definition, three ways to compute it.

All three take the packed projection and give the heads side by side, as a linear layer wants them::

    qkv (B, T, 3 C)   T tokens of a sample, runs of n of them are windows; last axis: q, k, v, each heads x width d
    bias (W, h, n, n) added to the scores; window i of a batch uses row i mod W, so W is 1 or the windows of a sample
    ->  (B, T, C)     softmax(q k^T / sqrt(d) + bias) v, window by window

``explicit``  two matrix products and a softmax: the definition. CPU, export, and whatever the others cannot take.
``sdpa``      `torch.nn.functional.scaled_dot_product_attention`, in the four dimensions and with the strides for which
              its fused CUDA kernels do not fall back to products in float32.
``kernel``    the Triton kernels below (CUDA with Triton). No scores in memory, no copies of q, k and v.

How the kernels work. A program holds a tile of 64 (or 32) consecutive tokens of one head, which are whole windows. The
scores of a tile are one 64 x 64 product of which only the squares on the diagonal count::

            keys 0 .. 63
    queries [ # . . . ]     n = 16: four windows; '#' is softmaxed row by row,
       0    [ . # . . ]     '.' belongs to another window and becomes -inf
       ..   [ . . # . ]
       63   [ . . . # ]     n = 64: the whole tile

Windows of 8, 16, 32 and 64 tokens therefore share one kernel, and a ragged end is a tile with fewer rows. On a card the
kernels take bfloat16 and float16; a tile of float32 products does not fit into registers, so that ``--amp off`` uses
``sdpa``. The backward
kernel computes the probabilities P again (Dao et al., arXiv 2205.14135, does so for long rows)::

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = dS K / sqrt(d)      dK = dS^T Q / sqrt(d)

and dbias is the sum of dS over all windows with the same row of the bias. Each program walks through every P-th tile of
one head and one pattern of rows, sums dS in registers and writes the sum once; the programs' sums are added by one
`sum`. There are no atomics: the order of additions is fixed, so that a repeated or resumed step is equal bit by bit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.cuda_graph import is_recording

try:  # comes with the CUDA builds of PyTorch for Linux
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - depends on the build
    triton = None

WINDOWS = (8, 16, 32, 64)  # tokens of a window that the kernels take
HEAD_WIDTHS = (16, 32, 64)


class Launch(NamedTuple):
    """How the kernels run for one length of a window.

    Attributes:
        tile: tokens of a program, whole windows.
        forward, backward: warps of a program.
        programs: of the backward pass at least, where a bias has a gradient; fixed, since it orders the sums.

    Chosen by timing on an H200 (`scripts/gpu_check.py --only candidates`): few warps, so that many tiles are under way.
    """

    tile: int
    forward: int
    backward: int
    programs: int = 528  # 4 for each multiprocessor of an H100


LAUNCH = {8: Launch(32, 2, 2), 16: Launch(32, 2, 2), 32: Launch(32, 2, 2), 64: Launch(64, 2, 4)}
_MOST_BATCH = 65535  # CUDA's limit in the grid dimension in which the fused kernels count batches
_FORMS = ("explicit", "sdpa", "kernel")

_INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # Triton on the CPU: slow, for tests

_forced: str | None = None


@contextlib.contextmanager
def attention_form(name: str | None) -> Iterator[None]:
    """Inside, `window_attention` uses one form wherever it can: for comparisons; None lets it choose again.

    Raises:
        ValueError: an unknown form.
    """
    global _forced
    if name is not None and name not in _FORMS:
        raise ValueError(f"attention form {name!r}: expected one of {', '.join(_FORMS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def kernel_takes(qkv: Tensor, bias: Tensor | None, num_heads: int, window: int) -> bool:
    """Whether the Triton kernels compute this case; elsewhere `window_attention` takes another form."""
    if triton is None or window not in WINDOWS or qkv.shape[-1] // (3 * num_heads) not in HEAD_WIDTHS:
        return False
    on_card = qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and _has_tensor_cores(qkv.device)
    if not (on_card or (_INTERPRETED and qkv.is_floating_point())):
        return False
    rows, inside = 1 if bias is None else bias.shape[0], LAUNCH[window].tile // window
    return rows % inside == 0 or inside % rows == 0  # tiles repeat after a whole number of windows


def _has_tensor_cores(device: torch.device) -> bool:
    """Ampere or later: bfloat16 products."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def window_attention(qkv: Tensor, bias: Tensor | None, num_heads: int, *, window: int) -> Tensor:
    """Attention within windows of consecutive tokens, by the fastest form that takes the case.

    Args:
        qkv: (B, T, 3 C), packed projections.
        bias: (W, h, n, n), added to the scores, or None; may need a gradient; W divides T / n.
        num_heads: h.
        window: n, tokens of a window; divides T.

    Returns:
        (B, T, C), contiguous.
    """
    form = _forced or _fastest(qkv)
    if form == "kernel" and not kernel_takes(qkv, bias, num_heads, window):
        form = "sdpa"
    if form == "sdpa" and (not qkv.is_cuda or qkv.shape[0] * qkv.shape[1] // window > _MOST_BATCH):
        form = "explicit"
    if form == "kernel":
        return torch.ops.sarwmix.window_attention(qkv.contiguous(), bias, num_heads, window)
    return (_sdpa if form == "sdpa" else explicit_window_attention)(qkv, bias, num_heads, window=window)


def _fastest(qkv: Tensor) -> str:
    """The kernels where launching them costs no time of the host (compiled or in a CUDA graph); called one by one from
    Python, as in eager mode, PyTorch's own operators have less to do before a launch."""
    if not qkv.is_cuda:
        return "explicit"
    return "kernel" if torch.compiler.is_compiling() or is_recording() else "sdpa"


def _split(qkv: Tensor, rows: int, num_heads: int, window: int) -> tuple[Tensor, ...]:
    """q, k and v as (groups, rows, h, n, d): `rows` windows with a bias each, over and over."""
    parts = qkv.reshape(-1, rows, window, 3, num_heads, qkv.shape[-1] // (3 * num_heads))
    return parts.permute(3, 0, 1, 4, 2, 5).unbind(0)


def explicit_window_attention(qkv: Tensor, bias: Tensor | None, num_heads: int, *, window: int) -> Tensor:
    """`window_attention` as it is defined; any device and type, differentiable any number of times."""
    q, k, v = _split(qkv, 1 if bias is None else bias.shape[0], num_heads, window)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if bias is not None:  # in place: neither the product nor the addition needs the scores for its backward pass
        scores = scores.add_(bias.to(scores.dtype))
    out = torch.matmul(scores.softmax(dim=-1), v)
    return out.transpose(2, 3).reshape(qkv.shape[0], qkv.shape[1], -1)


def _sdpa(qkv: Tensor, bias: Tensor | None, num_heads: int, *, window: int) -> Tensor:
    """`window_attention` by PyTorch's fused kernels: four dimensions, and a bias whose last stride is 1."""
    rows = 1 if bias is None else bias.shape[0]
    q, k, v = _split(qkv, rows, num_heads, window)
    if rows == 1:  # one bias for all windows: they join the batch, which is a view
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    else:  # a bias for each window: they join the heads
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))
    if bias is not None:
        # Expanded: the kernel reads it once, and its gradient is summed over the batch.
        bias = bias.to(q.dtype).contiguous().flatten(0, 1)[None].expand(q.shape[0], -1, -1, -1)
    if not torch.compiler.is_compiling() and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)  # made for long rows; the decoder's 16 tokens would go there
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = out.unflatten(1, (rows, num_heads)) if rows > 1 else out[:, None]
    return out.transpose(2, 3).reshape(qkv.shape[0], qkv.shape[1], -1)


class _GatherRows(torch.autograd.Function):
    """table[index]; its gradient is a product with a one-hot matrix, whose order of additions is fixed.

    The gradient of an ordinary gather adds with atomics on a GPU: repeats of a step would differ in the last bits.
    """

    @staticmethod
    def forward(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        with torch.autocast(grads[0].device.type, enabled=False):
            one_hot = (index == torch.arange(ctx.rows, device=index.device)[:, None]).to(grads[0].dtype)
            return one_hot @ grads[0], None


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table of learned biases: (M, K), (N,) -> (N, K), with a gradient that repeats bit by bit on a GPU."""
    return _GatherRows.apply(table, index) if table.is_cuda else table.index_select(0, index)


# ---------------------------------------------------------------------------------------------------------- kernels


if triton is not None:

    @triton.jit
    def _places(head, C: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
        """Elements from a tile's first token to its (token, column) pairs of a head, (TILE, D), 32 bits each.

        WIDTH is that of a token's row: 3 C in the projection, C in the output.
        """
        return tl.arange(0, TILE)[:, None] * WIDTH + head * D + tl.arange(0, D)[None, :]

    @triton.jit
    def _read(QKV, first, places, inside, C: tl.constexpr):
        """q, k, v (TILE, D) of a tile whose first token lies at `first`; rows beyond the last token are 0."""
        q = tl.load(QKV + first + places, mask=inside, other=0.0)
        k = tl.load(QKV + first + C + places, mask=inside, other=0.0)
        v = tl.load(QKV + first + 2 * C + places, mask=inside, other=0.0)
        return q, k, v

    @triton.jit
    def _bias_of(BIAS, tile, head, rows, heads, N: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr):
        """What is added to the scores of a tile, (TILE, TILE) float32: the bias, and -inf between windows."""
        i = tl.arange(0, TILE)[:, None]
        j = tl.arange(0, TILE)[None, :]
        same = (i // N) == (j // N)
        if HAS_BIAS:
            which = (tile * (TILE // N) + i // N) % rows
            found = tl.load(BIAS + ((which * heads + head) * N + i % N) * N + j % N, mask=same, other=0.0)
            return tl.where(same, found.to(tl.float32), float("-inf"))
        else:
            return tl.where(same, 0.0, float("-inf"))

    @triton.jit
    def _probabilities(q, k, added, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        """softmax(q k^T SCALE + added) in float32, rows of a tile. Every row has its own key, so none is empty."""
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE + added
        scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        return scores / tl.sum(scores, axis=1)[:, None]

    @triton.jit
    def _forward_kernel(
        QKV, BIAS, OUT, tokens, rows, heads,
        SCALE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        head, tile = tl.program_id(0), tl.program_id(1)
        inside = (tile * TILE + tl.arange(0, TILE) < tokens)[:, None]
        row = tl.full((), TILE, tl.int64) * tile
        q, k, v = _read(QKV, row * (3 * C), _places(head, C, D, TILE, 3 * C), inside, C)
        added = _bias_of(BIAS, tile, head, rows, heads, N, HAS_BIAS, TILE)
        p = _probabilities(q, k, added, SCALE, PRECISION)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        tl.store(OUT + row * C + _places(head, C, D, TILE, C), out.to(v.dtype), mask=inside)

    @triton.jit
    def _backward_kernel(
        QKV, BIAS, DOUT, DQKV, DBIAS, tokens, tiles, rows, heads, period, step,
        SCALE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr,
        SUM_BIAS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        head, pattern, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        # Tiles pattern, pattern + period, ... have the same rows of the bias: it is read once.
        added = _bias_of(BIAS, pattern, head, rows, heads, N, HAS_BIAS, TILE)
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        places, where = _places(head, C, D, TILE, 3 * C), _places(head, C, D, TILE, C)
        for tile in range(pattern + part * period, tiles, step * period):
            inside = (tile * TILE + tl.arange(0, TILE) < tokens)[:, None]
            row = tl.full((), TILE, tl.int64) * tile
            q, k, v = _read(QKV, row * (3 * C), places, inside, C)
            dout = tl.load(DOUT + row * C + where, mask=inside, other=0.0)
            gradients = DQKV + row * (3 * C)
            p = _probabilities(q, k, added, SCALE, PRECISION)
            dv = tl.dot(tl.trans(p.to(v.dtype)), dout, input_precision=PRECISION)
            tl.store(gradients + 2 * C + places, dv.to(v.dtype), mask=inside)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if SUM_BIAS:
                total += ds
            ds = (ds * SCALE).to(v.dtype)
            dq = tl.dot(ds, k, input_precision=PRECISION)
            tl.store(gradients + places, dq.to(v.dtype), mask=inside)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
            tl.store(gradients + C + places, dk.to(v.dtype), mask=inside)
        if SUM_BIAS:
            i = tl.arange(0, TILE)[:, None]
            j = tl.arange(0, TILE)[None, :]
            number = ((part * tl.num_programs(1) + pattern) * heads + head).to(tl.int64)
            tl.store(DBIAS + number * (TILE * TILE) + i * TILE + j, total)

    def _launch(kernel: Any) -> Any:
        """The kernel as torch.compile sees through it; Triton's interpreter knows nothing of that."""
        return kernel if _INTERPRETED else torch.library.wrap_triton(kernel)

    def _precision(qkv: Tensor) -> str:
        """Products of float32 stay float32: the tensor cores' default would keep 10 bits."""
        return "ieee" if qkv.dtype == torch.float32 else "tf32"

    @torch.library.triton_op("sarwmix::window_attention", mutates_args={})
    def _attend(qkv: Tensor, bias: Tensor | None, num_heads: int, window: int) -> Tensor:
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        out = torch.empty((batch, length, width), dtype=qkv.dtype, device=qkv.device)
        how = LAUNCH[window]
        tiles = triton.cdiv(batch * length, how.tile)
        _launch(_forward_kernel)[(num_heads, tiles)](
            qkv, qkv if bias is None else bias.contiguous(), out, batch * length,
            1 if bias is None else bias.shape[0], num_heads,
            SCALE=(width // num_heads) ** -0.5, N=window, D=width // num_heads, C=width, HAS_BIAS=bias is not None,
            PRECISION=_precision(qkv), TILE=how.tile, num_warps=how.forward,
        )  # fmt: skip
        return out

    @torch.library.triton_op("sarwmix::window_attention_backward", mutates_args={})
    def _attend_backward(
        qkv: Tensor, bias: Tensor | None, dout: Tensor, num_heads: int, window: int, sum_bias: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, width = qkv.shape[0] * qkv.shape[1], qkv.shape[2] // 3
        how = LAUNCH[window]
        rows, inside = 1 if bias is None else bias.shape[0], how.tile // window
        tiles, period = triton.cdiv(tokens, how.tile), max(1, rows // inside)
        # With a bias a program takes many tiles, to have few sums to write; without, one.
        parts = triton.cdiv(tiles, period)
        if sum_bias:
            parts = max(1, min(parts, triton.cdiv(how.programs, num_heads * period)))
        dqkv = torch.empty_like(qkv)
        sums = torch.empty(
            (parts, period, num_heads, how.tile, how.tile) if sum_bias else (0,), dtype=torch.float32, device=qkv.device
        )
        _launch(_backward_kernel)[(num_heads, period, parts)](
            qkv, qkv if bias is None else bias.contiguous(), dout, dqkv, sums, tokens, tiles, rows, num_heads, period,
            parts,
            SCALE=(width // num_heads) ** -0.5, N=window, D=width // num_heads, C=width, HAS_BIAS=bias is not None,
            SUM_BIAS=sum_bias, PRECISION=_precision(qkv), TILE=how.tile, num_warps=how.backward,
        )  # fmt: skip
        if not sum_bias:
            return dqkv, sums
        whole = sums.sum(dim=0)  # (period, h, TILE, TILE)
        squares = whole.unflatten(3, (inside, window)).unflatten(2, (inside, window))
        diagonal = torch.stack([squares[:, :, i, :, i] for i in range(inside)], dim=1)  # (period, inside, h, n, n)
        # Position p of the repeating pattern has row p of the bias, or p mod rows where tiles are longer.
        return dqkv, diagonal.reshape(-1, rows, num_heads, window, window).sum(dim=0)

    def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        qkv, bias, ctx.num_heads, ctx.window = inputs
        ctx.save_for_backward(qkv, bias)

    def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        wanted = bias is not None and ctx.needs_input_grad[1]
        dqkv, dbias = torch.ops.sarwmix.window_attention_backward(
            qkv, bias, dout.contiguous(), ctx.num_heads, ctx.window, wanted
        )
        return dqkv, dbias.to(bias.dtype) if wanted else None, None, None

    def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        qkv, bias, dout, ctx.num_heads, ctx.window, ctx.sum_bias = inputs
        ctx.save_for_backward(qkv, bias, dout)

    def _second_gradients(ctx: Any, ddqkv: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the gradients, by the explicit form: correct, and no faster than that."""
        with torch.enable_grad():
            saved: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
            qkv, bias, dout = saved
            sources = (qkv,) if not ctx.sum_bias else (qkv, bias)
            out = explicit_window_attention(qkv, bias, ctx.num_heads, window=ctx.window)
            first = torch.autograd.grad(out, sources, dout, create_graph=True)
            into = [t for t in (qkv, bias, dout) if t is not None]
            given = (ddqkv,) if not ctx.sum_bias else (ddqkv, ddbias)
            found = iter(torch.autograd.grad(first, into, given, allow_unused=True))
        grads = [None if t is None else next(found) for t in (qkv, bias, dout)]
        return (*grads, None, None, None)

    torch.library.register_autograd("sarwmix::window_attention", _gradients, setup_context=_remember)
    torch.library.register_autograd(
        "sarwmix::window_attention_backward", _second_gradients, setup_context=_remember_backward
    )
