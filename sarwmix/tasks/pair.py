"""The pair task of fine-tuning: flood or no flood from two images of one place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models_mixmim import MODELS, encoder_config
from models_sen12_ft import PATCH_OPS, MixMIMPair
from sarwmix.data.base import SarDataset
from sarwmix.datasets.sen12flood import PairDataset, power_to_db
from sarwmix.models.backbones import is_mixmim
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import Predictor, SingleLabelTask
from sarwmix.tasks.metrics import Report, pair_metrics
from sarwmix.transforms import SarTransform, draw_flips
from util.errors import UserError

TILE = 128  # the encoder sees tiles of this side, as in pretraining
FLOOD = 1


class PairTransform:
    """Batches of pairs in linear power -> standardised model inputs, on the device.

    Zeros become 1e-6, then decibel, invalid pixels (NaN, infinite, negative) at the band mean, resize, flips drawn once
    per pair and applied to both of its images, standardisation. Both images are handled as one batch.

    Args:
        transform: Size and statistics (dB) of the data set.
    """

    def __init__(self, transform: SarTransform) -> None:
        self.transform = transform

    def images(self, power: Tensor, flips: Tensor | None = None) -> Tensor:
        """(B, 2, H, W) linear power -> (B, 2, S, S) z-score."""
        return self.transform(power_to_db(power), flips).images

    def __call__(self, power1: Tensor, power2: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform both images of a batch of pairs.

        Args:
            power1, power2: (B, 2, H, W) linear power.
            flips: (B, 2) bool, one draw a pair, or None.
        """
        both = None if flips is None else torch.cat([flips, flips])
        first, second = self.images(torch.cat([power1, power2]), both).chunk(2)
        return first, second


class PairTask(SingleLabelTask):
    """Cross-entropy over (no flood, flood); accuracy, precision, recall and F1 with flood as the positive class.

    Args:
        classes: Names of the two classes, flood last.
        patch_op: ``"avg"`` or ``"max"`` over tiles.
        legacy_tiling: Tiles as the published code cuts them.
        select_on: Split that selects the best epoch: sequences of train that are held out, or test, as published.
        select: Metric that selects it, accuracy by default.
    """

    name = "pair"
    options = ("patch_op", "legacy_tiling", "select", "select_on")
    metric_names = ("acc", "f1", "precision", "recall")
    heads = ("linear",)

    def __init__(
        self,
        classes: Sequence[str],
        patch_op: str = "avg",
        legacy_tiling: bool = False,
        select_on: str = "val",
        select: str | None = None,
    ) -> None:
        super().__init__(classes, select_on, select)
        if len(self.classes) != 2:
            raise UserError(f"the pair task has two classes, no flood and flood; got {', '.join(self.classes)}")
        if patch_op not in PATCH_OPS:
            raise UserError(f"--patch_op is {patch_op!r}; expected one of {', '.join(PATCH_OPS)}")
        self.patch_op = patch_op
        self.legacy_tiling = legacy_tiling

    @property
    def model_settings(self) -> dict[str, Any]:
        return {"patch_op": self.patch_op, "legacy_tiling": self.legacy_tiling}

    def build_model(self, settings: ModelSettings) -> MixMIMPair:
        if not is_mixmim(settings.name) or settings.pool is not None:
            raise UserError(
                f"--model {settings.name} cannot compare pairs; choose one of {', '.join(MODELS)}, without --pool"
            )
        input_size = settings.input_size
        if input_size < TILE or input_size % TILE:
            raise UserError(
                f"--input_size is {input_size}; the images of a pair are cut into tiles of {TILE} px: expected a "
                f"multiple of {TILE}, such as 512 for SEN12-FLOOD"
            )
        return MixMIMPair(
            num_classes=self.num_outputs,
            patch_op=self.patch_op,
            legacy_tiling=self.legacy_tiling,
            drop_path_rate=settings.drop_path_rate,
            img_size=TILE,
            in_chans=settings.in_chans,
            drop_rate=settings.drop_rate,
            **encoder_config(settings.name),
        )

    def inputs(
        self,
        batch: Mapping[str, Any],
        transform: SarTransform,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        power1 = batch["image1"].to(device, non_blocking=True)  # (B, bands, H, W) linear power
        power2 = batch["image2"].to(device, non_blocking=True)
        flips = None if generator is None else draw_flips(len(power1), generator)
        return PairTransform(transform)(power1, power2, flips)

    # Evaluation --------------------------------------------------------------------------------------------------

    def run(
        self,
        model: Predictor,
        batches: Iterable[Mapping[str, Any]],
        transform: SarTransform | None,
        *,
        device: torch.device,
        features: bool = False,
    ) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """As :meth:`Task.run`; images that a batch brings apart from its pairs are encoded when they come, and pairs
        compare what is kept of them (`sarwmix.data.loader.EachImageOnce`)."""
        kept: dict[int, Tensor] = {}  # (T, D) of each image that a later pair needs
        for batch in batches:
            if transform is None or "rows" not in batch:
                yield from super().run(model, [batch], transform, device=device, features=features)
                continue
            if len(batch["new_rows"]):
                power = batch["images"].to(device, non_blocking=True)
                encoded = model.call("encode_image", PairTransform(transform).images(power))  # (images, T, D)
                kept.update(zip(batch["new_rows"].tolist(), encoded, strict=True))
            first, second = (torch.stack([kept[int(row)] for row in side]) for side in batch["rows"].T)
            yield batch, model.call("compare" if features else "classify", first, second).float()
            for row in batch["done_rows"].tolist():
                del kept[row]

    def metrics(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """``acc``, and ``precision``, ``recall``, ``f1`` of flood, as fractions."""
        return pair_metrics(truth, predicted)

    # Printing and pictures ---------------------------------------------------------------------------------------

    def format_report(self, report: Report) -> str:
        samples = sum(row["support"] for row in report.per_class)
        values = report.scalars

        def interval(name: str, scale: float = 1.0) -> str:
            ends = report.intervals.get(name)
            return "" if ends is None else f"  [{scale * ends[0]:.4f}, {scale * ends[1]:.4f}]"

        return (
            f"Accuracy of the network on the {samples} test images: {100 * values['acc']:.4f}%{interval('acc', 100)}\n"
            f"Precision: {values['precision']:.4f}{interval('precision')}\n"
            f"Recall: {values['recall']:.4f}{interval('recall')}\n"
            f"F1 Score: {values['f1']:.4f}{interval('f1')}"
        )

    def format_epoch(self, report: Report) -> str:
        text = f"accuracy {100 * report.scalars['acc']:.4f}%, F1 {report.scalars['f1']:.4f}"
        return f"{text}, loss {report.scalars['loss']:.4f}" if "loss" in report.scalars else text

    def epoch_lines(self, best: Mapping[str, Any], report: Report, *, improved: bool) -> list[str]:
        text = self.format_report(report)
        if self.select_on != "test":
            text = text.replace(" test images", " held-out training images")
        # As published: the accuracy in percent, here and nowhere else.
        name, unit, score = (
            ("accuracy", "%", 100 * best["score"]) if self.select == "acc" else (self.select, "", best["score"])
        )
        lines = [*text.splitlines(), f"Max {name}: {score:.4f}{unit}"]
        if improved:
            lines.append(f"Best model saved at epoch {best['epoch']} with score {score:.4f}")
        return lines

    def summary(self, best: Mapping[str, Any], report: Report, samples: int) -> str:
        name, score = ("Accuracy", 100 * best["score"]) if self.select == "acc" else (self.select, best["score"])
        return (
            f"Best Results Summary: Epoch {best['epoch']} Best {name} Score {score:.4f}\n{self.format_report(report)}"
        )

    def write_pictures(
        self, folder: Path, data: SarDataset, gathered: Mapping[str, np.ndarray], report: Report
    ) -> list[Path]:
        from sarwmix.figures.base import confusion_matrix_figure, precision_recall_figure, roc_figure
        from sarwmix.figures.pairs import wrong_pairs_figure

        split, scores, truth = data.split, gathered["scores"], gathered["target"].astype(np.int64)
        predicted = scores.argmax(axis=1)  # a tie is no flood
        one_hot = np.eye(2, dtype=np.int64)[truth]
        written = [
            confusion_matrix_figure(folder / f"confusion_{split}.png", truth, predicted, self.classes),
            roc_figure(folder / f"roc_{split}.png", one_hot, scores, self.classes),
            precision_recall_figure(folder / f"precision_recall_{split}.png", one_hot, scores, self.classes),
        ]
        if isinstance(data, PairDataset) and "loss" in gathered:
            path = folder / f"wrong_pairs_{split}.png"
            wrong_pairs_figure(path, data, predicted != truth, scores[:, FLOOD], gathered["loss"])
            written.append(path)
        return written
