"""The multi-class task: exactly one class per image (EuroSAT-SAR and data sets like it).

Shapes: B samples of a batch, N samples of a split, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sarwmix.data.base import SarDataset
from sarwmix.heads import TaskModel
from sarwmix.models.backbones import build_classifier
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import SingleLabelTask
from sarwmix.tasks.metrics import Report, class_accuracy, value_table
from util.errors import UserError


class MulticlassTask(SingleLabelTask):
    """Cross-entropy over K classes; accuracy (ACC) and mean class accuracy (aACC), in fractions.

    Args:
        classes: Class names.
        select_on: Split that selects the best epoch.
        select: Metric that selects it, accuracy by default.
    """

    name = "multiclass"
    metric_names = ("acc", "aacc")
    class_columns = (("Accuracy", "recall"), ("F1", "f1"), ("Precision", "precision"), ("AP", "ap"))

    def __init__(self, classes: Sequence[str], select_on: str = "val", select: str | None = None) -> None:
        super().__init__(classes, select_on, select)
        if len(self.classes) < 2:
            raise UserError(f"the multiclass task needs two classes or more, got {', '.join(self.classes)}")

    def build_model(self, settings: ModelSettings) -> TaskModel:
        return build_classifier(settings, self.num_outputs)

    def metrics(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """``acc``, and ``aacc``: its mean over the classes that have samples."""
        return class_accuracy(truth, predicted, len(self.classes))

    def format_report(self, report: Report) -> str:
        text = value_table({"acc": "Accuracy (ACC)", "aacc": "Mean class accuracy (aACC)"}, report)
        if report.absent:
            text += f"\nleft out of aACC (no sample): {'; '.join(report.absent)}"
        return text

    def write_pictures(
        self, folder: Path, data: SarDataset, gathered: Mapping[str, np.ndarray], report: Report
    ) -> list[Path]:
        from sarwmix.figures.base import confusion_matrix_figure

        truth, predicted = gathered["target"].astype(np.int64), gathered["scores"].argmax(axis=1)
        title = f"Confusion on {len(data):,} samples of {data.split}: accuracy {report.scalars['acc']:.4f}"
        path = folder / f"confusion_{data.split}.png"
        return [confusion_matrix_figure(path, truth, predicted, self.classes, title=title)]
