"""Continuing a run: differences that are refused, and the place where another batch goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from util.checkpoint import CheckpointError, save_checkpoint, taking_apart
from util.distributed import Processes
from util.errors import UserError
from util.log import setup_logging
from util.resume import (
    Batch,
    check_same_run,
    find_checkpoint,
    load_verified,
    new_run_id,
    restore_rng,
    resume_position,
    share_of_counts,
)
from util.seeding import rng_state

RUN = {"kind": "pretrain", "data": {"dataset": "demo", "bands": ["VH", "VV"]}, "schedule": {"epochs": 3, "lr": None}}


def test_same_run_passes_and_extra_entries_do_not_matter():
    check_same_run({**RUN, "model": 1, "data": {**RUN["data"], "extra": 2}}, RUN, path="a.pth", allow_mismatch=False)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"kind": "finetune"}, "kind: checkpoint 'finetune', now 'pretrain'"),
        ({"data": {"dataset": "benv2", "bands": ["VH", "VV"]}}, "data.dataset: checkpoint 'benv2', now 'demo'"),
        ({"data": {"dataset": "demo", "bands": ["VV", "VH"]}}, "data.bands"),
        ({"schedule": {"epochs": 4, "lr": None}}, "schedule.epochs: checkpoint 4, now 3"),
        ({"schedule": None}, r"schedule.lr: checkpoint '\(not stored\)'"),
    ],
)
def test_each_difference_is_named(changed, text, capsys):
    with pytest.raises(UserError, match=text):
        check_same_run({**RUN, **changed}, RUN, path="a.pth", allow_mismatch=False)
    setup_logging(rank=0)
    check_same_run({**RUN, **changed}, RUN, path="a.pth", allow_mismatch=True)
    assert "resuming a different run (--allow_mismatch)" in capsys.readouterr().out


def _checkpoint(batch, step):
    return {
        "epoch": 4, "step": step, "batch": batch.as_dict(), "sampler": {"samples": step * batch.per_step},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "step", "new", "expected"),
    [
        (Batch(8, 1, 2, 0.1), 7, Batch(8, 1, 2, 0.1), 7),  # the same: exactly there
        (Batch(8, 1, 2, 0.1), 7, Batch(8, 1, 4, 0.2), 3),  # 112 samples done, 32 a step: 3 steps, 16 seen again
        (Batch(8, 1, 4, 0.1), 3, Batch(8, 1, 2, 0.1), 6),  # 96 samples, 16 a step
        (Batch(8, 1, 1, 0.1), 7, Batch(8, 4, 1, 0.1), 4),  # 56 samples, optimizer steps of 4 x 8: one whole one
        (Batch(8, 1, 2, 0.1), 0, Batch(4, 1, 2, 0.1), 0),
        (Batch(8, 1, 1, 0.1), 11, Batch(1, 1, 1, 0.1), 20),  # never behind the end of the epoch (20 steps)
    ],
)
def test_position_is_kept_in_samples(capsys, old, step, new, expected):
    setup_logging(rank=0)
    assert resume_position(_checkpoint(old, step), batch=new, steps=20) == (5, expected)
    out = capsys.readouterr().out
    assert ("effective batch" in out) == (old != new)
    if old.world_size == 2 and new.world_size == 4:
        assert "world_size 4 instead of 2; effective batch 16 -> 32, peak lr 0.1 -> 0.2" in out
        assert "112 samples of epoch 5 were done; 16 are done again" in out


def test_checkpoints_of_others_have_no_batch():
    assert resume_position({"epoch": 63}, batch=Batch(8, 1, 1, 0.1), steps=10) == (64, 0)


def test_find_and_load(tmp_path):
    alone = Processes()
    assert find_checkpoint("auto", tmp_path, alone) is None
    save_checkpoint(tmp_path / "checkpoint.pth", {"epoch": 3})
    found = find_checkpoint("auto", tmp_path, alone)
    assert found == tmp_path / "checkpoint.pth"
    assert load_verified(found, alone) == {"epoch": 3}
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(str(tmp_path / "x.pth"), tmp_path, alone)


def test_generators_are_restored_for_the_same_number_of_processes():
    state = {"rng": {0: rng_state()}}
    first = torch.rand(())
    restore_rng(state, Processes())
    assert torch.rand(()) == first
    restore_rng(state, Processes(world_size=2))  # another number: left alone
    assert torch.rand(()) != first
    restore_rng({}, Processes())


def test_run_ids_differ():
    assert len(new_run_id()) == 16
    assert new_run_id() != new_run_id()


def test_counts_go_back_to_their_processes_or_are_spread():
    parts = {
        0: {"sums": {"loss": 6.0, "losses": 3.0}, "counts": {"invalid": 5.0}, "bad_samples": [["a", "torn"]]},
        1: {"sums": {"loss": 2.0, "losses": 1.0}, "counts": {}, "bad_samples": [["b", "gone"]]},
    }
    second = share_of_counts(parts, Processes(rank=1, world_size=2))
    assert second == {"sums": {"loss": 2.0, "losses": 1.0}, "counts": {}, "bad_samples": [("b", "gone")]}
    alone = share_of_counts(parts, Processes())
    assert alone["sums"] == {"loss": 8.0, "losses": 4.0}  # mean 2, as before
    assert alone["counts"] == {"invalid": 5.0}
    assert alone["bad_samples"] == [("a", "torn"), ("b", "gone")]
    fourth = share_of_counts(parts, Processes(rank=3, world_size=4))
    assert fourth["sums"] == {"loss": 2.0, "losses": 1.0}
    assert fourth["bad_samples"] == []
    assert share_of_counts({}, Processes()) == {"sums": None, "counts": None, "bad_samples": []}


def test_a_full_gpu_is_not_blamed_on_the_checkpoint(tmp_path: Path) -> None:
    """The remedy would be wrong: the file is whole, another one would not fit either."""
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), taking_apart(tmp_path / "checkpoint.pth"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CheckpointError, match="do not fit"), taking_apart(tmp_path / "checkpoint.pth"):
        raise RuntimeError("size mismatch")
