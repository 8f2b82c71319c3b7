"""Land cover, then floods: two runs of main_finetune.py on generated data, the head swapped in between."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main_finetune
from sarwmix.synthetic.neighbours import make_neighbour_data
from util.checkpoint import load_checkpoint
from util.errors import UserError

SMALL = ("--model", "resnet10t", "--input_size", 64, "--head", "fused", "--batch_size", 2, "--epochs", 1)
SMALL += ("--warmup_epochs", 0, "--num_workers", 0, "--device", "cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["main_finetune.py", *map(str, (*SMALL, *args))])
        main_finetune.main()

    return run


@pytest.mark.slow
def test_satlas_then_sen1floods11(
    script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    for name in ("satlas", "sen1floods11"):
        make_neighbour_data(name, tmp_path / name, samples=3)
    first = ("--dataset", "satlas", "--data_path", tmp_path / "satlas", "--bands", "rgb")
    script(*first, "--protocol", "finetune", "--output_dir", tmp_path / "one")
    cover = load_checkpoint(tmp_path / "one" / "checkpoint_best.pth")
    assert cover["data"]["bands"] == ["B04", "B03", "B02"]
    assert len(cover["model"]["head.classifier.weight"]) == 5

    second = ("--dataset", "sen1floods11", "--data_path", tmp_path / "sen1floods11", "--protocol", "frozen")
    second += ("--finetune", tmp_path / "one" / "checkpoint_best.pth", "--class_weights", 0.1, 0.5)
    with pytest.raises(UserError, match=r"trained on bands B04, B03, B02, the data set delivers VH, VV"):
        script(*second, "--bands", "s1", "--output_dir", tmp_path / "refused")
    capsys.readouterr()
    script(*second, "--bands", "B04,B03,B02", "--output_dir", tmp_path / "two")
    said = capsys.readouterr().out
    assert "labels 5 classes, the data set has 2: the last layer (head.classifier.weight) starts fresh" in said

    floods = load_checkpoint(tmp_path / "two" / "checkpoint_best.pth")["model"]
    for name, value in cover["model"].items():
        if not name.startswith("head."):  # the encoder was only read
            assert torch.equal(floods[name], value), name
    assert floods["head.classifier.weight"].shape == (2, 256)
    assert not torch.equal(floods["head.join.weight"], cover["model"]["head.join.weight"])
    result = json.loads((tmp_path / "two" / "metrics.json").read_text())
    trained = sum(floods[f"head.{name}"].numel() for name in ("join.weight", "join.bias", "reduce.weight"))
    trained += sum(floods[f"head.{name}"].numel() for name in ("norm.weight", "norm.bias", "classifier.weight"))
    assert result["trainable_parameters"] == trained
    assert result["results"]["checkpoint_best.pth"]["test"]["scalars"]["iou"] >= 0


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_probes_of_whole_images_do_not_label_pixels(script: Callable[..., None], tmp_path: Path, protocol: str) -> None:
    with pytest.raises(UserError, match=f"--protocol {protocol} works on one vector per image.*--protocol frozen"):
        script("--dataset", "satlas", "--data_path", tmp_path, "--protocol", protocol, "--output_dir", tmp_path / "x")
