"""Weights of other projects: MAE and FG-MAE ViTs, DINOv2, timm, safetensors; the head swap; refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sarwmix.models.backbones
from models_mixmim import MixMIM, model_config
from sarwmix.heads import TaskModel
from sarwmix.models.backbones import build_classifier, build_segmenter
from sarwmix.models.loading import load_pretrained, load_start, load_timm_weights, read_weights
from sarwmix.models.passport import find_passport, known_weights
from sarwmix.models.settings import ModelSettings
from util.errors import UserError
from util.pos_embed import resize_position_table

VIT = ModelSettings("vit_tiny_patch16_224", 32, 2)
BANDS = ("VH", "VV")
STATISTICS = {"mean": [-19.0, -12.0], "std": [5.0, 5.0]}


def start(model: TaskModel, path: Path, **options: Any) -> None:
    given = {"weight_bands": None if options.get("adapt_bands") or "x.pth" in str(path) else ",".join(BANDS), **options}
    load_start(model, str(path), bands=BANDS, statistics=STATISTICS, **given)


def encoder_state(seed: int = 0, settings: ModelSettings = VIT) -> dict[str, Tensor]:
    """timm's own names and seeded weights."""
    torch.manual_seed(seed)
    model: Any = build_classifier(settings, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return {name: value.clone() for name, value in model.encoder.state_dict().items()}


def mae_state(**changes: Tensor) -> dict[str, Tensor]:
    """An encoder with the decoder of MAE's published names."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 5, 16),
        "decoder_embed.weight": torch.zeros(16, 192),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_norm.weight": torch.zeros(16),
        "decoder_pred.weight": torch.zeros(512, 16),
    }
    return {**encoder_state(), **decoder, **changes}


@pytest.fixture
def fgmae(tmp_path: Path) -> Path:
    """A file as FG-MAE releases them: weights under `model`, an epoch, an argparse.Namespace."""
    path = tmp_path / "B2_vitt16_fgmae_ep99.pth"
    torch.save({"model": mae_state(), "epoch": 99, "args": argparse.Namespace(model="mae_vit", lr=1e-4)}, path)
    return path


def test_fgmae_file_into_a_vit(fgmae: Path) -> None:
    model: Any = build_classifier(VIT, 5)
    head = model.head.weight.clone()
    done = load_pretrained(model, read_weights(str(fgmae))["model"], source="x.pth")
    assert set(done.dropped) == {name for name in mae_state() if name.startswith(("decoder_", "mask_token"))}
    assert done.fresh == ("head.weight", "head.bias")
    assert not done.resized
    for name, value in encoder_state().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    assert torch.equal(model.head.weight, head)


def test_fgmae_for_bands_in_another_order_is_refused_or_put_into_order(fgmae: Path, tmp_path: Path) -> None:
    weight = mae_state()["patch_embed.proj.weight"]

    def first_layer(path: Path, bands: str, declared: str | None = None) -> Tensor:
        model: Any = build_classifier(VIT, 5)
        load_start(model, str(path), bands=bands.split(","), statistics=STATISTICS, weight_bands=declared)
        return model.encoder.state_dict()["patch_embed.proj.weight"]

    with pytest.raises(UserError, match=r"saw VV, VH, in this order; the data set delivers VH, VV.*--weight_bands VV"):
        first_layer(fgmae, "VH,VV")
    assert torch.equal(first_layer(fgmae, "VH,VV", "VV,VH"), weight[:, [1, 0]])
    assert torch.equal(first_layer(fgmae, "VV,VH"), weight)
    for contradiction in ("VH,VV", "HH,HV"):
        with pytest.raises(UserError, match=r"is FG-MAE .*, which saw VV, VH in this order .*; --weight_bands says"):
            first_layer(fgmae, "VH,VV", contradiction)

    torch.save({"model": encoder_state()}, tmp_path / "timm.pth")  # nobody knows what it saw
    with pytest.raises(UserError, match=r"has 2 bands and names none.*say which bands it saw.*--weight_bands VV,VH"):
        first_layer(tmp_path / "timm.pth", "VH,VV")
    assert torch.equal(first_layer(tmp_path / "timm.pth", "VH,VV", "VH,VV"), weight)
    assert torch.equal(first_layer(tmp_path / "timm.pth", "VH,VV", "VV,VH"), weight[:, [1, 0]])
    torch.save({"model": mae_state(), "data": {"bands": ["VH", "VV"]}}, tmp_path / "ours.pth")
    assert torch.equal(first_layer(tmp_path / "ours.pth", "VH,VV"), weight)
    with pytest.raises(UserError, match=r"VH, VV, as it says itself; --weight_bands says VV, VH"):
        first_layer(tmp_path / "ours.pth", "VH,VV", "VV,VH")


def test_position_table_of_another_input_size_is_resized(fgmae: Path) -> None:
    model: Any = build_classifier(ModelSettings("vit_tiny_patch16_224", 64, 2), 5)
    done = load_pretrained(model, read_weights(str(fgmae))["model"], source="x.pth")
    assert done.resized == ("pos_embed",)
    table = encoder_state()["pos_embed"]
    assert torch.equal(model.encoder.pos_embed[:, :1], table[:, :1])
    torch.testing.assert_close(model.encoder.pos_embed[:, 1:].detach(), resize_position_table(table[:, 1:], 16))


def test_global_pooling_has_a_norm_of_its_own(fgmae: Path) -> None:
    model: Any = build_classifier(ModelSettings("vit_tiny_patch16_224", 32, 2, pool="avg"), 5)
    done = load_pretrained(model, read_weights(str(fgmae))["model"], source="x.pth")
    assert {"norm.weight", "norm.bias"} < set(done.dropped)
    assert "encoder.fc_norm.weight" in done.fresh
    assert torch.equal(model.encoder.fc_norm.weight, torch.ones(192))


def test_segmenters_take_the_same_file(fgmae: Path) -> None:
    model: Any = build_segmenter(VIT, 5)
    load_start(model, str(fgmae), bands=("VV", "VH"), statistics=STATISTICS)
    assert torch.equal(model.encoder.norm.weight, encoder_state()["norm.weight"])


def test_safetensors_and_bare_state_dicts(tmp_path: Path) -> None:
    state = {**encoder_state(), "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "ddp.pth")
    for name in ("model.safetensors", "model.pth", "ddp.pth"):
        model: Any = build_classifier(VIT, 5)
        start(model, tmp_path / name)
        assert torch.equal(model.encoder.norm.weight, state["norm.weight"]), name
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(UserError, match=r"cannot load .*model\.safetensors"):
        read_weights(str(tmp_path / "model.safetensors"))
    torch.save({"epoch": 3, "weights": [1, 2]}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds no weights: .*it has epoch, weights"):
        read_weights(str(tmp_path / "none.pth"))


def test_dinov2_with_registers_computes_what_timm_computes(tmp_path: Path) -> None:
    settings = ModelSettings("vit_small_patch14_reg4_dinov2", 28, 2)
    torch.manual_seed(1)
    original: Any = build_classifier(settings, 3).eval()
    torch.nn.init.normal_(original.encoder.cls_token)  # timm's 1e-6 would drown in the rounding of what follows
    state = dict(original.encoder.state_dict())
    position = torch.randn(1, 1, 384)  # published: the class token has a position of its own, added in the forward pass
    published = {name: value for name, value in state.items() if name != "reg_token"}
    published["register_tokens"] = state["reg_token"]
    published["cls_token"] = state["cls_token"] - position
    published["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    published["mask_token"] = torch.zeros(1, 384)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in published.items()}}, tmp_path / "dino.pth")
    model: Any = build_classifier(settings, 3).eval()
    start(model, tmp_path / "dino.pth")
    images = torch.randn(1, 2, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images), original.forward_features(images), atol=1e-4, rtol=1e-4
        )


def test_another_number_of_bands_is_refused_or_adapted(tmp_path: Path) -> None:
    rgb = encoder_state(settings=ModelSettings("vit_tiny_patch16_224", 32, 3))
    torch.save(rgb, tmp_path / "rgb.pth")
    model: Any = build_classifier(VIT, 5)
    with pytest.raises(UserError, match=r"trained on 3 bands, the data set has 2 \(VH, VV\).*--adapt_bands"):
        start(model, tmp_path / "rgb.pth", weight_bands=None)
    start(model, tmp_path / "rgb.pth", adapt_bands=True)
    image = torch.randn(1, 1, 32, 32)
    patches = torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), rgb["patch_embed.proj.weight"], stride=16)
    found = torch.nn.functional.conv2d(image.expand(-1, 2, -1, -1), model.encoder.patch_embed.proj.weight, stride=16)
    torch.testing.assert_close(found, patches)  # equal bands give the response they gave before


def test_names_and_order_of_bands_are_enforced(tmp_path: Path) -> None:
    torch.save({"model": mae_state(), "data": {"bands": ["VV", "VH"]}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="trained on bands VV, VH, the data set delivers VH, VV"):
        start(build_classifier(VIT, 5), tmp_path / "x.pth")


def test_the_same_bands_in_another_order_can_be_put_into_order(tmp_path: Path) -> None:
    torch.save({"model": mae_state(), "data": {"bands": ["VV", "VH"]}}, tmp_path / "x.pth")
    model: Any = build_classifier(VIT, 5)
    start(model, tmp_path / "x.pth", adapt_bands=True)
    weight = mae_state()["patch_embed.proj.weight"]
    assert torch.equal(model.encoder.patch_embed.proj.weight, weight[:, [1, 0]])
    torch.save({"model": mae_state(), "data": {"bands": ["B04", "B03"]}}, tmp_path / "optical.pth")
    start(model, tmp_path / "optical.pth", adapt_bands=True)
    torch.testing.assert_close(model.encoder.patch_embed.proj.weight[:, 0].detach(), weight.mean(dim=1))


@pytest.mark.parametrize(
    ("settings", "state", "message"),
    [
        (VIT, {"blocks.0.surprise": torch.zeros(2)}, r"left over: encoder\.blocks\.0\.surprise \(2,\)"),
        (ModelSettings("vit_tiny_patch16_224", 128, 2), {"norm.weight": torch.zeros(7)}, r"shape of encoder\.norm"),
        (ModelSettings("vit_small_patch16_224", 32, 2), {}, "has width 192, 12 blocks.*has width 384, 12 blocks"),
        (ModelSettings("resnet10t", 64, 2), {}, "shares no entry with resnet10t"),
        (ModelSettings("mixmim_tiny", 128, 2), {}, "is a ViT .*but the model is mixmim_tiny"),
    ],
)
def test_a_file_of_another_model_is_one_clear_sentence(
    settings: ModelSettings, state: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_pretrained(build_classifier(settings, 5), mae_state(**state), source="x.pth")


def test_a_mixmim_checkpoint_is_no_vit() -> None:
    state = MixMIM(**model_config("mixmim_tiny")).state_dict()
    with pytest.raises(UserError, match="x.pth is a MixMIM encoder, the model is vit_tiny_patch16_224"):
        load_pretrained(build_classifier(VIT, 5), state, source="x.pth")


@pytest.mark.parametrize("head", ["upernet", "fused"])
@pytest.mark.parametrize("name", ["mixmim_tiny", "resnet10t"])
def test_segmentation_head_keeps_everything_but_a_last_layer_of_other_classes(name: str, head: str) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(name, 128, 2, head=head)
    satlas, floods = build_segmenter(settings, 5), build_segmenter(settings, 2)
    fresh = {key: value.clone() for key, value in floods.state_dict().items() if key.startswith("head.classifier")}
    done = load_pretrained(floods, satlas.state_dict(), source="satlas.pth")
    assert set(done.fresh) == set(done.dropped) == set(fresh)
    for key, value in floods.state_dict().items():
        assert torch.equal(value, fresh.get(key, satlas.state_dict()[key])), key
    same = load_pretrained(build_segmenter(settings, 5), satlas.state_dict(), source="satlas.pth")
    assert same.fresh == ()


def test_a_head_of_another_kind_is_named() -> None:
    state = build_segmenter(ModelSettings("resnet10t", 64, 2), 5).state_dict()
    model = build_segmenter(ModelSettings("resnet10t", 64, 2, head="fused"), 5)
    with pytest.raises(UserError, match=r"another kind of head.*--new_head"):
        load_pretrained(model, state, source="x.pth")
    assert "head.classifier.weight" in load_pretrained(model, state, source="x.pth", new_head=True).fresh


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: ModelSettings, *, pretrained: bool = False) -> Any:
        raise OSError("Name or service not known")

    model = build_classifier(VIT, 5)
    monkeypatch.setattr(sarwmix.models.backbones, "create_encoder", refuse)
    with pytest.raises(UserError, match=r"Name or service not known.*huggingface.co/timm/vit_tiny.*--finetune FILE"):
        load_timm_weights(model, VIT)
    with pytest.raises(UserError, match="--pretrained fetches timm's weights"):
        load_timm_weights(
            build_classifier(ModelSettings("mixmim_tiny", 128, 2), 5), ModelSettings("mixmim_tiny", 128, 2)
        )


def test_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build_classifier(VIT, 5)
    torch.manual_seed(9)
    downloaded: Any = build_classifier(VIT, 3).encoder
    monkeypatch.setattr(sarwmix.models.backbones, "create_encoder", lambda settings, pretrained=False: downloaded)
    load_timm_weights(model, VIT)
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in downloaded.state_dict().items())


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("module.encoder_q.", ("module.encoder_k.norm.weight", "module.queue", "module.queue_ptr")),
        ("module.base_encoder.", ("module.momentum_encoder.norm.weight", "module.predictor.0.weight")),
        ("model.", ("criterion.weight",)),
        ("model.encoder.", ("model.decoder.weight", "model.head.weight", "criterion.weight")),
        ("backbone.", ("backbone_momentum.norm.weight", "projection_head.layers.0.weight")),
        ("_orig_mod.", ()),
        ("module._orig_mod.", ()),
        ("model._orig_mod.", ("criterion.weight",)),
    ],
)
def test_wrappers_of_other_projects_load_to_equal_values(tmp_path: Path, prefix: str, others: tuple[str, ...]) -> None:
    state = encoder_state(seed=3)
    wrapped = {prefix + name: value for name, value in state.items()}
    wrapped[prefix + "head.0.weight"] = torch.ones(4, 192)  # MoCo's projector stands where timm's classifier is
    wrapped |= dict.fromkeys(others, torch.full((3,), 7.0))
    path = tmp_path / "wrapped.ckpt"
    torch.save({"state_dict": wrapped, "epoch": 3}, path)

    model: Any = build_classifier(VIT, 3)
    start(model, path)

    loaded = model.encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert len(read_weights(str(path))["left_out"]) == len(others)


def test_buffers_of_fgmae_are_left_out_by_name(tmp_path: Path) -> None:
    buffers = {
        "hog.weight_x": torch.zeros(2, 1, 3, 3),
        "hog.weight_y": torch.zeros(2, 1, 3, 3),
        "hog.gkern": torch.zeros(1, 1, 16, 16),
    }
    path = tmp_path / "fgmae.pth"
    torch.save({"model": mae_state(**buffers)}, path)
    model = build_classifier(VIT, 3)

    done = load_pretrained(model, read_weights(str(path))["model"], source="x.pth")

    assert set(buffers) <= set(done.dropped)


def test_passports_are_enforced(tmp_path: Path) -> None:
    rows = known_weights()
    assert len({row.pattern for row in rows}) == len(rows) >= 12
    for row in rows:
        assert len(row.mean) == len(row.std) == len(row.bands), row.pattern
    version = {name: tmp_path / f"resnet10t-s1-{name}" for name in ("v0.1.1", "v0.2.0")}
    settings = ModelSettings("resnet10t", 64, 2)
    state = {key: value.clone() for key, value in build_classifier(settings, 3).encoder.state_dict().items()}
    for folder in version.values():
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
    model: Any = build_classifier(settings, 3)
    options = {"bands": BANDS, "statistics": STATISTICS}
    load_start(model, str(version["v0.1.1"] / "model.safetensors"), **options)
    assert torch.equal(model.encoder.conv1[0].weight, state["conv1.0.weight"])
    with pytest.raises(UserError, match=r"version 0.2.0, which saw VV, VH, in this order; the data set deliver"):
        load_start(model, str(version["v0.2.0"] / "model.safetensors"), **options)
    load_start(model, str(version["v0.2.0"] / "model.safetensors"), weight_bands="VV,VH", **options)
    assert torch.equal(model.encoder.conv1[0].weight, state["conv1.0.weight"][:, [1, 0]])
    # A known name with other content is not the known file.
    save_file(state, tmp_path / "resnet50_sentinel1_all_moco-906e4356.pth")
    assert find_passport(tmp_path / "resnet50_sentinel1_all_moco-906e4356.pth") is None


def test_exports_carry_their_passport(tmp_path: Path) -> None:
    data = {"bands": ["VV", "VH"], "unit": "dB", "statistics": {"mean": [-12.0, -19.0], "std": [5.0, 5.0]}}
    path = tmp_path / "model.safetensors"
    save_file(encoder_state(), path, metadata={"format": "pt", "data": json.dumps(data)})
    assert read_weights(str(path))["data"] == data
    with pytest.raises(UserError, match="trained on bands VV, VH, the data set delivers VH, VV"):
        start(build_classifier(VIT, 5), path, weight_bands=None)
    save_file(encoder_state(), path)
    (tmp_path / "config.json").write_text(
        json.dumps({"format": "sarwmix-export/1", "data": data})
    )  # of earlier versions
    assert read_weights(str(path))["data"] == data


def test_dinov3_file_with_its_published_names(tmp_path: Path) -> None:
    settings = ModelSettings("vit_small_patch16_dinov3", 32, 2)
    torch.manual_seed(2)
    original: Any = build_classifier(settings, 3).eval()
    published = {}
    for name, value in original.encoder.state_dict().items():
        other = name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
        published[other.replace("gamma_2", "ls2.gamma")] = torch.randn_like(value) * 0.02
    for block in range(12):
        published[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(1152)
        published[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(1152)
    published |= {"rope_embed.periods": torch.ones(16), "mask_token": torch.zeros(1, 384)}
    torch.save(published, tmp_path / "dinov3.pth")
    model: Any = build_classifier(settings, 3)
    start(model, tmp_path / "dinov3.pth")
    assert torch.equal(model.encoder.reg_token, published["storage_tokens"])
    assert torch.equal(model.encoder.blocks[11].gamma_2, published["blocks.11.ls2.gamma"])
    assert torch.equal(model.encoder.blocks[3].attn.qkv.weight, published["blocks.3.attn.qkv.weight"])
    done = load_pretrained(model, published, source="x.pth")
    assert {"blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias_mask", "rope_embed.periods"} <= set(done.dropped)
    published["blocks.0.attn.qkv.bias"][3] = 1.0
    with pytest.raises(UserError, match="ends with _qkvb"):
        load_pretrained(model, published, source="x.pth")


def test_torchvision_swin_computes_the_same() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(4)
    theirs = torchvision.models.swin_t().eval()
    model: Any = build_classifier(ModelSettings("swin_tiny_patch4_window7_224", 224, 3), 5).eval()
    done = load_pretrained(model, theirs.state_dict(), source="swin_t.pth")
    assert set(done.dropped) == {"head.weight", "head.bias"}
    images = torch.randn(1, 3, 224, 224)
    theirs.head = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), theirs(images), atol=1e-4, rtol=1e-4)
