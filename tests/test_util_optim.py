"""Parameter groups against the recorded recipe, AdamW, gradient norm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from util.errors import UserError
from util.optim import SGD, AdamW, build_adamw, gradient_norm, layer_id, parameter_groups, stage_depths

RECORDED = json.loads((Path(__file__).parent / "parity" / "layer_decay_base_0.7.json").read_text())


class _Named(nn.Module):
    """Holds parameters under arbitrary dotted names, with shapes that follow from the kind of parameter."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            *folders, leaf = name.split(".")
            module = self
            for folder in folders:
                if folder not in module._modules:
                    module.add_module(folder, nn.Module())
                module = module._modules[folder]
            one_dimensional = leaf == "bias" or "norm" in folders[-1:][0]
            module.register_parameter(leaf, nn.Parameter(torch.zeros(2 if one_dimensional else (2, 2))))


@pytest.fixture(scope="module")
def base():
    return _Named(RECORDED)


def _per_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_recorded_base_recipe_exactly(base):
    found = _per_name(base, parameter_groups(base, weight_decay=0.05, layer_decay=0.7))
    assert set(found) == set(RECORDED)
    for name, expected in RECORDED.items():
        group = found[name]
        assert (group["layer_id"], group["lr_scale"], group["weight_decay"]) == (
            expected["layer_id"],
            expected["lr_scale"],
            expected["weight_decay"],
        ), name


def test_depths_are_read_from_names(base):
    assert stage_depths(name for name, _ in base.named_parameters()) == (2, 2, 18, 2)


def test_unknown_names_belong_to_the_top():
    assert layer_id("decode_head.conv.weight", (2, 2, 18, 2)) == 24
    assert layer_id("absolute_pos_embed", (2, 2, 18, 2)) == 24
    assert layer_id("encoder.layers.1.blocks.1.mlp.fc1.weight", (2, 2, 18, 2)) == 4


def test_without_layer_decay_there_are_two_groups(base):
    groups = parameter_groups(base, weight_decay=0.1)
    assert sorted((group["weight_decay"], group["lr_scale"]) for group in groups) == [(0.0, 1.0), (0.1, 1.0)]
    assert sum(len(group["params"]) for group in groups) == len(RECORDED)


def test_frozen_parameters_are_left_out(base):
    first = next(base.parameters())
    first.requires_grad_(False)
    try:
        groups = parameter_groups(base, weight_decay=0.1)
    finally:
        first.requires_grad_(True)
    assert sum(len(group["params"]) for group in groups) == len(RECORDED) - 1


@pytest.mark.parametrize("decay", [0.0, 1.1, -1.0])
def test_layer_decay_out_of_range(base, decay):
    with pytest.raises(UserError, match="layer_decay"):
        parameter_groups(base, weight_decay=0.1, layer_decay=decay)


def test_layer_decay_needs_blocks():
    with pytest.raises(UserError, match="layers"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.7)


def test_adamw_is_fused_and_equals_the_plain_one():
    torch.manual_seed(0)
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_adamw(parameter_groups(models[0], weight_decay=0.1), lr=0.01, betas=(0.9, 0.95))
    plain = torch.optim.AdamW(
        [{"params": [models[1].weight], "weight_decay": 0.1}, {"params": [models[1].bias], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    assert ours.defaults["fused"]
    x = torch.randn(5, 4)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    torch.testing.assert_close(models[0].bias, models[1].bias)


def test_adamw_starts_with_scaled_rates(base):
    optimizer = build_adamw(parameter_groups(base, weight_decay=0.0, layer_decay=0.7), lr=2.0)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in optimizer.param_groups)


def test_gradient_norm():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    assert gradient_norm(parameters) == 0
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([4.0])
    assert gradient_norm(parameters) == 5
    parameters[1].grad = torch.tensor([float("nan")])
    assert gradient_norm(parameters).isnan()


def test_making_and_stepping_an_optimizer_spares_the_compiler():
    program = (
        "import sys, torch\n"
        "from util.optim import build_adamw, build_sgd, parameter_groups\n"
        "for build in (build_adamw, build_sgd):\n"
        "    model = torch.nn.Linear(2, 2)\n"
        "    optimizer = build(parameter_groups(model, weight_decay=0.1), lr=0.1)\n"
        "    model(torch.ones(1, 2)).sum().backward(); optimizer.step(); optimizer.zero_grad()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_our_optimizers_step_as_pytorchs_do():
    for ours, theirs in ((AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)):
        results = []
        for kind in (ours, theirs):
            torch.manual_seed(0)
            layer = torch.nn.Linear(3, 3)
            optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                layer(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
            results.append(layer.weight.detach().clone())
        assert torch.equal(*results)
