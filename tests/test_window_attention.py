"""The three forms of window attention: the explicit one in float64 is the oracle.

Triton's CPU interpreter has to be chosen before Triton is imported, so its cases run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sarwmix.window_attention import attention_form, explicit_window_attention, kernel_takes, window_attention

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# window, rows of the bias (0: none), heads, width of a head, batch, tokens of a sample; the last batches are ragged
CASES = [
    (64, 1, 2, 32, 2, 128),
    (64, 4, 2, 32, 1, 256),
    (32, 2, 3, 32, 3, 64),
    (8, 2, 2, 32, 3, 16),
    (16, 1, 2, 16, 3, 16),
    (8, 1, 1, 16, 1, 24),
    (8, 16, 1, 16, 2, 128),
    (16, 0, 2, 32, 5, 16),
]

INTERPRETED = """
import torch
from sarwmix.window_attention import attention_form, explicit_window_attention, kernel_takes, window_attention
def run(call, qkv, bias, dout, window, heads):
    qkv = qkv.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    out = call(qkv, bias, heads, window=window)
    out.backward(dout)
    return [out.detach(), qkv.grad] + ([] if bias is None else [bias.grad])
torch.manual_seed(0)
for window, rows, heads, width, batch, tokens in CASES:
    for dtype, most in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        qkv = torch.randn(batch, tokens, 3 * heads * width).to(dtype)
        dout = torch.randn(batch, tokens, heads * width).to(dtype)
        bias = torch.randn(rows, heads, window, window) if rows else None
        if rows > 1:
            bias[0, :, :, : window // 2] = -1e4  # tokens of another image
        exact = run(explicit_window_attention, qkv.double(), None if bias is None else bias.double(), dout.double(),
                    window, heads)
        with attention_form("kernel"):
            assert kernel_takes(qkv, bias, heads, window)
            found = run(window_attention, qkv, bias, dout, window, heads)
            again = run(window_attention, qkv, bias, dout, window, heads)
        assert all(torch.equal(a, b) for a, b in zip(found, again)), "repeats differ"
        for name, one, right in zip(("out", "dqkv", "dbias"), found, exact):
            error = float((one.double() - right).norm() / right.norm())
            assert error <= most, (window, rows, dtype, name, error)
qkv = torch.randn(1, 16, 96, requires_grad=True)
bias = torch.randn(1, 2, 8, 8, requires_grad=True)
seconds = []
for form in ("explicit", "kernel"):
    with attention_form(form):
        out = window_attention(qkv, bias, 2, window=8)
        first = torch.autograd.grad(out.sin().sum(), (qkv, bias), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (qkv, bias)))
for one, other in zip(*seconds):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("fine")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sarwmix import window_attention as wa
assert not wa._INTERPRETED
def compiled(kernel, types, fixed, warps):
    names = {name: types.get(name, "constexpr" if name in fixed else "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=names, constexprs=fixed)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
import glob, os, re, subprocess, sys, tempfile
here = os.path.dirname(triton.__file__)
assemblers = glob.glob(here + "/backends/nvidia/bin/ptxas*") + glob.glob(here + "/../nvidia/**/ptxas", recursive=True)
def check(kernel, types, fixed, warps):
    ptx = compiled(kernel, types, fixed, warps)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in assemblers:  # one of them is as new as the compiler
            done = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull],
                                  capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            sys.exit("no assembler here is as new as the compiler: " + done.stderr)
    said = done.stderr
    registers = int(re.search(r"Used (\\d+) registers", said)[1])
    stores = int(re.search(r"(\\d+) bytes spill stores", said)[1])
    print(kernel.fn.__name__, fixed["N"], types["QKV"], fixed["HAS_BIAS"], warps, "warps", registers, "registers",
          stores, "bytes spilled")
    # Timed on an H200, four warps of which each thread spills some 130 bytes are 1.7 times as fast as eight that spill
    # nothing: more tiles are under way at once.
    assert stores <= (0 if kernel is wa._forward_kernel else 256), said
for kind in ("*bf16", "*fp16"):
    for window, has_bias in CHOSEN:
        tile = wa.LAUNCH[window].tile
        fixed = {"SCALE": 32**-0.5, "N": window, "D": 32, "C": 512, "HAS_BIAS": has_bias, "TILE": tile}
        fixed["PRECISION"] = "tf32"
        types = dict.fromkeys(("QKV", "OUT", "DOUT", "DQKV"), kind) | {"BIAS": "*fp32", "DBIAS": "*fp32"}
        check(wa._forward_kernel, types, fixed, wa.LAUNCH[window].forward)
        check(wa._backward_kernel, types, {**fixed, "SUM_BIAS": has_bias}, wa.LAUNCH[window].backward)
print("fine")
"""


def in_a_process(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("fine\n")
    return done.stdout


@needs_triton
def test_kernel_in_the_interpreter() -> None:
    """Forward, all gradients, second gradients, ragged batches, repeats; against float64."""
    in_a_process(f"CASES = {CASES}\n{INTERPRETED}", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("chosen", [[(64, True)], [(16, False)], pytest.param(
    [(32, True), (16, True), (8, True), (64, False), (32, False), (8, False)], marks=pytest.mark.slow)])  # fmt: skip
def test_kernel_stays_in_registers_on_hopper(chosen: list[tuple[int, bool]]) -> None:
    """Compiled for sm_90 without a GPU: what is spilled at the chosen number of warps is nothing, or little."""
    try:
        in_a_process(f"CHOSEN = {chosen}\n{COMPILED}", TRITON_INTERPRET="0")
    except AssertionError as error:
        if "no assembler here" not in str(error):
            raise
        pytest.skip("no ptxas for this version of Triton")


@pytest.mark.parametrize("case", CASES)
def test_form_of_the_fused_kernels(case: tuple[int, ...]) -> None:
    """Four dimensions instead of five: the same numbers and gradients."""
    from sarwmix import window_attention as module

    window, rows, heads, width, batch, tokens = case
    qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(rows, heads, window, window, dtype=torch.float64, requires_grad=True) if rows else None
    found = []
    for function in (explicit_window_attention, module._sdpa):
        out = function(qkv, bias, heads, window=window)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        sources = (qkv,) if bias is None else (qkv, bias)
        found.append((out, *torch.autograd.grad((out * weight).sum(), sources)))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)


def test_definition_by_hand() -> None:
    """Two windows of one token each attend to themselves; a bias of -1e4 hides a token."""
    qkv = torch.tensor([[[1.0, 5.0, 7.0], [2.0, 3.0, 11.0]]])  # q, k, v of two tokens, one head of width 1
    assert window_attention(qkv, None, 1, window=1).flatten().tolist() == [7.0, 11.0]
    hidden = torch.tensor([[[[0.0, -1e4], [0.0, 0.0]]]])
    first, second = window_attention(qkv, hidden, 1, window=2).flatten().tolist()
    assert first == 7.0
    share = 1 / (1 + torch.tensor(2.0 * 3.0 - 2.0 * 5.0).exp().item())  # of the first token: scores 10 and 6
    assert second == pytest.approx(share * 7 + (1 - share) * 11, rel=1e-6)


def test_where_the_kernel_steps_aside() -> None:
    qkv = torch.randn(1, 64, 96)
    assert not kernel_takes(qkv, None, 3, 64)  # on a CPU
    with pytest.raises(ValueError, match="expected one of explicit, sdpa, kernel"), attention_form("flash"):
        pass
    with attention_form("kernel"):  # falls back to the definition
        torch.testing.assert_close(
            window_attention(qkv, None, 1, window=64), explicit_window_attention(qkv, None, 1, window=64)
        )
