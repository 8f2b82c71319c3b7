"""Checkpoints: round trip, checksum, refusal of damaged and hostile files, rotation, fallback, disk full."""

from __future__ import annotations

import argparse
import errno
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from util import checkpoint as ck
from util.files import WriteError
from util.log import setup_logging

ROOT = Path(__file__).resolve().parent.parent


def _state(epoch=3, step=0, value=1.0):
    return {
        "format": ck.FORMAT,
        "kind": "pretrain",
        "model": OrderedDict(weight=torch.full((4, 5), value), index=torch.arange(6)),
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "scaler": None,
        "epoch": epoch,
        "step": step,
        "args": {"lr": 0.1, "resume": ""},
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    ck.save_checkpoint(path, _state())
    return path


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---------------------------------------------------------------------------------------------------- round trip


def test_round_trip(saved):
    loaded = ck.load_checkpoint(saved)
    assert _same(loaded, _state())
    assert isinstance(loaded["model"], OrderedDict)


def test_plain_torch_load_reads_it(saved):
    assert _same(torch.load(saved, weights_only=True), _state())
    assert _same(torch.load(saved, weights_only=True, mmap=True), _state())
    assert zipfile.ZipFile(saved).testzip() is None


def test_footer_tells_progress_without_loading(saved):
    info = ck.read_info(saved)
    assert info is not None
    assert info.progress == (3, 0)
    assert ck.verify_checkpoint(saved) == info


def test_nothing_is_left_beside_it(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.nn.Linear(1, 1), 1j])
def test_saving_refuses_what_could_not_be_loaded(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['args'\]\['x'\]"):
        ck.save_checkpoint(tmp_path / "a.pth", {"args": {"x": value}})
    assert list(tmp_path.iterdir()) == []


def test_published_form_with_namespace(tmp_path):
    path = tmp_path / "published.pth"
    namespace = argparse.Namespace(model="mixmim_base", lr=1e-3, nested=argparse.Namespace(a=[1]))
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 63, "scaler": {}, "args": namespace}, path)
    loaded = ck.load_checkpoint(path)
    assert loaded["args"] == {"model": "mixmim_base", "lr": 1e-3, "nested": {"a": [1]}}
    assert ck.read_info(path) is None


# ---------------------------------------------------------------------------------------------------- checksums


def test_released_name_with_another_hash_warns(tmp_path, monkeypatch, capsys):
    setup_logging(rank=0)
    path = tmp_path / "benv2_pretrain_checkpoint_64.pth"
    torch.save({"model": {}}, path)
    ck.load_checkpoint(path)
    assert "another SHA-256" in capsys.readouterr().out
    monkeypatch.setattr(ck, "released_checksums", lambda: {path.name: ck.sha256_file(path)})
    ck.load_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_checksums_file_is_what_sha256sum_reads(tmp_path):
    table = ck.released_checksums()
    assert len(table) == 5
    assert table["benv1_pretrain_checkpoint_64.pth"].startswith("b4f385f96a1eef96")
    content = tmp_path / "benv1_pretrain_checkpoint_64.pth"
    content.write_text("not it")
    command = ["sha256sum", "-c", str(ROOT / "CHECKSUMS.txt"), "--ignore-missing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "benv1_pretrain_checkpoint_64.pth: FAILED" in done.stdout


# ---------------------------------------------------------------------------------------------------- damage


class _Hostile:
    """Would create a file when unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def _zip_with_pickle(path, payload, name="archive/data.pkl", compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr(name, payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def _hostile_files(folder, marker):
    """(name, maker) of files that must be refused."""

    def legacy(path):
        torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)

    def hostile_new(path):
        torch.save({"model": _Hostile(marker)}, path)

    def hostile_legacy(path):
        torch.save({"model": _Hostile(marker)}, path, _use_new_zipfile_serialization=False)

    def hostile_with_our_footer(path):
        stream = io.BytesIO()
        writer = ck._HashingWriter(stream)
        torch.save({"format": ck.FORMAT, "model": _Hostile(marker)}, writer)
        writer.finish("", 1, 0)
        path.write_bytes(stream.getvalue())

    def tar(path):
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, arcname="data.pkl")

    def script(path):
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)

    def numpy_object(path):
        import numpy as np

        torch.save({"model": np.array([object], dtype=object)}, path)

    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("Not found\n"),
        "html": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
        "folder": lambda path: path.mkdir(),
        "fifo": lambda path: os.mkfifo(path),
        "link loop": lambda path: path.symlink_to(path),
        "plain pickle": lambda path: path.write_bytes(pickle.dumps({"model": 1})),
        "hostile pickle": lambda path: path.write_bytes(pickle.dumps(_Hostile(marker))),
        "hostile zip": lambda path: _zip_with_pickle(path, pickle.dumps(_Hostile(marker), protocol=2)),
        "hostile compressed": lambda path: _zip_with_pickle(
            path, pickle.dumps(_Hostile(marker), protocol=2), compress=zipfile.ZIP_DEFLATED
        ),
        "hostile torch": hostile_new,
        "hostile legacy": hostile_legacy,
        "hostile footer": hostile_with_our_footer,
        "getattr chain": lambda path: _zip_with_pickle(
            path, b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x05\x00\x00\x00touchtR."
        ),
        "eval": lambda path: _zip_with_pickle(path, b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R."),
        "deep": lambda path: _zip_with_pickle(path, b"\x80\x02" + b"(" * 50000 + b"l" * 49999 + b"."),
        "huge bytes": lambda path: _zip_with_pickle(
            path, b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\xff\xff\xff\xff\xff\x3f\x85R."
        ),
        "bad memo": lambda path: _zip_with_pickle(path, b"\x80\x02h\xff."),
        "no data": lambda path: _zip_with_pickle(path, b"x", name="archive/other.pkl"),
        "legacy": legacy,
        "tar": tar,
        "torchscript": script,
        "list": lambda path: torch.save([1, 2], path),
        "tensor": lambda path: torch.save(torch.ones(3), path),
        "set inside": lambda path: torch.save({"model": {1, 2}}, path),
        "module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "numpy object": numpy_object,
        "partial": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 50),
    }  # fmt: skip


HOSTILE_NAMES = tuple(_hostile_files(Path(), Path()))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_wrong_files_are_refused_and_run_nothing(tmp_path, name):
    marker = tmp_path / "executed"
    path = tmp_path / "bad.pth"
    _hostile_files(tmp_path, marker)[name](path)
    with pytest.raises(ck.CheckpointError, match=r"bad\.pth"):
        ck.load_checkpoint(path)
    if "hostile" in name:
        with pytest.raises(ck.CheckpointError):  # the pickle itself is refused too, not only the archive
            ck.load_checkpoint(path, verify=False)
    assert not marker.exists()


def test_the_hostile_object_would_work(tmp_path):
    pickle.loads(pickle.dumps(_Hostile(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_the_offending_type_is_named(tmp_path):
    torch.save({"model": _Hostile(tmp_path / "x")}, tmp_path / "a.pth")
    with pytest.raises(ck.CheckpointError, match=r"posix\.system"):
        ck.load_checkpoint(tmp_path / "a.pth")


def test_missing_file_says_so(tmp_path):
    with pytest.raises(ck.CheckpointError, match="does not exist"):
        ck.load_checkpoint(tmp_path / "none.pth")


def test_every_truncation_is_noticed(saved):
    whole = saved.read_bytes()
    lengths = sorted({round(len(whole) * part / 60) for part in range(60)} | {len(whole) - n for n in range(1, 12)})
    for length in lengths:
        saved.write_bytes(whole[:length])
        with pytest.raises(ck.CheckpointError):
            ck.load_checkpoint(saved)


def test_every_flipped_bit_is_noticed_or_harmless(saved):
    whole = saved.read_bytes()
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        place = chance.randrange(len(whole))
        damaged[place] ^= 1 << chance.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(ck.CheckpointError):
            ck.load_checkpoint(saved)


def test_flipped_bits_of_foreign_files(tmp_path):
    """No hash there, only each record's CRC: a flip outside the records may pass, but then changes nothing."""
    path = tmp_path / "foreign.pth"
    content = {"model": {"w": torch.arange(50.0)}, "epoch": 3}
    torch.save(content, path)
    whole = path.read_bytes()
    chance = random.Random(1)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _same(ck.load_checkpoint(path), content)
        except ck.CheckpointError:
            refused += 1
    assert refused > 30


# ---------------------------------------------------------------------------------------------------- manager


def test_manager_keeps_k_and_links_names(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep=2)
    manager.save(_state(-1, 5))
    manager.save(_state(0, 0), names=["checkpoint.pth"])
    manager.save(_state(0, 7))
    manager.save(_state(1, 0), names=["checkpoint.pth", "checkpoint_2.pth"], wait=True)
    recent = sorted(path.name for path in (tmp_path / ck.RECENT).iterdir())
    assert recent == ["epochs_0001_step_000007.pth", "epochs_0002_step_000000.pth"]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint.pth", "checkpoint_2.pth"]
    assert (tmp_path / "checkpoint.pth").stat().st_ino == (tmp_path / "checkpoint_2.pth").stat().st_ino
    assert ck.load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_manager_without_history(tmp_path):
    manager = ck.CheckpointManager(tmp_path)
    manager.save(_state(4), names=["checkpoint_best.pth", "checkpoint_best_default.pth"], recent=False, wait=True)
    assert list((tmp_path / ck.RECENT).iterdir()) == []
    assert ck.load_checkpoint(tmp_path / "checkpoint_best_default.pth")["epoch"] == 4
    assert ck.find_latest(tmp_path) is None


def test_manager_snapshots_before_it_writes(tmp_path, monkeypatch):
    gate = threading.Event()
    original = ck.save_checkpoint

    def slow(path, state):
        gate.wait(10)
        original(path, state)

    monkeypatch.setattr(ck, "save_checkpoint", slow)
    manager = ck.CheckpointManager(tmp_path)
    state = _state()
    manager.save(state, names=["checkpoint.pth"])
    assert manager.blocked_seconds < 1
    state["model"]["weight"].fill_(7.0)  # the next optimizer step
    gate.set()
    manager.close()
    assert ck.load_checkpoint(tmp_path / "checkpoint.pth")["model"]["weight"].eq(1.0).all()


def test_snapshots_keep_every_type_and_are_used_again(tmp_path):
    state = {
        "epoch": 0,
        "model": {
            "float": torch.randn(3, 5),
            "half": torch.randn(7).bfloat16(),
            "turned": torch.randn(4, 6).t(),
            "whole": torch.arange(3),
            "flag": torch.tensor(True),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4),
        },
        "nested": [(torch.ones(2), "x"), {"y": torch.zeros(1, dtype=torch.uint8)}],
    }
    manager = ck.CheckpointManager(tmp_path)
    for value in (1.0, 2.0):
        state["model"]["float"].fill_(value)
        manager.save(state, names=["checkpoint.pth"])
        manager.wait()
        assert _same(ck.load_checkpoint(tmp_path / "checkpoint.pth"), state)


def test_manager_cleans_up_after_a_kill(tmp_path):
    (tmp_path / ck.RECENT).mkdir()
    (tmp_path / ck.RECENT / ".epochs_0001_step_000000.pth.abc.partial").write_bytes(b"half")
    ck.CheckpointManager(tmp_path)
    assert list((tmp_path / ck.RECENT).iterdir()) == []


def _fill_disk(monkeypatch, after=1000):
    """Writers of this process get ENOSPC once a file is longer than `after` bytes."""
    original = ck._HashingWriter._pass
    written = {}

    def limited(self, view):
        written[id(self)] = written.get(id(self), 0) + len(view)
        if written[id(self)] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, view)

    monkeypatch.setattr(ck._HashingWriter, "_pass", limited)


def test_disk_full_keeps_the_last_good_file(saved, monkeypatch):
    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        _fill_disk(patch)
        with pytest.raises(WriteError, match="disk is full"):
            ck.save_checkpoint(saved, _state(9))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pth"]


def test_disk_full_in_the_background_is_reported_and_retried(tmp_path, monkeypatch, capsys):
    setup_logging(rank=0)
    manager = ck.CheckpointManager(tmp_path)
    manager.save(_state(0), names=["checkpoint.pth"], wait=True)
    with monkeypatch.context() as patch:
        _fill_disk(patch)
        manager.save(_state(1), names=["checkpoint.pth"])
        with pytest.raises(WriteError, match="disk is full"):
            manager.wait()
    assert "disk is full" in capsys.readouterr().out
    assert ck.load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0
    manager.save(_state(2), names=["checkpoint.pth"], wait=True)
    assert ck.load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_what_could_not_be_written_is_written_later(tmp_path, monkeypatch, capsys):
    """The best epoch's weights exist once: they are kept until there is room, and no later epoch takes their name."""
    setup_logging(rank=0)
    manager = ck.CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        _fill_disk(patch)
        manager.save(_state(1), names=["checkpoint_best.pth"], recent=False)
        manager._join()
    assert not (tmp_path / "checkpoint_best.pth").exists()
    manager.save(_state(2), names=["checkpoint.pth"])
    manager.wait()
    assert "checkpoint_best.pth of epoch 1 written after all" in capsys.readouterr().out
    assert ck.load_checkpoint(tmp_path / "checkpoint_best.pth")["epoch"] == 1
    assert ck.load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_disk_full_for_good_ends_the_run(tmp_path, monkeypatch):
    setup_logging(rank=0)
    manager = ck.CheckpointManager(tmp_path, max_failures=2)
    _fill_disk(monkeypatch)
    manager.save(_state(0))
    manager.save(_state(1))
    with pytest.raises(WriteError, match="disk is full"):
        manager.save(_state(2))


def test_disk_full_on_a_real_small_file_system(tmp_path):
    """The same on a tmpfs of 64 KiB in a mount namespace of its own, where the system lets us have one."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from util import checkpoint as ck
from util.files import WriteError
ck.save_checkpoint('/small/checkpoint.pth', {{'model': torch.zeros(2000), 'epoch': 1}})
try:
    ck.save_checkpoint('/small/checkpoint.pth', {{'model': torch.zeros(20000), 'epoch': 2}})
except WriteError as error:
    print(error)
print(ck.load_checkpoint('/small/checkpoint.pth')['epoch'], __import__('os').listdir('/small'))
"""
    mount = f"mkdir -p {tmp_path}/small && mount -t tmpfs -o size=64k tmpfs {tmp_path}/small && exec {sys.executable} -"
    script = script.replace("/small", f"{tmp_path}/small")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True) if shutil.which("unshare") else None
    if probe is None or probe.returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], input=script, capture_output=True, text=True)
    if "mount" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert "disk is full" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "1 ['checkpoint.pth']"


# ---------------------------------------------------------------------------------------------------- resume


def _run_folder(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep=3)
    manager.save(_state(0), names=["checkpoint.pth"])
    manager.save(_state(1), names=["checkpoint.pth"])
    manager.save(_state(1, 12), wait=True)
    return tmp_path / ck.RECENT


def test_latest_is_by_progress_not_by_clock(tmp_path):
    recent = _run_folder(tmp_path)
    os.utime(recent / "epochs_0001_step_000000.pth")
    assert ck.find_latest(tmp_path) == recent / "epochs_0002_step_000012.pth"


def test_latest_belongs_to_the_run_that_wrote_last(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep=3)
    manager.save({**_state(40), "run_id": "old"}, names=["checkpoint.pth"], wait=True)
    for path in tmp_path.glob("**/*.pth"):
        os.utime(path, (1, 1))
    manager.save({**_state(2), "run_id": "new"}, wait=True)  # started afresh in the same folder, then killed
    assert ck.find_latest(tmp_path) == tmp_path / ck.RECENT / "epochs_0003_step_000000.pth"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_latest_falls_back_and_says_so(tmp_path, capsys, damage):
    setup_logging(rank=0)
    newest = _run_folder(tmp_path) / "epochs_0002_step_000012.pth"
    content = bytearray(newest.read_bytes())
    content[200] ^= 1
    newest.write_bytes({"truncate": content[:-300], "flip": content, "empty": b""}[damage])
    found = ck.find_latest(tmp_path)
    assert found is not None
    assert ck.load_checkpoint(found)["epoch"] == 1
    out = capsys.readouterr().out
    assert "epochs_0002_step_000012.pth" in out
    assert "falling back to" in out


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    setup_logging(rank=0)
    ck.save_checkpoint(tmp_path / "checkpoint.pth", _state())
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ck.CheckpointError, match="move them away"):
        ck.find_latest(tmp_path)


def test_resolve_resume(tmp_path, saved):
    assert ck.resolve_resume("", tmp_path) is None
    assert ck.resolve_resume("auto", tmp_path / "fresh") is None
    assert ck.resolve_resume("auto", tmp_path) == saved
    assert ck.resolve_resume(str(saved), tmp_path) == saved
    with pytest.raises(ck.CheckpointError, match="does not exist"):
        ck.resolve_resume(str(tmp_path / "none.pth"), tmp_path)


def test_model_state_must_fit(tmp_path):
    model = torch.nn.Linear(3, 2)
    good = {"model": torch.nn.Linear(3, 2).state_dict()}
    ck.load_model_state(model, good, path="a.pth")
    assert torch.equal(model.weight, good["model"]["weight"])
    for wrong, text in [
        ({"model": {"weight": torch.zeros(2, 3)}}, "missing keys"),
        ({"model": {**good["model"], "x": torch.zeros(1)}}, "unknown keys"),
        ({"model": {**good["model"], "weight": torch.zeros(2, 4)}}, r"\(2, 4\), the model needs \(2, 3\)"),
        ({}, "no 'model'"),
    ]:
        with pytest.raises(ck.CheckpointError, match=text):
            ck.load_model_state(model, wrong, path="a.pth")


def test_weights_that_are_not_finite_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"model": {"a.weight": torch.ones(2), "b.weight": torch.tensor([1.0, float("nan")])}}, path)
    with pytest.raises(ck.CheckpointError, match=r"1 of its 2 weights hold NaN .*first b\.weight: the run .* diverged"):
        ck.load_checkpoint(path)


def test_names_of_compiled_and_parallel_models_are_those_of_the_bare_model(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    state = {"module._orig_mod.a.weight": torch.ones(2), "layers._orig_mod.0.b": torch.zeros(1)}
    torch.save({"model": state}, path)
    assert list(ck.load_checkpoint(path)["model"]) == ["a.weight", "layers.0.b"]
