"""Plain masked autoencoders: what is hidden, what the loss counts, and that fine-tuning takes the encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
from sarwmix.inference.model import open_model
from sarwmix.models.backbones import build_classifier
from sarwmix.models.loading import load_start
from sarwmix.models.mae import PATCH, MaskedViT
from sarwmix.models.settings import ModelSettings
from util.checkpoint import load_checkpoint
from util.errors import UserError


@pytest.fixture(scope="module")
def model() -> MaskedViT:
    torch.manual_seed(0)
    return MaskedViT("mae_vit_tiny", img_size=64)  # 16 patches


def test_each_sample_hides_its_own_patches(model: MaskedViT) -> None:
    mask = model.draw_mask(0.75, torch.Generator().manual_seed(1), samples=5)
    assert mask.sum(dim=1).tolist() == [12.0] * 5
    assert len({tuple(row.tolist()) for row in mask}) > 1
    assert torch.equal(mask, model.draw_mask(0.75, torch.Generator().manual_seed(1), samples=5))
    prepared = model.prepare_mask(mask)
    assert prepared.visible == 4
    for row in range(5):
        assert not mask[row, prepared.order[row, :4]].any()
        assert prepared.order[row, prepared.back[row]].tolist() == list(range(16))
    with pytest.raises(UserError, match="mask ratio 0.01 masks 0 of 16 patches"):
        model.draw_mask(0.01)
    with pytest.raises(ValueError, match="as many patches"):
        model.prepare_mask(torch.eye(16)[:2].cumsum(1))


def test_hidden_pixels_are_never_seen_and_tokens_return_to_their_places(model: MaskedViT) -> None:
    mask = model.prepare_mask(model.draw_mask(0.5, torch.Generator().manual_seed(0), samples=2))
    images = torch.randn(2, 2, 64, 64)
    altered = model.images_of(torch.where(mask.hidden[:, :, None], 9.0, model.cells_of(images)))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        assert torch.equal(model.encode(images, mask), model.encode(altered, mask))
        # the decoder's input: visible tokens where they came from, else the mask token
        hook = model.decoder_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        latent = torch.randn(2, 1 + mask.visible, model.encoder.embed_dim)
        model.decode(latent, mask)
        hook.remove()
        tokens = (seen[0] - model.decoder_pos_embed)[:, 1:]
        embedded = model.decoder_embed(latent)[:, 1:]
    for sample in range(2):
        shown = 0
        for patch in range(16):
            wanted = model.mask_token[0, 0]
            if not mask.hidden[sample, patch]:  # visible ones keep their order
                wanted, shown = embedded[sample, shown], shown + 1
            torch.testing.assert_close(tokens[sample, patch], wanted)


@pytest.mark.parametrize("kind", ["none", "pixels", "cells"])
def test_loss_against_float64_by_hand(model: MaskedViT, kind: str) -> None:
    rng = np.random.default_rng(0)
    images, rec = rng.normal(size=(2, 2, 64, 64)), rng.normal(size=(2, 16, PATCH * PATCH * 2))
    mask = model.draw_mask(0.5, torch.Generator().manual_seed(3), samples=2)
    weights = None
    full = np.ones_like(images)
    if kind == "pixels":
        weights = full = rng.random(images.shape) * (rng.random(images.shape) > 0.1)
    if kind == "cells":  # (B, cells of 32 px row-major, bands)
        weights = 1 + rng.random((2, 4, 2))
        full = weights.reshape(2, 2, 2, 2).transpose(0, 3, 1, 2).repeat(32, 2).repeat(32, 3)
    total = count = 0.0
    for sample in range(2):
        for patch in range(16):
            if not mask[sample, patch]:
                continue
            top, left = 16 * (patch // 4), 16 * (patch % 4)
            for band in range(2):
                weight = full[sample, band, top : top + 16, left : left + 16]
                goal = images[sample, band, top : top + 16, left : left + 16]
                error = rec[sample, patch].reshape(16, 16, 2)[..., band] - goal
                total, count = total + (weight * error**2).sum(), count + (weight > 0).sum()
    given = None if weights is None else torch.tensor(weights)
    found = model.losses(torch.tensor(rec), torch.tensor(images), given, mask > 0.5)[0]
    assert float(found) == pytest.approx(total / count, rel=1e-12)


def test_standardised_patches(model: MaskedViT) -> None:
    """norm_pix_loss: a patch's level and contrast do not matter; visible patches do not count."""
    images = torch.randn(1, 2, 64, 64)
    mask = torch.ones(1, 16).bool()
    mask[0, 0] = False
    goal = model.cells_of(images)
    rec = (goal - goal.mean(-1, keepdim=True)) / (goal.var(-1, keepdim=True) + 1e-6).sqrt()
    rec[0, 0] = 100.0
    standardised = MaskedViT("mae_vit_tiny", img_size=64, norm_pix_loss=True)
    for factor, shift in ((1.0, 0.0), (3.0, -7.0)):
        assert float(standardised.losses(rec, factor * images + shift, None, mask)[0]) < 1e-6


def call(monkeypatch: pytest.MonkeyPatch, script: object, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    script.main()  # type: ignore[attr-defined]


def test_entry_scripts_train_it_resume_draw_and_fine_tune(
    demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--dataset", "demo", "--data_path", demo_root, "--model", "mae_vit_tiny", "--batch_size", 4]
    common += ["--num_workers", 0, "--device", "cpu", "--warmup_epochs", 0, "--test_run"]
    whole, cut = tmp_path / "pre", tmp_path / "cut"
    words = [*common, "--epochs", 3, "--norm_pix_loss"]
    call(monkeypatch, main_pretrain, *words, "--stop_epoch", 2, "--output_dir", whole)
    assert json.loads((whole / "args.json").read_text())["mask_ratio"] == 0.75
    call(monkeypatch, main_pretrain, *words, "--stop_epoch", 1, "--output_dir", cut)
    call(monkeypatch, main_pretrain, *words, "--stop_epoch", 2, "--output_dir", cut, "--resume", "auto")
    losses = [
        [json.loads(line)["train_loss"] for line in (run / "log.txt").read_text().splitlines()] for run in (whole, cut)
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    call(monkeypatch, main_pretrain, *common, "--inference", whole / "checkpoint.pth", "--output_dir", whole)
    assert list((whole / "reconstructions").glob("*.png"))

    saved = load_checkpoint(whole / "checkpoint.pth")
    tuned = build_classifier(ModelSettings("mae_vit_tiny", 128, 2), num_classes=19)
    load_start(tuned, str(whole / "checkpoint.pth"), bands=("VH", "VV"), statistics=saved["data"]["statistics"])
    own, taken = tuned.state_dict(), [name for name in saved["model"] if name.startswith("encoder.")]
    assert len(taken) > 140
    assert all(torch.equal(own[name], saved["model"][name]) for name in taken)
    opened = open_model(whole / "checkpoint.pth")  # as extract_features.py and stress.py open it
    images = torch.randn(2, 2, 128, 128)
    with torch.no_grad():
        assert torch.equal(opened.model.forward_features(images), tuned.eval().forward_features(images))  # type: ignore[operator]
    words = [*common, "--epochs", 1, "--finetune", whole / "checkpoint.pth", "--protocol", "linear"]
    call(monkeypatch, main_finetune, *words, "--output_dir", tmp_path / "probe")
    assert (tmp_path / "probe" / "metrics.json").is_file()
