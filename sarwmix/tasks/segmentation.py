"""The segmentation task: one class per pixel, ignored pixels left out of loss and metrics alike.

Of each sample evaluation keeps a confusion matrix, so that metrics over a whole split are exact whatever the number of
processes. A pixel is ignored where its label says so (255) or where any band of the image has no valid value.

Shapes: B samples of a batch, N samples of a split, K classes, H x W pixels as read, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sarwmix.data.base import IGNORED, MaskDataset, SarDataset
from sarwmix.heads import SEGMENTATION_HEADS, TaskModel
from sarwmix.models.backbones import build_segmenter
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import Predictor, Prepared, Task
from sarwmix.tasks.metrics import Report, confusion_metrics, value_table
from sarwmix.transforms import SarTransform, apply_flips, blend_weights, cut_windows, draw_flips, draw_windows, starts
from util.errors import UserError

PICTURED = 8  # samples in the picture of a split
MAP_PIXELS = 1 << 26  # predicted pixels that are kept of a split; of larger ones every second, third, ... is


class SegmentationTask(Task):
    """Cross-entropy over the labelled pixels; IoU and its kin from the confusion matrix of a whole split.

    With two classes the second one is what is looked for (water): precision, recall, F1 and IoU are its own.

    Args:
        classes: Class names.
        class_weights: Weight of each class in the loss; None: all 1. The loss of a batch is the weighted sum over its
            pixels divided by the sum of their weights.
        select_on: Split that selects the best epoch.
        select: Metric that selects it; IoU of water by default, with more classes than two the mean IoU.
    """

    name = "segmentation"
    options = ("class_weights", "select", "select_on")
    mixable = False
    exclusive = True
    heads = SEGMENTATION_HEADS
    dense = True
    class_columns = (("IoU", "iou"), ("F1", "f1"), ("Precision", "precision"), ("Recall", "recall"))

    def __init__(
        self,
        classes: Sequence[str],
        class_weights: Sequence[float] | None = None,
        select_on: str = "val",
        select: str | None = None,
    ) -> None:
        self.primary = "iou" if len(classes) == 2 else "miou"
        binary, several = ("iou", "miou", "f1", "precision", "recall"), ("miou", "f1_macro", "precision_macro")
        self.metric_names = (*(binary if len(classes) == 2 else (*several, "recall_macro")), "accuracy")
        super().__init__(classes, select_on, select)
        if len(self.classes) < 2:
            raise UserError(f"the segmentation task needs two classes or more, got {', '.join(self.classes)}")
        if class_weights is not None:
            values = tuple(float(value) for value in class_weights)
            if len(values) != len(self.classes):
                raise UserError(
                    f"--class_weights has {len(values)} value(s), the data set has {len(self.classes)} classes "
                    f"({'; '.join(self.classes)}); give one for each"
                )
            if not all(np.isfinite(values)) or min(values) < 0 or max(values) == 0:
                raise UserError(f"--class_weights {values}: expected numbers of 0 or more, at least one above 0")
            class_weights = values
        self.class_weights = class_weights
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    @property
    def binary(self) -> bool:
        """Whether there are two classes, of which the second one is looked for."""
        return len(self.classes) == 2

    def build_model(self, settings: ModelSettings) -> TaskModel:
        return build_segmenter(settings, self.num_outputs)

    # Batches -----------------------------------------------------------------------------------------------------

    def inputs(
        self,
        batch: Mapping[str, Any],
        transform: SarTransform,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        return self.prepare(batch, transform, device=device, generator=generator).inputs

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """(B, H, W) uint8: class numbers, 255 where the label or any band of the image says nothing."""
        label = batch["label"].to(device, non_blocking=True)
        invalid = ~torch.isfinite(batch["image"].to(device, non_blocking=True)).all(dim=1)
        return label.masked_fill(invalid, IGNORED)

    def prepare(
        self,
        batch: Mapping[str, Any],
        transform: SarTransform | None,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Prepared:
        """Images and label maps of the model's input size; windows and flips are the same for both."""
        if transform is None:
            raise UserError("cached features are vectors of whole images; the segmentation task needs maps")
        images = batch["image"].to(device, non_blocking=True)  # (B, bands, H, W)
        labels = self.target(batch, device)  # (B, H, W)
        if generator is not None:
            if transform.preprocessing.geometry == "window":
                corners = draw_windows(len(images), images.shape[-2], images.shape[-1], transform.size, generator)
                images = cut_windows(images, corners, transform.size)
                labels = cut_windows(labels, corners, transform.size)
            flips = draw_flips(len(images), generator)
            images, labels = apply_flips(images, flips), apply_flips(labels, flips)
        prepared = transform(images)
        side = prepared.images.shape[-2:]
        if labels.shape[-2:] != side:
            labels = F.interpolate(labels[:, None].float(), size=side, mode="nearest")[:, 0].to(torch.uint8)
        if prepared.valid is not None:
            labels = labels.masked_fill(~prepared.valid.all(dim=1), IGNORED)
        return Prepared((prepared.images,), labels)

    def soft_target(self, target: Tensor) -> Tensor:
        raise UserError("label maps cannot be mixed")

    # Loss --------------------------------------------------------------------------------------------------------

    def pixel_loss(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy and weight of every pixel, (B, H, W) each; both 0 where it is ignored.

        Args:
            logits: (B, K, H, W).
            target: (B, H, W), 255 where ignored.
        """
        labels = target.long()
        if self._weights is not None and self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)  # once
        weights = self._weights
        loss = F.cross_entropy(
            logits.float(), labels, weight=weights, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        counted = labels != IGNORED
        if weights is None:
            return loss, counted.float()
        return loss, weights[labels.clamp(max=len(weights) - 1)] * counted

    def losses(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        loss, weight = self.pixel_loss(logits, target, smoothing=smoothing)
        total = weight.flatten(1).sum(dim=1)
        return torch.where(total > 0, loss.flatten(1).sum(dim=1) / total.clamp(min=1e-12), 0.0)

    def loss(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Mean over the labelled pixels of the batch: a sample without any counts nothing, a batch without any is 0."""
        loss, weight = self.pixel_loss(logits, target, smoothing=smoothing)
        return loss.sum() / weight.sum().clamp(min=1e-12)

    def scores(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.double(), dim=1)

    # Evaluation --------------------------------------------------------------------------------------------------

    def outputs(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``confusion`` (B, K, K) int64, rows are true classes; ``loss_sum`` and ``loss_weight`` (B,) float64."""
        loss, weight = self.pixel_loss(logits, target)
        return {
            "confusion": confusion_matrices(target, logits.argmax(dim=1), len(self.classes)),
            "loss_sum": loss.flatten(1).sum(dim=1, dtype=torch.float64),
            "loss_weight": weight.flatten(1).sum(dim=1, dtype=torch.float64),
        }

    def predict(
        self,
        model: Predictor,
        batches: Iterable[Mapping[str, Any]],
        transform: SarTransform | None,
        *,
        device: torch.device,
        whole: SarDataset | None = None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Label whole images in their own resolution, and compare with the label maps as read.

        Of final results the predicted maps are kept as ``prediction`` (B, h, w) uint8, for pictures and for whoever
        wants to compute anything else.
        """
        assert transform is not None
        step = None if whole is None else map_step(whole)
        for batch in batches:
            images = batch["image"].to(device, non_blocking=True)
            logits = label_images(model, images, transform)
            outputs = self.outputs(logits, self.target(batch, device))
            if step is not None:
                outputs["prediction"] = logits.argmax(dim=1)[:, ::step, ::step].to(torch.uint8)
            if "skipped" in batch:
                outputs["skipped"] = batch["skipped"]
            yield batch["index"], outputs

    def report(self, gathered: Mapping[str, np.ndarray]) -> Report:
        """Scalars: ``miou``, ``accuracy`` (of pixels), ``loss``; with two classes ``iou``, ``f1``, ``precision`` and
        ``recall`` of the second one, with more ``f1_macro``, ``precision_macro`` and ``recall_macro``.

        Raises:
            UserError: not one pixel of the split is labelled.
        """
        matrices = gathered["confusion"].astype(np.int64)  # (N, K, K)
        confusion = matrices.sum(axis=0)
        if confusion.sum() == 0:
            raise UserError(
                f"not one of the pixels of these {len(matrices)} samples counts: all are ignored by their label or "
                "have no valid image value; check the label files and the split"
            )
        scalars = confusion_metrics(confusion)
        total = float(gathered["loss_weight"].sum())
        scalars["loss"] = float(gathered["loss_sum"].sum() / total) if total else 0.0
        hits, truth, claimed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        per_class: list[dict[str, Any]] = []
        for number, name in enumerate(self.classes):
            tp, own, found = int(hits[number]), int(truth[number]), int(claimed[number])
            per_class.append(
                {
                    "class": name,
                    "support": own,
                    "predicted": found,
                    "iou": tp / (own + found - tp) if own + found else None,
                    "f1": 2 * tp / (own + found) if own + found else None,
                    "precision": tp / found if found else 0.0,
                    "recall": tp / own if own else None,
                }
            )
        absent = tuple(str(row["class"]) for row in per_class if not row["support"])
        return Report(scalars=scalars, per_class=per_class, absent=absent)

    # Printing and pictures ---------------------------------------------------------------------------------------

    def format_report(self, report: Report) -> str:
        of = f" of {self.classes[1]}" if self.binary else ", mean over classes"
        titles = {
            "miou": "Mean IoU",
            "iou": f"IoU{of}",
            "f1": f"F1{of}",
            "precision": f"Precision{of}",
            "recall": f"Recall{of}",
            "f1_macro": f"F1{of}",
            "precision_macro": f"Precision{of}",
            "recall_macro": f"Recall{of}",
            "accuracy": "Pixel accuracy",
        }
        text = value_table(titles, report)
        if report.absent:
            text += f"\nwithout a labelled pixel: {'; '.join(report.absent)}"
        return text

    def format_epoch(self, report: Report) -> str:
        values = report.scalars
        own = f"IoU of {self.classes[1]} {values['iou']:.4f}, " if self.binary else ""
        return f"{own}mean IoU {values['miou']:.4f}, loss {values['loss']:.4f}"

    def write_pictures(
        self, folder: Path, data: SarDataset, gathered: Mapping[str, np.ndarray], report: Report
    ) -> list[Path]:
        from sarwmix.figures.base import confusion_counts_figure, label_map_figure

        split, confusion = data.split, gathered["confusion"].sum(axis=0)
        written = [
            confusion_counts_figure(
                folder / f"confusion_{split}.png",
                confusion,
                self.classes,
                unit="pixels",
                title=f"Confusion on {int(confusion.sum()):,} pixels of {split}: mean IoU {report.scalars['miou']:.4f}",
            )
        ]
        if not isinstance(data, MaskDataset) or "prediction" not in gathered:
            return written
        counted = np.flatnonzero(gathered["confusion"].sum(axis=(1, 2)))
        chosen = counted[np.unique(np.linspace(0, len(counted) - 1, min(PICTURED, len(counted))).astype(int))]
        step = map_step(data)
        batch = data.get_batch(chosen)
        labels = self.target(batch, torch.device("cpu")).numpy()
        captions = []
        for index in chosen:
            values = confusion_metrics(gathered["confusion"][index])
            shown = f"IoU {values['iou']:.3f}" if self.binary else f"mean IoU {values['miou']:.3f}"
            if self.binary and not gathered["confusion"][index][1].any():
                shown = f"no {self.classes[1]} here; {int(gathered['confusion'][index][0, 1]):,} pixels claimed"
            captions.append(f"{data.names[int(index)]}\n{shown}")
        written.append(
            label_map_figure(
                folder / f"segmentation_{split}.png",
                images=batch["image"].numpy()[..., ::step, ::step],
                bands=data.spec.bands,
                labels=labels[:, ::step, ::step],
                predictions=gathered["prediction"][chosen],
                classes=self.classes,
                captions=captions,
                ignored=IGNORED,
                title=f"{data.spec.name}, {split}: {len(chosen)} of {len(data)} samples",
            )
        )
        return written


def map_step(data: Any) -> int:
    """Every how many pixels predictions of a split are kept, so that they stay below `MAP_PIXELS`."""
    pixels = len(data) * int(np.prod(data.shape[1:]))
    return max(1, int(np.ceil(np.sqrt(pixels / MAP_PIXELS))))


def label_images(model: Predictor, images: Tensor, transform: SarTransform) -> Tensor:
    """Logits (B, K, H, W), float32, of whole images in their own resolution.

    Images larger than the model's input are covered as scenes are in prediction: a window every half of its side,
    probabilities blended with weights that fall to 0 at its edges. Smaller images are enlarged and their logits brought
    back (bilinear).

    Args:
        model: (B, bands, S, S) -> logits (B, K, S, S).
        images: (B, bands, H, W) as read, NaN at invalid pixels.
        transform: of evaluation.
    """
    height, width = images.shape[-2:]
    whole = transform.preprocessing.geometry != "window"
    size = max(height, width) if whole else transform.size
    rows, columns = (starts(length, size, max(1, size // 2)) for length in (height, width))

    def label(part: Tensor) -> Tensor:
        logits = model(transform(part).images).float()
        if logits.shape[-2:] != part.shape[-2:]:
            logits = F.interpolate(logits, size=part.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    if len(rows) == len(columns) == 1:
        return label(images)
    weights = torch.from_numpy(blend_weights(size)).to(images.device)
    total: Tensor | None = None
    count = torch.zeros(height, width, device=images.device)
    for top in rows:
        for left in columns:
            area = (..., slice(top, top + size), slice(left, left + size))
            chances = label(images[area]).softmax(dim=1)
            total = chances.new_zeros(*chances.shape[:2], height, width) if total is None else total
            share = weights[: chances.shape[-2], : chances.shape[-1]]
            total[area] += chances * share
            count[area] += share
    assert total is not None
    return (total / count).clamp(min=torch.finfo(torch.float32).tiny).log()


def confusion_matrices(target: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Confusion matrix of each sample, rows are true classes: (B, H, W) twice -> (B, K, K) int64; 255 is left out.

    Raises:
        ValueError: a label that is neither a class number nor 255.
    """
    truth = target.long()
    counted = truth != IGNORED
    if bool((counted & (truth >= classes)).any()):
        raise ValueError(f"labels must be below {classes}, or {IGNORED}; got {int(truth[counted].max())}")
    sample = torch.arange(len(truth), device=truth.device)[:, None, None]
    place = (sample * classes + truth) * classes + predicted.long()
    counts = torch.bincount(place[counted], minlength=len(truth) * classes * classes)
    return counts.view(len(truth), classes, classes)
