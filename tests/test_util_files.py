"""Atomic files, JSON, JSON lines, links, safe names."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from util import files
from util.errors import UserError


def test_atomic_write_replaces_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    with files.atomic_write(path) as stream:
        stream.write(b"one")
    with files.atomic_write(path, "w") as stream:
        stream.write("zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_atomic_write_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def stop_halfway():
        with files.atomic_write(path) as stream:
            stream.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_full_says_so_and_keeps_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.WriteError, match=r"(disk|device)"), files.atomic_write(path) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_real_full_device():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(files.WriteError, match="disk is full"):
        files.append_jsonl("/dev/full", {"a": 1})


def test_missing_folder_and_file_in_the_way(tmp_path):
    with pytest.raises(files.WriteError, match="folder does not exist"), files.atomic_write(tmp_path / "no" / "x"):
        pass
    (tmp_path / "plain").write_text("")
    with pytest.raises(files.WriteError, match="cannot create the folder"):
        files.make_directory(tmp_path / "plain" / "sub")


def test_permissions_and_symlinks_are_respected(tmp_path):
    target = tmp_path / "real.txt"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    with files.atomic_write(link, "w") as stream:
        stream.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_write_protected_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # what a user other than root sees on a 0444 file
    with pytest.raises(files.WriteError, match="permission denied"), files.atomic_write(path):
        pass
    assert path.read_text() == "old"


def test_partial_files_are_removed(tmp_path):
    (tmp_path / f".checkpoint.pth.x{files.TEMP_SUFFIX}").write_text("half")
    (tmp_path / "keep.pth").write_text("whole")
    assert files.remove_partial_files(tmp_path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["keep.pth"]


def test_json_round_trip_without_nan(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": float("nan"), "b": np.float32(0.5), "c": Path("x"), "d": (1, np.arange(2))})
    assert files.read_json(path) == {"a": None, "b": 0.5, "c": "x", "d": [1, [0, 1]]}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100000])
def test_read_json_refuses_damage(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(path)


def test_jsonl_heals_a_half_line(tmp_path):
    path = tmp_path / "log.txt"
    files.append_jsonl(path, {"epoch": 0, "loss": float("inf")})
    with open(path, "ab") as stream:
        stream.write(b'{"epoch": 1, "lo')
    files.append_jsonl(path, {"epoch": 1})
    assert files.read_jsonl(path) == [{"epoch": 0, "loss": None}, {"epoch": 1}]


def test_link_file_shares_and_replaces(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")
    for _ in range(2):  # the second time both names are already one file
        files.link_file(source, target)
        assert target.read_text() == "new"
        assert target.stat().st_ino == source.stat().st_ino
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_link_file_copies_where_links_are_not_supported(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("new")
    files.link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("name", ["a", "a/b.tif", "a/./b", "..a/b"])
def test_safe_join_accepts(tmp_path, name):
    assert files.safe_join(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "C:\\x", "\\x", "a\0b"])
def test_safe_join_refuses(tmp_path, name):
    with pytest.raises(UserError, match="is refused"):
        files.safe_join(tmp_path, name)


def test_safe_join_refuses_links_that_leave(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="symbolic link"):
        files.safe_join(root, "out/x")
    (tmp_path / "door").symlink_to(root)  # the root itself may be a link
    assert files.safe_join(tmp_path / "door", "x") == tmp_path / "door" / "x"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
