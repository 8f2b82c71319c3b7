"""Pieces of the shared training loop: accumulation groups, bad samples, steps that are not finite."""

from __future__ import annotations

import pytest
import torch

from util.distributed import Processes
from util.errors import NonFiniteError, UserError
from util.files import WriteError
from util.training import BadSamples, Trainer, accumulation_group


def test_accumulation_group_by_hand() -> None:
    # 7 batches in groups of 3: 0 1 2 | 3 4 5 | 6
    got = [accumulation_group(step, 7, 3) for step in range(7)]
    assert [g[0] for g in got] == [True, False, False, True, False, False, True]
    assert [g[1] for g in got] == [False, False, True, False, False, True, True]
    assert [g[2] for g in got] == [3, 3, 3, 3, 3, 3, 1]


def test_bad_samples_are_counted_and_limited() -> None:
    bad = BadSamples(limit=2)
    bad.add([("a", "gone")])
    bad.add([])
    bad.add([("b", "short")])
    with pytest.raises(UserError, match=r"3 unreadable samples, more than --max_bad_samples 2.*c: torn"):
        bad.add([("c", "torn")])


def test_a_full_disk_does_not_hide_the_error(monkeypatch, tmp_path) -> None:
    """The facts about a step that is not finite go to a file; when that fails, the message is still about the step."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    trainer = Trainer(model, optimizer, processes=Processes(), output_dir=tmp_path, lr_at=float)
    bad = torch.tensor(float("nan"))
    trainer.guard.watch(bad, bad, ["patch_7"], 3)
    with pytest.raises(NonFiniteError, match=r"step 3 .*patch_7.*nonfinite_rank0\.json"):
        trainer.check()

    def full(*_):
        raise WriteError("the disk is full")

    monkeypatch.setattr("util.training.write_json", full)
    trainer.guard.watch(bad, bad, ["patch_7"], 3)
    with pytest.raises(NonFiniteError, match=r"step 3 .*patch_7.*the disk is full"):
        trainer.check()
