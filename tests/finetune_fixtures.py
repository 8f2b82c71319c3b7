"""A tiny labelled data set in memory and a tiny model, for tests of tasks, evaluation and probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sarwmix.data.base import SarDataset
from sarwmix.data.registry import get_spec
from sarwmix.data.spec import DatasetSpec, Statistics

STATISTICS = Statistics((-19.0, -12.0), (5.0, 5.0), (-31.0, -24.0), (-7.0, 0.0), "made up")


def small_spec(classes: Sequence[str]) -> DatasetSpec:
    return DatasetSpec(
        name="made_up",
        task="multilabel",
        bands=("VH", "VV"),
        statistics={"made_up": STATISTICS},
        default_statistics="made_up",
        classes=tuple(classes),
        splits=("train", "val", "test"),
        size=8,
        builder="nowhere:build",
        description="",
    )


class MemoryDataset(SarDataset):
    """Images of 8 x 8 pixels whose band means say which labels they have."""

    def __init__(self, count: int, classes: int = 4, *, seed: int = 0, split: str = "test") -> None:
        rng = np.random.default_rng([seed, count])
        labels = (rng.random((count, classes)) < 0.4).astype(np.uint8)
        labels[0, 0] = 1
        spec = small_spec([f"class {k}" for k in range(classes)])
        super().__init__(spec, split, STATISTICS, [f"{split}_{i:04d}" for i in range(count)], labels)
        shift = (labels @ rng.standard_normal((classes, 2)) * 4).astype(np.float32)
        noise = rng.standard_normal((count, 2, 8, 8)).astype(np.float32) * 4
        self.images = noise + shift[:, :, None, None] + np.array([-19, -12], dtype=np.float32)[:, None, None]

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


class MeanModel(nn.Module):
    """Band means and mean squares of the images, one linear layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(4, classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))


def demo_classes() -> tuple[str, ...]:
    return get_spec("demo").classes
