"""RunSaver: what is in a checkpoint, timed saves, stop requests; and what asynchronous writing costs the training."""

from __future__ import annotations

import time

import pytest
import torch

from util.checkpoint import CheckpointManager, load_checkpoint
from util.distributed import Processes
from util.log import setup_logging
from util.resume import Batch, Resumed
from util.saving import RunSaver
from util.training import Trainer


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**options):
        model = torch.nn.Linear(2, 1)
        trainer = Trainer(
            model, torch.optim.AdamW(model.parameters()), processes=Processes(), output_dir=tmp_path, lr_at=float
        )
        saver = RunSaver(
            tmp_path,
            **{
                "processes": Processes(), "is_main": True, "keep": 2, "minutes": 0.0, "hang_timeout": 0.0, "seed": 5,
                "batch": Batch(4, 2, 1, 0.1), "resumed": Resumed(run_id="abc"),
                "fixed": {"kind": "pretrain"}, "model": model, "trainer": trainer,
                "changing": lambda: {"best": {"score": 3}}, **options,
            },
        )  # fmt: skip
        made.append(saver)
        return saver

    setup_logging(rank=0)
    yield build
    for saver in made:
        saver._stop.restore()


def test_a_checkpoint_holds_what_resuming_needs(make, tmp_path):
    saver = make()
    saver.save(2, 6, ["checkpoint.pth"], wait=True)
    saver.close()
    saved = load_checkpoint(tmp_path / "checkpoint.pth")
    assert saved["format"] == "sarwmix/1"
    assert {"model", "optimizer", "scaler", "rng", "best", "kind", "run_id", "world_size"} <= set(saved)
    assert (saved["epoch"], saved["step"]) == (2, 6)
    assert saved["sampler"] == {"seed": 5, "epoch": 3, "position": 6, "samples": 24}
    assert saved["batch"] == {"batch_size": 4, "accum_iter": 2, "world_size": 1, "lr": 0.1, "effective": 8}
    assert sorted(saved["rng"]) == [0]
    assert set(saved["rng"][0]) == {"python", "numpy", "torch", "cuda"}
    assert set(saved["counted"][0]) == {"sums", "counts", "bad_samples"}


def test_a_resumed_run_gets_the_names_that_a_kill_kept_from_its_checkpoint(make, tmp_path):
    saver = make()
    saver.save(0, 0, ["checkpoint.pth", "checkpoint_best.pth"], wait=True)
    saver.save(1, 0, ["checkpoint.pth", "checkpoint_best.pth"], wait=True)
    older, newest = sorted((tmp_path / "recent").iterdir())
    (tmp_path / "checkpoint.pth").unlink()  # killed before the first name existed, and before the second was renewed
    (tmp_path / "checkpoint_best.pth").unlink()
    (tmp_path / "checkpoint_best.pth").hardlink_to(older)
    saved = load_checkpoint(newest)
    make(resumed=Resumed(path=newest, entries=saved)).close()
    for name in saved["names"]:
        assert (tmp_path / name).samefile(newest)


def test_a_checkpoint_from_elsewhere_gets_no_names(make, tmp_path):
    saver = make()
    saver.save(0, 0, ["checkpoint.pth"], wait=True)
    elsewhere = tmp_path / "other.pth"
    elsewhere.write_bytes((tmp_path / "checkpoint.pth").read_bytes())
    make(resumed=Resumed(path=elsewhere, entries={"names": ["checkpoint_9.pth"]})).close()
    assert not (tmp_path / "checkpoint_9.pth").exists()


def test_timed_saves(make, tmp_path):
    saver = make(minutes=0.1 / 60)
    assert not saver.after_step(0, 10, 1)
    time.sleep(0.15)
    assert not saver.after_step(0, 10, 2)
    saver.close()
    assert [path.name for path in (tmp_path / "recent").iterdir()] == ["epochs_0000_step_000002.pth"]


def test_never_by_time_when_told_so(make, tmp_path):
    saver = make(minutes=0.0)
    assert not saver.after_step(0, 10, 1)
    saver.close()
    assert list((tmp_path / "recent").iterdir()) == []


def test_stop_request_ends_the_epoch_or_waits_for_its_end(make, tmp_path):
    saver = make()
    saver._stop.signal_name = "SIGTERM"
    assert saver.after_step(0, 10, 3)
    assert saver.stopping
    saver.save_and_stop(-1, 3)
    assert saver.stopped
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 3

    saver = make()
    saver._stop.signal_name = "SIGTERM"
    assert not saver.after_step(0, 10, 10)  # the epoch is complete: it is logged and saved as usual...
    assert saver.stopping  # ... and then the run stops


@pytest.mark.slow
def test_writing_a_base_checkpoint_blocks_for_less_than_a_second(tmp_path):
    """113.6 M parameters with their two Adam moments, 1.36 GB. CPU time, because other programs may be running."""
    count = 568_000
    weights = {str(index): torch.ones(count) for index in range(200)}
    moments = {index: {"exp_avg": torch.ones(count), "exp_avg_sq": torch.ones(count)} for index in range(200)}
    manager = CheckpointManager(tmp_path)
    blocked = []
    for epoch in range(3):
        state = {"model": weights, "optimizer": {"state": moments}, "epoch": epoch}
        began, cpu = time.monotonic(), time.thread_time()
        manager.save(state, names=["checkpoint.pth"])
        blocked.append((time.thread_time() - cpu, manager.blocked_seconds))
        manager.wait()
        print(f"blocked {blocked[-1][1]:.2f} s (CPU {blocked[-1][0]:.2f} s) of {time.monotonic() - began:.1f} s")
    assert min(cpu for cpu, _ in blocked) < 1.0
