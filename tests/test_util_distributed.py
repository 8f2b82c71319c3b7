"""Processes: what the environment says, and real mpirun and torchrun groups (gloo, CPU)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment, mpirun_command

from util import cli, distributed, errors
from util.distributed import FlagExchange, Processes, first_host, setup_processes
from util.errors import StoppedEarly, UserError
from util.signals import StopRequest

# A program that exercises every collective, and then misbehaves as asked on rank 1.
PROGRAM = """
import os, signal, sys, time
import numpy as np
from util.distributed import FlagExchange, setup_processes
from util.errors import UserError
from util.cli import run_cli

def main():
    options = dict(item.split("=") for item in sys.argv[2:])
    if "world_size" in options: options["world_size"] = int(options["world_size"])
    if "port" in options: options["port"] = int(options["port"])
    if "dist_on_itp" in options: options["dist_on_itp"] = True
    p = setup_processes(device="cpu", **options)
    n, mode = p.world_size, sys.argv[1]
    if mode == "all refuse": raise UserError("no such folder: x")
    if p.rank == 1:
        if mode == "one refuses": raise UserError("disk 7 is missing")
        if mode == "exception": raise ValueError("boom")
        if mode == "exit": os._exit(9)
        if mode == "sys.exit": sys.exit(0)
        if mode == "kill": os.kill(os.getpid(), signal.SIGKILL)
    assert p.all_reduce_sum({"a": p.rank, "b": 1}) == {"a": n * (n - 1) / 2, "b": n}
    assert p.all_reduce_mean({"a": p.rank}) == {"a": (n - 1) / 2}
    assert p.maximum([p.rank, 0]) == [n - 1, 0]
    arrays = p.all_gather_arrays(np.arange(p.rank * 3, dtype=np.int16).reshape(p.rank, 3))
    assert [a.shape for a in arrays] == [(r, 3) for r in range(n)] and arrays[-1].dtype == np.int16
    assert np.array_equal(arrays[-1].ravel(), np.arange((n - 1) * 3))
    assert [a.shape for a in p.all_gather_arrays(np.zeros((0, 2)))] == [(0, 2)] * n
    assert p.broadcast_object({"from": p.rank}) == {"from": 0}
    assert p.all_gather_objects(p.rank) == list(range(n))
    flags = FlagExchange(p, 2)
    assert flags.post([p.rank, 0]) == [0, 0]
    assert flags.post([0, 0]) == [n - 1, 0]
    assert flags.collect() == [0, 0]
    p.barrier()
    p.close()
    print(f"rank {p.rank}/{n} {p.launcher} {p.backend}", flush=True)
    return 75 if mode == "preempted" else 0

run_cli(main)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(distributed.os.environ):
        if re.match(r"OMPI_|PMIX_|PMI_|SLURM_|TORCHELASTIC|RANK$|WORLD_SIZE$|LOCAL_|MASTER_", name):
            monkeypatch.delenv(name)
    yield
    cli.set_failure_hook(None)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def _run(command, timeout=60, **env):
    environment = clean_environment(env)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------------------------------------ single process


def test_single_process_needs_nothing():
    p = setup_processes(device="cpu")
    assert (p.rank, p.world_size, p.backend, p.launcher) == (0, 1, "none", "single")
    assert p.describe() == "1 process on cpu"
    assert p.all_reduce_mean({"a": 2}) == {"a": 2.0}
    assert p.maximum([True, 3]) == [1, 3]
    assert p.broadcast_object("x") == "x"
    assert p.all_gather_objects("x") == ["x"]
    assert np.array_equal(p.all_gather_arrays(np.arange(3))[0], np.arange(3))
    flags = FlagExchange(p, 2)
    assert flags.post([1, 0]) == [1, 0]
    assert flags.post([0, 0]) == [0, 0]
    assert flags.collect() == [0, 0]
    p.barrier()
    p.close()


@pytest.mark.parametrize(
    ("options", "environment", "text"),
    [
        ({"world_size": 8}, {}, "--world_size 8, but 1 processes"),
        ({"device": "gpu"}, {}, "'gpu' is not a device"),
        ({"device": "meta"}, {}, "not supported"),
        ({"dist_url": "http://x"}, {"RANK": "0", "WORLD_SIZE": "2"}, "expected auto, env:// or tcp"),
        ({"dist_url": "tcp://x:y"}, {"RANK": "0", "WORLD_SIZE": "2"}, "expected auto, env:// or tcp"),
        ({"dist_url": "tcp://localhost:1"}, {}, "RANK"),
        ({}, {"RANK": "zero"}, "RANK is 'zero'"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"dist_on_itp": True}, {}, "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_contradictions_are_refused(monkeypatch, options, environment, text):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(text)):
        setup_processes(**{"device": "cpu", **options})


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        setup_processes(device="cuda")
    assert setup_processes(device="auto").device.type == "cpu"


@pytest.mark.parametrize(
    ("local_rank", "local_size", "gpus", "visible", "expected"),
    [
        (1, 2, 2, (), 1),
        (1, 2, 8, ("0,1", "0,1"), 1),
        (1, 2, 1, ("GPU-a", "GPU-b"), 0),  # the queue shows each process its own GPU
        (1, 4, 2, ("0,1", "0,1", "2,3", "2,3"), 1),  # srun --gpu-bind shows two processes two GPUs each
        (2, 4, 2, ("0,1", "0,1", "2,3", "2,3"), 0),
        (1, 2, 2, ("0,1", "2,3"), 0),
        (0, 3, 2, ("0,1", "0,1", "0,1"), None),
        (0, 3, 2, (), None),
        (2, 3, 2, (), None),
    ],
)
def test_gpu_by_local_rank(monkeypatch, local_rank, local_size, gpus, visible, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    start = distributed._Start("mpi", local_rank, local_size, local_rank, local_size, visible=visible)
    if expected is None:
        with pytest.raises(UserError, match=f"{local_size} processes .* but {gpus} GPUs"):
            distributed._choose_device("auto", start)
    else:
        assert distributed._choose_device("cuda", start) == torch.device("cuda", expected)
        with pytest.raises(UserError, match="use --device cuda"):
            distributed._choose_device("cuda:0", start)


def test_slurm_environment(monkeypatch):
    values = {"STEP_NUM_TASKS": "16", "PROCID": "9", "LOCALID": "1", "STEP_TASKS_PER_NODE": "8(x2)"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    start = distributed._find_start("auto", None, False)
    assert (start.launcher, start.rank, start.world_size, start.local_rank, start.local_world_size) == (
        "slurm", 9, 16, 1, 8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "host"),
    [("a003", "a003"), ("a[003-007,9],b1", "a003"), ("a[5]", "a5"), ("n1,n2", "n1"), ("x-[1,2]", "x-1")],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_threads_are_shared_among_local_ranks(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distributed.limit_threads(1)
    distributed.limit_threads(8)
    distributed.limit_threads(100)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed.limit_threads(8)
    assert chosen == [8, 1]


def test_lost_peer_is_told_apart_from_an_error_of_ours(monkeypatch):
    said = []
    processes = Processes(rank=0, world_size=2)
    monkeypatch.setattr(Processes, "abort", lambda self, message, code: said.append((message, code)))
    hook = distributed._FailureHook(processes)
    hook("Traceback ...\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1234", 1)
    hook("Traceback ...\nKeyError: 'x'", 1)
    assert "lost contact with another process" in said[0][0]
    assert [code for _, code in said] == [errors.EXIT_LOST, 1]


# ------------------------------------------------------------------------------------------------ real processes


@pytest.mark.mpi
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_mpirun(program, count):
    done = _run([*mpirun_command(count), sys.executable, program, "ok"])
    assert done.returncode == 0, done.stderr
    expected = [f"rank {rank}/{count} mpi gloo" for rank in range(count)]
    assert sorted(re.findall(r"rank \d/\d mpi gloo", done.stdout)) == expected


@pytest.mark.mpi
def test_torchrun(program):
    torchrun = Path(sys.executable).parent / "torchrun"
    done = _run([str(torchrun), "--standalone", "--nproc-per-node", "2", program, "ok"])
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d/2 torchrun gloo", done.stdout)) == [f"rank {r}/2 torchrun gloo" for r in (0, 1)]


@pytest.mark.mpi
@pytest.mark.slow
def test_two_jobs_at_once_do_not_collide(program):
    command = [*mpirun_command(2), sys.executable, program, "ok"]
    jobs = [
        subprocess.Popen(command, env=clean_environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=90)[0].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs


@pytest.mark.mpi
def test_dist_on_itp_and_tcp_without_mpi4py(program):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = _run(
        [*mpirun_command(2), sys.executable, program, "ok", "dist_on_itp=1"],
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("itp gloo") == 2


@pytest.mark.mpi
@pytest.mark.slow
def test_slurm_without_pmix(program):
    """What plain srun sets for two tasks on this machine."""
    environment = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": str(time.time_ns() % 100000), "SLURM_STEP_ID": "0",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, program, "ok"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=clean_environment({**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=90)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "rank 0/2 slurm gloo" in outputs[0]


@pytest.mark.mpi
def test_manual_tcp_and_a_port_in_use(program):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _run([*mpirun_command(2), sys.executable, program, "ok", f"port={port}"])
        assert done.returncode == 2
        assert f"cannot listen on port {port}" in done.stderr
    arguments = [sys.executable, program, "ok", f"dist_url=tcp://127.0.0.1:{port}", "world_size=2"]
    other = subprocess.Popen(arguments, env=clean_environment({"RANK": "1"}), cwd=ROOT, stdout=subprocess.DEVNULL)
    done = _run(arguments, RANK="0")
    assert done.returncode == 0, done.stderr
    assert other.wait(30) == 0
    assert "rank 0/2 manual gloo" in done.stdout


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [
        ("all refuse", 2, "error: no such folder: x"),
        pytest.param("one refuses", 2, "error: disk 7 is missing", marks=pytest.mark.slow),
        ("exception", 1, "ValueError: boom"),
        pytest.param("exit", None, "", marks=pytest.mark.slow),
        pytest.param("sys.exit", 4, "left in the middle of the run", marks=pytest.mark.slow),
        ("kill", None, ""),
        ("preempted", 75, ""),
    ],
)
def test_one_failing_rank_ends_all(program, mode, code, text):
    began = time.monotonic()
    done = _run([*mpirun_command(2), sys.executable, program, mode])
    assert done.returncode != 0
    assert code is None or done.returncode == code, done.stderr
    assert text in done.stderr
    assert time.monotonic() - began < 45
    if mode == "all refuse":  # said once, by rank 0
        assert done.stderr.count(text) == 1


def lone_store(monkeypatch: pytest.MonkeyPatch, limit: float) -> tuple[Any, Any]:
    """A store for two processes at which only the first has come."""
    monkeypatch.setattr(distributed, "_CONNECT_TIMEOUT", limit)
    return distributed._open_store("127.0.0.1", 0, 2), distributed._Start("slurm", 0, 2, 0, 2)


def test_a_process_that_does_not_come_is_named(monkeypatch, capfd):
    store, start = lone_store(monkeypatch, 0.6)
    with pytest.raises(UserError, match=r"process 1 of 2 \(numbered from 0\) has not come in"):
        distributed._await_all(store, start, hang_timeout=0.2)
    assert "warning: process 1 of 2" in capfd.readouterr().err
    store.set("here/1", "elsewhere")
    distributed._await_all(store, start, hang_timeout=0.2)


@pytest.mark.parametrize("what", ["others", "rank 0"])
def test_a_signal_ends_the_wait_for_others_at_once(monkeypatch, what):
    store, start = lone_store(monkeypatch, 60.0)
    wait = partial(distributed._await_listener, "127.0.0.1", 1)
    if what == "others":
        wait = partial(distributed._await_all, store, start)
    request = StopRequest(leave=True).install()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    timer.start()
    try:
        with pytest.raises(StoppedEarly):
            wait(hang_timeout=30)
    finally:
        timer.join()
        request.restore()
    assert time.monotonic() - began < 5


def test_gpus_of_a_node_are_gathered(monkeypatch):
    store, start = lone_store(monkeypatch, 5.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"u{number}"))
    store.set("gpus/1", f"{socket.gethostname()} u2,u3")
    assert distributed._gather_visible(store, start) == ("u0,u1", "u2,u3")


def test_a_foreign_size_that_contradicts_is_refused(monkeypatch):
    world = SimpleNamespace(Get_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world)))
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="mpi4py sees 2 processes, but the environment says OMPI_COMM_WORLD_SIZE=4"):
        distributed._start_from_mpi()
