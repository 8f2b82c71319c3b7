"""The short GELU of compiled half-precision layers against float64 and against PyTorch's."""

import math

import pytest
import torch
from torch.nn import functional as F

from util import gelu as module
from util.gelu import _Gelu, gelu, normal_distribution


def test_distribution_and_density_against_float64():
    x = torch.linspace(-9, 9, 20001).double()
    exact = 0.5 * torch.erfc(-x / math.sqrt(2))
    below, density = normal_distribution(x.float())
    assert (below.double() - exact).abs().max() < 3e-7
    assert (density.double() - torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)).abs().max() < 1e-7


def test_known_values():
    """P(X <= 0) = 1/2, P(X <= 1) = .8413447, and the ends."""
    below, _ = normal_distribution(torch.tensor([0.0, 1.0, -1.0, 40.0, -40.0]))
    torch.testing.assert_close(below, torch.tensor([0.5, 0.8413447, 0.1586553, 1.0, 0.0]), atol=2e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_and_gradient_are_pytorchs_up_to_a_step_of_the_type(dtype):
    x = torch.linspace(-12, 12, 4001).to(dtype)
    dy = torch.randn(4001, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for function in (_Gelu.apply, F.gelu):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy)
        assert y.dtype == leaf.grad.dtype == dtype
        found.append((y.detach(), leaf.grad))
    step = torch.finfo(dtype).eps
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=step, atol=2e-6)
        plain = theirs.abs() > 1e-3  # nearer to 0 the errors of the sum, not of the type, decide the last digit
        assert (ours != theirs)[plain].float().mean() < 0.02  # a tie that rounds the other way


def test_compiled_layers_take_it_in_half_precision_only(monkeypatch):
    """The condition, without a card: compiled with a backend that keeps operators, on a stand-in for CUDA."""
    taken = []
    monkeypatch.setattr(module, "_Gelu", type("Spy", (), {"apply": staticmethod(lambda x: taken.append(x.dtype) or x)}))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    class OnCard(torch.Tensor):
        is_cuda = True

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gelu(torch.zeros(2, dtype=dtype).as_subclass(OnCard))
    assert taken == [torch.bfloat16, torch.float16]
    monkeypatch.undo()
    x = torch.randn(7, dtype=torch.bfloat16)
    assert torch.equal(gelu(x), F.gelu(x))


def test_it_compiles_without_a_break():
    compiled = torch.compile(lambda x: _Gelu.apply(x) * 2, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    (_Gelu.apply(other) * 2).sum().backward()
    assert torch.equal(x.grad, other.grad)
