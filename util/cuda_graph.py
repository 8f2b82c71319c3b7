"""Forward and backward pass of a training step as one CUDA graph: recorded once, then launched as a whole.

A step of these models launches about two thousand kernels. Where the processor needs longer to launch them than the GPU
to run them (small batches, slow hosts), the GPU waits; a graph is one launch. What may not be in it stays outside:
drawing (masks, flips, mixing), copies from the host, the optimizer, and whatever looks at a value.

A graph reads and writes fixed memory. Inputs are copied into it before each launch; gradients are left in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from util.log import get_logger

WARM_UP = 3  # steps before recording: libraries allocate and kernels are compiled in them
_MOST = 8  # recorded shapes; a run has one, and one more for a short last accumulation group

_recording = False


def is_recording() -> bool:
    """Whether a graph is being recorded or warmed up for; launching costs nothing later, so fewer bytes win."""
    return _recording


@contextlib.contextmanager
def _as_recording() -> Iterator[None]:
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def capture(work: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor, Any]:
    """Record work on the current device: (launch it, its result's memory, memory pool)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph.replay, result, graph.pool()


@dataclass
class _Recorded:
    """A graph and the memory it works on."""

    launch: Callable[[], None]
    inputs: list[Tensor]
    loss: Tensor
    gradients: list[Tensor | None]


class StepGraphs:
    """Runs forward and backward passes as graphs, one for each kind of input.

    Args:
        model: bare module in training.
        parameters: those that are trained.
        capture: records work; for tests.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], capture: Callable[..., Any] | None = None
    ) -> None:
        self._model, self._parameters = model, list(parameters)
        self._capture = capture
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None

    def run(self, work: Callable[[Any], Tensor], inputs: Any, *, first: bool, last: bool) -> Tensor:
        """A batch: its loss, with gradients left in ``.grad``.

        Args:
            work: forward and backward pass of the inputs, the same function at every call; returns the loss.
            inputs: nested tuples of tensors and plain values; other shapes or values are recorded anew.
            first: whether the batch begins an optimizer step; otherwise gradients are added.
            last: whether it ends one.
        """
        leaves, form = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        key = (str(form), tuple(kinds))
        if key not in self._recorded:
            self._recorded[key] = self._record(work, leaves, form)
        recorded = self._recorded[key]
        for memory, tensor in zip(recorded.inputs, tensors, strict=True):
            memory.copy_(tensor, non_blocking=True)
        recorded.launch()
        self._leave(recorded.gradients, first=first, last=last)
        return recorded.loss.clone()

    def _leave(self, gradients: list[Tensor | None], *, first: bool, last: bool) -> None:
        """Hand gradients to the parameters; the graph's memory holds only those of its latest launch."""
        pairs = [(p, g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        if first:
            for parameter, gradient in pairs:
                parameter.grad = gradient if last else gradient.clone()
        else:
            torch._foreach_add_([p.grad for p, _ in pairs], [g for _, g in pairs])  # type: ignore[misc]

    def _record(self, work: Callable[[Any], Tensor], leaves: list[Any], form: TreeSpec) -> _Recorded:
        """Warm up and record; random numbers, running statistics and gradients are afterwards as they were."""
        if len(self._recorded) >= _MOST:
            raise RuntimeError(
                f"--cuda_graph met {_MOST + 1} different shapes of training batches; it is for runs whose batches are "
                "alike: leave it out"
            )
        fixed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(fixed, form)
        gradients = [parameter.grad for parameter in self._parameters]
        statistics = [buffer.clone() for buffer in self._model.buffers()]
        on_gpu = self._capture is None
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None

        def clean() -> None:
            for parameter in self._parameters:
                parameter.grad = None

        with _as_recording():
            if on_gpu:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        clean()
                        work(inputs)
                torch.cuda.current_stream().wait_stream(side)
            clean()
            launch, loss, self._pool = (self._capture or capture)(lambda: work(inputs), self._pool)
        kept = [parameter.grad for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1])
        get_logger().info("recorded the forward and backward pass as a CUDA graph")
        return _Recorded(launch, [leaf for leaf in fixed if isinstance(leaf, Tensor)], loss, kept)
