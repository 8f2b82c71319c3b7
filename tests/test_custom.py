"""Any encoder by package.module:factory: features, gradients, label maps, trust, TorchGeo's adapters on stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import main_finetune
from sarwmix.inference.model import from_checkpoint
from sarwmix.models import custom
from sarwmix.models.backbones import build_classifier, build_segmenter
from sarwmix.models.settings import ModelSettings
from util.errors import UserError

SOURCE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, bands):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in ((bands, 4), (4, 6), (6, 8), (8, 10)))
    def feature_maps(self, images):
        maps = []
        for layer in self.layers:
            images = torch.relu(layer(images))
            maps.append(images)
        return maps
    def forward(self, images):
        return self.feature_maps(images)[-1].mean(dim=(2, 3))

def tiny(*, in_chans, input_size):
    return Tiny(in_chans)
def tokens(*, in_chans, input_size):
    return nn.Unflatten(1, (1, in_chans))
def number(*, in_chans, input_size):
    return 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoders_for_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(custom, "_trusted", set())


def settings(name: str) -> ModelSettings:
    return ModelSettings(f"own_encoders_for_test:{name}", 32, 2)


def test_only_trusted_factories_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is code that a file names; if you trust it"):
        build_classifier(settings("tiny"), 3)
    monkeypatch.setenv(custom.VARIABLE, "other:x,own_encoders_for_test:tiny")
    model: Any = build_classifier(settings("tiny"), 3)
    assert model(torch.randn(2, 2, 32, 32)).shape == (2, 3)
    assert model.num_features == 10
    segmenter: Any = build_segmenter(settings("tiny"), 4)
    assert segmenter(torch.randn(2, 2, 32, 32)).shape == (2, 4, 32, 32)
    assert segmenter.pyramid_channels == [4, 6, 8, 10]


def test_factories_that_do_not_fit() -> None:
    for name, message in (
        ("tokens", r"gives \(2, 1, 2, 32, 32\) for two images; expected one vector each"),
        ("number", "makes a int, expected a torch.nn.Module"),
        ("nothing", "has no attribute 'nothing'; expected package.module:factory"),
    ):
        custom.trust(f"own_encoders_for_test:{name}")
        with pytest.raises(UserError, match=message):
            build_classifier(settings(name), 3)
    with pytest.raises(UserError, match="has no feature_maps, which label maps need"):
        build_segmenter(settings("tokens"), 3)


def test_fine_tuning_probing_and_opening(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: object) -> None:
        command: list[object] = ["main_finetune.py", "--dataset", "demo", "--data_path", demo_root]
        command += ["--num_workers", 0, "--input_size", 32, "--batch_size", 16, "--test_run", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main_finetune.main()

    name = "own_encoders_for_test:tiny"
    run("--model", name, "--output_dir", tmp_path / "ft")
    run("--model", name, "--protocol", "linear", "--output_dir", tmp_path / "linear")
    assert json.loads((tmp_path / "ft" / "metrics.json").read_text())["model"] == name
    assert from_checkpoint(tmp_path / "ft" / "checkpoint_best.pth").model(torch.zeros(1, 2, 32, 32)).shape == (1, 19)
    monkeypatch.setattr(custom, "_trusted", set())
    with pytest.raises(UserError, match="is code that a file names"):
        from_checkpoint(tmp_path / "ft" / "checkpoint_best.pth")


def test_torchgeo_adapters_on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Croma(nn.Module):
        def __init__(self, modalities: list[str], image_size: int) -> None:
            super().__init__()
            assert (modalities, image_size) == (["sar"], 32)

        def forward(self, x_sar: Any = None, x_optical: Any = None) -> dict[str, Any]:
            return {"sar_encodings": None, "sar_GAP": x_sar.mean(dim=(2, 3))}

    class Dofa(nn.Module):
        def forward_features(self, x: Any, wavelengths: list[float]) -> Any:
            assert wavelengths == [3.75, 3.75]
            return x.mean(dim=(2, 3))

    package, models = ModuleType("torchgeo"), ModuleType("torchgeo.models")
    models.croma_base = Croma  # type: ignore[attr-defined]
    models.dofa_base_patch16_224 = lambda img_size: Dofa()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    monkeypatch.setitem(sys.modules, "torchgeo.models", models)
    for name in ("croma_base", "dofa_base"):
        full = f"sarwmix.models.custom:{name}"
        custom.trust(full)
        model: Any = build_classifier(ModelSettings(full, 32, 2), 3)
        assert model(torch.randn(2, 2, 32, 32)).shape == (2, 3)
    monkeypatch.setitem(sys.modules, "torchgeo.models", None)
    with pytest.raises(UserError, match=r"torchgeo is not installed .*pip install torchgeo"):
        build_classifier(ModelSettings("sarwmix.models.custom:croma_base", 32, 2), 3)
