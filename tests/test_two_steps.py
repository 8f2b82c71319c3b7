"""Land cover, then floods: two runs of main_finetune.py on generated data, the head swapped in between."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import main_finetune
from sarwmix.heads import PixelProbe
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--protocol", "knn"), "--protocol knn works on one vector per image.*--protocol linear"),
        (("--protocol", "linear", "--probe_solver", "lbfgs"), "lbfgs fits vectors of whole images"),
        (("--protocol", "linear"), "not --head fused; use --protocol frozen"),
    ],
    ids=str,
)
def test_probes_that_do_not_label_pixels(
    script: Callable[..., None], tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        script("--dataset", "satlas", "--data_path", tmp_path, *flags, "--output_dir", tmp_path / "x")


def test_linear_probe_of_label_maps(
    script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only one layer on the frozen maps is trained; an evaluation of its checkpoint gives the same numbers."""
    make_neighbour_data("sen1floods11", tmp_path / "data", samples=3)
    data = ("--dataset", "sen1floods11", "--data_path", tmp_path / "data", "--model", "mixmim_tiny")
    data += ("--input_size", 128, "--head", "bn_linear")
    script(*data, "--protocol", "linear", "--output_dir", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    maps = (32, 64, 128, 256)  # of mixmim_tiny
    assert (found["trainable_parameters"], found["head"]) == (2 * sum(maps) + 2, "bn_linear")
    saved = load_checkpoint(tmp_path / "run" / "checkpoint_best.pth")
    assert saved["model"]["head.linear.3.weight"].shape == (2, 256, 1, 1)
    script(*data, "--eval", "--resume", tmp_path / "run" / "checkpoint_best.pth", "--output_dir", tmp_path / "eval")
    again = json.loads((tmp_path / "eval" / "metrics_eval.json").read_text())
    (evaluated,) = again["results"].values()
    assert evaluated["test"]["scalars"] == pytest.approx(found["results"]["checkpoint_best.pth"]["test"]["scalars"])


def test_probe_of_pixels_is_one_linear_layer_on_upsampled_maps() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, channels, side, side) for channels, side in ((3, 16), (5, 8), (7, 4), (4, 2))]
    probe = PixelProbe([3, 5, 7, 4], 3)
    found = probe(maps)
    probe.eval()
    whole = [F.interpolate(level, size=(16, 16), mode="bilinear", align_corners=False) for level in
             [(m - m.mean((0, 2, 3), keepdim=True)) / (m.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-6).sqrt()
              for m in maps]]  # fmt: skip
    weight = torch.cat([layer.weight for layer in probe.linear], dim=1)  # type: ignore[list-item]
    wanted = F.conv2d(torch.cat(whole, dim=1), weight, probe.linear[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
