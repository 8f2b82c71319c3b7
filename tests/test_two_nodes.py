"""Two machines on one: network namespaces joined by a cable, each with a host name and address of its own.

`scripts/qsub_run.sh` runs on the first with a stand-in $PBS_NODEFILE; mpirun reaches the second through a stand-in for
ssh. Everything else is real: the daemons, MPI, the rendezvous over the cable, gloo, training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment, mpirun_command

from util.checkpoint import load_checkpoint

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
FLAGS = ["--batch_size", "4", "--num_workers", "0", "--warmup_epochs", "1", "--lr", "1e-3", "--save_every", "1"]

ENTER = """#!/bin/bash
# enter HOST COMMAND: run the command on that machine (its network, name and /etc/hosts)
exec ip netns exec "{prefix}$1" unshare --uts --mount bash -c \\
    'hostname "$0"; mount --bind {folder}/hosts /etc/hosts; exec bash -c "$1"' "$1" "$2"
"""
SSH = """#!/bin/bash
# in place of ssh: [options] HOST COMMAND...
while [[ "$1" == -* ]]; do shift; done
host="$1"; shift
echo "$host" >>{folder}/reached
exec {folder}/enter "$host" "$*"
"""

Enter = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Enter]:
    """Machines node1 (10.77.0.1) and node2 (10.77.0.2); call to run a shell command on node1."""
    prefix = f"sarw{os.getpid()}-"

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if not shutil.which("ip") or not shutil.which("unshare") or not ip("netns", "add", f"{prefix}node1"):
        pytest.skip("network namespaces are not allowed here (they need root and iproute2)")
    try:
        ip("netns", "add", f"{prefix}node2")
        ip("link", "add", "cable1", "netns", f"{prefix}node1", "type", "veth", "peer", "name", "cable2",
           "netns", f"{prefix}node2")  # fmt: skip
        for number in ("1", "2"):
            inside = ("-n", f"{prefix}node{number}")
            ip(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", f"cable{number}")
            ip(*inside, "link", "set", "lo", "up")
            if not ip(*inside, "link", "set", f"cable{number}", "up"):
                pytest.skip("network cables between namespaces are not allowed here")
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
        for name, text in (("enter", ENTER), ("ssh", SSH)):
            (tmp_path / name).write_text(text.format(prefix=prefix, folder=tmp_path))
            (tmp_path / name).chmod(0o755)

        def run(command: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
            environment = clean_environment({"PRTE_MCA_plm_ssh_agent": str(tmp_path / "ssh"), **env})
            return subprocess.run(
                [str(tmp_path / "enter"), "node1", command], env=environment, cwd=ROOT, capture_output=True, text=True,
                timeout=timeout,
            )  # fmt: skip

        yield run
    finally:
        for number in ("1", "2"):
            ip("netns", "del", f"{prefix}node{number}")


def test_qsub_run_on_two_nodes_equals_two_processes_on_one(machines: Enter, demo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("node1\nnode2\n")
    python = tmp_path / "python"  # the launcher's python, with the small model of the fault tests
    python.write_text(
        f'#!/bin/bash\nshift\necho "$(hostname) $FROM_SITE" >>{tmp_path}/ran\n'
        f'exec {sys.executable} {PROGRAM} "{{}}" "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "site.env").write_text("export FROM_SITE=ib0\n")
    settings = {
        "PBS_JOBID": "12.pbs1", "PBS_ENVIRONMENT": "PBS_BATCH", "SITE_FILE": str(tmp_path / "site.env"),
        "PBS_NODEFILE": str(tmp_path / "nodes"), "GPUS_PER_NODE": "1", "PYTHON": str(python), "DATASET": "demo",
        "DATA_PATH": str(demo_root), "MODEL": "mixmim_tiny", "EPOCH": "2", "OUT": str(tmp_path / "two"),
        "MPIRUN": mpirun_command(1)[0],
    }  # fmt: skip
    done = machines(f"bash scripts/qsub_run.sh -- {' '.join(FLAGS)}", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrain on 2 node(s) x 1 process(es)" in done.stdout
    assert sorted((tmp_path / "ran").read_text().splitlines()) == ["node1 ib0", "node2 ib0"]
    assert (tmp_path / "reached").read_text().split() == ["node2"]

    command = [*mpirun_command(2), sys.executable, PROGRAM, "{}", "--dataset", "demo", "--data_path", str(demo_root)]
    command += [*FLAGS, "--model", "mixmim_tiny", "--epochs", "2", "--output_dir", str(tmp_path / "one")]
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_node_that_fails_ends_the_job(machines: Enter, demo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("node1\nnode2\n")
    fault = '{\\"kind\\": \\"kill\\", \\"rank\\": 1, \\"batch\\": 5}'
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} {PROGRAM} "{fault}" "$@"\n')
    python.chmod(0o755)
    settings = {
        "PBS_NODEFILE": str(tmp_path / "nodes"), "GPUS_PER_NODE": "1", "PYTHON": str(python), "DATASET": "demo",
        "DATA_PATH": str(demo_root), "MODEL": "mixmim_tiny", "OUT": str(tmp_path / "two"),
        "MPIRUN": mpirun_command(1)[0],
    }  # fmt: skip
    done = machines(f"bash scripts/qsub_run.sh -- {' '.join(FLAGS)}", timeout=120, **settings)
    assert done.returncode not in (0, 75)
    assert "ended with exit code" in done.stdout
