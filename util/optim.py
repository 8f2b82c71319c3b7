"""Parameter groups (weight decay, layer-wise learning-rate decay), AdamW, and the gradient norm."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.blocks\.(\d+)\.")
_DOWNSAMPLE = re.compile(r"(?:^|\.)layers\.(\d+)\.downsample\.")
_PATCH_EMBED = re.compile(r"(?:^|\.)patch_embed\.")


def stage_depths(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks per stage, read from parameter names `layers.<stage>.blocks.<block>.`; e.g. (2, 2, 18, 2)."""
    deepest: dict[int, int] = {}
    for name in names:
        if match := _BLOCK.search(name):
            stage, block = int(match[1]), int(match[2])
            deepest[stage] = max(deepest.get(stage, -1), block)
    return tuple(deepest[stage] + 1 for stage in sorted(deepest))


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Depth of a parameter for layer-wise decay.

    Patch embedding: 0. Block k of the whole encoder (from 0): k + 1. The downsampling of a stage: that of the stage's
    last block, plus 1 (so the next stage's first block shares it). Final norm, head and everything else: that of the
    last block.
    """
    if _PATCH_EMBED.search(name):
        return 0
    if match := _BLOCK.search(name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    if match := _DOWNSAMPLE.search(name):
        return sum(depths[: int(match[1]) + 1]) + 1
    return sum(depths)


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Weights decay; biases, norms and all other 1-D parameters do not. Relative-position bias tables (2-D) do."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into optimizer groups.

    Args:
        model: any module. For `layer_decay` it has `layer_ids()`, or encoder blocks named
            `layers.<stage>.blocks.<block>`. Weights named by its `no_weight_decay()`, if it has one, do not decay.
        weight_decay: decay of the weights that decay at all.
        layer_decay: factor per layer, in (0, 1]; scale = layer_decay ** (last layer - layer id), where the last
            layer is the number of blocks + 1 unless the model says otherwise. `None`: every scale is 1.

    Returns:
        Groups with keys `params`, `weight_decay`, `lr_scale`, `layer_id`, in order of first appearance.

    Raises:
        UserError: `layer_decay` out of range, or the model has no blocks to count.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    never_decayed: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise UserError(f"--layer_decay must lie in (0, 1], got {layer_decay}")
    ids, last = _layer_ids(model, [name for name, _ in named]) if layer_decay is not None else ({}, 0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        depth = ids.get(name, last)
        decays = has_weight_decay(name, parameter) and name not in never_decayed
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_decay ** (last - depth) if layer_decay is not None else 1.0,
                "layer_id": depth,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer_ids(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Layer id of each parameter, and the id at which the scale is 1."""
    own = getattr(model, "layer_ids", None)
    if own is not None:
        return own()
    depths = stage_depths(name for name, _ in model.named_parameters())
    if not depths:
        raise UserError(f"--layer_decay needs a model with layers.<stage>.blocks; {type(model).__name__} has none")
    return {name: layer_id(name, depths) for name in names}, sum(depths) + 1


# PyTorch marks methods of its optimizers as "not to be compiled" by importing the compiler, torch._dynamo, when they
# are first called: 1.5 s of every start and 150 MiB. Nothing here compiles an optimizer, so the plain methods serve.


def _spare_the_compiler(base: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The plain `step` of an optimizer class, under `no_grad`; its other methods lose their mark, too."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None:
            plain.__dict__.setdefault("__dynamo_disable", plain)  # where PyTorch keeps the marked method
    return torch.no_grad()(inspect.unwrap(base.step))


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that does not import torch._dynamo."""

    step = _spare_the_compiler(torch.optim.AdamW)


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` that does not import torch._dynamo."""

    step = _spare_the_compiler(torch.optim.SGD)


def build_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over `groups`, with the fused kernel (CPU and CUDA have one): one pass over the parameters per step.

    The rate of each group starts at `lr` times its `lr_scale`. On a CPU the moments are allocated here instead of in
    the first step: they would lie amid the arrays of that step, whose place the next steps could not use as a whole.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = AdamW(groups, lr=lr, betas=betas, fused=fused)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    for parameter in parameters:
        if parameter.device.type == "cpu" and fused:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


def build_sgd(groups: list[dict[str, Any]], *, lr: float, momentum: float = 0.9) -> torch.optim.SGD:
    """SGD with momentum over `groups`, fused, for linear probes."""
    return SGD(groups, lr=lr, momentum=momentum, fused=True)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients as a scalar tensor on their device (no host synchronisation)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients)
