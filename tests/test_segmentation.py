"""Label maps: loss, metrics, windows, and that ignored and invalid pixels change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor, nn

from engine_finetune import evaluate
from sarwmix.data.base import MaskDataset, NoValidPixel, UnreadableSample
from sarwmix.data.loader import build_loader
from sarwmix.data.registry import get_spec
from sarwmix.data.spec import Statistics
from sarwmix.figures.base import label_map_figure
from sarwmix.preprocessing import Preprocessing
from sarwmix.tasks.base import Predictor, build_task
from sarwmix.tasks.intervals import metric_intervals
from sarwmix.tasks.metrics import confusion_metrics, evaluator
from sarwmix.tasks.segmentation import SegmentationTask, confusion_matrices, label_images
from sarwmix.transforms import SarTransform, cut_windows, draw_windows, starts
from util.errors import UserError

STATISTICS = Statistics((-19.0, -12.0), (5.0, 5.0), (-31.0, -24.0), (-7.0, 0.0), "made up")
WINDOW = Preprocessing(geometry="window")
CPU = torch.device("cpu")


class Maps(MaskDataset):
    """Images of 24 x 24 pixels; water is dark. Sample 1 has invalid pixels, sample 2 no label at all."""

    def __init__(self, count: int = 5, *, classes: int = 2, bad: Sequence[int] = (), on_error: str = "raise") -> None:
        spec = get_spec("sen1floods11")
        super().__init__(spec, "test", STATISTICS, [f"chip_{k}" for k in range(count)], on_error=on_error)
        rng = np.random.default_rng(count)
        self.labels_of = rng.integers(0, classes, (count, 24, 24)).astype(np.uint8)
        dark = np.where(self.labels_of == 1, -8.0, 0.0)[:, None]
        self.images = (dark + rng.normal(-12, 3, (count, 2, 24, 24))).astype(np.float32)
        self.labels_of[:, :2] = 255
        self.images[1, 0, 10:14] = np.nan
        if count > 2:
            self.labels_of[2] = 255
        self.bad = bad

    @property
    def shape(self) -> tuple[int, int, int]:
        return 2, 24, 24

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        if index in self.bad:
            raise UnreadableSample(self.names[index], "nowhere", "is made unreadable")
        image[...], label[...] = self.images[index], self.labels_of[index]


class Pixels(nn.Module):
    """A 1x1 convolution: every pixel on its own, so that windows cannot matter."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.head = nn.Conv2d(2, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images)


def make_transform(size: int = 8) -> SarTransform:
    return SarTransform(size=size, mean=STATISTICS.mean, std=STATISTICS.std, preprocessing=WINDOW)


def run(
    data: MaskDataset, model: nn.Module, task: SegmentationTask, *, size: int = 8, batch: int = 2
) -> dict[str, Any]:
    loader = build_loader(data, batch_size=batch, shuffle=False, drop_last=False, seed=0, num_workers=0)
    result = evaluate(
        model,
        loader,
        task=task,
        transform=make_transform(size),
        device=CPU,
        split="test",
        names=data.names,
        all_gather=lambda value: [value],
        all_gather_arrays=lambda values: [values],
        whole=data,
    )
    return result.outputs


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_scikit_learn(classes: int) -> None:
    data, names = Maps(classes=classes), [f"class {k}" for k in range(classes)]
    task = SegmentationTask(names)
    outputs = run(data, Pixels(classes), task)
    report = task.report(outputs)

    counted = (data.labels_of != 255) & np.isfinite(data.images).all(axis=1)
    truth, found = data.labels_of[counted], outputs["prediction"][counted]
    assert outputs["confusion"].sum() == counted.sum()
    iou = jaccard_score(truth, found, average=None, labels=range(classes))
    assert [row["iou"] for row in report.per_class] == pytest.approx(list(iou))
    assert report.scalars["miou"] == pytest.approx(iou.mean())
    assert report.scalars["accuracy"] == pytest.approx((truth == found).mean())
    if classes == 2:
        scores = {"iou": iou[1], "f1": f1_score(truth, found), "precision": precision_score(truth, found)}
        scores["recall"] = recall_score(truth, found)
    else:
        scores = {"f1_macro": f1_score(truth, found, average="macro")}
        scores["recall_macro"] = recall_score(truth, found, average="macro")
        scores["precision_macro"] = precision_score(truth, found, average="macro")
    for name, value in scores.items():
        assert report.scalars[name] == pytest.approx(value), name
    # empty samples count in no metric, whatever is drawn
    evaluate = evaluator("segmentation", outputs, classes)
    once = np.ones(len(outputs["confusion"]), dtype=np.int64)
    assert evaluate(once) == {name: value for name, value in report.scalars.items() if name != "loss"}
    assert metric_intervals(evaluate, np.arange(len(once)), draws=20)["miou"][0] < report.scalars["miou"]
    assert "Mean IoU" in task.format_report(report)


def test_windows_and_batches_change_nothing() -> None:
    data, task, model = Maps(), SegmentationTask(("land", "water")), Pixels()
    whole = run(data, model, task, size=24)
    for size, batch in ((8, 1), (7, 3), (16, 5)):
        part = run(data, model, task, size=size, batch=batch)
        assert np.array_equal(part["confusion"], whole["confusion"])
        assert part["loss_sum"] == pytest.approx(whole["loss_sum"], rel=1e-5)


def test_invalid_and_ignored_pixels_change_neither_loss_nor_metric() -> None:
    task, model = SegmentationTask(("land", "water"), class_weights=(0.1, 0.5)), Pixels()
    first, second = Maps(), Maps()
    second.labels_of[1, 10:14] = 1 - second.labels_of[1, 10:14]  # labels where a band has no data
    second.images[1, 1, 10:14] = 40.0  # the other band there
    second.images[:, :, :2] = -60.0  # pixels whose label is ignored
    one, two = run(first, model, task), run(second, model, task)
    for key in ("confusion", "loss_sum", "loss_weight"):
        assert np.array_equal(one[key], two[key]), key

    for seed in range(5):
        losses = []
        for data in (first, second):
            batch = data.get_batch(np.arange(5))
            prepared = task.prepare(
                batch, make_transform(16), device=CPU, generator=torch.Generator().manual_seed(seed)
            )
            losses.append(task.loss(model(*prepared.inputs), prepared.target))
        assert losses[0] == losses[1]


def test_loss_is_the_weighted_mean_over_labelled_pixels() -> None:
    weights = (0.1, 0.5)
    task = SegmentationTask(("land", "water"), class_weights=weights)
    logits = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.randint(0, 2, (3, 6, 6), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    target[0, :3], target[2] = 255, 255
    expected = nn.functional.cross_entropy(logits, target.long(), torch.tensor(weights), ignore_index=255)
    assert task.loss(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.losses(logits, target)[2] == 0
    plain = SegmentationTask(("land", "water"))
    assert plain.loss(logits, target).item() != pytest.approx(expected.item(), rel=1e-3)

    nothing = task.loss(logits, torch.full_like(target, 255))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_split_without_labelled_pixels_is_an_error() -> None:
    data, task = Maps(), SegmentationTask(("land", "water"))
    data.labels_of[:] = 255
    with pytest.raises(UserError, match="not one of the pixels of these 5 samples counts"):
        task.report(run(data, Pixels(), task))


def test_processes_share_a_split_exactly() -> None:
    data, task, model = Maps(7), SegmentationTask(("land", "water")), Pixels()
    alone = run(data, model, task)
    parts = []
    for rank in range(2):
        loader = build_loader(
            data, batch_size=2, shuffle=False, drop_last=False, seed=0, num_workers=0, rank=rank, world_size=2
        )
        for index, outputs in task.predict(Predictor(model, CPU, None), loader, make_transform(), device=CPU):
            parts.append((index.numpy(), outputs["confusion"].numpy()))
    order = np.argsort(np.concatenate([index for index, _ in parts]))
    together = np.concatenate([matrix for _, matrix in parts])[order]
    assert np.array_equal(together, alone["confusion"])


def test_masks_follow_their_images() -> None:
    """An image that holds the label itself still does after windows and flips."""
    data, task = Maps(), SegmentationTask(("land", "water"))
    data.labels_of[...] = np.random.default_rng(0).integers(0, 2, data.labels_of.shape)
    data.images[...] = data.labels_of[:, None]
    transform = SarTransform(size=10, mean=(0, 0), std=(1, 1), preprocessing=WINDOW)
    batch = data.get_batch(np.arange(5))
    shown = set()
    for seed in range(8):
        prepared = task.prepare(batch, transform, device=CPU, generator=torch.Generator().manual_seed(seed))
        assert prepared.inputs[0].shape == (5, 2, 10, 10)
        assert torch.equal(prepared.inputs[0][:, 0], prepared.target.float())
        shown.add(prepared.target.numpy().tobytes())
    assert len(shown) == 8
    larger = SarTransform(size=48, mean=(0, 0), std=(1, 1), preprocessing=WINDOW)
    prepared = task.prepare(batch, larger, device=CPU)
    assert torch.equal(prepared.target, batch["label"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert label_images(Predictor(Pixels(), CPU, None), batch["image"], larger).shape == (5, 2, 24, 24)


def test_windows() -> None:
    assert [starts(length, 8, 4) for length in (8, 5, 16, 18)] == [[0], [0], [0, 4, 8], [0, 4, 8, 10]]
    corners = draw_windows(400, 24, 10, 8, torch.Generator().manual_seed(0))
    assert set(corners[:, 0].tolist()) == set(range(17))
    assert set(corners[:, 1].tolist()) == {0, 1, 2}
    maps = torch.arange(2 * 3 * 24 * 10).view(2, 3, 24, 10)
    assert torch.equal(cut_windows(maps, torch.tensor([[4, 1], [0, 2]]), 8)[1], maps[1, :, 0:8, 2:10])


def test_class_weights_are_checked() -> None:
    with pytest.raises(UserError, match=r"--class_weights has 3 value\(s\), the data set has 2 classes"):
        build_task("segmentation", ("land", "water"), {"class_weights": [1, 2, 3]})
    with pytest.raises(UserError, match="at least one above 0"):
        build_task("segmentation", ("land", "water"), {"class_weights": [0, 0]})
    with pytest.raises(UserError, match="--class_weights is not an option of the multilabel task"):
        build_task("multilabel", ("land", "water"), {"class_weights": [1, 2]})


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be below 2"):
        confusion_matrices(torch.tensor([[[3]]]), torch.tensor([[[0]]]), 2)


def test_nothing_there_and_nothing_claimed() -> None:
    values = confusion_metrics(np.array([[9, 0], [0, 0]]))
    assert values["iou"] == 0
    assert values["miou"] == 1  # over the class that is there
    assert np.isnan(confusion_metrics(np.zeros((2, 2)))["iou"])


def test_unreadable_samples_are_replaced_or_refused() -> None:
    with pytest.raises(UnreadableSample, match="chip_3"):
        Maps(bad=[3]).get_batch(np.array([3]))
    data = Maps(bad=[3], on_error="replace")
    batch = data.get_batch(np.array([0, 3]))
    assert batch["index"].tolist() == [0, 4]
    assert batch["replaced"] == [("chip_3", "nowhere: is made unreadable")]
    assert np.array_equal(batch["label"][1].numpy(), data.labels_of[4])
    part = data.subset(np.array([4, 0]))
    assert np.array_equal(part.get_batch(np.array([0]))["label"][0].numpy(), data.labels_of[4])


class EmptyMaps(Maps):
    """Sample 3 has labels, but no valid pixel."""

    def read_pair(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        super().read_pair(index, image, label)
        if index == 3:
            raise NoValidPixel(self.names[index], "somewhere", "no valid pixel")


def test_an_image_without_a_valid_pixel_counts_nothing_in_an_evaluation() -> None:
    task, model = SegmentationTask(["land", "water"]), Pixels()
    with pytest.raises(NoValidPixel, match="chip_3"):
        EmptyMaps().get_batch(np.array([3]))
    assert EmptyMaps(on_error="replace").get_batch(np.array([3]))["index"].tolist() == [4]
    data = EmptyMaps(on_error="skip")
    batch = data.get_batch(np.array([3, 0]))
    assert batch["index"].tolist() == [3, 0]
    assert batch["replaced"] == []
    assert batch["skipped"].tolist() == [1, 0]
    assert torch.isnan(batch["image"][0]).all()
    assert (batch["label"][0] == 255).all()

    loader = build_loader(data, batch_size=2, shuffle=False, drop_last=False, seed=0, num_workers=0)
    found = evaluate(
        model, loader, task=task, transform=make_transform(), device=CPU, split="test", names=data.names,
        all_gather=lambda value: [value], all_gather_arrays=lambda values: [values], whole=data,
    )  # fmt: skip
    assert found.skipped == ("chip_3",)
    assert set(found.outputs) == set(run(Maps(), model, task))
    without = Maps().subset(np.array([0, 1, 2, 4]))
    assert isinstance(without, MaskDataset)
    expected = task.report(run(without, model, task))
    assert task.report(found.outputs) == expected
    assert task.report(run(Maps(), model, task)).scalars != expected.scalars
    with pytest.raises(UnreadableSample, match="chip_1"):
        EmptyMaps(bad=[1], on_error="skip").get_batch(np.array([0, 1]))


def test_pictures(tmp_path: Path) -> None:
    data, task, model = Maps(), SegmentationTask(("land", "water")), Pixels()
    outputs = run(data, model, task)
    written = task.write_pictures(tmp_path, data, outputs, task.report(outputs))
    assert [path.name for path in written] == ["confusion_test.png", "segmentation_test.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    with pytest.raises(ValueError, match="11 classes"):
        label_map_figure(
            tmp_path / "x.png", images=data.images, bands=("VH", "VV"), labels=data.labels_of,
            predictions=data.labels_of, classes=[str(k) for k in range(11)], captions=[""] * 5, ignored=255, title="",
        )  # fmt: skip
