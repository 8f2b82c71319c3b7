"""How often a training step waits for the device: counted without a GPU.

Reads: a dispatch mode marks what would live on the GPU (weights, the loaded images and all that is computed from them)
and counts the operators that need one of those values on the host: each is a synchronisation there. Copies: the meta
device stands for the GPU, and every copy to it must be asked for without waiting.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_pretrain import batches, build_trainer, epoch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from engine_finetune import Augmentation, augment
from engine_finetune import train_one_epoch as finetune_epoch
from sarwmix.mixup import Mixup
from sarwmix.models.settings import ModelSettings
from sarwmix.preprocessing import Preprocessing
from sarwmix.tasks.base import build_task
from sarwmix.transforms import SarTransform, draw_flips
from sarwmix.weighting import WeightOptions
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


META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies from the host to the meta device: those that wait until they are done, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            if source.device.type == "cpu" and out.device == META:
                names = [argument.name for argument in func._schema.arguments]
                given = dict(zip(names, args, strict=False)) | (kwargs or {})
                if given.get("non_blocking"):
                    self.others += 1
                else:
                    self.waiting.append(f"{name} of {tuple(source.shape)}")
        return out


def test_the_copies_are_counted() -> None:
    with Copies() as copies:
        torch.ones(3).to(META)
        torch.ones(3).to(META, non_blocking=True)
        torch.empty(3, device=META).copy_(torch.ones(3))
    assert copies.waiting == ["aten::_to_copy of (3,)", "aten::copy_ of (3,)"]
    assert copies.others == 1


def test_pretraining_copies_without_waiting() -> None:
    model = tiny().to(META)
    weighting = WeightOptions(norm="dataset")
    transform = SarTransform(
        size=128,
        mean=(-19.2, -12.5),
        std=(5.4, 5.0),
        weighting=weighting,
        range_db=((-30.0, -20.0), (-10.0, -5.0)),
    )
    transform.to_device(META)
    with Copies() as copies:
        image = torch.randn(4, 2, 120, 120).to(META, non_blocking=True)
        sar = transform(image, draw_flips(4, torch.Generator()))
        model(sar.images, sar.weights, mask=model.draw_mask()).loss.backward()
    assert copies.waiting == []
    assert copies.others >= 4  # image, two kinds of flips, mask


@pytest.mark.parametrize("kind", ["multilabel", "pair", "segmentation", "crops"])
def test_finetuning_copies_without_waiting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta device
    batch = {"image": torch.randn(4, 2, 128, 128), "label": torch.ones(4, 3), "name": list("abcd")}
    batch |= {"image1": batch["image"], "image2": batch["image"]}
    preprocessing = Preprocessing()
    augmentation = Augmentation(Mixup(0.8, 1.0, mode="elem"), erase_prob=0.5, smoothing=0.1)
    name, classes, head = "multilabel", ("a", "b", "c"), None
    if kind == "pair":
        name, classes, batch["label"] = "pair", ("no flood", "flood"), torch.ones(4, dtype=torch.int64)
    elif kind == "segmentation":
        name, head, augmentation = "segmentation", "upernet", Augmentation(erase_prob=0.5)
        batch["label"] = torch.zeros(4, 128, 128, dtype=torch.uint8)
    elif kind == "crops":
        preprocessing = Preprocessing(normalisation="quantiles", geometry="resized_crop")
    options = {"class_weights": (1.0, 2.0, 3.0)} if kind == "segmentation" else {}
    task = build_task(name, classes, options)
    model = task.build_model(ModelSettings("mixmim_tiny", 128, 2, drop_path_rate=0.1, head=head)).to(META)
    transform = SarTransform(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0), preprocessing=preprocessing)
    transform.to_device(META)

    def step() -> None:
        prepared = task.prepare(batch, transform, device=META, generator=torch.Generator())
        inputs, target = augment(task, prepared, augmentation, torch.Generator())
        task.loss(model(*inputs), target, smoothing=augmentation.smoothing).backward()

    step()  # constants move once
    with Copies() as copies:
        step()
    assert copies.waiting == []
    assert copies.others >= 3
