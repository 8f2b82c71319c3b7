"""util.linear: oneDNN's product against PyTorch's own, values and gradients, and when it steps aside."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from util import linear as module
from util.linear import Linear, linear, onednn_available

needs_onednn = pytest.mark.skipif(not onednn_available(), reason="this build of PyTorch has no oneDNN linear operator")


@pytest.fixture
def used(monkeypatch):
    """Counts the products that went to oneDNN."""
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (2, 3, 4, 24), (1, 24), (3, 100, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_equals_pytorch(shape, with_bias, avx512, used, monkeypatch):
    monkeypatch.setattr(module, "_has_avx512", lambda: avx512)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40) if with_bias else None
    results = []
    for function in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, *([bias] if with_bias else []))]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert len(used) == 2  # forward and the gradient of x


@needs_onednn
def test_second_gradients_and_transforms():
    """Differentiated twice, and under torch.func: as PyTorch's own layer."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape) for shape in ((2, 3, 4), (5, 4), (5,)))

    def energy(function, x, weight, bias):
        return function(x, weight, bias).pow(3).sum()

    seconds = []
    for function in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        first = torch.autograd.grad(energy(function, *leaves), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, one: energy(linear, one, w, bias)), (None, 0))(weight, x)
    expected = torch.autograd.functional.jacobian(lambda w: F.linear(x, w, bias).pow(3).sum((1, 2)), weight)
    torch.testing.assert_close(per_sample, expected, rtol=1e-5, atol=1e-3)


@needs_onednn
def test_strided_inputs_and_expanded_gradients(used):
    x = torch.randn(6, 4, 5).transpose(0, 1)[..., ::1].requires_grad_()
    weight = torch.randn(5, 7).t().requires_grad_()
    linear(x, weight).sum().backward()  # its gradient is one number expanded
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(4, 6, 5))
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(7, 5), rtol=1e-5, atol=1e-5)
    assert used


@needs_onednn
def test_only_the_gradients_asked_for(used):
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert len(used) == 1
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


def test_other_types_and_autocast_go_to_pytorch(used):
    x, layer = torch.randn(3, 4), Linear(4, 5)
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert linear(torch.empty(0, 4), layer.weight).shape == (0, 5)
    assert not used


def test_same_names_as_a_plain_layer():
    assert Linear(4, 5).state_dict().keys() == torch.nn.Linear(4, 5).state_dict().keys()


def test_without_onednn(monkeypatch, used):
    x, layer = torch.randn(3, 4), Linear(4, 5)
    monkeypatch.setattr(module, "_WANTED", False)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not used
