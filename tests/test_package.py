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
