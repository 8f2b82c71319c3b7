"""The pretraining engine: accumulation, bad samples, non-finite steps, reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_pretrain import reconstruct, train_one_epoch
from models_mixmim import MixMIM, model_config
from sarwmix.transforms import SarTransform
from sarwmix.weighting import WeightOptions
from util.distributed import Processes
from util.errors import NonFiniteError
from util.log import Progress
from util.optim import build_adamw, parameter_groups
from util.resume import Resumed
from util.training import EpochResult, Trainer


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


def build_trainer(model: torch.nn.Module, folder: Path, **options: Any) -> Trainer:
    optimizer = build_adamw(parameter_groups(model, weight_decay=0.05), lr=1e-3)
    settings: dict[str, Any] = {"lr_at": lambda at: 1e-3, "max_bad_samples": 10}
    return Trainer(model, optimizer, processes=Processes(), output_dir=folder, **{**settings, **options})


def epoch(trainer: Trainer, loader: list[dict[str, Any]], **options: Any) -> EpochResult:
    settings: dict[str, Any] = {
        "transform": transform(),
        "seed": 0,
        "epoch": 0,
        "steps": len(loader),
        "progress": Progress(len(loader), title="", enabled=False),
    }
    return train_one_epoch(trainer, loader[options.get("start_step", 0) :], **{**settings, **options})


def test_accumulated_gradient_is_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three accumulated batches give the mean of their gradients, and the short last group is not scaled down."""
    loader = batches(4)
    seen: list[torch.Tensor] = []
    original = Trainer.update

    def spy(trainer: Trainer, *rest: Any) -> Any:
        seen.append(trainer.model.decoder_pred.weight.grad.clone())
        return original(trainer, *rest)

    monkeypatch.setattr(Trainer, "update", spy)
    for accum_iter in (3, 1):  # lr 0: weights stay, gradients compare
        epoch(build_trainer(tiny(), tmp_path, accum_iter=accum_iter, lr_at=lambda at: 0.0), loader)
    grouped, single = seen[:2], seen[2:]
    torch.testing.assert_close(grouped[0], torch.stack(single[:3]).mean(0))
    torch.testing.assert_close(grouped[1], single[3])


def test_learning_rate_follows_the_fractional_epoch(tmp_path: Path) -> None:
    asked: list[float] = []
    trainer = build_trainer(tiny(), tmp_path, accum_iter=2, lr_at=lambda at: asked.append(at) or 1e-3)
    epoch(trainer, batches(4), epoch=3)
    assert asked == [3.0, 3.5]


@pytest.mark.parametrize("allowed", [0, 1])
def test_non_finite_step(tmp_path: Path, allowed: int) -> None:
    """A poisoned batch never reaches the weights; it stops the run or is skipped as often as allowed."""
    model = tiny()
    loader = batches(3)
    before: list[torch.Tensor] = []

    class Poisoned(SarTransform):
        calls = 0

        def __call__(self, *arguments: Any) -> Any:
            out = super().__call__(*arguments)
            self.calls += 1
            if self.calls == 2:
                before.append(model.decoder_pred.weight.detach().clone())
                return out._replace(images=out.images * float("inf"))
            return out

    poisoned = Poisoned(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0), weighting=WeightOptions())
    if allowed == 0:
        with pytest.raises(NonFiniteError, match=r"step 1 .*--skip_nonfinite 0.*s1_0"):
            epoch(build_trainer(model, tmp_path), loader, transform=poisoned)
        assert "s1_3" in (tmp_path / "nonfinite_rank0.json").read_text()
        assert torch.equal(model.decoder_pred.weight, before[0])
    else:
        result = epoch(build_trainer(model, tmp_path, skip_nonfinite=1), loader, transform=poisoned)
        assert result.stats["skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_stop_request_ends_between_steps(tmp_path: Path) -> None:
    result = epoch(build_trainer(tiny(), tmp_path), batches(4), on_step=lambda done: done == 2)
    assert (result.finished, result.steps_done) == (False, 2)


def test_a_resumed_epoch_logs_the_whole_epoch(tmp_path: Path) -> None:
    """Loss, gradient norm and counts of an epoch that was left in the middle are those of the uninterrupted one."""
    loader = batches(4)
    loader[0]["image"][0, 0, :3, :5] = float("nan")  # 15 pixels; seen before the stop
    loader[3]["replaced"] = [("torn", "short")]
    whole = epoch(build_trainer(tiny(), tmp_path), loader).stats
    assert (whole["invalid_pixels"], whole["unreadable_samples"]) == (15, 1)

    first = build_trainer(tiny(), tmp_path)
    before = epoch(first, loader, on_step=lambda done: done == 2)
    saved = first.state()
    resumed = Resumed(step=2, sums=saved["sums"], counts=saved["counts"])
    second = build_trainer(first.model, tmp_path, resumed=resumed)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    after = epoch(second, loader, start_step=2).stats
    for name in ("train_loss", "grad_norm", "invalid_pixels", "unreadable_samples", "skipped_steps", "train_lr"):
        assert after[name] == whole[name], name
    assert after["seconds"] > before.stats["seconds"]

    epoch(second, loader)  # the next epoch starts from nothing
    assert second.state()["sums"]["losses"] == 4


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
