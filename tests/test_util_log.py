"""Logger, progress, epoch log, TensorBoard."""

from __future__ import annotations

import io
import json

import util.log
from util.files import WriteError, read_jsonl
from util.log import EpochLog, Progress, ScalarWriter, format_duration, get_logger, setup_logging


def test_rank_0_speaks_and_records(tmp_path, capsys):
    setup_logging(tmp_path, rank=0)
    get_logger().info("hello %d", 3)
    get_logger().warning("careful")
    assert capsys.readouterr().out == "hello 3\nwarning: careful\n"
    text = (tmp_path / "run.log").read_text()
    assert "INFO hello 3" in text
    assert "WARNING careful" in text
    setup_logging(rank=0)


def test_other_ranks_only_warn(tmp_path, capsys):
    setup_logging(tmp_path, rank=2)
    get_logger().info("hello")
    get_logger().error("bad")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[rank 2] error: bad\n"
    assert not (tmp_path / "run.log").exists()
    setup_logging(rank=0)


def test_progress_lines():
    stream = io.StringIO()
    progress = Progress(4, title="Epoch 1/2", interval=1000, stream=stream)
    for step in range(1, 5):
        progress.update(step, samples=step * 8, values={"loss": 0.5, "lr": 1e-3})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first and the last
    assert lines[0].startswith("Epoch 1/2 [1/4]  loss 0.5  lr 0.001  ")
    assert "images/s" in lines[0]
    assert "ETA" in lines[0]
    assert "MiB" in lines[0]
    assert lines[1].startswith("Epoch 1/2 [4/4]")


def test_progress_of_other_ranks_is_silent():
    stream = io.StringIO()
    progress = Progress(1, title="x", enabled=False, stream=stream)
    assert not progress.wants
    progress.update(1)
    progress.close()
    assert stream.getvalue() == ""


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(2, title="E", stream=stream)
    progress.update(2)
    progress.close()
    assert stream.getvalue().startswith("\rE [########################] 2/2")
    assert stream.getvalue().endswith("\n")


def test_epoch_log_is_json_lines(tmp_path):
    log = EpochLog(tmp_path / "run")
    log.write({"epoch": 0, "train_loss": 0.25})
    log.write({"epoch": 1, "train_loss": float("nan")})
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert records == [{"epoch": 0, "train_loss": 0.25}, {"epoch": 1, "train_loss": None}]


def test_epoch_log_has_each_epoch_once(tmp_path):
    log = EpochLog(tmp_path)
    for epoch in range(3):
        log.write({"epoch": epoch, "first": True})
    EpochLog(tmp_path, start_epoch=2).write({"epoch": 2, "first": False})  # killed before epoch 2 was saved
    assert [(row["epoch"], row["first"]) for row in read_jsonl(log.path)] == [(0, True), (1, True), (2, False)]
    assert read_jsonl(tmp_path / "log.superseded.txt") == [{"epoch": 2, "first": True}]
    EpochLog(tmp_path, start_epoch=3)
    assert len(read_jsonl(log.path)) == 3


def test_a_full_disk_costs_a_line_not_the_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise WriteError("the disk is full")

    setup_logging(rank=0)
    monkeypatch.setattr(util.log, "append_jsonl", full)
    EpochLog(tmp_path).write({"epoch": 0})
    monkeypatch.setattr(util.log, "make_directory", full)
    writer = ScalarWriter(tmp_path / "tb")
    writer.add(0, {"loss": 1.0})
    writer.add(1, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().out.count("disk is full") == 2


def test_tensorboard_is_lazy_and_optional(tmp_path):
    ScalarWriter(None).add(0, {"loss": 1.0})
    writer = ScalarWriter(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()
    writer.add(1000, {"train_loss": 0.5, "lr": 1e-3})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["lr", "train_loss"]
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1000, 0.5)]


def test_duration():
    assert format_duration(3725.4) == "1:02:05"
    assert format_duration(-1) == "0:00:00"
