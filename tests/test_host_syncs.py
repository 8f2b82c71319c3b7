"""How often a training step waits for the device: counted without a GPU.

A dispatch mode marks what would live on the GPU (weights, the loaded images and all that is computed from them) and
counts the operators that need one of those values on the host: each is a synchronisation there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_pretrain import batches, build_trainer, epoch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from engine_finetune import Augmentation
from engine_finetune import train_one_epoch as finetune_epoch
from sarwmix.tasks import ModelSettings, build_task
from sarwmix.transforms import SarTransform
from util.log import Progress
from util.training import SYNC_EVERY

STEPS = 2 * SYNC_EVERY
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


class Syncs(TorchDispatchMode):
    """Counts reads of device values, by operator."""

    def __init__(self, on_device: list[torch.Tensor]) -> None:
        super().__init__()
        self.marked = WeakIdKeyDictionary()
        self.counts: dict[str, int] = {}
        self.viewed = WeakIdKeyDictionary()  # view -> what it is a view of
        for tensor in on_device:
            self.marked[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        if func.is_view and isinstance(out, torch.Tensor) and out is not inputs[0]:
            self.viewed[out] = inputs[0]
        if any(tensor in self.marked for tensor in inputs):
            name = func._schema.name
            if name in WAITING:
                self.counts[name] = self.counts.get(name, 0) + 1
            for leaf in tree_leaves(out):
                while isinstance(leaf, torch.Tensor):
                    self.marked[leaf] = True
                    leaf = self.viewed.get(leaf)  # what is written into a view is in its base, too
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarwmix.transforms.is_all_finite", lambda values: False)
    monkeypatch.setattr("util.training.sync_interval", lambda device: SYNC_EVERY)


def devices(model: torch.nn.Module, loader: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers(), *(batch["image"] for batch in loader)]


def test_the_counter_counts() -> None:
    value = torch.ones(3, requires_grad=True)
    with Syncs([value]) as counter:
        float((value * 2).sum().detach())
        (value > 0).nonzero()
        float(torch.ones(3).sum())  # was never on the device
    assert counter.counts == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_pretraining_waits_once_in_twenty_steps(tmp_path: Path) -> None:
    model, loader = tiny(), batches(STEPS, size=2)
    with Syncs(devices(model, loader)) as counter:
        epoch(build_trainer(model, tmp_path), loader)
    at_end = 5  # the epoch's sums, once each
    assert 0 < sum(counter.counts.values()) <= STEPS // SYNC_EVERY + at_end, counter.counts


@pytest.mark.usefixtures("as_on_a_gpu")
def test_finetuning_waits_once_in_twenty_steps(tmp_path: Path) -> None:
    task = build_task("multilabel", ("a", "b", "c"))
    model = task.build_model(ModelSettings("mixmim_tiny", 128, 2))
    loader = batches(STEPS, size=2)
    for batch in loader:
        batch["label"] = torch.ones(2, 3)
    with Syncs(devices(model, loader)) as counter:
        finetune_epoch(
            build_trainer(model, tmp_path),
            loader,
            task=task,
            transform=SarTransform(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0)),
            augmentation=Augmentation(),
            seed=0,
            epoch=0,
            steps=STEPS,
            progress=Progress(STEPS, title="", enabled=False),
        )
    assert 0 < sum(counter.counts.values()) <= STEPS // SYNC_EVERY + 5, counter.counts


def test_a_look_in_each_step_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("util.training.sync_interval", lambda device: 1)
    model, loader = tiny(), batches(STEPS, size=2)
    with Syncs(devices(model, loader)) as counter:
        epoch(build_trainer(model, tmp_path), loader)
    assert sum(counter.counts.values()) >= STEPS
