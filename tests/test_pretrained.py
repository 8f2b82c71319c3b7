"""Opening trained models: what comes from the file, equal outputs, and what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models_mixmim import MixMIM, model_config
from sarwmix.data import registry
from sarwmix.inference.model import Pretrained, from_checkpoint, from_pretrained, open_model
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import build_task
from sarwmix.transforms import SarTransform
from tests.prediction_fixtures import write_finetuned, write_pretrained
from util.checkpoint import save_checkpoint
from util.errors import UserError


def images(count: int = 2, side: int = 120) -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(0).normal(-14, 5, (count, 2, side, side)).astype(np.float32))
    values[0, :, :7] = torch.nan
    return values


def test_outputs_are_those_of_the_trained_model(tmp_path: Path) -> None:
    path = write_finetuned(tmp_path / "c.pth")
    found = from_checkpoint(path)
    task = build_task("multilabel", found.classes)
    model = task.build_model(ModelSettings("mixmim_tiny", 128, 2)).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    statistics = registry.get_spec("demo").statistics["demo"]
    transform = SarTransform(size=128, mean=statistics.mean, std=statistics.std)
    with torch.no_grad():
        expected = task.scores(model(*task.inputs({"image": images()}, transform, device=torch.device("cpu"))))
    assert torch.equal(found.scores(images()), expected)
    assert found.features(images()).shape == (2, 256)
    assert (found.bands, found.unit, found.sample_size) == (("VH", "VV"), "dB", (120, 120))
    assert len(found.classes) == 19
    assert not found.model.training


def test_what_stands_in_the_file_wins(tmp_path: Path) -> None:
    """Statistics, bands in their order and the size of a sample are those of the file, not of the registry."""
    statistics = {"mean": [-11.0, -18.0], "std": [4.0, 5.0], "p01": [-20.0, -30.0], "p99": [0.0, -5.0], "origin": "t"}
    path = write_finetuned(
        tmp_path / "c.pth", bands=["VV", "VH"], statistics=statistics, sample_size=[64, 64], classes=["a", "b", "c"]
    )
    found = from_checkpoint(path)
    assert found.bands == ("VV", "VH")
    assert found.sample_size == (64, 64)
    assert found.classes == ("a", "b", "c")
    (inputs,) = found.inputs(torch.full((1, 2, 128, 128), -11.0))
    assert torch.allclose(inputs[:, 0], torch.zeros(1))
    assert torch.allclose(inputs[:, 1], torch.tensor(7.0 / 5.0))


def test_pair_checkpoint_reads_two_images_in_db(tmp_path: Path) -> None:
    found = from_checkpoint(write_finetuned(tmp_path / "c.pth", task="pair", dataset="sen12flood"))
    first, second = images(side=128), images(side=128) - 3
    scores = found.scores(first, second)
    assert scores.shape == (2, 2)
    assert torch.allclose(scores, found.scores(second, first))  # the order does not matter
    inputs = found.inputs(first, second)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (found.statistics.mean, found.statistics.std))
    expected = (torch.where(torch.isfinite(first), first, mean) - mean) / std
    assert torch.allclose(inputs[0], expected, atol=1e-4)
    with pytest.raises(UserError, match="compares two images"):
        found.scores(first)


def test_pretraining_checkpoint_gives_features_only(tmp_path: Path) -> None:
    found = from_checkpoint(write_pretrained(tmp_path / "c.pth"))
    assert found.kind == "pretrain"
    assert found.features(images()).shape == (2, 256)
    with pytest.raises(UserError, match="pretraining checkpoint.*main_finetune.py --finetune"):
        found.scores(images())
    full = MixMIM(**model_config("mixmim_tiny")).eval()
    full.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True)["model"])
    with torch.no_grad():
        expected = full.forward_features(*found.inputs(images()))
    assert torch.equal(found.features(images()), expected)


@pytest.mark.parametrize("pretraining", [True, False])
def test_released_files_need_the_name_of_their_data(tmp_path: Path, pretraining: bool) -> None:
    path = tmp_path / "benv2.pth"
    if pretraining:
        state = MixMIM(**model_config("mixmim_tiny")).state_dict()
    else:
        task = build_task("multilabel", registry.get_spec("benv2").classes)
        state = task.build_model(ModelSettings("mixmim_tiny", 128, 2)).state_dict()
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(model="mixmim_tiny")}, path)
    with pytest.raises(UserError, match="--trained_on, one of"):
        from_checkpoint(path)
    found = from_checkpoint(path, trained_on="benv2")
    assert found.kind == ("pretrain" if pretraining else "finetune")
    assert found.statistics == registry.BENV2_STATISTICS
    assert found.features(images()).shape == (2, 256)


def _change(**entries: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        save_checkpoint(path, {**checkpoint, **entries})

    return change


@pytest.mark.parametrize(("change", "message"), [
    (lambda path: path.unlink(), "does not exist"),
    (lambda path: path.write_bytes(b"no checkpoint at all"), "not a torch.save archive"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated or damaged|checksum"),
    (_change(model={}), "no weights under 'model'"),
    (_change(task="sentences"), "no fine-tuning for task 'sentences'"),
    (_change(model_config={"name": "mixmim_base", "img_size": 128, "in_chans": 2, "head": None}), "mixmim_tiny"),
    (_change(model_config={"img_size": 128}), "does not describe its model completely.*name"),
    (_change(data={"bands": ["VH", "VV"], "unit": "dB"}), "does not describe its model completely.*statistics"),
    (_change(classes=["a", "b"]), "head for 19 classes"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    path = write_finetuned(tmp_path / "c.pth")
    change(path)
    with pytest.raises(UserError, match=message):
        open_model(path)


def test_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither config.json of an export nor checkpoint_best.pth"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="runs/nothing/here.pth does not exist"):
        open_model("runs/nothing/here.pth")
    path = write_finetuned(tmp_path / "checkpoint_best.pth")
    assert isinstance(open_model(tmp_path), Pretrained)  # the output folder of a run
    with pytest.raises(UserError, match="says that it was trained on demo"):
        open_model(path, trained_on="benv2")


def test_hub_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"does not deliver it \(no route to host\)"):
        from_pretrained("somebody/something")
