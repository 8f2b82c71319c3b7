"""The classifier: parity with the published implementation, loading of pretrained weights, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models_mixmim import MixMIM
from models_mixmim_ft import MixMIMClassifier
from sarwmix.heads import LinearProbe
from sarwmix.models.loading import load_pretrained, load_trained
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import build_task
from tests.conftest import PARITY, parity_weights
from util.errors import UserError
from util.optim import parameter_groups

SMALL = {
    "img_size": 64,
    "in_chans": 2,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": (8, 8, 4, 2),
}


def config_of(raw: np.ndarray) -> dict:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(str(raw)).items()}


def test_features_and_logits_equal_the_published_ones() -> None:
    vectors = np.load(PARITY / "finetune_small.npz")
    model = MixMIMClassifier(**config_of(vectors["config"])).eval()
    parity_weights(model, int(vectors["salt"]))
    with torch.no_grad():
        images = torch.from_numpy(vectors["x"])
        np.testing.assert_allclose(model.forward_features(images).numpy(), vectors["features"], atol=1e-5)
        np.testing.assert_allclose(model(images).numpy(), vectors["logits"], atol=1e-5)


def test_loading_into_a_larger_input_and_window_resizes_the_tables() -> None:
    vectors = np.load(PARITY / "interpolate.npz")
    source = MixMIMClassifier(**config_of(vectors["src_config"]))
    parity_weights(source, int(vectors["src_salt"]))
    model = MixMIMClassifier(**config_of(vectors["dst_config"])).eval()
    parity_weights(model, int(vectors["dst_salt"]))
    done = load_pretrained(model, source.state_dict(), source="the 64 px model")
    assert "absolute_pos_embed" in done.resized
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in done.resized
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(vectors["x"])).numpy(), vectors["logits"], atol=1e-5)


def test_layer_decay_of_the_base_model_is_the_released_one() -> None:
    expected = json.loads((PARITY / "layer_decay_base_0.7.json").read_text())
    model = MixMIMClassifier()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, weight_decay=0.05, layer_decay=0.7):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["layer_id"], group["lr_scale"], group["weight_decay"])
    assert set(found) == set(expected)
    for name, entry in expected.items():
        layer, scale, decay = found[name]
        assert (layer, decay) == (entry["layer_id"], entry["weight_decay"]), name
        assert scale == pytest.approx(entry["lr_scale"], rel=1e-12), name


def test_state_dict_of_the_base_model_is_the_released_one() -> None:
    shapes = json.loads((PARITY / "state_dict_shapes.json").read_text())["finetune_mixmim_base"]
    model = MixMIMClassifier()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_901_515
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 86_770_443


def pretraining_state(**changes: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MixMIM(**{**SMALL, "decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, **changes}).state_dict()


def test_pretraining_checkpoint_loses_its_decoder_and_keeps_the_fresh_head() -> None:
    state = pretraining_state()
    model = MixMIMClassifier(5, **SMALL)
    head = model.head.weight.detach().clone()
    done = load_pretrained(model, state, source="x.pth")
    assert done.fresh == ("head.weight", "head.bias")
    assert "mask_token" in done.dropped
    assert all(name == "mask_token" or name.startswith("decoder_") for name in done.dropped)
    assert not done.resized
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    own = model.state_dict()
    for name, value in state.items():
        if name not in done.dropped:
            torch.testing.assert_close(own[name], value, rtol=0, atol=0)


def test_head_starts_from_a_truncated_normal_of_2e_5() -> None:
    torch.manual_seed(0)
    model = MixMIMClassifier(19, **{**SMALL, "embed_dim": 64})
    assert model.head.weight.detach().std().item() == pytest.approx(2e-5, rel=0.05)
    assert not model.head.bias.any()


def test_every_trainable_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = MixMIMClassifier(3, drop_path_rate=0.1, **SMALL).train()
    torch.nn.init.normal_(model.head.weight)
    model(torch.randn(4, 2, 64, 64)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 32, "num_heads": (2, 4, 8, 16)}, ["embed_dim 32", "embed_dim 16", "--model"]),
        ({"depths": (1, 1, 4, 1)}, ["depths 1-1-4-1", "depths 1-1-2-1"]),
        ({"in_chans": 1}, ["1 band,", "data set has 2"]),
    ],
)
def test_another_model_size_or_band_count_is_one_clear_sentence(changes: dict, words: list[str]) -> None:
    state = pretraining_state(**changes)
    with pytest.raises(UserError) as caught:
        load_pretrained(MixMIMClassifier(5, **SMALL), state, source="x.pth")
    assert "x.pth" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_left_over_missing_and_misshapen_entries_are_named() -> None:
    state = pretraining_state()
    state["layers.9.surprise"] = torch.zeros(3)
    del state["norm.bias"]
    state["norm.weight"] = torch.zeros(7)
    with pytest.raises(UserError) as caught:
        load_pretrained(MixMIMClassifier(5, **SMALL), state, source="x.pth")
    for word in ("left over: layers.9.surprise (3,)", "missing: norm.bias", "shape of norm.weight: (7,)"):
        assert word in str(caught.value)


def test_head_of_another_class_count() -> None:
    state = MixMIMClassifier(4, **SMALL).state_dict()
    model = MixMIMClassifier(5, **SMALL)
    with pytest.raises(UserError, match=r"head for 4 classes, the data set has 5.*--new_head"):
        load_trained(model, {"model": state}, source="x.pth")
    with pytest.raises(UserError, match="head for 4 classes"):
        load_pretrained(model, state, source="x.pth")
    done = load_pretrained(model, state, source="x.pth", new_head=True)
    assert done.fresh == ("head.weight", "head.bias")


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="no MixMIM encoder"):
        load_trained(MixMIMClassifier(5, **SMALL), {"model": {"conv1.weight": torch.zeros(1)}}, source="resnet.pth")


def test_a_typo_in_an_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        MixMIMClassifier(5, embed_dims=16)  # type: ignore[call-arg]


def test_linear_probe_has_only_the_linear_layer_to_train() -> None:
    probe = LinearProbe(384, 19)
    assert sum(p.numel() for p in probe.parameters()) == 7_315  # 384 * 19 + 19, as published for ViT-S


@pytest.mark.parametrize("name", ["mixmim_tiny", "vit_tiny_patch16_224", "resnet10t"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = build_task("multilabel", ("a", "b")).build_model(ModelSettings(name, 128, 2))
        torch.nn.init.normal_([p for key, p in model.named_parameters() if key.startswith("head.")][-2])
        if recomputed:
            model.recompute_blocks()
        model.train()
        torch.manual_seed(1)
        model(torch.randn(2, 2, 128, 128)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
