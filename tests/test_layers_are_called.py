"""Layers are called, never taken apart: adapters learn, hooks fire, gradients have gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models_mixmim import MixMIM, MixMIMEncoder, encoder_config, model_config


class Adapter(nn.Module):
    """LoRA (arXiv 2106.09685): a frozen layer plus a product of two thin matrices."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / rank)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank) / rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.t() @ self.up.t()


def small() -> MixMIM:
    torch.manual_seed(0)
    return MixMIM(**model_config("mixmim_tiny"), norm_pix_loss=True)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_on_every_layer_get_gradients(compiled: bool) -> None:
    model = small()
    names = list(linear_layers(model))
    assert len(names) == 4 * 9 + 3 + 2  # 7 + 2 blocks, 3 mergings, into and out of the decoder
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapter(model.get_submodule(name)))
    if compiled:
        torch.compiler.reset()
        model.compile_blocks(backend="aot_eager")
    model(torch.randn(2, 2, 128, 128), mask=model.draw_mask()).loss.backward()
    for name in names:
        adapter: Any = model.get_submodule(name)
        assert adapter.layer.weight.grad is None
        for part in (adapter.down, adapter.up):
            assert part.grad is not None, name
            assert part.grad.abs().sum() > 0, name


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_of_every_layer_fire(compiled: bool) -> None:
    model = small()
    seen: list[str] = []
    layers = linear_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    if compiled:
        torch.compiler.reset()
        model.compile_blocks(backend="eager")
    model(torch.randn(2, 2, 128, 128), mask=model.draw_mask())
    assert sorted(seen) == sorted(layers)


def test_gradients_have_gradients() -> None:
    """A penalty on the gradient of the input, in float32 and by the textbook's operators in float64."""
    found = []
    images = torch.randn(2, 2, 128, 128)
    mask = small().draw_mask(generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        model = small().to(dtype)
        x = images.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(model(x, mask=mask).loss, x, create_graph=True)
        first.pow(2).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_gradients_of_single_samples() -> None:
    """torch.func: a gradient for each sample sums up to that of the batch."""
    torch.manual_seed(0)
    model = MixMIMEncoder(**encoder_config("mixmim_tiny")).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    images = torch.randn(3, 2, 128, 128, dtype=torch.float64)

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, image[None]).pow(2).sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    model(images).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(single[name].sum(0), parameter.grad, rtol=1e-6, atol=1e-9)
