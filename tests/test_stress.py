"""Stress test: each fault does what its formula says, at dose 0 nothing, and the scores are those of an evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sarwmix.data.registry import get_spec
from sarwmix.finetune.bench import Workbench
from sarwmix.finetune.stress import Perturbed, stress
from sarwmix.perturbations import perturbations
from sarwmix.tasks.base import MultilabelTask
from sarwmix.transforms import SarTransform
from scripts import stress as script
from tests.conftest import Runner
from tests.finetune_fixtures import STATISTICS, MeanModel, MemoryDataset
from util.distributed import Processes
from util.errors import UserError

KNOWN = {one.name: one for one in perturbations(("VH", "VV"))}
NUMBERS, MEANS = np.array([0, 1, 2, 3]), (-19.0, -12.0)


def apply(name: str, images: torch.Tensor, dose: float, numbers: np.ndarray = NUMBERS) -> torch.Tensor:
    return KNOWN[name].apply(images, dose, numbers[: len(images)], MEANS, 0)


def some(size: int = 20) -> torch.Tensor:
    images = torch.randn(4, 2, size, size, generator=torch.Generator().manual_seed(3)) * 3 - 15
    images[0, 1, 2, 3] = torch.nan
    return images


@pytest.mark.parametrize("name", KNOWN)
def test_no_dose_changes_nothing_and_invalid_pixels_stay(name: str) -> None:
    images = some()
    kept = images.clone()
    assert torch.equal(apply(name, images, KNOWN[name].none).nan_to_num(9), kept.nan_to_num(9))
    for dose in KNOWN[name].doses:
        after = apply(name, images, dose)
        assert not torch.equal(after.nan_to_num(9), kept.nan_to_num(9))
        place = (0, 0, 2, 3) if name == "swapped_bands" else (0, 1, 2, 3)
        assert torch.isnan(after).sum() == 1
        assert torch.isnan(after[place])
    assert torch.equal(images.nan_to_num(9), kept.nan_to_num(9))  # what came in is not touched


def test_values_by_hand() -> None:
    flat = torch.full((4, 2, 4, 5), -10.0)
    assert apply("calibration", flat, -2)[0, 0, 0, 0] == -12
    assert apply("incidence_ramp", flat, 4)[1, 1, 2].tolist() == [-8, -9, -10, -11, -12]
    lost = apply("missing_band", flat, 2)
    assert (lost[:, 1] == -12).all()
    assert (lost[:, 0] == -10).all()
    swapped = apply("swapped_bands", torch.stack([flat[:, 0], flat[:, 1] + 7], 1), 1)
    assert swapped[0, :, 0, 0].tolist() == [-3, -10]
    # powers 0.1 and 0.3 in a block of two columns: mean 0.2; the last column stands alone
    row = 10 * torch.log10(torch.tensor([0.1, 0.3, 0.5]))
    block = apply("resolution", row.expand(1, 2, 2, 3), 2)
    expected = 10 * torch.log10(torch.tensor([0.2, 0.2, 0.5]))
    assert torch.allclose(block, expected.expand(1, 2, 2, 3), atol=1e-5)
    gap = row.expand(1, 2, 2, 3).clone()
    gap[..., 0] = torch.nan  # the block's mean is that of its valid pixels
    assert torch.allclose(apply("resolution", gap, 2)[0, 0, 0, 1:], row[1:], atol=1e-5)


def test_border_goes_round_by_sample_and_covers_its_share() -> None:
    after = apply("border_noise", torch.zeros(4, 2, 10, 10), 0.2)
    for number, side in enumerate((np.s_[:, :2], np.s_[:2, :], np.s_[:, -2:], np.s_[-2:, :])):
        hit = after[number, 0] != 0
        assert int(hit.sum()) == 20
        assert bool(hit[side].all())
        assert abs(float(after[number][:, hit].mean()) + 40) < 2.5


def test_speckle_has_the_wanted_moments_and_does_not_depend_on_the_batch() -> None:
    flat = torch.zeros(2, 2, 200, 200)
    power = 10 ** (apply("speckle", flat, 0.25) / 10)
    assert abs(float(power.mean()) - 1) < 0.01
    assert abs(float(power.var()) - 0.25) < 0.01
    alone = apply("speckle", flat[:1], 0.25, np.array([1]))
    assert torch.equal(alone[0], apply("speckle", flat, 0.25)[1])


def test_pairs_are_perturbed_in_decibel_and_come_back_as_power() -> None:
    batch = {"image1": torch.full((1, 2, 2, 2), 0.1), "index": torch.tensor([5]), "label": torch.tensor([1])}
    (after,) = Perturbed([batch], KNOWN["calibration"], -10, means=MEANS, seed=0)
    assert torch.allclose(after["image1"], torch.tensor(0.01), atol=1e-7)
    assert after["label"] is batch["label"]


def bench_of(data: MemoryDataset) -> Workbench:
    transform = SarTransform(size=8, mean=STATISTICS.mean, std=STATISTICS.std)
    alone = Processes()
    return Workbench(MultilabelTask(data.spec.classes), {"test": data}, transform, alone, alone, batch_size=7)


def test_scores_are_paired_with_the_images_as_read() -> None:
    torch.manual_seed(0)
    bench, model = bench_of(MemoryDataset(40)), MeanModel().eval()
    clean, rows = stress(bench, model, "test", [KNOWN["calibration"], KNOWN["swapped_bands"]],
                         metric="ap_macro", draws=20)  # fmt: skip
    expected = bench.task.report(bench.evaluate(model, "test").outputs).scalars["ap_macro"]
    assert clean == expected
    assert [row.dose for row in rows] == [*KNOWN["calibration"].doses, 1.0]
    assert all(row.score - clean == row.change and row.low <= row.change <= row.high for row in rows)
    assert any(row.change != 0 for row in rows)
    by_hand = MemoryDataset(40)
    by_hand.images = by_hand.images[:, ::-1].copy()
    assert rows[-1].score == bench.task.report(bench_of(by_hand).evaluate(model, "test").outputs).scalars["ap_macro"]
    with pytest.raises(UserError, match="--metric iou"):
        stress(bench, model, "test", [], metric="iou")


def test_one_band_has_none_to_lose_or_swap() -> None:
    assert not {"missing_band", "swapped_bands"} & {one.name for one in perturbations(("VV",))}
    with pytest.raises(UserError, match="--only rain"):
        script.choose(["rain"], get_spec("demo").bands)


def test_a_file_that_says_nothing_of_its_training_is_refused(tmp_path: Path) -> None:
    from tests.prediction_fixtures import write_finetuned

    args = script.get_parser().parse_args([str(tmp_path)])
    with pytest.raises(UserError, match="does not say how it was fine-tuned"):
        script.open_run(args, write_finetuned(tmp_path / "checkpoint_best.pth"))


@pytest.mark.slow
def test_the_script_writes_figure_and_table(tmp_path: Path, demo_root: Path, run_script: Runner) -> None:
    train = run_script("main_finetune.py", "--dataset", "demo", "--data_path", str(demo_root), "--model",
                       "mixmim_tiny", "--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--num_workers",
                       "0", "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert train.returncode == 0, train.stderr
    done = run_script("scripts/stress.py", str(tmp_path / "run"), "--only", "calibration", "missing_band")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "stress" / "stress.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1 + 8 + 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]["checkpoint_best.pth"]
    assert float(rows[0]["score"]) == pytest.approx(metrics["test"]["scalars"]["ap_macro"], abs=1e-9)
    assert (tmp_path / "run" / "stress" / "stress.png").is_file()
