"""scripts/describe.py on every kind of file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from models_mixmim import MixMIM, model_config
from sarwmix.data.packed import pack
from sarwmix.data.registry import build_dataset
from sarwmix.inference.describing import facts_of
from util.checkpoint import save_checkpoint


def test_files_of_every_kind(tmp_path: Path, demo_root: Path) -> None:
    statistics = {"mean": [-19.2, -12.5], "std": [5.4, 5.0], "p01": [-40.0, -30.0], "p99": [0.0, 0.0], "origin": "test"}
    data = {"dataset": "demo", "bands": ["VH", "VV"], "unit": "dB", "statistics": statistics}
    weights = MixMIM(**model_config("mixmim_tiny")).state_dict()
    config = {"name": "mixmim_tiny", "img_size": 128, "in_chans": 2}
    state = {"kind": "pretrain", "model_config": config, "data": data, "epoch": 3, "model": weights}
    save_checkpoint(tmp_path / "checkpoint.pth", state)
    facts = dict(facts_of(tmp_path))
    assert facts["file"] == "checkpoint.pth"
    assert facts["model"] == "mixmim_tiny, 2 bands, input 128 px"
    assert facts["bands"] == "VH, VV in dB (says the file)"
    assert facts["epoch"] == "3"

    torch.save(
        {"state_dict": {f"module.encoder_q.{name}": value for name, value in weights.items()}}, tmp_path / "m.pth"
    )
    facts = dict(facts_of(tmp_path / "m.pth"))
    assert facts["model"] == "mixmim_tiny, 2 bands"
    assert facts["bands"].startswith("not known: give --weight_bands")

    vit = {"patch_embed.proj.weight": torch.zeros(384, 2, 16, 16), "blocks.0.norm1.weight": torch.zeros(384)}
    save_file(vit, tmp_path / "B2_vits16_fgmae_ep99.safetensors")
    facts = dict(facts_of(tmp_path / "B2_vits16_fgmae_ep99.safetensors"))
    assert facts["model"] == "ViT small, 1 blocks, patches of 16 px, 2 bands"
    assert facts["bands"] == "VV, VH in dB (known file)"
    assert facts["clip"] == "mean -+ 2 std to 0..1"

    pack([build_dataset("demo", demo_root, "test")], tmp_path / "store", jobs=1)
    facts = dict(facts_of(tmp_path / "store"))
    assert facts["kind"] == "packed store"
    assert facts["bands"] == "VH, VV in dB"
