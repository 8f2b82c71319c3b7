"""The watchdog: what it ends, what it leaves alone, and what it says."""

from __future__ import annotations

import time

import pytest

from util.distributed import Processes
from util.errors import EXIT_LOST
from util.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch):
    said = []
    monkeypatch.setattr(Processes, "abort", lambda self, message, code: said.append((message, code)))
    return said


def _slow_batches(*delays):
    for number, delay in enumerate(delays):
        time.sleep(delay)
        yield number


def test_late_batch_ends_the_job_and_shows_where(ended):
    dog = Watchdog(Processes(world_size=2), limit=0.2)
    batches = list(dog.watch(_slow_batches(0.0, 0.7)))
    dog.close()
    assert batches == [0, 1]  # here abort returns; in reality nothing comes after it
    message, code = ended[0]
    assert code == EXIT_LOST
    assert "waiting for a batch from the data loader (limit 0 s, from --hang_timeout 0.2)" in message
    assert "_slow_batches" in message


def test_slow_step_after_quick_ones_ends_the_job(ended):
    dog = Watchdog(Processes(world_size=2), limit=0.2)
    for number in dog.watch(_slow_batches(*[0] * 5)):
        time.sleep(0.8 if number == 4 else 0.01)
    dog.close()
    assert "computing a step together" in ended[0][0]


def test_steps_may_take_a_few_times_the_slowest(ended):
    dog = Watchdog(Processes(world_size=2), limit=0.1)
    for number in dog.watch(_slow_batches(*[0] * 6)):
        time.sleep((0.5, 0, 0, 0.09, 0.3, 0.5)[number])  # the first three may compile; 0.3 < 4 * 0.09; 0.5 < 4 * 0.3
    dog.close()
    assert ended == []


def test_evaluation_is_only_watched_while_it_waits(ended):
    dog = Watchdog(Processes(world_size=2), limit=0.2)
    for _ in dog.watch(_slow_batches(0, 0), alone=True):
        time.sleep(0.6)
    assert ended == []
    list(dog.watch(_slow_batches(0.7), alone=True))
    dog.close()
    assert "waiting for a batch" in ended[0][0]


@pytest.mark.parametrize(("world_size", "limit"), [(1, 0.05), (2, 0.0)])
def test_alone_or_without_limit_it_is_idle(ended, world_size, limit):
    dog = Watchdog(Processes(world_size=world_size), limit=limit)
    assert list(dog.watch(_slow_batches(0.2))) == [0]
    dog.close()
    assert ended == []


def test_nothing_is_watched_between_epochs_and_while_paused(ended):
    dog = Watchdog(Processes(world_size=2), limit=0.1)
    for _ in dog.watch(_slow_batches(0, 0)):
        with dog.paused():
            time.sleep(0.3)
    time.sleep(0.3)
    batches = dog.watch(_slow_batches(0, 0))
    next(batches)
    batches.close()  # an epoch that is left early
    time.sleep(0.3)
    dog.close()
    assert ended == []
