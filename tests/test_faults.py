"""Several processes equal one, and runs survive: signals, kills, dead and hung processes, bad numbers, full disks.

Training is real (main_pretrain, generated data) with a microscopic model; see fault_program.py and kill_program.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_environment, mpirun_command
from fault_program import MICRO

from util.checkpoint import load_checkpoint, verify_checkpoint
from util.files import read_jsonl
from util.signals import REPEAT_SECONDS

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
FLAGS = ["--model", "mixmim_tiny", "--batch_size", "4", "--num_workers", "0", "--epochs", "3", "--warmup_epochs", "1",
         "--lr", "1e-3", "--save_every", "1"]  # fmt: skip
pytestmark = pytest.mark.mpi

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(demo_root: Path, tmp_path: Path) -> Iterator[Start]:
    """Start fault_program under a launcher; what is still running at the end of the test is killed."""
    jobs = []

    def run(*flags: object, out: str = "run", processes: int = 2, fault: dict[str, Any] | None = None,
            launcher: str = "mpirun") -> subprocess.Popen[str]:  # fmt: skip
        command = [sys.executable, PROGRAM, json.dumps(fault or {}), "--dataset", "demo", "--data_path", str(demo_root)]
        command += [*FLAGS, "--output_dir", str(tmp_path / out), *map(str, flags)]
        if launcher == "torchrun":
            torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node"]
            command = [*torchrun, str(processes), *command[1:]]
        elif processes > 1:
            command = mpirun_command(processes) + command
        job = subprocess.Popen(
            command, env=clean_environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        jobs.append(job)
        return job

    yield run
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def finish(job: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    output, _ = job.communicate(timeout=timeout)
    return job.returncode, output


def read_until(job: subprocess.Popen[str], text: str) -> None:
    """Wait for a line of the job's output: the start takes as long as the machine is busy."""
    assert job.stdout is not None
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(job.stdout.readline())
        assert lines[-1], "".join(lines)


def left_behind(out: Path) -> list[str]:
    """Command lines of processes that still work on this output folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words:
            found.append(b" ".join(words).decode())
    return found


def rank_processes(out: Path) -> dict[int, int]:
    """Rank -> process id of the Python processes that work on this output folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(out).encode() not in words or b"python" not in words[0]:
                continue
            environment = dict(item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if item)
        except (OSError, ValueError):
            continue
        if b"OMPI_COMM_WORLD_RANK" in environment:
            found[int(environment[b"OMPI_COMM_WORLD_RANK"])] = int(folder.name)
    return found


def every_rank_and_worker(out: Path) -> Iterator[int]:
    """Process ids of the Python processes that work on this output folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(out).encode() in words and b"python" in words[0]:
                yield int(folder.name)


def same(a: Path, b: Path) -> bool:
    first, second = (load_checkpoint(folder / "checkpoint.pth") for folder in (a, b))
    return first["epoch"] == second["epoch"] and all(
        torch.equal(value, second["model"][key]) for key, value in first["model"].items()
    )


@pytest.fixture(scope="module")
def whole(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command = [*mpirun_command(2), sys.executable, PROGRAM, "{}", "--dataset", "demo", "--data_path", str(demo_root)]
    command += [*FLAGS, "--output_dir", str(out)]
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


# ------------------------------------------------------------------------------------------- several equal one


def reference(demo_root: Path, world: int, steps: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The first steps of a run of ``world`` processes, computed by one process step by step.

    It draws the samples, flips and masks of every rank, averages the gradients and calls torch's plain AdamW.
    """
    import main_pretrain
    import models_mixmim
    from sarwmix.data.loader import Plan
    from sarwmix.transforms import draw_flips
    from sarwmix.weighting import WeightOptions
    from util.optim import has_weight_decay, parameter_groups
    from util.seeding import seed_everything, step_generator

    patch.setitem(models_mixmim.MODELS, "mixmim_tiny", dict(MICRO))
    args = main_pretrain.get_parser().parse_args(["--dataset", "demo", "--data_path", str(demo_root), *FLAGS])
    main_pretrain.check_args(args)
    seed_everything(args.seed)
    data = main_pretrain.open_data(args)
    transform = main_pretrain.make_transform(data, args.input_size, WeightOptions())
    model = main_pretrain.make_model(args, bands=2)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    decayed = [{"params": [p], "weight_decay": 0.05 if has_weight_decay(name, p) else 0.0} for name, p in named]
    optimizer = torch.optim.AdamW(decayed, betas=(0.9, 0.95), fused=False, foreach=False)
    plans = [
        Plan(len(data), batch_size=4, shuffle=True, drop_last=True, seed=args.seed, rank=rank, world_size=world)
        for rank in range(world)
    ]
    names = {id(parameter): name for name, parameter in named}
    in_order = [p for group in parameter_groups(model, weight_decay=0.05) for p in group["params"]]
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        for rank, plan in enumerate(plans):
            batch = data.get_batch(plan.indices(0, step))
            sar = transform(batch["image"], draw_flips(4, step_generator(args.seed, 0, step, rank, "flips")))
            mask = model.draw_mask(args.mask_ratio, step_generator(args.seed, 0, step, rank, "mask"))
            loss = model(sar.images, sar.weights, mask=mask).loss
            (loss / world).backward()
            losses.append(float(loss.detach()))
        norms.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters]))))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / steps  # warm-up over one epoch of `steps`
        optimizer.step()
    return {
        "loss": sum(losses) / len(losses),
        "norm": sum(norms) / steps,
        "model": model.state_dict(),
        "moments": {names[id(p)]: optimizer.state[p]["exp_avg"] for p in in_order},
    }


@pytest.mark.parametrize(
    ("launcher", "world"),
    [
        ("mpirun", 2),
        pytest.param("mpirun", 3, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, marks=pytest.mark.slow),
    ],
)
def test_processes_equal_one_that_sees_the_same(
    start: Start, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, world: int
) -> None:
    code, output = finish(start("--test_run", "--stop_epoch", 1, processes=world, launcher=launcher))
    assert code == 0, output
    expected = reference(demo_root, world, steps=3, patch=monkeypatch)
    record = read_jsonl(tmp_path / "run" / "log.txt")[0]
    assert record["train_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert record["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    # The first moments are a weighted sum of the gradients: all of them agree to rounding.
    moments = expected["moments"]
    saved = [checkpoint["optimizer"]["state"][index]["exp_avg"] for index in sorted(checkpoint["optimizer"]["state"])]
    assert len(saved) == len(moments)
    largest = max(float(moment.abs().max()) for moment in moments.values())
    for (name, moment), mine in zip(moments.items(), saved, strict=True):
        torch.testing.assert_close(mine, moment, rtol=1e-4, atol=1e-6 * largest, msg=name)
        # Adam divides by the gradient's size: where that is rounding noise (key biases have no true gradient), so is
        # the update. Everywhere else the weights agree, too.
        real = moment.abs() > 1e-4 * largest
        ours, theirs = checkpoint["model"][name][real], expected["model"][name][real]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_and_ends_all(start: Start, whole: Path, tmp_path: Path, name: str) -> None:
    """The signal comes in mid-epoch from within rank 1; all leave with 75, and the resumed run is bit-equal."""
    job = start(fault={"kind": name, "rank": 1, "batch": 15})
    read_until(job, f"{name}: stopping after this step")
    began = time.monotonic()
    code, output = finish(job)
    assert code == 75, output
    assert "stopped on request: 1 epochs and" in output
    assert time.monotonic() - began < 30
    info = verify_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert info is not None
    assert info.epoch == 0
    assert info.step in (4, 5, 6)
    assert left_behind(tmp_path / "run") == []
    code, output = finish(start("--resume", "auto"))
    assert code == 0, output
    assert same(whole, tmp_path / "run")
    assert [row["epoch"] for row in read_jsonl(tmp_path / "run" / "log.txt")] == [0, 1, 2]


@pytest.mark.slow
def test_a_signal_from_outside_and_a_second_one(start: Start, tmp_path: Path) -> None:
    job = start(fault={"slow": 0.3})
    read_until(job, "Epoch 1/3")
    ranks = rank_processes(tmp_path / "run")
    assert sorted(ranks) == [0, 1]
    sent = time.monotonic()
    os.kill(ranks[1], signal.SIGTERM)
    code, output = finish(job)
    assert code == 75, output
    assert time.monotonic() - sent < 30
    verify_checkpoint(tmp_path / "run" / "checkpoint.pth")
    job = start("--resume", "auto", fault={"slow": 12.0})  # the step takes long: only a later signal ends it at once
    read_until(job, "training epochs")
    time.sleep(1.0)
    ranks = rank_processes(tmp_path / "run")
    assert sorted(ranks) == [0, 1]
    for _ in range(2):
        for process in ranks.values():
            os.kill(process, signal.SIGTERM)
    time.sleep(REPEAT_SECONDS + 0.5)
    assert job.poll() is None  # what comes within seconds is the same request
    os.kill(ranks[1], signal.SIGTERM)
    sent = time.monotonic()
    code, output = finish(job)
    assert code not in (0, 75)
    assert time.monotonic() - sent < 10
    assert "leaving at once" in output


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_saves(start: Start, tmp_path: Path, name: str) -> None:
    """The loader's worker gets it, too, and goes on until the run has saved."""
    job = start("--num_workers", 1, processes=1, fault={"slow": 0.3})
    read_until(job, "Epoch 1/3")
    assert len(left_behind(tmp_path / "run")) == 2
    os.killpg(job.pid, getattr(signal, name))
    code, output = finish(job, timeout=30)
    assert code == 75, output
    info = verify_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert info is not None
    assert 0 < info.step < 22
    assert left_behind(tmp_path / "run") == []


def test_loader_workers_end_with_a_killed_parent(start: Start, tmp_path: Path) -> None:
    job = start("--num_workers", 1, processes=1, fault={"slow": 0.3})
    read_until(job, "Epoch 1/3")
    assert len(left_behind(tmp_path / "run")) == 2
    job.kill()
    until = time.monotonic() + 20
    while left_behind(tmp_path / "run"):
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_before_training_ends_with_75(start: Start, tmp_path: Path, processes: int) -> None:
    job = start(processes=processes, fault={"scan": 60})
    read_until(job, "scanning")
    time.sleep(0.5)
    ranks = rank_processes(tmp_path / "run") or {0: job.pid}
    assert len(ranks) == processes
    sent = time.monotonic()
    os.kill(ranks[processes - 1], signal.SIGUSR1)
    code, output = finish(job, timeout=50)
    assert code == 75, output
    assert "SIGUSR1: stopped where there was nothing to save" in output
    assert time.monotonic() - sent < 20
    assert left_behind(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGTERM to all"])
def test_a_signal_to_the_launch_script_saves(demo_root: Path, tmp_path: Path, name: str) -> None:
    """run_local.sh hands the request through mpirun to every rank; or everybody but mpirun gets it at once.

    The second is what a queue system does: the ranks and the workers get the signal, and then once more through mpirun.
    """
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} {PROGRAM} \'{{"slow": 0.3}}\' "$@"\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "MPIRUN": mpirun_command(1)[0], "NPROC": "2", "DATA_PATH": str(demo_root)}
    settings |= {"DATASET": "demo", "MODEL": "mixmim_tiny", "EPOCH": "3", "OUT": str(tmp_path / "run")}
    flags = ["--batch_size", "4", "--num_workers", "1", "--warmup_epochs", "1", "--lr", "1e-3"]
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "run_local.sh"), "--", *flags], env=clean_environment(settings), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    read_until(job, "Epoch 1/3")
    if name == "SIGTERM to all":
        processes = list(every_rank_and_worker(tmp_path / "run"))
        assert len(processes) == 4
        for process in processes:
            os.kill(process, signal.SIGTERM)
        os.killpg(job.pid, signal.SIGTERM)
    else:
        job.send_signal(getattr(signal, name))
    sent = time.monotonic()
    code, output = finish(job)
    assert code == 75, output
    assert time.monotonic() - sent < 30
    assert "the same command continues" in output
    info = verify_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert info is not None
    assert 0 < info.step < 11


# ------------------------------------------------------------------------------------------- kill -9


def _kill(demo_root: Path, out: Path, kills: int, seed: int, epochs: int) -> dict[str, Any]:
    program = str(Path(__file__).with_name("kill_program.py"))
    data = ["--dataset", "demo", "--data_path", str(demo_root)]
    flags = [*FLAGS, *data, "--epochs", str(epochs), "--save_minutes", "0.002"]
    done = subprocess.run(
        [sys.executable, program, str(kills), str(seed), str(out), *flags],
        env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["killed"] == kills
    return report


def test_killed_a_few_times_the_weights_are_bit_equal(demo_root: Path, tmp_path: Path) -> None:
    _kill(demo_root, tmp_path, kills=4, seed=0, epochs=2)


@pytest.mark.slow
def test_killed_thirty_times_the_weights_are_bit_equal(demo_root: Path, tmp_path: Path) -> None:
    report = _kill(demo_root, tmp_path, kills=30, seed=1, epochs=4)
    print(report)
    assert report["timed"] >= 8
    assert sum(report["inside"].values()) >= 8


@pytest.mark.slow
def test_a_killed_job_of_two_processes_continues_bit_equal(start: Start, whole: Path, tmp_path: Path) -> None:
    for batch in (3, 9, 17):
        code, output = finish(start("--resume", "auto", "--save_minutes", "0.001",
                                    fault={"kind": "kill", "rank": batch % 2, "batch": batch}))  # fmt: skip
        assert code not in (0, 75), output
    code, output = finish(start("--resume", "auto"))
    assert code == 0, output
    assert same(whole, tmp_path / "run")


# ------------------------------------------------------------------------------------------- dead and hung ranks


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("kill", None, "signal 9"),
        pytest.param("exit", None, "non-zero status", marks=pytest.mark.slow),
        pytest.param("sys.exit", 4, "left in the middle of the run", marks=pytest.mark.slow),
        pytest.param("exception", 1, "RuntimeError: the fault of this test", marks=pytest.mark.slow),
        pytest.param("hang", 4, "while waiting for a batch from the data loader", marks=pytest.mark.slow),
        pytest.param("freeze", 4, "while computing a step together", marks=pytest.mark.slow),
    ],
)
def test_a_dead_or_hung_rank_ends_the_job(start: Start, tmp_path: Path, kind: str, code: int | None, text: str) -> None:
    job = start(fault={"kind": kind, "rank": 1, "batch": 14})
    read_until(job, "Epoch 1/3")
    began = time.monotonic()
    found, output = finish(job)
    assert found not in (0, 75)
    assert code is None or found == code, output
    assert text in output
    assert time.monotonic() - began < 60
    assert left_behind(tmp_path / "run") == []
    if code in (1, 4):
        assert "--resume auto" in output or "Traceback" in output or "sys.exit" in output


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_hangs(start: Start, tmp_path: Path) -> None:
    job = start(launcher="torchrun", fault={"kind": "hang", "rank": 1, "batch": 14})
    read_until(job, "Epoch 1/3")
    began = time.monotonic()
    code, output = finish(job)
    assert code != 0
    assert "while waiting for a batch" in output
    assert time.monotonic() - began < 60
    assert left_behind(tmp_path / "run") == []


# ------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_with_names(start: Start, tmp_path: Path) -> None:
    code, output = finish(start(fault={"kind": "nan", "rank": 1, "batch": 14}))
    assert code == 3, output
    assert "loss or gradients are not finite at step 2" in output
    names = re.search(r"samples of that batch: ([^;]+);", output)
    assert names is not None
    assert len(names[1].split(", ")) == 4
    dumps = sorted((tmp_path / "run").glob("nonfinite_rank*.json"))
    assert dumps
    culprits = json.loads(dumps[0].read_text())["culprits_by_rank"]
    assert culprits[0] == []
    assert sorted(culprits[1]) == names[1].split(", ")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 0  # the last good one


@pytest.mark.slow
def test_skip_nonfinite_skips_the_step_on_all(start: Start, tmp_path: Path) -> None:
    code, output = finish(start("--skip_nonfinite", 1, fault={"kind": "nan", "rank": 1, "batch": 14}))
    assert code == 0, output
    rows = read_jsonl(tmp_path / "run" / "log.txt")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert all(row["train_loss"] is not None for row in rows)
    weights = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


# ------------------------------------------------------------------------------------------- resuming otherwise


@pytest.mark.slow
def test_resume_with_another_number_of_processes(start: Start, tmp_path: Path) -> None:
    """22 steps of 4 x 1 samples; stopped after some; continued by two processes at the same place in samples."""
    code, output = finish(start(processes=1, fault={"kind": "SIGTERM", "rank": 0, "batch": 7}))
    assert code == 75, output
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["step"]
    code, output = finish(start("--resume", "auto", processes=2))
    assert code == 0, output
    assert "world_size 2 instead of 1; effective batch 4 -> 8, peak lr 0.001 -> 0.001" in output
    assert "lr = blr * effective / 256" in output
    assert f"epoch 0, step {step // 2}" in output
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 2


@pytest.mark.slow
def test_disk_full_while_training(start: Start, tmp_path: Path) -> None:
    """The output folder is a file system with room for the run's small files and one checkpoint, not for three."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    out = tmp_path / "run"
    out.mkdir()
    command = start(processes=1).args
    assert isinstance(command, list)
    size = 700_000
    inside = f'mount -t tmpfs -o size={size} tmpfs {out} && "$@"; code=$?; cp -r {out} {tmp_path}/copy; exit $code'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", *command], env=clean_environment(), cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    if "mount:" in done.stderr:
        pytest.skip("mounting is not allowed here")
    print(done.stdout, done.stderr)
    assert done.returncode == 2
    assert "disk is full" in done.stdout + done.stderr
    from util.checkpoint import find_latest

    found = find_latest(tmp_path / "copy")
    assert found is None or verify_checkpoint(found) is not None
