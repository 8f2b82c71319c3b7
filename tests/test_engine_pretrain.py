"""The pretraining engine: accumulation, bad samples, non-finite steps, reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_pretrain import BadSamples, FiniteGuard, accumulation_group, reconstruct, train_one_epoch
from models_mixmim import MixMIM, model_config
from sarwmix.transforms import SarTransform
from sarwmix.weighting import WeightOptions
from util.errors import NonFiniteError, UserError
from util.log import Progress
from util.optim import build_adamw, parameter_groups

CPU = torch.device("cpu")


def batches(count: int, size: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(size, 2, 120, 120, generator=generator) * 4 - 15,
            "name": [f"s{step}_{i}" for i in range(size)],
            "replaced": [],
        }
        for step in range(count)
    ]


def transform() -> SarTransform:
    return SarTransform(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0), weighting=WeightOptions())


def tiny() -> MixMIM:
    torch.manual_seed(0)
    return MixMIM(**model_config("mixmim_tiny"))


def epoch(model: MixMIM, loader: list[dict[str, Any]], tmp_path: Path, *, allowed: int = 0, **options: Any) -> Any:
    optimizer = build_adamw(parameter_groups(model, weight_decay=0.05), lr=1e-3)
    settings: dict[str, Any] = {
        "transform": transform(),
        "device": CPU,
        "epoch": 0,
        "steps": len(loader),
        "lr_at": lambda at: 1e-3,
        "seed": 0,
        "guard": FiniteGuard(optimizer, allowed, CPU),
        "bad_samples": BadSamples(limit=10),
        "all_gather": lambda value: [value],
        "all_reduce_mean": dict,
        "dump": lambda facts: (tmp_path / "dump").write_text(str(facts)) and str(tmp_path / "dump"),
        "progress": Progress(len(loader), title="", enabled=False),
    }
    return train_one_epoch(model, loader, optimizer, **{**settings, **options})


def test_accumulation_group_by_hand() -> None:
    # 7 batches in groups of 3: 0 1 2 | 3 4 5 | 6
    got = [accumulation_group(step, 7, 3) for step in range(7)]
    assert [g[0] for g in got] == [True, False, False, True, False, False, True]
    assert [g[1] for g in got] == [False, False, True, False, False, True, True]
    assert [g[2] for g in got] == [3, 3, 3, 3, 3, 3, 1]


def test_accumulated_gradient_is_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three accumulated batches give the mean of their gradients, and the short last group is not scaled down."""
    import engine_pretrain

    loader = batches(4)
    seen: list[torch.Tensor] = []
    original = engine_pretrain.optimizer_step

    def spy(optimizer: Any, parameters: Any, *rest: Any) -> Any:
        seen.append(parameters[0].grad.clone())
        return original(optimizer, parameters, *rest)

    monkeypatch.setattr(engine_pretrain, "optimizer_step", spy)
    epoch(tiny(), loader, tmp_path, accum_iter=3, lr_at=lambda at: 0.0)  # lr 0: weights stay, gradients compare
    epoch(tiny(), loader, tmp_path, accum_iter=1, lr_at=lambda at: 0.0)
    grouped, single = seen[:2], seen[2:]
    torch.testing.assert_close(grouped[0], torch.stack(single[:3]).mean(0))
    torch.testing.assert_close(grouped[1], single[3])


def test_learning_rate_follows_the_fractional_epoch(tmp_path: Path) -> None:
    asked: list[float] = []
    epoch(tiny(), batches(4), tmp_path, accum_iter=2, epoch=3, lr_at=lambda at: asked.append(at) or 1e-3)
    assert asked == [3.0, 3.5]


def test_bad_samples_are_counted_and_limited() -> None:
    bad = BadSamples(limit=2)
    bad.add([("a", "gone")])
    bad.add([])
    bad.add([("b", "short")])
    with pytest.raises(UserError, match=r"3 unreadable samples, more than --max_bad_samples 2.*c: torn"):
        bad.add([("c", "torn")])


@pytest.mark.parametrize("allowed", [0, 1])
def test_non_finite_step(tmp_path: Path, allowed: int) -> None:
    """A poisoned batch never reaches the weights; it stops the run or is skipped as often as allowed."""
    model = tiny()
    loader = batches(3)
    before: list[torch.Tensor] = []

    class Poisoned(SarTransform):
        calls = 0

        def __call__(self, image: torch.Tensor, flips: torch.Tensor | None = None) -> Any:
            out = super().__call__(image, flips)
            self.calls += 1
            if self.calls == 2:
                before.append(model.decoder_pred.weight.detach().clone())
                return out._replace(images=out.images * float("inf"))
            return out

    poisoned = Poisoned(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0), weighting=WeightOptions())
    if allowed == 0:
        with pytest.raises(NonFiniteError, match=r"step 1 .*--skip_nonfinite 0.*s1_0"):
            epoch(model, loader, tmp_path, transform=poisoned)
        assert "s1_3" in (tmp_path / "dump").read_text()
        assert torch.equal(model.decoder_pred.weight, before[0])
    else:
        result = epoch(model, loader, tmp_path, transform=poisoned, allowed=1)
        assert result.stats["skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_stop_request_ends_between_steps(tmp_path: Path) -> None:
    result = epoch(tiny(), batches(4), tmp_path, on_step=lambda done: done == 2)
    assert (result.finished, result.steps_done) == (False, 2)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct(norm_pix_loss: bool) -> None:
    torch.manual_seed(0)
    model = MixMIM(**model_config("mixmim_tiny"), norm_pix_loss=norm_pix_loss)
    batch = batches(1, 2)[0]
    mask = model.draw_mask(generator=torch.Generator().manual_seed(0))
    got = reconstruct(model, batch, transform=transform(), mask=mask)
    sar = transform()(batch["image"])
    hidden = mask.view(1, 1, 4, 1, 4, 1).expand(2, 2, 4, 32, 4, 32).reshape(2, 2, 128, 128).bool()
    db = sar.db
    torch.testing.assert_close(torch.from_numpy(got.original), db)
    mixed = torch.where(hidden, db.flip(0), db)
    torch.testing.assert_close(torch.from_numpy(got.mixed), mixed, rtol=1e-4, atol=1e-3)
    rec = torch.from_numpy(got.reconstruction)
    torch.testing.assert_close(rec[~hidden], db[~hidden], rtol=1e-4, atol=1e-3)  # visible cells are the sample's own
    assert (rec - db)[hidden].abs().mean() > 0.1  # untrained
    assert got.weights.shape == db.shape
    assert 1 <= got.weights.min() <= got.weights.max() <= 2.7183
