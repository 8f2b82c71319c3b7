"""Checkpoints with random weights and generated scenes, for the tests of prediction, features and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

from models_mixmim import MixMIM, model_config
from sarwmix.data import registry
from sarwmix.data.spec import unit_of_bands
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import build_task
from util.checkpoint import save_checkpoint

ORIGIN, PIXEL = (500000.0, 5400000.0), 10.0


def write_finetuned(
    path: Path,
    *,
    task: str = "multilabel",
    dataset: str = "demo",
    bands: Sequence[str] = ("VH", "VV"),
    statistics: dict[str, Any] | None = None,
    sample_size: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    input_size: int = 128,
    name: str = "mixmim_tiny",
    spread: float = 0.3,
) -> Path:
    """A checkpoint as main_finetune.py writes it, with weights large enough that classes differ."""
    torch.manual_seed(1)
    spec = registry.get_spec(dataset, bands=",".join(bands))
    names = tuple(classes or spec.classes)
    built = build_task(task, names, options)
    settings = ModelSettings(name, input_size, len(bands))
    model = built.build_model(settings)
    weight = getattr(model.head, "weight", None)
    if isinstance(weight, torch.Tensor):
        torch.nn.init.normal_(weight, std=spread)
    if sample_size is None:
        sample_size = (input_size, input_size) if task == "pair" else (spec.size, spec.size)
    save_checkpoint(path, {
        "format": "sarwmix/1",
        "kind": "finetune",
        "task": task,
        "protocol": "finetune",
        "classes": list(names),
        "model_config": {**settings.as_config(), **built.model_settings},
        "data": {
            "dataset": dataset,
            "split": "train",
            "bands": list(bands),
            "unit": unit_of_bands(bands),
            "statistics": statistics or spec.statistics[spec.default_statistics].as_dict(),
            "preprocessing": spec.preprocessing.as_dict(),
        },
        "sample_size": list(sample_size),
        "epoch": 3,
        "step": 0,
        "run_id": "1234",
        "model": model.state_dict(),
    })  # fmt: skip
    return path


def write_pretrained(path: Path) -> Path:
    """A checkpoint as main_pretrain.py writes it."""
    torch.manual_seed(2)
    spec = registry.get_spec("demo")
    save_checkpoint(path, {
        "format": "sarwmix/1",
        "kind": "pretrain",
        "model_config": {"name": "mixmim_tiny", "img_size": 128, "norm_pix_loss": False},
        "data": {
            "dataset": "demo",
            "bands": list(spec.bands),
            "unit": "dB",
            "statistics": spec.statistics[spec.default_statistics].as_dict(),
        },
        "epoch": 3,
        "step": 0,
        "model": MixMIM(**model_config("mixmim_tiny")).state_dict(),
    })  # fmt: skip
    return path


def backscatter(height: int, width: int, seed: int = 0) -> np.ndarray:
    """VH, VV in dB (2, height, width): dark and bright areas with speckle."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    level = 4 * np.sin(rows / 90.0) * np.cos(columns / 70.0)
    mean = np.array([-18.0, -11.0])[:, None, None]
    return (mean + level + rng.normal(0, 1.5, (2, height, width))).astype(np.float32)


def write_scene(
    path: Path,
    values: np.ndarray,
    *,
    descriptions: Sequence[str] = ("VH", "VV"),
    origin: tuple[float, float] = ORIGIN,
    epsg: int | None = 32633,
    **profile: Any,
) -> Path:
    """A GeoTIFF of 10 m pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {} if epsg is None else {"crs": f"EPSG:{epsg}", "transform": from_origin(*origin, PIXEL, PIXEL)}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=values.shape[1],
        width=values.shape[2],
        count=len(values),
        dtype=values.dtype,
        **place,
        **profile,
    ) as target:
        target.write(values)
        for number, text in enumerate(descriptions, start=1):
            target.set_band_description(number, text)
    return path
