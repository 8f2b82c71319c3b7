"""Processes: who am I, how many are we, on which device, and how do we talk.

Started by mpirun (Open MPI, MPICH, Intel MPI; also srun with PMIx), mpi4py gives rank and size, and carries the
rendezvous: rank 0 opens a store on a free port, so two jobs on one node never collide, and broadcasts the address.
torchrun and plain srun give the same through the environment. Without a launcher there is one process and no group.
Collectives run on NCCL for CUDA tensors and gloo for CPU tensors, in one group.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist

from util.cli import set_failure_hook
from util.errors import EXIT_LOST, UserError
from util.log import record_in_file
from util.memory import keep_freed_memory
from util.signals import held_signals

DEFAULT_TIMEOUT = 600.0  # seconds one collective may take; longer than any checkpoint load or evaluation on rank 0
_BEAT = 5.0  # seconds between signs of life of a rank 0 that works alone
_CONNECT_TIMEOUT = 300.0  # seconds for all processes to find each other

# Texts by which gloo, NCCL and the store report that a peer is gone. Anything else is an error of our own.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket closed|Timed out waiting|NCCL (communicator|error)|"
    r"ncclRemoteError|ncclSystemError|Application timeout|DistStoreError|DistNetworkError|recvValue failed"
)


@dataclass
class Processes:
    """The processes of this run as seen by one of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"  # "none", "gloo", "cpu:gloo,cuda:nccl"
    launcher: str = "single"  # "single", "mpi", "torchrun", "slurm", "itp", "manual"
    _communicator: Any = None  # mpi4py communicator when started by MPI

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that logs and writes."""
        return self.rank == 0

    def describe(self) -> str:
        """One line for the log."""
        if self.world_size == 1:
            return f"1 process on {self.device}"
        return f"{self.world_size} processes ({self.launcher}, {self.backend}) on {self.device.type}"

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean of each number over the processes; all pass the same keys."""
        return {name: total / self.world_size for name, total in self.all_reduce_sum(values).items()}

    def all_reduce_sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of each number over the processes, in float64; all pass the same keys."""
        if self.world_size == 1:
            return {name: float(value) for name, value in values.items()}
        names = sorted(values)
        packed = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        dist.all_reduce(packed)
        return dict(zip(names, packed.tolist(), strict=True))

    def maximum(self, flags: Sequence[int]) -> list[int]:
        """Largest value of each flag over the processes: how all ranks come to the same decision."""
        if self.world_size == 1:
            return [int(flag) for flag in flags]
        packed = torch.tensor([int(flag) for flag in flags], dtype=torch.int64)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        return [int(flag) for flag in packed.tolist()]

    def all_gather_arrays(self, array: np.ndarray) -> list[np.ndarray]:
        """Arrays of all processes in rank order; first dimensions may differ, the others and the type may not.

        Args:
            array: (n_r, ...) numeric, n_r may be 0.

        Returns:
            One array per rank, on every rank.
        """
        if self.world_size == 1:
            return [array]
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(array)], dtype=torch.int64))
        lengths = [int(count) for count in counts]
        # Bytes, so that every NumPy type travels unchanged; padded to the longest because shapes must agree.
        row = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        longest = max(lengths) * row
        if longest == 0:
            return [array[:0] for _ in lengths]
        mine = np.zeros(longest, dtype=np.uint8)
        mine[: array.nbytes] = np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, torch.from_numpy(mine))
        return [
            np.frombuffer(part.numpy()[: length * row].tobytes(), dtype=array.dtype).reshape(length, *array.shape[1:])
            for part, length in zip(parts, lengths, strict=True)
        ]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Any (small) value of all processes in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The value that rank 0 has."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_works(self, work: Callable[[], None]) -> None:
        """Rank 0 does something that may take longer than one collective may; the others wait. All call it."""
        if self.world_size == 1:
            work()
            return
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(work) if self.is_main else None
            done = 0
            while not done:
                if future is not None:
                    done = int(bool(wait([future], timeout=_BEAT).done))
                done = self.maximum([done])[0]
            if future is not None:
                future.result()
        finally:
            pool.shutdown(wait=False)  # when another process is lost nobody waits for the work

    def abort(self, message: str, code: int = EXIT_LOST) -> None:
        """End all processes now, whatever they wait for, with `message` and exit code `code`. Does not return."""
        prefix = f"[rank {self.rank} on {socket.gethostname()}] " if self.world_size > 1 else ""
        sys.stdout.flush()
        sys.stderr.write(f"{prefix}{message.rstrip()}\n")
        sys.stderr.flush()
        record_in_file(message.rstrip())  # the launcher may drop what a dying process says
        if self._communicator is not None and self.world_size > 1:
            time.sleep(0.2)  # the launcher stops forwarding output once a process has called Abort
            self._communicator.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Leave together: nobody's exit code may make the launcher kill one that still writes."""
        if self.world_size > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()
        set_failure_hook(None)


def data_parallel(model: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """Wrap a model for several processes; alone it stays as it is.

    Buffers that are constants (index tables) are not broadcast before each forward pass; running statistics
    (BatchNorm) are, so that all processes go on from those of rank 0. Gradients live in the communication buckets,
    which saves one copy of all of them. `static_graph` stays off: it saves the search for unused parameters, which is
    off anyway, and does not go with the first steps of gradient accumulation.
    """
    if processes.world_size == 1:
        return model
    parallel = torch.nn.parallel.DistributedDataParallel
    # torch 2.15 renames the option and deprecates the old name.
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": has_running_statistics(model)
    }
    # Without `device_ids` inputs stay where they are: a mask that is drawn on the CPU is read there, without a wait.
    return parallel(model, gradient_as_bucket_view=True, **options)


def average_gradients(parameters: Iterable[torch.nn.Parameter], processes: Processes, *, most: int = 2**26) -> None:
    """Replace gradients by their mean over processes, many at a time; for models outside DistributedDataParallel.

    Args:
        parameters: the same on every process, in the same order.
        most: elements that travel together, and are copied for it.
    """
    if processes.world_size == 1:
        return
    groups: list[list[torch.Tensor]] = [[]]
    for gradient in (p.grad for p in parameters if p.grad is not None):
        if groups[-1] and sum(g.numel() for g in groups[-1]) + gradient.numel() > most:
            groups.append([])
        groups[-1].append(gradient)
    for group in groups:
        flat = torch.cat([gradient.flatten() for gradient in group])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(processes.world_size).split([gradient.numel() for gradient in group])
        torch._foreach_copy_(group, [part.view_as(gradient) for part, gradient in zip(parts, group, strict=True)])


def share_parameters(model: torch.nn.Module, processes: Processes) -> None:
    """Give all processes the parameters of rank 0, as DistributedDataParallel does at its start."""
    if processes.world_size > 1:
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.detach(), src=0)


def has_running_statistics(model: torch.nn.Module) -> bool:
    """Whether training changes buffers of the model."""
    return any(isinstance(module, torch.nn.modules.batchnorm._NormBase) for module in model.modules())


def share_statistics(model: torch.nn.Module, processes: Processes) -> None:
    """Give all processes the running statistics of rank 0: an evaluation must not depend on who does which sample."""
    if processes.world_size == 1 or not has_running_statistics(model):
        return
    own = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    shared = processes.broadcast_object({name: value.cpu() for name, value in own.items()})
    for name, value in own.items():
        value.copy_(shared[name])


class FlagExchange:
    """Agreement of all processes about flags, without stopping them: `post` this step, read in the next.

    The reduction runs in the background while the step computes, so all ranks see the same flags at the same step, one
    step after they were raised. A lone process sees its own at once.
    """

    def __init__(self, processes: Processes, count: int) -> None:
        self._processes = processes
        self._buffer = torch.zeros(count, dtype=torch.int64)
        self._work: Any = None

    def post(self, flags: Sequence[int]) -> list[int]:
        """Hand in this step's flags; returns the agreed (largest) ones of the previous `post` (zeros at first)."""
        if self._processes.world_size == 1:
            return [int(flag) for flag in flags]
        agreed = self.collect()
        self._buffer = torch.tensor([int(flag) for flag in flags], dtype=torch.int64)
        self._work = dist.all_reduce(self._buffer, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def collect(self) -> list[int]:
        """Wait for the flags posted last and return them; also ends the exchange."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        agreed = [int(flag) for flag in self._buffer.tolist()]
        self._buffer = torch.zeros_like(self._buffer)
        return agreed


@dataclass
class _Start:
    """What the launcher says, before anything is connected."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    communicator: Any = None
    visible: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of the ranks of this node, where known


def _integer(name: str) -> int:
    value = os.environ.get(name, "")
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {value!r}, expected a number; "
            "start with mpirun, torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None


def _start_from_mpi() -> _Start | None:
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")
    if not any(name in os.environ for name in names):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py cannot be used ({error}); install it for this MPI "
            "(pip install --no-binary mpi4py mpi4py), or start with torchrun"
        ) from error
    world = MPI.COMM_WORLD
    size = world.Get_size()
    sizes = {name: _integer(name) for name in (names[0], names[1], names[3]) if os.environ.get(name)}
    foreign = {name: value for name, value in sizes.items() if value > 1 and value != size}
    if size > 1 and foreign:
        said = " and ".join(f"{name}={value}" for name, value in foreign.items())
        raise UserError(
            f"mpi4py sees {size} processes, but the environment says {said}: "
            "left over from another MPI, or mpirun inside mpirun; unset it, or start afresh"
        )
    announced = max(sizes.values(), default=size)
    if size == 1 and announced > 1:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return None  # srun speaks another dialect than this MPI; its own variables say the same
        raise UserError(
            f"mpirun started {announced} processes, but mpi4py sees 1: it was built for another MPI than this mpirun; "
            "load the module mpi4py was built with, or reinstall it (pip install --no-binary mpi4py mpi4py)"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    visible = tuple(local.allgather(os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    return _Start("mpi", world.Get_rank(), size, local.Get_rank(), local.Get_size(), world, visible)


def _start_from_slurm() -> _Start | None:
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) <= 1 or "SLURM_PROCID" not in os.environ:
        return None
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    local_size = int(re.split(r"\D", tasks)[0])
    return _Start("slurm", _integer("SLURM_PROCID"), _integer("SLURM_STEP_NUM_TASKS"), _integer("SLURM_LOCALID"),
                  local_size)  # fmt: skip


def _start_from_rank_variables(launcher: str, world_size: int | None) -> _Start:
    rank = _integer("RANK")
    size = world_size if world_size is not None and "WORLD_SIZE" not in os.environ else _integer("WORLD_SIZE")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return _Start(launcher, rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _find_start(dist_url: str, world_size: int | None, dist_on_itp: bool) -> _Start:
    if dist_on_itp:
        return _Start(
            "itp",
            _integer("OMPI_COMM_WORLD_RANK"),
            _integer("OMPI_COMM_WORLD_SIZE"),
            _integer("OMPI_COMM_WORLD_LOCAL_RANK"),
            int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:  # before MPI: torchrun agents may themselves be started by mpirun
        return _start_from_rank_variables("torchrun", world_size)
    start = _start_from_mpi() or _start_from_slurm()
    if start is not None:
        return start
    if dist_url != "auto" or "RANK" in os.environ:
        _parse_url(dist_url, 1)  # a wrong address is the mistake, not the variables that go with a right one
        return _start_from_rank_variables("manual", world_size)
    return _Start("single", 0, 1, 0, 1)


def first_host(node_list: str) -> str:
    """First host name of a SLURM node list: `a[003-007,9],b1` -> `a003`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", node_list)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is {node_list!r}, expected host names; set MASTER_ADDR to rank 0's host")
    return match[1] + (match[2] or "")


def _own_address(hosts: Sequence[str]) -> str:
    """Address at which the other hosts reach this one: that of the interface that routes to one of them."""
    own = socket.gethostname()
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    others = [host for host in hosts if host != own]
    if not others:
        return "127.0.0.1"
    for host in others:
        try:
            family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # UDP: chooses a route, sends nothing
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        if not address.startswith("127."):
            return address
    return own


def _open_store(host: str, port: int, world_size: int) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host, port, world_size, is_master=True, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_CONNECT_TIMEOUT),
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"rank 0 cannot listen on port {port}: {str(error).splitlines()[0]}; "
            "leave --port and --dist_url away to use a free port"
        ) from error


def _join_store(host: str, port: int, world_size: int) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host, port, world_size, is_master=False, timeout=datetime.timedelta(seconds=_CONNECT_TIMEOUT)
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot reach rank 0 at {host}:{port}: {str(error).splitlines()[0]}; "
            "set MASTER_ADDR to an address of rank 0's node that the others can reach"
        ) from error


def _parse_url(dist_url: str, port: int) -> tuple[str, int] | None:
    """Host and port of `tcp://host:port`; `None` for `auto` and `env://`."""
    if dist_url in ("auto", "env://"):
        return None
    url = urlparse(dist_url)
    try:
        url_port = url.port
    except ValueError:
        url_port = None
    if url.scheme != "tcp" or not url.hostname or not (url_port or port):
        raise UserError(f"--dist_url {dist_url!r} is not understood; expected auto, env:// or tcp://host:port")
    return url.hostname, url_port or port


def _rendezvous(start: _Start, dist_url: str, port: int, hang_timeout: float) -> dist.Store | None:
    """Store through which the group forms; `None`: torch's own `env://`."""
    target = _parse_url(dist_url, port)
    if target is None and dist_url != "env://" and start.communicator is not None:
        return _rendezvous_by_mpi(start, port)
    if target is None and start.launcher == "slurm" and dist_url != "env://":
        host = os.environ.get("MASTER_ADDR") or first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
        job = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}"
        digest = int.from_bytes(hashlib.blake2b(job.encode(), digest_size=4).digest(), "little")
        # Nothing to broadcast with yet: the port follows from the job and step, which differ between jobs on a node.
        target = host, port or 20000 + digest % 20000
    if target is None and start.launcher in ("itp", "manual"):
        host = os.environ.get("MASTER_ADDR", "")
        if not host:
            raise UserError(
                "MASTER_ADDR is not set; set MASTER_ADDR and MASTER_PORT to rank 0's address, or --dist_url"
            )
        target = host, port or _integer("MASTER_PORT")
    if target is None:
        return None
    if start.rank == 0:
        return _open_store(*target, start.world_size)
    _await_listener(*target, hang_timeout)
    return _join_store(*target, start.world_size)


def _await_listener(host: str, port: int, hang_timeout: float) -> None:
    """Wait until rank 0 listens, in short attempts: a signal ends the wait at once. Who joins then says what fails."""
    began, warned = time.monotonic(), False
    while (waited := time.monotonic() - began) < _CONNECT_TIMEOUT:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        if hang_timeout and waited > hang_timeout and not warned:
            warned = True
            sys.stderr.write(f"warning: process 0 does not answer at {host}:{port} after {waited:.0f} s; waiting on\n")
            sys.stderr.flush()
        time.sleep(0.2)


def _rendezvous_by_mpi(start: _Start, port: int) -> dist.TCPStore:
    """Rank 0 opens the store (port 0: the system picks a free one) and tells the others where it is."""
    world = start.communicator
    hosts = world.gather(socket.gethostname(), root=0)
    store: dist.TCPStore | None = None
    news: tuple[str, int, str] = ("", 0, "")
    if start.rank == 0:
        try:
            address = _own_address(sorted(set(hosts)))
            store = _open_store(address, port, start.world_size)
            news = (address, store.port, "")
        except UserError as error:
            news = ("", 0, str(error))
    address, chosen, failure = world.bcast(news, root=0)
    if failure:
        raise UserError(failure)
    return store if store is not None else _join_store(address, chosen, start.world_size)


def _gather_visible(store: dist.Store, start: _Start) -> tuple[str, ...]:
    """Which GPUs each process of this node sees, by their own numbers; srun --gpu-bind shows some to each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = ",".join(str(torch.cuda.get_device_properties(number).uuid) for number in range(count))
    host = socket.gethostname()
    store.set(f"gpus/{start.rank}", f"{host} {seen}")
    found = [store.get(f"gpus/{rank}").decode().split(" ", 1) for rank in range(start.world_size)]
    return tuple(gpus for name, gpus in found if name == host)


def _await_all(store: dist.Store, start: _Start, hang_timeout: float) -> None:
    """Wait until every process has come, in short looks: a signal ends the wait at once.

    Raises:
        UserError: some have not come in time; names them.
    """
    store.set(f"here/{start.rank}", socket.gethostname())
    began, warned = time.monotonic(), False
    while True:
        missing = [rank for rank in range(start.world_size) if not store.check([f"here/{rank}"])]
        waited = time.monotonic() - began
        if not missing:
            return
        named = f"process {', '.join(map(str, missing[:8]))} of {start.world_size} (numbered from 0) has not come"
        if waited > _CONNECT_TIMEOUT:
            raise UserError(f"{named} in {waited:.0f} s; look at its own messages, or whether its node was started")
        if hang_timeout and waited > hang_timeout and not warned:
            warned = True
            sys.stderr.write(f"warning: {named} after {waited:.0f} s; waiting {_CONNECT_TIMEOUT:g} s in all\n")
            sys.stderr.flush()
        time.sleep(0.1)


def _choose_device(name: str, start: _Start) -> torch.device:
    """Device of this process; `auto` is CUDA when there is a GPU.

    Raises:
        UserError: no CUDA although asked for, or fewer GPUs than processes on this node.
    """
    try:
        wanted = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device; expected auto, cpu, cuda or cuda:N") from None
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda":
        raise UserError(f"--device {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device on this machine; use --device cpu")
    count = torch.cuda.device_count()
    if wanted.index is not None:
        if start.local_world_size > 1:
            raise UserError(f"--device {name} with {start.local_world_size} processes on a node; use --device cuda")
        if wanted.index >= count:
            raise UserError(f"--device {name}: there are {count} GPUs, numbered from 0")
        return wanted
    if len(set(start.visible)) > 1:  # the queue system shows processes GPUs of their own, one or several
        same = [place for place, gpus in enumerate(start.visible) if gpus == start.visible[start.local_rank]]
        if len(same) <= count:
            return torch.device("cuda", same.index(start.local_rank))
    if start.launcher == "slurm" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task=1 does the same under srun
    if start.local_rank >= count or start.local_world_size > count:
        raise UserError(
            f"{start.local_world_size} processes on {socket.gethostname()} but {count} GPUs; "
            f"start at most {count} processes on a node (one per GPU), or use --device cpu"
        )
    return torch.device("cuda", start.local_rank)


def limit_threads(local_world_size: int) -> None:
    """Share the cores among the processes of a node, unless OMP_NUM_THREADS says otherwise."""
    if local_world_size > 1 and not os.environ.get("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))


def setup_processes(
    *,
    device: str = "auto",
    dist_url: str = "auto",
    port: int = 0,
    world_size: int | None = None,
    dist_on_itp: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    hang_timeout: float = 0.0,
) -> Processes:
    """Find the other processes and the device of this one.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dist_url: `auto` (the launcher decides), `env://` (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or
            `tcp://host:port` of rank 0.
        port: port of rank 0; 0: a free one.
        world_size: how many processes there must be; `None`: as many as the launcher started.
        dist_on_itp: take rank and size from Open MPI's environment variables and the address from MASTER_ADDR and
            MASTER_PORT, without mpi4py.
        timeout: seconds that one collective may take.
        hang_timeout: seconds after which processes that have not come are named; 0: not before they are given up.

    Returns:
        The processes; the failure hook of `util.errors` is set so that one failing process ends all.

    Raises:
        UserError: the launcher's information is incomplete or contradictory, or the device does not exist.
    """
    with held_signals():  # who left in between would leave the others waiting in MPI
        start = _find_start(dist_url, world_size, dist_on_itp)
        processes = Processes(
            rank=start.rank,
            world_size=start.world_size,
            local_rank=start.local_rank,
            local_world_size=start.local_world_size,
            launcher=start.launcher,
            _communicator=start.communicator,
        )
        if start.world_size > 1:
            set_failure_hook(_FailureHook(processes))
    if world_size is not None and world_size != start.world_size:
        raise UserError(
            f"--world_size {world_size}, but {start.world_size} processes were started ({start.launcher}); "
            f"start {world_size} (mpirun -np {world_size}) or leave --world_size away"
        )
    limit_threads(start.local_world_size)
    store = _rendezvous(start, dist_url, port, hang_timeout) if start.world_size > 1 else None
    if store is not None:
        _await_all(store, start, hang_timeout)
        if start.launcher == "slurm" and device != "cpu":
            start.visible = _gather_visible(store, start)
    processes.device = _choose_device(device, start)
    if processes.device.type == "cpu":
        keep_freed_memory()
    if processes.device.type == "cuda":
        torch.cuda.set_device(processes.device)
    if start.world_size > 1:
        processes.backend = "cpu:gloo,cuda:nccl" if processes.device.type == "cuda" else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        if store is None:
            dist.init_process_group(processes.backend, init_method="env://", timeout=limit)
        else:
            dist.init_process_group(
                processes.backend, store=store, rank=start.rank, world_size=start.world_size, timeout=limit
            )
    return processes


class _FailureHook:
    """Ends all processes when one fails. Rank 0 speaks first when all fail alike (a missing folder, a wrong option)."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __call__(self, message: str, code: int) -> None:
        if code == 1 and (found := _LOST.search(message)) is not None:
            last = message.strip().splitlines()[-1]
            message = (
                f"error: lost contact with another process of this job ({found[0]}); its own message, if any, stands "
                f"elsewhere in this output. Continue with --resume auto. ({last[:300]})"
            )
            code = EXIT_LOST
        if self._processes.rank != 0:
            time.sleep(2.0)
        self._processes.abort(message, code)
