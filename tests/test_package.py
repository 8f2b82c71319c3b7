"""The package as others use it: built, installed without the checkout, imported from an empty folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in files:  # building writes into the source tree
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "-w",
        str(folder),
        str(folder / "source"),
        cwd=folder,
    )
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_what_is_needed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {
        "main_pretrain.py",
        "models_mixmim.py",
        "sarwmix/tables/published_results.csv",
        "util/CHECKSUMS.txt",
    } <= names
    wanted = {line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    listed = {
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")
    }
    assert len(listed) == len(wanted)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import sys; sys.path.insert(0, 'installed'); import sarwmix; from sarwmix import build_dataset, open_model, "
        "__version__; from sarwmix.reports.comparison import read_published; from util.checkpoint import "
        "released_checksums; print(sarwmix.__file__, len(read_published()) > 50, len(released_checksums()) > 0)"
    )
    said = run(sys.executable, "-c", program, cwd=tmp_path)
    assert str(tmp_path) in said
    assert said.split()[1:] == ["True", "True"]


def test_names_of_the_package_are_lazy() -> None:
    program = (
        "import sys, sarwmix; assert 'torch' not in sys.modules; print(sarwmix.__version__); "
        "sarwmix.build_dataset; assert 'torch' not in sys.modules"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT)[0].isdigit()
    program = "import sarwmix; sarwmix.nothing"
    assert (
        "no attribute 'nothing'"
        in subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stderr
    )


def test_torch_hub_opens_encoders_and_trained_models(tmp_path: Path) -> None:
    import torch

    from models_mixmim import MixMIM, model_config
    from util.checkpoint import save_checkpoint

    encoder = torch.hub.load(str(ROOT), "encoder", source="local", size="mixmim_tiny")
    assert encoder(torch.randn(2, 2, 128, 128)).shape == (2, 256)
    torch.manual_seed(3)
    pretrained = MixMIM(**model_config("mixmim_tiny"))
    statistics = {"mean": [-19.2, -12.5], "std": [5.4, 5.0], "p01": [-40.0, -30.0], "p99": [0.0, 0.0], "origin": "test"}
    data = {"dataset": "demo", "bands": ["VH", "VV"], "unit": "dB", "statistics": statistics}
    config = {"name": "mixmim_tiny", "img_size": 128, "norm_pix_loss": False}
    path = tmp_path / "checkpoint.pth"
    state = {"kind": "pretrain", "model_config": config, "data": data, "epoch": 0, "model": pretrained.state_dict()}
    save_checkpoint(path, state)
    loaded = torch.hub.load(str(ROOT), "encoder", source="local", checkpoint=str(path))
    weights = pretrained.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    opened = torch.hub.load(str(ROOT), "trained", str(path), source="local")
    assert opened.bands == ("VH", "VV")


def own_data_commands() -> list[list[str]]:
    """Commands of the first block of docs/own_data.md."""
    block = (ROOT / "docs" / "own_data.md").read_text().split("```bash\n")[1].split("```")[0]
    return [line.split("#")[0].split() for line in block.splitlines()]


def test_own_data_takes_at_most_eight_commands() -> None:
    lines = own_data_commands()
    assert len(lines) <= 8
    assert lines[0][:2] == ["pip", "install"]
    assert all(line[0] == "sarwmix" for line in lines[1:])


@pytest.mark.slow
def test_own_geotiffs_to_a_map_from_an_installed_package(wheel: Path, tmp_path: Path) -> None:
    """The page as it stands, in an empty folder; training is cut short by --test_run."""
    import numpy as np
    import rasterio

    from tests.conftest import clean_environment

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    work = tmp_path / "work"

    def write(path: Path, level: float, seed: int, side: int = 64) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        profile = {
            "driver": "GTiff",
            "height": side,
            "width": side,
            "count": 2,
            "dtype": "float32",
            "crs": "EPSG:32633",
        }
        with rasterio.open(path, "w", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **profile) as out:
            for number, (name, offset) in enumerate((("VV", 0.0), ("VH", -7.0)), start=1):
                out.write(random.normal(level + offset, 2, (side, side)).astype("float32"), number)
                out.set_band_description(number, name)

    for number in range(20):
        write(work / f"tiles/forest/{number}.tif", -9, number)
        write(work / f"tiles/water/{number}.tif", -19, 100 + number)
    write(work / "scene.tif", -12, 999, side=256)
    environment = clean_environment({"PYTHONPATH": str(tmp_path / "installed")})
    for _, *words in own_data_commands()[1:]:
        short = ["--num_workers", "0", "--test_run"] if words[0] in ("pretrain", "finetune") else []
        command = [sys.executable, "-m", "sarwmix", *words, *short]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (words, (done.stdout + done.stderr)[-3000:])
    assert (work / "exported" / "model.safetensors").is_file()
    with rasterio.open(next((work / "maps").glob("*.tif"))) as result:
        values = result.read()
    assert values.shape[0] == 2
    assert np.isfinite(values).any()
