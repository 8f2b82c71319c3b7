"""torch.compile for the repeated parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_LIMIT = 64  # graphs of one function: stages x (training, evaluation, its last batch); PyTorch stops compiling after 8


def _settle() -> None:
    """Settings of the compiler for blocks that are compiled one by one."""
    import torch._dynamo  # takes 1.5 s; only where something is compiled

    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the older name
    setattr(config, name, max(getattr(config, name), _LIMIT))
    # DistributedDataParallel would cut each block again where its gradient buckets end. Blocks are small enough: the
    # gradients of one travel while those of the next are computed.
    config.optimize_ddp = False


def limit_memory(share: float) -> None:
    """Let compiled graphs keep only a share of what their backward pass would like to find; 1 is all of it.

    The rest is computed again, cheapest first: the compiler solves a knapsack for each block. It holds for everything
    that is compiled in this process afterwards.
    """
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = share


def _options(backend: str | Callable[..., Any]) -> dict[str, Any] | None:
    """Small kernels that do not depend on each other are launched as one: casts of weights, sums of gradients."""
    if backend != "inductor":
        return None
    import torch._inductor.config

    return {"combo_kernels": True} if hasattr(torch._inductor.config, "combo_kernels") else None


def compile_modules(modules: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile modules in place, for the exact shapes they meet: they share their code, and symbolic sizes, which
    PyTorch tries after the second shape, make slower kernels."""
    _settle()
    for module in modules:
        module.compile(backend=backend, dynamic=False, options=_options(backend))


def compile_methods(module: nn.Module, names: Iterable[str], backend: str | Callable[..., Any] = "inductor") -> None:
    """The same for methods other than ``forward``; names the module does not have are left out."""
    _settle()
    for name in names:
        if hasattr(module, name):
            compiled = torch.compile(getattr(module, name), backend=backend, dynamic=False, options=_options(backend))
            setattr(module, name, compiled)
