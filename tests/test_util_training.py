"""Pieces of the shared training loop: accumulation groups, bad samples, steps that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from util.distributed import Processes
from util.errors import NonFiniteError, UserError
from util.files import WriteError
from util.log import Progress
from util.training import BadSamples, FiniteGuard, Trainer, _Waits, accumulation_group


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
    trainer.guard.watch([(bad, ["patch_7"])], bad, 3)
    with pytest.raises(NonFiniteError, match=r"step 3 .*patch_7.*nonfinite_rank0\.json"):
        trainer.check()

    def full(*_):
        raise WriteError("the disk is full")

    monkeypatch.setattr("util.training.write_json", full)
    trainer.guard.watch([(bad, ["patch_7"])], bad, 3)
    with pytest.raises(NonFiniteError, match=r"step 3 .*patch_7.*the disk is full"):
        trainer.check()


def test_all_batches_of_a_step_are_suspects() -> None:
    """The batch that was not finite is named, not the last of its step; without one, all samples of all processes."""
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    guard, facts = FiniteGuard(allowed=0), []

    def others(mine: dict[str, list[str]]) -> list[dict[str, list[str]]]:
        return [mine, {"lost": [], "names": ["e", "f"]}]

    def dump(found: dict) -> str:
        facts.append(found)
        return "facts.json"

    guard.watch([(bad, ["a", "b"]), (good, ["c", "d"])], bad, 5)
    with pytest.raises(NonFiniteError, match="samples of that batch: a, b; facts"):
        guard.check(others, dump)
    assert facts[0] == {
        "step": 5, "loss_finite": False, "names": ["a", "b", "c", "d"], "culprits_by_rank": [["a", "b"], []],
    }  # fmt: skip
    guard = FiniteGuard(allowed=0)
    guard.watch([(good, ["a"])], bad, 5)
    with pytest.raises(NonFiniteError, match="samples of that batch: a, e, f; facts"):
        guard.check(others, dump)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_float16_does_not_hide_what_never_becomes_finite(where: str, tmp_path: Path) -> None:
    """The scaler leaves out a step with an overflow; a loss that is NaN in any batch, or endless overflow, ends it."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, processes=Processes(), output_dir=tmp_path, lr_at=float, accum_iter=2,
        scaler=torch.amp.GradScaler("cpu"),
    )  # fmt: skip
    before = model.weight.detach().clone()
    factor = torch.tensor(float("nan") if where == "loss" else 1.0)
    if where == "gradient":
        model.weight.register_hook(lambda gradient: gradient * float("inf"))

    def loss_of(step: int) -> torch.Tensor:
        loss = model(torch.ones(1, 1)).sum()
        return loss * factor if step % 2 == 0 else loss

    batches = [{"name": [f"patch_{i}"], "replaced": []} for i in range(80)]
    message = "samples of that batch: patch_0;" if where == "loss" else "loss scale of 0.5"
    with pytest.raises(NonFiniteError, match=message):
        trainer.run_epoch(
            batches, lambda batch, step: (step, {}), loss_of, epoch=0, steps=80,
            progress=Progress(80, title="", enabled=False),
        )  # fmt: skip
    assert torch.equal(model.weight, before)
    if where == "gradient":
        assert trainer._sums.as_dicts()["sums"]["overflows"] == 17  # 65,536 / 2^17 = 0.5


def test_waits_are_the_idle_time_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host's wait does not count while work is queued: only the time between two marks in the queue.

    A queue of pretended work: the device is done with what it was given at `busy`; a mark is reached at the later of
    that moment and the moment it was set.
    """
    clock, busy = [0.0], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = busy[0] = max(busy[0], clock[0])

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = _Waits(torch.device("cuda", 0))
    busy[0] = 10.0  # ten seconds of work are queued
    with waits:
        clock[0] = 4.0  # the batch takes four: the device does not notice
    assert waits.take() == 0.0
    with waits:
        clock[0] = 13.0  # nine more: it stands still for three
    busy[0] = 14.0
    with waits:
        pass
    assert waits.take() == 3.0
    assert waits.take() == 0.0
