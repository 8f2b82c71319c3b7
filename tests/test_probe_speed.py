"""Linear probes: the same numbers with and without cached features, and the speed that caching is for."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine_finetune import Augmentation, train_one_epoch
from sarwmix.finetune.bench import Workbench
from sarwmix.heads import TaskModel
from sarwmix.models.backbones import build_classifier
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import MultilabelTask
from sarwmix.transforms import SarTransform
from tests.finetune_fixtures import STATISTICS, MemoryDataset
from util.distributed import Processes
from util.log import Progress
from util.optim import build_sgd, parameter_groups
from util.training import Trainer

EPOCHS = 3


class Unflipped(SarTransform):
    """Cached features are those of images as they are; for the comparison training images are, too."""

    def model_input(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().model_input(image)


def probe() -> TaskModel:
    torch.manual_seed(0)
    model = build_classifier(ModelSettings("mixmim_tiny", 128, 2, head="bn_linear"), 4)
    model.freeze_encoder()
    return model


def train(bench: Workbench, module: nn.Module) -> list[float]:
    """Train the probe; returns the seconds of each epoch."""
    optimizer = build_sgd(parameter_groups(module, weight_decay=0.0), lr=0.1)
    trainer = Trainer(module, optimizer, processes=Processes(), output_dir=".", lr_at=lambda at: 0.1)
    loader = bench.loader("train", train=True)
    seconds = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        began = time.perf_counter()
        train_one_epoch(
            trainer,
            loader.iter_from(0),
            task=bench.task,
            transform=bench.transform,
            augmentation=Augmentation(),
            seed=0,
            epoch=epoch,
            steps=len(loader),
            progress=Progress(len(loader), title="", enabled=False),
        )
        seconds.append(time.perf_counter() - began)
    return seconds


def test_cached_features_give_the_same_probe_ten_times_faster(tmp_path: Path) -> None:
    splits = {name: MemoryDataset(48, seed=i, split=name) for i, name in enumerate(("train", "val", "test"))}
    bench = Workbench(
        task=MultilabelTask(splits["train"].spec.classes),
        splits=splits,
        transform=Unflipped(size=128, mean=STATISTICS.mean, std=STATISTICS.std),
        processes=Processes(),
        group=Processes(),
        batch_size=16,
    )
    on_images, on_features = probe(), probe()
    slow = min(train(bench, on_images))
    cached = bench.with_features(on_features, tmp_path)
    fast = min(train(cached, on_features.head))
    torch.testing.assert_close(on_features.state_dict(), on_images.state_dict(), atol=1e-4, rtol=1e-4)
    first = bench.evaluate(on_images, "test").outputs["scores"]
    second = cached.evaluate(on_features.head, "test").outputs["scores"]
    np.testing.assert_allclose(second, first, atol=1e-4)
    print(f"seconds per epoch: {slow:.4f} on images, {fast:.4f} on cached features, {slow / fast:.0f} times faster")
    assert slow > 10 * fast
