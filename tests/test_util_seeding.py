"""Random numbers are a function of (seed, epoch, step, rank, stream)."""

from __future__ import annotations

import random

import numpy as np
import torch

from util.seeding import derive_seed, rng_state, seed_step, set_rng_state, step_generator


def _draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_step_generator_depends_on_everything_and_nothing_else():
    base = (1, 2, 3, 0, "mask")
    first = torch.rand(4, generator=step_generator(*base))
    torch.rand(7)
    assert torch.equal(first, torch.rand(4, generator=step_generator(*base)))
    for position, other in enumerate((5, 5, 5, 5, "flip")):
        changed = list(base)
        changed[position] = other
        assert not torch.equal(first, torch.rand(4, generator=step_generator(*changed)))


def test_parts_do_not_run_together():
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert 0 <= derive_seed(0) < 2**63


def test_seed_step_reseeds_all():
    seed_step(0, 1, 2, 3)
    first = _draw()
    _draw()
    seed_step(0, 1, 2, 3)
    assert _draw() == first
    seed_step(0, 1, 3, 3)
    assert _draw() != first


def test_state_round_trip_through_a_safe_file(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.save(rng_state(), tmp_path / "rng.pth")
    first = _draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert _draw() == first
