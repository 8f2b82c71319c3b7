"""Any polarisation in a folder of scenes: VH alone and HH with HV, from statistics to packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import Runner
from rasterio.transform import from_origin

from sarwmix.data import registry
from sarwmix.data.pixels import check_unit
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError

LEVELS = {"VH": -19.0, "VV": -12.0, "HV": -21.0, "HH": -11.0}


def write(folder: Path, *bands: str) -> Path:
    """Two scenes of 260 px with one file a band."""
    folder.mkdir()
    for number in range(2):
        for band in bands:
            rng = np.random.default_rng([number, len(band), ord(band[1])])
            values = rng.normal(LEVELS[band], 2, (260, 260)).astype(np.float32)
            place = from_origin(500000 + 9000 * number, 5400000, 10, 10)
            with rasterio.open(
                folder / f"scene{number}_{band}.tif", "w", driver="GTiff", width=260, height=260, count=1,
                dtype="float32", crs="EPSG:32633", transform=place,
            ) as file:  # fmt: skip
                file.write(values, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bands", [("VH",), ("HH", "HV")], ids="+".join)
def test_pretrained_checked_and_packed(bands: tuple[str, ...], run_script: Runner, tmp_path: Path) -> None:
    scenes, names = write(tmp_path / "scenes", *bands), ",".join(bands)
    options = ["--data_option", f"bands={names}", "--data_option", "tile=128"]
    where = ["--dataset", "s1_scenes", "--data_path", str(scenes)]
    run_script("scripts/compute_statistics.py", *where, "--out", str(tmp_path / "s.json"), "--jobs", "1", *options)
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["bands"] == list(bands)
    assert found["mean"] == pytest.approx([LEVELS[band] for band in bands], abs=0.05)
    out = tmp_path / "run"
    run_script(
        "main_pretrain.py", *where, "--bands", names, "--data_option", "tile=128", "--model", "mixmim_tiny",
        "--batch_size", "4", "--test_run", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0",
        "--statistics", str(tmp_path / "s.json"), "--output_dir", str(out), "--device", "cpu",
    )  # fmt: skip
    checkpoint = load_checkpoint(out / "checkpoint.pth")
    assert checkpoint["data"]["bands"] == list(bands)
    assert checkpoint["model"]["patch_embed.proj.weight"].shape[1] == len(bands)
    run_script("scripts/check_data.py", *where, "--out", str(tmp_path / "check"), *options)
    run_script("scripts/pack_dataset.py", *where, "--out", str(tmp_path / "packed"), "--splits", "train", *options)
    packed = registry.build_dataset("s1_scenes", tmp_path / "packed", "train", bands=names)
    plain = registry.build_dataset("s1_scenes", scenes, "train", bands=names, tile=128)
    np.testing.assert_allclose(packed[1]["image"], plain[1]["image"], atol=0.02)


@pytest.mark.slow
def test_a_model_of_vh_predicts_a_folder_of_vh(demo_root: Path, run_script: Runner, tmp_path: Path) -> None:
    scenes = write(tmp_path / "scenes", "VH")
    run_script(
        "main_finetune.py", "--dataset", "demo", "--data_path", demo_root, "--bands", "VH", "--model", "mixmim_tiny",
        "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8", "--num_workers", "0", "--device", "cpu",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    where = ["--scene", scenes, "--unit", "dB", "--out", tmp_path / "maps"]
    run_script("scripts/predict.py", "--model", tmp_path / "run", *where, "--device", "cpu")
    assert len(list((tmp_path / "maps").rglob("*.tif"))) >= 2


@pytest.mark.slow
def test_a_model_of_hh_and_hv_predicts_a_folder_of_them(demo_root: Path, run_script: Runner, tmp_path: Path) -> None:
    """No labelled data of the registry have HH and HV: a model of two bands is told that they are its own."""
    run_script(
        "main_finetune.py", "--dataset", "demo", "--data_path", demo_root, "--model", "mixmim_tiny", "--test_run",
        "--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint_best.pth")
    checkpoint["data"] = {**checkpoint["data"], "bands": ["HH", "HV"]}
    save_checkpoint(tmp_path / "hh_hv.pth", checkpoint)
    where = ["--scene", write(tmp_path / "scenes", "HH", "HV"), "--unit", "dB", "--out", tmp_path / "maps"]
    run_script("scripts/predict.py", "--model", tmp_path / "hh_hv.pth", *where, "--device", "cpu")
    assert list((tmp_path / "maps").rglob("*.tif"))
    others = ["--scene", write(tmp_path / "others", "VH", "VV"), "--unit", "dB", "--out", tmp_path / "none"]
    refused = run_script(
        "scripts/predict.py", "--model", tmp_path / "hh_hv.pth", *others, "--device", "cpu", check=False
    )
    assert refused.returncode == 2
    assert "HH" in refused.stderr


def test_the_remedy_for_one_polarisation_is_named(tmp_path: Path) -> None:
    for name, bands in (("vh", ("VH",)), ("h", ("HH", "HV"))):
        with pytest.raises(UserError, match="bands=VH"):
            registry.build_dataset("s1_scenes", write(tmp_path / name, *bands), "train")
    data = registry.build_dataset("s1_scenes", tmp_path / "vh", "train", bands="VH", tile=128)
    assert data[0]["image"].shape == (1, 128, 128)
    assert data[0]["image"].mean().item() == pytest.approx(LEVELS["VH"], abs=0.1)


def test_statistics_follow_the_bands() -> None:
    spec = registry.get_spec("s1_scenes", "HH,HV")
    assert spec.bands == ("HH", "HV")
    assert spec.statistics["benv2"].mean == (-12.5144, -19.1966)
    assert "compute your own" in spec.statistics["benv2"].origin
    assert registry.get_spec("s1_scenes", "VH").statistics["benv2"].mean == (-19.1966,)
    with pytest.raises(UserError, match="no band LH"):
        registry.get_spec("s1_scenes", "LH")


@pytest.mark.parametrize(("bands", "levels"), [(("VV", "VH"), (-19, -12)), (("HV", "HH"), (-10, -16))])
def test_swapped_bands_are_seen_in_every_order(bands: tuple[str, str], levels: tuple[float, float]) -> None:
    pixels = np.random.default_rng(0).normal(0, 2, (2, 500)) + np.array(levels)[:, None]
    assert "may be swapped" in (check_unit(pixels.astype(np.float32), "dB", "x", bands) or "")
    assert check_unit(pixels[::-1].astype(np.float32), "dB", "x", bands) is None
