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
from sarwmix.data.loader import Loader, ahead
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

    def predict(
        self,
        model: Predictor,
        batches: Iterable[Mapping[str, Any]],
        transform: SarTransform | None,
        *,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """With a store, each distinct image is read and encoded once, and pairs compare its features.

        The split is then shared out in consecutive runs of pairs, so that the images of a sequence meet in one process.
        """
        data = batches.dataset if isinstance(batches, Loader) else None
        shares = isinstance(data, PairDataset) and data.shares_images and model.has("encode_image")
        if transform is None or not shares:
            yield from super().predict(model, batches, transform, device=device)
            return
        assert isinstance(batches, Loader)
        assert isinstance(data, PairDataset)
        plan = batches.plan
        mine = np.array_split(np.arange(len(data)), plan.world_size)[plan.rank]
        yield from self._predict_shared(model, data, mine, PairTransform(transform), plan.batch_size, device)

    def _predict_shared(
        self,
        model: Predictor,
        data: PairDataset,
        mine: np.ndarray,
        transform: PairTransform,
        batch_size: int,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        last_use = {int(row): place for place, index in enumerate(mine) for row in data.rows[index]}
        features: dict[int, Tensor] = {}
        assert data.labels is not None
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        fresh = _first_uses([data.rows[indices] for indices in batches], most=2 * batch_size)
        on_gpu = device.type == "cuda"

        def read(rows: np.ndarray) -> Tensor:
            power = data.read_rows(rows)
            return power.pin_memory() if on_gpu else power

        images = ahead(read, [rows for pieces in fresh for rows in pieces])
        done = 0
        for indices, pieces in zip(batches, fresh, strict=True):
            for some in pieces:
                power = next(images).to(device, non_blocking=True)
                encoded = model.call("encode_image", transform.images(power))  # (images, T, D)
                features.update(zip(some.tolist(), encoded, strict=True))
            rows = data.rows[indices]  # (B, 2)
            first = torch.stack([features[int(row)] for row in rows[:, 0]])
            second = torch.stack([features[int(row)] for row in rows[:, 1]])
            logits = model.call("classify", first, second).float()
            target = torch.from_numpy(data.labels[indices]).to(device)
            yield torch.from_numpy(indices), self.outputs(logits, target)
            done += len(indices)
            features = {row: value for row, value in features.items() if last_use[row] >= done}

    def metrics(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """``acc`` in %, ``precision``, ``recall``, ``f1`` of flood as fractions."""
        return pair_metrics(truth, predicted)

    # Printing and pictures ---------------------------------------------------------------------------------------

    def format_report(self, report: Report) -> str:
        samples = sum(row["support"] for row in report.per_class)
        values = report.scalars

        def interval(name: str) -> str:
            low, high = report.intervals.get(name, (None, None))
            return "" if low is None else f"  [{low:.4f}, {high:.4f}]"

        return (
            f"Accuracy of the network on the {samples} test images: {values['acc']:.4f}%{interval('acc')}\n"
            f"Precision: {values['precision']:.4f}{interval('precision')}\n"
            f"Recall: {values['recall']:.4f}{interval('recall')}\n"
            f"F1 Score: {values['f1']:.4f}{interval('f1')}"
        )

    def format_epoch(self, report: Report) -> str:
        text = f"accuracy {report.scalars['acc']:.4f}%, F1 {report.scalars['f1']:.4f}"
        return f"{text}, loss {report.scalars['loss']:.4f}" if "loss" in report.scalars else text

    def epoch_lines(self, best: Mapping[str, Any], report: Report, *, improved: bool) -> list[str]:
        text = self.format_report(report)
        if self.select_on != "test":
            text = text.replace(" test images", " held-out training images")
        name, unit = ("accuracy", "%") if self.select == "acc" else (self.select, "")
        lines = [*text.splitlines(), f"Max {name}: {best['score']:.4f}{unit}"]
        if improved:
            lines.append(f"Best model saved at epoch {best['epoch']} with score {best['score']:.4f}")
        return lines

    def summary(self, best: Mapping[str, Any], report: Report, samples: int) -> str:
        name = "Accuracy" if self.select == "acc" else self.select
        return (
            f"Best Results Summary: Epoch {best['epoch']} Best {name} Score {best['score']:.4f}\n"
            f"{self.format_report(report)}"
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


def _first_uses(batches: Sequence[np.ndarray], *, most: int) -> list[list[np.ndarray]]:
    """For each batch of rows (B, 2) those not met before, in pieces of at most ``most``: as many images at once as a
    training batch of pairs holds."""
    seen: set[int] = set()
    pieces = []
    for rows in batches:
        new = np.array([row for row in np.unique(rows) if int(row) not in seen], dtype=np.int64)
        seen.update(int(row) for row in new)
        pieces.append([new[begin : begin + most] for begin in range(0, len(new), most)])
    return pieces
