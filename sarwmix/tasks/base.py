"""What a kind of label needs from fine-tuning, in one object: the engine knows tasks only through `Task`.

A task says how a batch becomes model inputs on the device, which loss is trained, what is kept of every sample during
evaluation, how metrics follow from that over the whole split, which epochs are best, and what is printed and drawn.
The data set's entry in the registry names its task; `build_task` makes it.

To add one: subclass `Task`, add its line to `TASKS`. Whatever a task keeps of a sample must be an array with the
samples first (a segmentation task keeps one confusion matrix a sample, not the pixels), so that gathering over
processes, the check that each sample counts once and the order by sample number stay the same for all.

Shapes: B samples of a batch, N samples of a split, K classes.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sarwmix.data.base import SarDataset
from sarwmix.heads import CLASSIFICATION_HEADS, TaskModel
from sarwmix.mixup import smooth_labels
from sarwmix.models.backbones import build_classifier
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.metrics import Report, align_table, metric_table, multilabel_report
from sarwmix.tasks.selection import SIX_METRICS, Rule, multilabel_rules, selection_rules
from sarwmix.transforms import SarTransform
from util.errors import UserError

TASKS = {
    "multilabel": "sarwmix.tasks.base:MultilabelTask",
    "multiclass": "sarwmix.tasks.multiclass:MulticlassTask",
    "segmentation": "sarwmix.tasks.segmentation:SegmentationTask",
    "pair": "sarwmix.tasks.pair:PairTask",
}


@dataclass
class Prepared:
    """A batch on the device, ready for the model.

    Attributes:
        inputs: positional arguments of the model's forward, e.g. (images,) or (images1, images2).
        target: what the loss compares with, in the task's own form; (B, K) float for multi-label.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor


class Predictor:
    """A model in evaluation mode under autocast.

    Args:
        model: bare module.
        device: where it lives.
        amp_dtype: autocast type; None: float32.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None) -> None:
        self.model = model.eval()
        self._device_type, self._amp_dtype = device.type, amp_dtype
        self._compiled = any(module._compiled_call_impl is not None for module in model.modules())
        self._most: dict[str, int] = {}  # samples of a batch so far, by method

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.call("__call__", *inputs)

    def has(self, method: str) -> bool:
        """Whether the model has a method of that name."""
        return callable(getattr(self.model, method, None))

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """Another method of the model, such as the one that encodes a single image of a pair.

        A compiled model is compiled for each size of a batch: a short last one is filled up with its last sample.
        """
        count = len(inputs[0])
        most = self._most[method] = max(count, self._most.get(method, 0))
        if self._compiled and count < most:
            inputs = tuple(torch.cat([x, x[-1:].expand(most - count, *x.shape[1:])]) for x in inputs)
            return self.call(method, *inputs)[:count]
        with torch.autocast(self._device_type, self._amp_dtype, enabled=self._amp_dtype is not None):
            return getattr(self.model, method)(*inputs)


class Task(ABC):
    """One kind of label. Instances hold plain settings only and are cheap."""

    name: ClassVar[str]
    # options of this task beyond the class names, as the entry script may hand them to `build_task`
    options: ClassVar[tuple[str, ...]] = ("select", "select_on")
    # scalar metric shown while training, in tables and searched for by probes, larger is better
    primary: str
    # all metrics that may select the best epoch, larger is better
    metric_names: tuple[str, ...]
    # whether mixup and CutMix make sense
    mixable: ClassVar[bool] = True
    # whether a sample has exactly one class (softmax), or each label is a yes/no question of its own (sigmoid)
    exclusive: ClassVar[bool] = False
    # names of the heads that fit, the usual one first
    heads: ClassVar[tuple[str, ...]] = CLASSIFICATION_HEADS
    # whether labels are per pixel: then a frozen encoder runs on the fly, and there is no probe on pooled features
    dense: ClassVar[bool] = False

    # columns of the per-class table: title, key of the report's rows
    class_columns: ClassVar[tuple[tuple[str, str], ...]] = (("AP", "ap"), ("F1", "f1"), ("Precision", "precision"))

    def __init__(self, classes: Sequence[str], select_on: str = "val", select: str | None = None) -> None:
        if not classes:
            raise UserError(f"task {self.name} needs a data set with labels, this one has no classes")
        self.classes = tuple(classes)
        self.select_on = select_on  # split that selects the best epoch: "test" where a published protocol does so
        self.select = select or self.primary  # what "best" means: a metric, or the name of a published rule

    @property
    def num_outputs(self) -> int:
        """Width of the model's head."""
        return len(self.classes)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Settings beyond the size table that change what a model of this task computes; kept in its checkpoints."""
        return {}

    def check_settings(self, saved: Mapping[str, Any], *, source: str) -> None:
        """Refuse weights that were trained with other `model_settings`: they would load and compute something else.

        Args:
            saved: the checkpoint's `model_config`; released files have none.
            source: what the message calls the checkpoint.

        Raises:
            UserError: a setting differs.
        """
        for name, value in self.model_settings.items():
            if name in saved and saved[name] != value:
                raise UserError(f"{source} was trained with {name} {saved[name]}, not {value}; give --{name} to fit")

    @abstractmethod
    def build_model(self, settings: ModelSettings) -> TaskModel:
        """The model with a fresh head.

        It must have `head`, its last layer, and `forward_features(*inputs) -> (B, D)`, what `head` is applied to.
        """

    def inputs(
        self,
        batch: Mapping[str, Any],
        transform: SarTransform,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """Raw batch of the loader -> standardised inputs of the model, on the device.

        Args:
            batch: as the loader yields it (image in dB with NaN at invalid pixels, ...).
            transform: resizing, flips and standardisation with the data set's statistics.
            device: where the model lives.
            generator: CPU generator of the training step: flip at random. None: evaluation, no augmentation.
        """
        return (transform.model_input(batch["image"].to(device, non_blocking=True), generator),)

    @abstractmethod
    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The batch's labels on the device, in the form that `losses` takes."""

    def prepare(
        self,
        batch: Mapping[str, Any],
        transform: SarTransform | None,
        *,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Prepared:
        """Inputs and target of a batch of images or, where transform is None, of cached features (B, D)."""
        if transform is None:
            inputs: tuple[Tensor, ...] = (batch["features"].to(device, non_blocking=True),)
        else:
            inputs = self.inputs(batch, transform, device=device, generator=generator)
        return Prepared(inputs, self.target(batch, device))

    @abstractmethod
    def soft_target(self, target: Tensor) -> Tensor:
        """Target as (B, K) float probabilities that can be mixed."""

    @abstractmethod
    def losses(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Loss of each sample, (B,), float32. The target may be mixed (soft)."""

    def loss(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Loss of a batch, what training minimises."""
        return self.losses(logits, target, smoothing=smoothing).mean()

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Class probabilities in float64 from logits, (B, K)."""

    def outputs(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What evaluation keeps of each sample: tensors with B first. NaN in any float one is an error."""
        return {"scores": self.scores(logits), "target": target, "loss": self.losses(logits, target).double()}

    def run(
        self,
        model: Predictor,
        batches: Iterable[Mapping[str, Any]],
        transform: SarTransform | None,
        *,
        device: torch.device,
        features: bool = False,
    ) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """Run the model over batches, without gradients.

        Args:
            model: returns logits (B, K) from the inputs.
            batches: of the loader.
            transform: device transform; None for cached features.
            device: where the model lives.
            features: whether the encoder's pooled features are asked for, (B, D), instead of logits.

        Yields:
            (batch, float32 result) of each.
        """
        for batch in batches:
            inputs = self.prepare(batch, transform, device=device).inputs
            yield batch, (model.call("forward_features", *inputs) if features else model(*inputs)).float()

    def predict(
        self,
        model: Predictor,
        batches: Iterable[Mapping[str, Any]],
        transform: SarTransform | None,
        *,
        device: torch.device,
        whole: SarDataset | None = None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """What is kept of each sample of this process's share of a split.

        Args:
            model, batches, transform, device: see `run`.
            whole: the split, where results are final and what its pictures need is kept, too.

        Yields:
            (sample numbers (B,), outputs) of each batch.
        """
        for batch, logits in self.run(model, batches, transform, device=device):
            yield batch["index"], self.outputs(logits, self.target(batch, device))

    @abstractmethod
    def report(self, gathered: Mapping[str, np.ndarray]) -> Report:
        """Metrics of a split from the outputs of all its samples in order, (N, ...); `loss` where there is one."""

    def published_rules(self) -> tuple[Rule, ...]:
        """Selection rules of the published protocol, by name, where it has more than the highest metric."""
        return ()

    def rules(self, *, keep_published: bool = False) -> tuple[Rule, ...]:
        """Selection rules; the first one is `select`, and its file the run's main result.

        Args:
            keep_published: whether the best epochs by the other published rules are stored, too.

        Raises:
            UserError: `select` is neither a metric of the task nor a published rule.
        """
        return selection_rules(self.select, self.metric_names, self.published_rules(), keep_published=keep_published)

    @abstractmethod
    def format_report(self, report: Report) -> str:
        """The result table as text."""

    def summary(self, best: Mapping[str, Any], report: Report, samples: int) -> str:
        """The run's last lines, before the training time.

        Args:
            best: `epoch` and `score` of the first rule's best epoch.
            report: its result on the test split.
            samples: number of test samples.
        """
        return f"Best Results Summary: Epoch {best['epoch']}\n{self.format_report(report)}"

    def format_epoch(self, report: Report) -> str:
        """One line for the progress output."""
        text = f"{self.primary} {report.scalars[self.primary]:.4f}"
        return f"{text}, loss {report.scalars['loss']:.4f}" if "loss" in report.scalars else text

    def epoch_lines(self, best: Mapping[str, Any], report: Report, *, improved: bool) -> list[str]:
        """Further lines after each epoch, for tasks whose protocol asks for them.

        Args:
            best: `epoch` and `score` of the first rule's best epoch so far.
            report: of the epoch on the split that selects.
            improved: whether this epoch is the best so far.
        """
        return []

    def write_pictures(
        self, folder: Path, data: SarDataset, gathered: Mapping[str, np.ndarray], report: Report
    ) -> list[Path]:
        """Draw the result of a split (`data.split`) into folder; returns the files written.

        Args:
            folder: exists.
            data: the split's samples; a task may look at some of them again.
            gathered: outputs of all samples in order.
            report: their metrics.
        """
        return []


class SingleLabelTask(Task):
    """Exactly one class a sample: cross-entropy and softmax."""

    exclusive = True
    primary = "acc"

    @abstractmethod
    def metrics(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """Scalars of a split, ``acc`` among them.

        Args:
            truth: (N,) class numbers.
            predicted: (N,) class numbers.
        """

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        return batch["label"].to(device, torch.int64, non_blocking=True)  # (B,)

    def soft_target(self, target: Tensor) -> Tensor:
        return F.one_hot(target, self.num_outputs).float()

    def losses(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=smoothing)

    def scores(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.double(), dim=1)

    def report(self, gathered: Mapping[str, np.ndarray]) -> Report:
        """Scalars of `metrics` and ``loss``; the first of several classes with the same score is the predicted one."""
        from sklearn.metrics import average_precision_score

        truth = gathered["target"].astype(np.int64)  # (N,)
        scores = gathered["scores"]  # (N, K)
        predicted = scores.argmax(axis=1)
        scalars = self.metrics(truth, predicted)
        if "loss" in gathered:  # k-NN has scores only
            scalars["loss"] = float(np.mean(gathered["loss"], dtype=np.float64))
        per_class: list[dict[str, Any]] = []
        for number, name in enumerate(self.classes):
            own, found = truth == number, predicted == number
            support, hits, claimed = int(own.sum()), int((own & found).sum()), int(found.sum())
            per_class.append(
                {
                    "class": name,
                    "support": support,
                    "predicted": claimed,
                    "recall": hits / support if support else None,
                    "f1": 2 * hits / (support + claimed) if support + claimed else 0.0,
                    "precision": hits / claimed if claimed else 0.0,
                    "ap": float(average_precision_score(own, scores[:, number])) if support else None,
                }
            )
        absent = tuple(str(row["class"]) for row in per_class if not row["support"])
        return Report(scalars=scalars, per_class=per_class, absent=absent)


class MultilabelTask(Task):
    """Several classes may be present at once: BigEarthNet with 19 classes and data sets like it."""

    name = "multilabel"
    primary = "ap_macro"
    metric_names = SIX_METRICS

    def build_model(self, settings: ModelSettings) -> TaskModel:
        return build_classifier(settings, self.num_outputs)

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        return batch["label"].to(device, torch.float32, non_blocking=True)  # (B, K)

    def soft_target(self, target: Tensor) -> Tensor:
        return target

    def losses(self, logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
        target = smooth_labels(target, smoothing)
        return F.multilabel_soft_margin_loss(logits.float(), target, reduction="none")

    def scores(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits.double())

    def outputs(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {**super().outputs(logits, target), "target": target.to(torch.uint8)}

    def report(self, gathered: Mapping[str, np.ndarray]) -> Report:
        report = multilabel_report(gathered["scores"], gathered["target"], self.classes)
        if "loss" in gathered:  # k-NN has scores only
            report.scalars["loss"] = float(np.mean(gathered["loss"], dtype=np.float64))
        return report

    def published_rules(self) -> tuple[Rule, ...]:
        return multilabel_rules()

    def format_report(self, report: Report) -> str:
        text = metric_table(report.scalars, report.intervals)
        if report.absent:
            text += f"\nleft out of macro average precision (no positive sample): {'; '.join(report.absent)}"
        return text

    def write_pictures(
        self, folder: Path, data: SarDataset, gathered: Mapping[str, np.ndarray], report: Report
    ) -> list[Path]:
        from sarwmix.figures.base import per_class_table_figure, precision_recall_figure

        scores, target, split = gathered["scores"], gathered["target"], data.split
        what = f"{len(data):,} samples of {split}"
        curves = precision_recall_figure(
            folder / f"precision_recall_{split}.png",
            target,
            scores,
            self.classes,
            title=f"Precision and recall on {what}: macro AP {report.scalars['ap_macro']:.4f}",
        )
        columns: dict[str, Any] = {
            "support": [row["support"] for row in report.per_class],
            "AP": [np.nan if row["ap"] is None else row["ap"] for row in report.per_class],
            "F1": [row["f1"] for row in report.per_class],
            "precision": [row["precision"] for row in report.per_class],
        }
        table = per_class_table_figure(
            folder / f"per_class_{split}.png", self.classes, columns, title=f"Results of each class on {what}"
        )
        return [curves, table]


def per_class_text(report: Report, columns: Sequence[tuple[str, str]] = Task.class_columns) -> str:
    """Per-class metrics as an aligned text table.

    Args:
        report: its `per_class` rows hold `class`, `support` and the columns.
        columns: title and key of each; None as a value is undefined.
    """
    rows = [("Class", "Support", *(title for title, _ in columns))]
    for row in report.per_class:
        values = ("-" if row[key] is None else f"{row[key]:.4f}" for _, key in columns)
        rows.append((row["class"], str(row["support"]), *values))
    return align_table(rows)


def task_class(name: str) -> type[Task]:
    """The class registered for a task name.

    Raises:
        UserError: no such task.
    """
    if name not in TASKS:
        raise UserError(f"no fine-tuning for task {name!r}; there is: {', '.join(sorted(TASKS))}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build_task(name: str, classes: Sequence[str], options: Mapping[str, Any] | None = None) -> Task:
    """Make the task of a data set.

    Args:
        name: the data set's task.
        classes: its class names.
        options: task options by name; None as a value counts as not given.

    Raises:
        UserError: no such task, or an option that it does not have.
    """
    chosen = task_class(name)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    unknown = sorted(set(given) - set(chosen.options))
    if unknown:
        raise UserError(f"--{unknown[0]} is not an option of the {name} task (its options: {list(chosen.options)})")
    return chosen(classes, **given)
