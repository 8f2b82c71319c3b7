"""Score of a fine-tuned model against the dose of faults in its images, paired with the score on the images as read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sarwmix.datasets.sen12flood import power_to_db
from sarwmix.finetune.bench import Workbench
from sarwmix.perturbations import Perturbation
from sarwmix.tasks.intervals import DRAWS, cluster_numbers, paired_difference
from sarwmix.tasks.metrics import evaluator
from util.errors import UserError
from util.log import get_logger

POWER_KEYS = ("image1", "image2", "images")  # of pairs: linear power
NOT_PREDICTED = ("prediction", "loss", "loss_sum", "loss_weight", "skipped")


@dataclass(frozen=True)
class Stressed:
    """Score under one dose.

    Attributes:
        perturbation: its name.
        dose: how much of it.
        label: the dose in words.
        score: the metric on the whole split.
        change: score minus that of the images as read.
        low, high: 95 % interval of the change over clusters of the split; NaN where there are fewer than two.
    """

    perturbation: str
    dose: float
    label: str
    score: float
    change: float
    low: float
    high: float


class Perturbed:
    """Batches of a loader with faults in their images.

    Args:
        batches: of the loader.
        perturbation: what is done.
        dose: how much.
        means: of the bands, dB.
        seed: of all draws.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        perturbation: Perturbation,
        dose: float,
        *,
        means: Sequence[float],
        seed: int,
    ) -> None:
        self._batches, self._perturbation, self._dose = batches, perturbation, dose
        self._means, self._seed = means, seed

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._batches:
            yield {name: self._image(name, value, batch) for name, value in batch.items()}

    def _image(self, name: str, value: Any, batch: Mapping[str, Any]) -> Any:
        if name != "image" and name not in POWER_KEYS or not isinstance(value, Tensor) or len(value) == 0:
            return value
        numbers = np.asarray(batch["new_rows"] if name == "images" else batch["index"])
        db = value.float() if name == "image" else power_to_db(value.float())
        db = torch.where(torch.isfinite(db), db, torch.nan)
        db = self._perturbation.apply(db, self._dose, numbers, self._means, self._seed)
        return db if name == "image" else 10.0 ** (db / 10.0)


def stress(
    bench: Workbench,
    model: nn.Module,
    split: str,
    chosen: Sequence[Perturbation],
    *,
    metric: str,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, list[Stressed]]:
    """Evaluate a model on the split as it is and under every dose.

    Args:
        bench: its splits; images, not cached features.
        model: in evaluation mode.
        split: which.
        chosen: what is done to the images, one at a time.
        metric: of the task, larger is better.
        seed: of the draws.
        draws: resamples of the intervals.

    Returns:
        The score on the images as read, and what each dose made of it.

    Raises:
        UserError: images that are not in dB, or no such metric.
    """
    spec, task = bench.splits[split].spec, bench.task
    if spec.unit != "dB":
        raise UserError(f"bands {', '.join(spec.bands)} of {spec.name} are in {spec.unit}; the faults are those of dB")
    if metric not in task.metric_names:
        raise UserError(f"--metric {metric} is none of the {task.name} task's: {', '.join(task.metric_names)}")
    means = bench.splits[split].statistics.mean

    def outcome(one: Perturbation | None, dose: float) -> tuple[float, Any, np.ndarray]:
        batches: Iterable[Mapping[str, Any]] = bench.loader(split, train=False)
        if one is not None:
            batches = Perturbed(batches, one, dose, means=means, seed=seed)
        found = bench.evaluate(model, split, batches)
        score = task.report(found.outputs).scalars[metric]
        outputs = {name: value for name, value in found.outputs.items() if name not in NOT_PREDICTED}
        counted = outputs["confusion"].sum(axis=(1, 2)) > 0 if "confusion" in outputs else None
        numbers = cluster_numbers(found.clusters, len(found.names), counted=counted)
        return score, evaluator(task.name, outputs, len(task.classes)), numbers

    clean, before, numbers = outcome(None, 0.0)
    get_logger().info("as read: %s %.4f", metric, clean)
    rows = []
    for one in chosen:
        for dose in one.doses:
            score, after, _ = outcome(one, dose)
            change = paired_difference([after], [before], numbers, metric, draws=draws)
            rows.append(Stressed(one.name, dose, one.label(dose), score, score - clean, change.low, change.high))
            get_logger().info("%s", line_of(rows[-1], metric))
    return clean, rows


def line_of(row: Stressed, metric: str) -> str:
    """One dose in a line."""
    interval = "" if np.isnan(row.low) else f" [{row.low:+.4f}, {row.high:+.4f}]"
    return f"{row.perturbation:15} {row.label:>8}  {metric} {row.score:.4f}  change {row.change:+.4f}{interval}"


def table_rows(clean: float, rows: Sequence[Stressed]) -> list[dict[str, Any]]:
    """The table, plain values; the first row is the images as read."""
    first = Stressed("as read", 0.0, "", clean, 0.0, 0.0, 0.0)
    plain = [asdict(row) for row in (first, *rows)]
    return [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in plain]
