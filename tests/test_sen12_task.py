"""The pair task: device transform, metrics, evaluation with shared features, printing, pictures, and whole runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Runner
from PIL import Image
from sen12_fixtures import make_raw, run

from engine_finetune import gather_in_order
from models_sen12_ft import MixMIMPair
from sarwmix.data.base import UnreadableSample
from sarwmix.data.loader import DeviceLoader, build_loader
from sarwmix.data.registry import build_dataset
from sarwmix.datasets.sen12flood import PairDataset
from sarwmix.mixup import Mixup
from sarwmix.models.settings import ModelSettings
from sarwmix.synthetic.sen12flood import DemoOptions
from sarwmix.tasks.base import Predictor, build_task
from sarwmix.tasks.metrics import pair_metrics
from sarwmix.tasks.pair import PairTask, PairTransform
from sarwmix.transforms import SarTransform, draw_flips
from util.errors import UserError

CLASSES = ("no flood", "flood")
CPU = torch.device("cpu")
STATISTICS = {"mean": (-19.2309, -12.5951), "std": (3.1672, 2.9644)}
SIDE = 128


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4 + 2 places of 4 frames at 128 px in both layouts: at most 6 pairs a place."""
    base = tmp_path_factory.mktemp("sen12_task")
    raw = make_raw(base, DemoOptions(train=4, test=2, frames=4, size=SIDE, seed=5, swath_edges=0.1))
    for layout in ("npy", "store"):
        run(raw, base / layout, layout=layout, size=SIDE)
    return {layout: base / layout / "out" for layout in ("npy", "store")}


def open_pairs(path: Path, split: str = "test", **options: Any) -> PairDataset:
    data = build_dataset("sen12flood", path, split, **options)
    assert isinstance(data, PairDataset)
    return data


def small_model(**options: Any) -> MixMIMPair:
    torch.manual_seed(0)
    model = PairTask(CLASSES, **options).build_model(ModelSettings("mixmim_tiny", SIDE, 2))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


# Transform ----------------------------------------------------------------------------------------------------------


def test_transform_by_hand() -> None:
    power = torch.full((1, 2, 4, 4), 0.1)
    power[0, 0, 0, 0] = 0.0
    power[0, 1, 1, 1] = float("nan")
    power[0, 1, 2, 2] = -1.0
    power[0, 0, 3, 3] = float("inf")
    first, second = PairTransform(SarTransform(size=4, **STATISTICS))(power, 10 * power)
    for image, db in ((first, -10.0), (second, 0.0)):
        for band in range(2):
            z = (db - STATISTICS["mean"][band]) / STATISTICS["std"][band]
            assert image[0, band, 0, 1].item() == pytest.approx(z, abs=1e-5)
        assert image[0, 0, 0, 0].item() == pytest.approx((-60 - STATISTICS["mean"][0]) / STATISTICS["std"][0], abs=1e-4)
        # Invalid pixels are the band mean, as in pretraining: 0 after standardisation.
        assert [image[0, 1, 1, 1].item(), image[0, 1, 2, 2].item(), image[0, 0, 3, 3].item()] == [0, 0, 0]


def test_flips_are_drawn_once_per_pair() -> None:
    power = torch.rand(8, 2, 16, 16) + 0.1
    batch = {"image1": power, "image2": power.clone(), "label": torch.zeros(8, dtype=torch.int64)}
    task, transform = PairTask(CLASSES), SarTransform(size=16, **STATISTICS)
    one, other = task.inputs(batch, transform, device=CPU, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, other)  # equal images stay equal
    plain = task.inputs(batch, transform, device=CPU)[0]
    flips = draw_flips(8, torch.Generator().manual_seed(1))
    assert flips.any(dim=0).all()
    assert not flips.all(dim=0).any()
    for sample, (columns, rows) in enumerate(flips.tolist()):
        wanted = plain[sample].flip(-1) if columns else plain[sample]
        assert torch.equal(one[sample], wanted.flip(-2) if rows else wanted)


def test_mixup_uses_one_permutation_and_one_share() -> None:
    task = PairTask(CLASSES)
    image = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 4, 4)
    soft = task.soft_target(torch.tensor([0, 1, 0, 1, 1, 0]))
    (one, other), target = Mixup(mixup=1.0)((image, image + 10), soft, torch.Generator().manual_seed(3))
    torch.testing.assert_close(other, one + 10)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(6))
    assert not torch.equal(target, soft)
    assert torch.isfinite(task.losses(torch.randn(6, 2), target, smoothing=0.1)).all()


# Loss and metrics ---------------------------------------------------------------------------------------------------


def test_loss_is_cross_entropy() -> None:
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    losses = PairTask(CLASSES).losses(logits, target)
    np.testing.assert_allclose(losses.numpy(), [np.log(1 + np.exp(-2)), np.log(2)], rtol=1e-6)


def test_metrics_by_hand() -> None:
    truth, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    wanted = {"acc": 0.75, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert pair_metrics(truth, predicted) == pytest.approx(wanted)
    assert pair_metrics(np.zeros(3), np.zeros(3)) == {"acc": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    # Weights count samples several times.
    twice = pair_metrics(np.repeat(truth, 2), np.repeat(predicted, 2))
    assert pair_metrics(truth, predicted, np.full(8, 2)) == pytest.approx(twice)


def gathered(truth: list[int], flood: list[float]) -> dict[str, np.ndarray]:
    scores = np.array([[1 - p, p] for p in flood])
    loss = -np.log(scores[np.arange(len(truth)), truth])
    return {"target": np.array(truth), "scores": scores, "loss": loss}


def test_report_and_printing() -> None:
    task = PairTask(CLASSES, select_on="test")
    report = task.report(gathered([1, 1, 0, 0], [0.9, 0.4, 0.2, 0.5]))
    assert report.scalars["acc"] == 0.75  # a tie is no flood
    assert report.scalars["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.5]).mean())
    assert [row["support"] for row in report.per_class] == [2, 2]
    assert report.per_class[1]["ap"] == pytest.approx((1 + 2 / 3) / 2)
    best = {"epoch": 3, "score": 0.75}
    assert task.epoch_lines(best, report, improved=True) == [
        "Accuracy of the network on the 4 test images: 75.0000%",
        "Precision: 1.0000",
        "Recall: 0.5000",
        "F1 Score: 0.6667",
        "Max accuracy: 75.0000%",
        "Best model saved at epoch 3 with score 75.0000",
    ]
    assert len(task.epoch_lines(best, report, improved=False)) == 5
    held_out = PairTask(CLASSES).epoch_lines(best, report, improved=False)
    assert held_out[0] == "Accuracy of the network on the 4 held-out training images: 75.0000%"
    first = task.summary(best, report, 4).splitlines()[0]
    assert first == "Best Results Summary: Epoch 3 Best Accuracy Score 75.0000"


def test_best_accuracy_selects_and_ties_keep_the_earlier() -> None:
    (rule,) = PairTask(CLASSES).rules()
    assert rule.filename == "checkpoint_best.pth"
    assert rule.wins({"acc": 80.0}, {"acc": 79.0})
    assert not rule.wins({"acc": 80.0}, {"acc": 80.0})


def test_task_options() -> None:
    task = build_task("pair", CLASSES, {"patch_op": "max", "legacy_tiling": True, "select_on": "test"})
    model = task.build_model(ModelSettings("mixmim_tiny", 256, 2))
    assert isinstance(model, MixMIMPair)
    assert (model.patch_op, model.legacy_tiling, model.img_size) == ("max", True, 128)
    assert task.select_on == "test"
    assert build_task("pair", CLASSES).select_on == "val"
    task.check_settings({}, source="released.pth")
    task.check_settings({"patch_op": "max", "legacy_tiling": True, "name": "mixmim_base"}, source="ours.pth")
    with pytest.raises(UserError, match=r"ours.pth was trained with patch_op avg, not max; give --patch_op"):
        task.check_settings({"patch_op": "avg"}, source="ours.pth")
    with pytest.raises(UserError, match="--input_size is 200; .* a multiple of 128, such as 512"):
        task.build_model(ModelSettings("mixmim_tiny", 200, 2))
    with pytest.raises(UserError, match="two classes"):
        build_task("pair", ("a", "b", "c"))


# Evaluation ---------------------------------------------------------------------------------------------------------


def outputs(
    task: PairTask, model: MixMIMPair, data: PairDataset, *, batch: int = 4, rank: int = 0, world: int = 1
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    loader = build_loader(
        data, batch_size=batch, shuffle=False, drop_last=False, rank=rank, world_size=world, each_image_once=True
    )
    transform = SarTransform(size=SIDE, **STATISTICS)
    with torch.no_grad():
        parts = list(task.predict(Predictor(model, CPU, None), loader, transform, device=CPU))
    return [index for index, _ in parts], [part for _, part in parts]


def in_order(
    parts: list[tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]], count: int
) -> dict[str, np.ndarray]:
    """What gathering over processes gives, without processes."""
    indices = [i for part in parts for i in part[0]]
    kept = [k for part in parts for k in part[1]]
    return gather_in_order(
        indices,
        kept,
        count=count,
        split="test",
        all_gather=lambda value: [value],
        all_gather_arrays=lambda value: [value],
    )


@pytest.mark.parametrize("patch_op", ["avg", "max"])
def test_shared_features_equal_pair_by_pair(prepared: dict[str, Path], patch_op: str) -> None:
    task, model = PairTask(CLASSES, patch_op=patch_op), small_model(patch_op=patch_op)
    plain = in_order([outputs(task, model, open_pairs(prepared["npy"]))], len(open_pairs(prepared["npy"])))
    for batch in (3, 1000):
        data = open_pairs(prepared["store"])
        shared = in_order([outputs(task, model, data, batch=batch)], len(data))
        for key, values in plain.items():
            np.testing.assert_allclose(shared[key], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "world"), [("npy", 3), ("store", 3), ("store", 50)])
def test_metrics_do_not_depend_on_the_number_of_processes(prepared: dict[str, Path], layout: str, world: int) -> None:
    task, model, data = PairTask(CLASSES), small_model(), open_pairs(prepared[layout])
    one = in_order([outputs(task, model, data)], len(data))
    many = in_order([outputs(task, model, data, rank=rank, world=world) for rank in range(world)], len(data))
    np.testing.assert_array_equal(many["target"], one["target"])
    np.testing.assert_allclose(many["scores"], one["scores"], atol=1e-5)


def test_each_distinct_image_is_encoded_once(prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model(), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: seen.append(len(images)) or encode(images))
    data = open_pairs(prepared["store"])
    outputs(PairTask(CLASSES), model, data, batch=3)
    distinct = len(np.unique(data.rows))
    assert sum(seen) == distinct < 2 * len(data)
    seen.clear()
    outputs(PairTask(CLASSES), model, open_pairs(prepared["npy"]), batch=3)
    assert sum(seen) == 2 * len(data)  # pair files: nothing tells which images are the same


def test_a_store_in_device_memory_gives_the_same_batches(prepared: dict[str, Path]) -> None:
    """Each image lies there once, whatever the number of pairs that show it."""
    data = open_pairs(prepared["store"])
    options = {"batch_size": 5, "shuffle": True, "drop_last": True, "seed": 3}
    cached = build_loader(data, cache="device", device="cpu", **options)
    assert isinstance(cached, DeviceLoader)
    assert len(cached.images) == len(np.unique(data.rows)) < 2 * len(data)
    for ours, theirs in zip(cached, build_loader(data, **options), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("image1", "image2", "label", "index"):
            assert torch.equal(ours[key], theirs[key]), key
        assert ours["name"] == theirs["name"]
    with pytest.raises(UserError, match="cache=device does not suit"):
        build_loader(open_pairs(prepared["npy"]), cache="device", device="cpu", **options)


def test_an_image_without_pixels_is_found_in_device_memory(prepared: dict[str, Path], monkeypatch) -> None:
    data = open_pairs(prepared["store"])
    images = np.array(data.images)
    lost = int(data.rows[2, 1])
    images[lost, 1] = np.nan
    monkeypatch.setattr(data, "_images", images)
    options = {"batch_size": 4, "shuffle": False, "drop_last": False, "cache": "device", "device": "cpu"}
    with pytest.raises(UnreadableSample, match="band without any finite pixel"):
        build_loader(data, **options)
    data.on_error = "replace"
    batches = list(build_loader(data, **options))
    replaced = [name for batch in batches for name, _ in batch["replaced"]]
    assert replaced == [data.names[i] for i in np.flatnonzero((data.rows == lost).any(axis=1))]


def test_subset_of_a_store_shares_features_too(prepared: dict[str, Path]) -> None:
    task, model, data = PairTask(CLASSES), small_model(), open_pairs(prepared["store"])
    whole = in_order([outputs(task, model, data)], len(data))
    picked = np.array([5, 2, 0])
    part = in_order([outputs(task, model, data.subset(picked))], 3)
    np.testing.assert_allclose(part["scores"], whole["scores"][picked], atol=1e-5)


# Pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "bands"), [(True, None), (False, None), (False, "VV"), (True, "VV,VH")])
def test_pictures(prepared: dict[str, Path], tmp_path: Path, right: bool, bands: str | None) -> None:
    task, data = PairTask(CLASSES), open_pairs(prepared["npy"], bands=bands)
    assert data.labels is not None
    flood = np.where(data.labels == 1, 0.9, 0.1) if right else np.linspace(0.05, 0.95, len(data))
    values = gathered(data.labels.tolist(), flood.tolist())
    written = task.write_pictures(tmp_path, data, values, task.report(values))
    assert [path.name for path in written] == [
        "confusion_test.png", "roc_test.png", "precision_recall_test.png", "wrong_pairs_test.png",
    ]  # fmt: skip
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > 300
            assert np.asarray(picture.convert("L")).std() > 5


# Whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finetune(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    import main_finetune

    command = ["main_finetune.py", "--dataset", "sen12flood", "--model", "mixmim_tiny", "--input_size", SIDE]
    command += ["--num_workers", 0, "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    main_finetune.main()


@pytest.mark.usefixtures("one_thread")
def test_a_run_prints_logs_and_draws_what_the_contract_says(
    prepared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--data_path", prepared["store"], "--batch_size", 8)
    training = ("--epochs", 2, "--warmup_epochs", 0, "--lr", 1e-3, "--mixup", 0.5, "--select_on", "test")
    finetune(monkeypatch, *common, *training, "--output_dir", tmp_path / "run")
    output = capsys.readouterr().out
    count = len(open_pairs(prepared["store"]))
    assert "best epoch: highest acc on test, which is then no independent measure" in output
    assert len(re.findall(rf"^Accuracy of the network on the {count} test images: \d+\.\d{{4}}%$", output, re.M)) >= 3
    for line in (r"Precision: \d\.\d+", r"Recall: \d\.\d+", r"F1 Score: \d\.\d+", r"Max accuracy: \d+\.\d+%"):
        assert re.search(rf"^{line}$", output, re.M), line
    assert re.search(r"^Best model saved at epoch 0 with score \d+\.\d+$", output, re.M)
    assert re.search(r"^Best Results Summary: Epoch \d Best Accuracy Score \d+\.\d+$", output, re.M)
    assert re.fullmatch(r"Training time \d+:\d\d:\d\d", output.strip().splitlines()[-1])
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scalars = result["results"]["checkpoint_best.pth"]["test"]["scalars"]
    assert set(scalars) == {"acc", "precision", "recall", "f1", "loss"}
    assert result["selected_on"] == {"split": "test", "rule": "acc", "epoch": result["best_epoch"]}
    assert "selected on test: optimistic" in output
    assert (tmp_path / "run" / "pictures" / "wrong_pairs_test.png").exists()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    wanted = {"loss", "lr", *(f"perf/test_{name}" for name in ("acc", "loss", "precision", "recall", "f1"))}
    assert wanted <= set(events.Tags()["scalars"])

    # --eval prints the same and exits.
    best = tmp_path / "run" / "checkpoint_best.pth"
    finetune(monkeypatch, *common, "--eval", "--resume", best, "--output_dir", tmp_path / "eval", "--bootstrap", 20)
    assert f"Accuracy of the network on the {count} test images: {100 * scalars['acc']:.4f}%" in capsys.readouterr().out
    # intervals are over places, which the kept predictions name
    places = {name.split("__")[0] for name in open_pairs(prepared["store"]).names}
    assert len(places) == 2
    evaluated = json.loads((tmp_path / "eval" / "metrics_eval.json").read_text())
    assert evaluated["clusters"] == {"test": 2}
    assert evaluated["selected_on"] == result["selected_on"]
    low, high = evaluated["results"][str(best)]["test"]["intervals_95"]["acc"]
    assert 0 <= low < scalars["acc"] < high <= 1
    with np.load(tmp_path / "eval" / "predictions_test.npz") as arrays:
        assert set(arrays["clusters"]) == places
    with pytest.raises(UserError, match="was trained with patch_op avg, not max"):
        finetune(
            monkeypatch, *common, "--patch_op", "max", "--eval", "--resume", best, "--output_dir", tmp_path / "eval"
        )


@pytest.mark.slow
@pytest.mark.mpi
def test_two_processes_select_on_held_out_places_and_count_each_pair_once(
    prepared: dict[str, Path], tmp_path: Path, run_script: Runner
) -> None:
    words = ["--dataset", "sen12flood", "--model", "mixmim_tiny", "--input_size", str(SIDE)]
    words += ["--data_path", str(prepared["store"]), "--num_workers", "0", "--device", "cpu", "--val_frac", "0.3"]
    training = ["--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-3"]
    done = run_script("main_finetune.py", *words, *training, "--output_dir", str(tmp_path / "two"), processes=2)
    count = len(open_pairs(prepared["store"]))
    held_out = len(open_pairs(prepared["store"], "val", val_frac=0.3))
    assert f"Accuracy of the network on the {held_out} held-out training images" in done.stdout
    assert done.stdout.count(f"on the {count} test images") == 2  # table and summary of the end: test is read once
    assert "selected on test" not in done.stdout
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())["results"]["checkpoint_best.pth"]
    evaluation = [
        "--eval",
        "--resume",
        str(tmp_path / "two" / "checkpoint_best.pth"),
        "--output_dir",
        str(tmp_path / "one"),
    ]
    run_script("main_finetune.py", *words, "--batch_size", "7", *evaluation)
    (one,) = json.loads((tmp_path / "one" / "metrics_eval.json").read_text())["results"].values()
    for name, value in one["test"]["scalars"].items():
        assert two["test"]["scalars"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
