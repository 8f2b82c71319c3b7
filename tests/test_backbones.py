"""Every kind of backbone with every head: gradients, maps, counts, names, depths of layers, frozen encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sarwmix.heads import FusedHead, LinearHead, LinearProbe, TaskModel, UnitConv1x1, UPerNetHead, count_trainable
from sarwmix.models.backbones import build_classifier, build_segmenter, last_four, pyramid_stages
from sarwmix.models.loading import load_trained
from sarwmix.models.settings import ModelSettings
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError
from util.optim import parameter_groups

# name, input size, width of the pooled features, channels of the pyramid, sides of the last blocks' maps
KINDS = [
    ("mixmim_tiny", 128, 256, (32, 64, 128, 256), (32, 16, 8, 4)),
    ("vit_tiny_patch16_224", 64, 192, (192,) * 4, (4,) * 4),
    ("vit_small_patch14_reg4_dinov2", 42, 384, (384,) * 4, (3,) * 4),
    ("resnet10t", 64, 512, (64, 128, 256, 512), (16, 8, 4, 2)),
    ("convnextv2_atto", 64, 320, (40, 80, 160, 320), (16, 8, 4, 2)),
    ("mobilevit_xxs", 64, 320, (24, 48, 64, 320), (16, 8, 4, 2)),
]
HEADS = {"linear": LinearHead, "bn_linear": LinearProbe, "upernet": UPerNetHead, "fused": FusedHead}
BANDS = ["VH", "VV", "B04"]


def build(settings: ModelSettings, classes: int = 5) -> TaskModel:
    """The model that the head's name belongs to; a head with weights that let gradients through."""
    make = build_segmenter if settings.head in ("upernet", "fused") else build_classifier
    model = make(settings, classes)
    if isinstance(model.head, LinearHead):
        torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize(("name", "side", "width", "channels", "blocks"), KINDS, ids=[kind[0] for kind in KINDS])
def test_every_kind_of_backbone(
    name: str, side: int, width: int, channels: tuple[int, ...], blocks: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, len(BANDS), side, side)
    for head, kind in HEADS.items():
        drop_rate = 0.0 if head == "bn_linear" else 0.1
        settings = ModelSettings(name, side, len(BANDS), drop_path_rate=0.1, drop_rate=drop_rate, head=head)
        model = build(settings)
        assert isinstance(model.head, kind)

        logits = model.train()(images)
        logits.square().mean().backward()
        assert logits.shape == ((2, 5, side, side) if head in ("upernet", "fused") else (2, 5))
        assert logits.dtype == torch.float32
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []

        model.eval()
        with torch.no_grad():
            expected = model(images)
            if head == "linear":
                assert model.forward_features(images).shape == (2, width)  # type: ignore[operator]
            if head == "upernet":
                shapes = [tuple(level.shape) for level in model.feature_pyramid(images)]  # type: ignore[operator]
                assert shapes == [
                    (2, c, max(1, side // s), max(1, side // s)) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
                ]
            if head == "fused":
                shapes = [tuple(level.shape) for level in model.last_blocks(images)]  # type: ignore[operator]
                assert shapes == [(2, c, edge, edge) for c, edge in zip(channels, blocks, strict=True)]

        checkpoint: dict[str, Any] = {
            "model": model.state_dict(),
            "model_config": settings.as_config(),
            "data": {"bands": BANDS},
            "classes": list("abcde"),
        }
        if head == "fused":  # one file a backbone: they are large
            save_checkpoint(tmp_path / "x.pth", checkpoint)
            checkpoint = load_checkpoint(tmp_path / "x.pth")
        again = build(ModelSettings.from_config(checkpoint["model_config"])).eval()
        load_trained(again, checkpoint, source="x.pth", classes=list("abcde"), bands=checkpoint["data"]["bands"])
        with torch.no_grad():
            torch.testing.assert_close(again(images), expected, rtol=0, atol=0)
        with pytest.raises(UserError, match=r"trained on bands VH, VV, B04, the data set delivers VV, VH, B04"):
            load_trained(again, checkpoint, source="x.pth", bands=["VV", "VH", "B04"])


VITS = [
    ("vit_small_patch16_224", 21_571_210, 21_574_675, 3_850, 7_315),
    ("vit_base_patch16_224", 85_609_738, 85_616_659, 7_690, 14_611),
    ("vit_large_patch16_224", 303_049_738, 303_058_963, 10_250, 19_475),
    ("vit_huge_patch14_224", 630_526_730, None, 12_810, None),
]


@pytest.mark.parametrize(("name", "eurosat", "bigearthnet", "probe_10", "probe_19"), VITS, ids=[row[0] for row in VITS])
def test_trainable_parameters_are_the_published_ones(
    name: str, eurosat: int, bigearthnet: int | None, probe_10: int, probe_19: int | None
) -> None:
    settings = ModelSettings(name, 224, 2)
    with torch.device("meta"):
        assert build_classifier(settings, 10).trainable() == eurosat
        probe = build_classifier(replace(settings, head="bn_linear"), 10)
        probe.freeze_encoder()
        assert probe.trainable() == probe_10
        if bigearthnet is not None:
            pooled = build_classifier(replace(settings, pool="avg"), 19)
            assert pooled.trainable() == bigearthnet
            assert "encoder.fc_norm.weight" in pooled.state_dict()
            pooled.head = LinearProbe(pooled.num_features, 19)
            assert count_trainable(pooled.head) == probe_19


def test_blocks_of_a_vit_and_stages_of_anything_else() -> None:
    assert pyramid_stages([16] * 12) == (3, 5, 7, 11)
    assert pyramid_stages([16] * 24) == (7, 11, 15, 23)
    assert pyramid_stages([14] * 32) == (9, 15, 20, 31)
    assert pyramid_stages([2, 4, 8, 16, 32]) == last_four([2, 4, 8, 16, 32]) == (1, 2, 3, 4)
    assert pyramid_stages([4, 4, 8, 16, 32]) == (1, 2, 3, 4)
    assert last_four([16] * 12) == (8, 9, 10, 11)
    assert last_four([16] * 3) == (0, 0, 1, 2)


def test_maps_of_a_vit_are_those_of_timm() -> None:
    torch.manual_seed(0)
    model: Any = build_segmenter(ModelSettings("vit_tiny_patch16_224", 64, 2), 3).eval()
    images = torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        plain = model.encoder.forward_intermediates(images, norm=True, intermediates_only=True)
        torch.testing.assert_close(model.last_blocks(images), plain[8:])
        pyramid = model.feature_pyramid(images)
    torch.testing.assert_close(pyramid[2], plain[7])  # stride 16 is the ViT's own
    torch.testing.assert_close(pyramid[3], torch.nn.functional.avg_pool2d(plain[11], 2))  # bilinear by 2 = mean of 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ModelSettings("vit_smal_patch16_224", 64, 2),
            "unknown model 'vit_smal_patch16_224'.*did you mean.*vit_small_patch16_224",
        ),
        (ModelSettings("mixmim_tny", 128, 2), "mixmim_tiny"),
        (ModelSettings("resnet-50", 64, 2), "did you mean resnet50"),
        (ModelSettings("qqqqqqqq", 64, 2), r"timm.list_models\(\)"),
        (ModelSettings("resnet50.nobody", 64, 2), "no weights 'nobody'; there are: .*a1_in1k"),
        (ModelSettings("vit_small_patch14_dinov2", 128, 2), "patches of 14 px.*--input_size 128.*choose 126 or 140"),
        (ModelSettings("mixmim_tiny", 100, 2), "multiple of 128"),
        (ModelSettings("resnet10t", 64, 2, pool="token"), "timm cannot build resnet10t .*global_pool token"),
        (ModelSettings("mixmim_tiny", 128, 2, pool="avg"), "--pool avg"),
        (ModelSettings("resnet10t", 64, 2, head="fused"), "--head fused does not classify"),
        (ModelSettings("mixmim_tiny", 128, 2, head="bn_linear", drop_rate=0.1), "--drop_rate 0.1 has no place"),
    ],
)
def test_what_cannot_be_built_is_said(settings: ModelSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_classifier(settings, 3)


@pytest.mark.parametrize("head", ["upernet", "fused"])
def test_an_encoder_that_cannot_norm_its_maps_labels_pixels(head: str) -> None:
    """timm's Hiera asserts that no norm is asked for."""
    torch.manual_seed(0)
    model = build_segmenter(ModelSettings("hiera_tiny_224", 64, 2, head=head), 3)
    assert model.training
    assert all(module.training for module in model.modules())
    logits = model(torch.randn(2, 2, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.normed is False
    assert build_segmenter(ModelSettings("vit_tiny_patch16_224", 64, 2, head=head), 3).normed is True


def test_an_encoder_without_maps_of_this_size_is_refused_when_built() -> None:
    with pytest.raises(UserError, match="maxvit_tiny_rw_224 gives no maps of images of 100 px .*divisible"):
        build_segmenter(ModelSettings("maxvit_tiny_rw_224", 100, 2, head="fused"), 3)


def test_heads_that_do_not_label_pixels() -> None:
    with pytest.raises(UserError, match="--head linear does not label pixels; choose one of upernet, fused"):
        build_segmenter(ModelSettings("mixmim_tiny", 128, 2, head="linear"), 3)


def test_classifier_of_the_fused_head_has_unit_gain() -> None:
    layer = UnitConv1x1(4, 3)
    maps = torch.randn(2, 4, 5, 5)
    torch.nn.init.normal_(layer.weight, std=7.0)
    expected = torch.nn.functional.conv2d(
        maps, (layer.weight / layer.weight.norm(dim=1, keepdim=True))[..., None, None]
    )
    torch.testing.assert_close(layer(maps), expected)
    model = build_segmenter(ModelSettings("resnet10t", 64, 2, head="fused"), 3)
    assert [name for name, _ in model.head.named_parameters() if name.startswith("classifier")] == ["classifier.weight"]


def test_upernet_does_not_train_on_single_images() -> None:
    model = build_segmenter(ModelSettings("resnet10t", 64, 2), 3)
    with pytest.raises(UserError, match="--batch_size 2"):
        model.train()(torch.randn(1, 2, 64, 64))
    assert model.eval()(torch.randn(1, 2, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("head", ["bn_linear", "fused"])
def test_a_frozen_encoder_neither_learns_nor_counts(head: str) -> None:
    model = build(ModelSettings("resnet10t", 64, 2, drop_path_rate=0.5, head=head))
    model.freeze_encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(torch.randn(4, 2, 64, 64)).square().mean().backward()
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, before[name]), name
    assert model.head.training
    assert not model.encoder.training  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, _ in model.named_parameters() if name.startswith("head.")
    ]
    assert count_trainable(model) == sum(p.numel() for p in model.head.parameters())


def scales(model: TaskModel) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_layer_decay_is_per_block_of_a_vit_and_per_stage_of_anything_else() -> None:
    vit = scales(build_classifier(ModelSettings("vit_tiny_patch16_224", 32, 2), 3))
    assert vit["head.weight"] == vit["encoder.norm.weight"] == 1
    assert vit["encoder.blocks.11.attn.qkv.weight"] == 0.5
    assert vit["encoder.blocks.0.mlp.fc1.bias"] == 0.5**12
    assert vit["encoder.pos_embed"] == vit["encoder.cls_token"] == vit["encoder.patch_embed.proj.weight"] == 0.5**13
    resnet = scales(build_classifier(ModelSettings("resnet10t", 64, 2), 3))
    assert (resnet["head.weight"], resnet["encoder.layer4.0.conv1.weight"]) == (1, 0.5)
    assert resnet["encoder.conv1.0.weight"] == 0.5**5
    segmenter = scales(build_segmenter(ModelSettings("convnextv2_atto", 64, 2), 3))
    assert segmenter["head.classifier.weight"] == 1
    assert segmenter["encoder.stages.3.blocks.0.conv_dw.weight"] == 0.5


def test_tokens_and_position_table_do_not_decay() -> None:
    model = build_classifier(ModelSettings("vit_tiny_patch16_224", 32, 2), 3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays: dict[str, float] = {}
    for group in parameter_groups(model, weight_decay=0.05, layer_decay=0.75):
        decays |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert decays["encoder.cls_token"] == decays["encoder.pos_embed"] == decays["encoder.norm.weight"] == 0
    assert decays["encoder.patch_embed.proj.weight"] == decays["head.weight"] == 0.05


def test_dropout_comes_before_the_last_layer_only_in_training() -> None:
    torch.manual_seed(0)
    head = LinearHead(1000, 3, drop_rate=0.5)
    torch.nn.init.ones_(head.weight)
    features: Tensor = torch.ones(200, 1000)
    assert torch.equal(head.eval()(features), torch.full((200, 3), 1000.0))
    found = head.train()(features)
    assert found.mean().item() == pytest.approx(1000, rel=0.02)
    assert found.std() > 10
