"""What a fine-tuning run reports: a line per epoch, tables that say what was measured, metrics.json, pictures."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from engine_finetune import Evaluation
from sarwmix.data.base import SarDataset
from sarwmix.finetune.bench import Workbench, data_facts
from sarwmix.finetune.probes import fit_logistic_probe
from sarwmix.heads import TaskModel
from sarwmix.models.loading import load_trained
from sarwmix.tasks.base import Task, per_class_text
from sarwmix.tasks.calibration import calibrate
from sarwmix.tasks.intervals import cluster_numbers, metric_intervals
from sarwmix.tasks.metrics import Report, evaluator
from sarwmix.tasks.selection import BEST, ON_TEST, Selector, in_fractions
from util.args import args_to_dict
from util.checkpoint import load_checkpoint, read_info
from util.errors import UserError
from util.files import atomic_write, make_directory, write_json
from util.log import EpochLog, ScalarWriter, format_duration, get_logger, memory_mib
from util.resume import Resumed, load_verified
from util.tracking import Tracker

NOTHING_SELECTED: dict[str, Any] = {"split": None, "rule": None, "epoch": None}


def evaluation_folder(output_dir: str, checkpoint: str) -> str:
    """Folder of an evaluation: `output_dir` when it is new, else the first free ``eval_<checkpoint>`` in it.

    Args:
        output_dir: asked for, or the checkpoint's own folder.
        checkpoint: what is evaluated.
    """
    wanted = Path(output_dir)
    if not wanted.exists() or not any(wanted.iterdir()):
        return output_dir
    number, name = 1, f"eval_{Path(checkpoint).stem}"
    while (wanted / name).exists():
        number += 1
        name = f"eval_{Path(checkpoint).stem}_{number}"
    return str(wanted / name)


def facts_of(args: argparse.Namespace, bench: Workbench, model: TaskModel) -> dict[str, Any]:
    """What every result line and metrics.json name about a run."""
    task, splits = bench.task, bench.splits
    spec, statistics = splits["test"].spec, splits["test"].statistics
    return {
        "task": task.name,
        "cluster": splits["test"].cluster_kind,  # what intervals are computed over
        "protocol": args.protocol if args.probe_solver == "sgd" else f"{args.protocol} ({args.probe_solver})",
        "dataset": spec.name,
        "model": args.model,
        "head": "bn_linear" if task.dense and args.protocol == "linear" else args.head or task.heads[0],
        "pool": getattr(model, "pool_used", None),
        "bands": list(spec.bands),
        "classes": list(spec.classes),
        "statistics": args.statistics or spec.default_statistics,
        "statistics_origin": statistics.origin,
        "seed": args.seed,
        "train_frac": args.train_frac,
        "samples": {name: len(data) for name, data in splits.items()},
        "sample_size": list(splits["test"].shape[1:]),
        "precision": str(bench.amp_dtype or "float32").removeprefix("torch."),
        **data_facts(splits, bench.options),
    }


def export_result(results: Results, folder: str, *, evaluated: bool, repository: str | None) -> None:
    """Export the evaluated checkpoint, or the best one of the run that has just ended.

    Args:
        results: of the run.
        folder: a new one.
        evaluated: whether the run was an evaluation.
        repository: of the hub, which gets the export, too.
    """
    from sarwmix.inference.export import export_model, push_to_hub

    name, entry = next(iter(results.entries.items()))
    checkpoint = Path(name) if evaluated else results.output_dir / BEST
    export_model(checkpoint, folder, metrics=entry if evaluated else results.entries[BEST])
    if repository:
        get_logger().info("pushed to %s", push_to_hub(folder, repository))


class EpochJournal:
    """One line a training epoch in log.txt, the same numbers in TensorBoard, and a sentence on the console."""

    def __init__(
        self,
        output_dir: Path,
        args: argparse.Namespace,
        *,
        task: Task,
        is_main: bool,
        start_epoch: int,
    ) -> None:
        self._task = task
        tracked = args.use_wandb and is_main
        self._tracker = Tracker(output_dir, args_to_dict(args), resumed=start_epoch > 0) if tracked else None
        self._log = EpochLog(output_dir, start_epoch=start_epoch) if is_main else None
        folder = (args.log_dir or output_dir / "tensorboard") if is_main else None
        self._scalars = ScalarWriter(folder, start=1000 * start_epoch)

    def write(
        self,
        epoch: int,
        stats: Mapping[str, float],
        report: Report,
        improved: Sequence[str],
        best: Mapping[str, Any],
    ) -> None:
        """
        Args:
            epoch: number of the epoch, from 0.
            stats: of the training epoch.
            report: of the split that selects.
            improved: files of the rules whose best epoch this is.
            best: best epoch of the first rule, with its score.
        """
        split = self._task.select_on
        record = {"epoch": epoch, **stats, "memory_mib": max(memory_mib())}
        record |= {f"{split}_{name}": value for name, value in report.scalars.items()}
        if self._log is not None:
            self._log.write({**record, "best": list(improved)})
        if self._tracker is not None:
            self._tracker.log(epoch, record)
        perf = {f"perf/{split}_{name}": value for name, value in report.scalars.items()}
        self._scalars.add(1000 * epoch, {"loss": stats["train_loss"], "lr": stats["train_lr"], **perf})
        get_logger().info(
            "Epoch %d  loss %.4f  lr %.3g  %.1f samples/s  %s: %s%s",
            epoch,
            stats["train_loss"],
            stats["train_lr"],
            stats["images_per_s"],
            split,
            self._task.format_epoch(report),
            f"  (best {self._task.select} so far)" if BEST in improved else "",
        )
        for line in self._task.epoch_lines(best, report, improved=BEST in improved):
            get_logger().info("%s", line)

    def close(self) -> None:
        """Flush TensorBoard and end tracking."""
        self._scalars.close()
        if self._tracker is not None:
            self._tracker.close()


def best_on_disk(
    folder: Path, best: Mapping[str, dict[str, Any]], runs: Collection[str], *, resumed: Resumed | None = None
) -> dict[str, dict[str, Any]]:
    """Best epochs of a run whose weights are there.

    A file of an earlier epoch (the better one was never written) counts for what it is; a file that is missing or of
    another run does not count. One of a later epoch is left to a resumed run, which comes to that epoch again.

    Args:
        folder: of the run.
        best: by file name, as `Selector.state_dict` gives it.
        runs: identities of this run.
        resumed: where the run stands, when it has just been resumed.
    """
    found = {}
    for name, entry in best.items():
        info = read_info(folder / name) if (folder / name).is_file() else None
        if info is None or info.run not in runs:
            what = "is missing" if info is None else "is of another run"
            get_logger().warning("%s %s; its epoch %d no longer counts", folder / name, what, entry["epoch"])
            continue
        again = resumed is not None and info.run == resumed.run_id and info.epoch >= resumed.epoch
        if info.epoch != entry["epoch"] and not again:
            get_logger().warning("%s holds epoch %d, not %d", folder / name, info.epoch, entry["epoch"])
            entry = in_fractions(load_checkpoint(folder / name)["best"][name])
        found[name] = entry
    return found


@dataclass
class Results:
    """Collects the results of a run, shows and writes them. Rank 0 does; what all processes must call says so.

    Attributes:
        facts: what every result line and metrics.json name: protocol, dataset, model, statistics, seed, samples, ...
        output_dir: the run's folder.
        task: formats and draws.
        bootstrap: resamples of clusters for 95 % intervals; 0: none.
        seed: seed of the resampling.
        entries: results by name (a checkpoint file, or the protocol), each with its epoch and its splits.
    """

    facts: dict[str, Any]
    output_dir: Path
    task: Task
    bootstrap: int = 0
    seed: int = 0
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def line(self, split: str) -> str:
        """Protocol, data set, split, statistics, seed and sample counts in one line."""
        samples = ", ".join(f"{name} {count:,}" for name, count in self.facts["samples"].items())
        return (
            f"protocol {self.facts['protocol']}, data set {self.facts['dataset']}, split {split}, "
            f"model {self.facts['model']}, statistics {self.facts['statistics']}, seed {self.facts['seed']}, "
            f"samples: {samples}" + (f", {ON_TEST}" if self.selected_on["split"] == "test" else "")
        )

    @property
    def selected_on(self) -> dict[str, Any]:
        """Split, rule and epoch of the main result; without a split where nothing was selected."""
        return self.facts.get("selected_on", NOTHING_SELECTED)

    def add(self, name: str, evaluation: Evaluation, *, epoch: int | None = None) -> Report:
        """Compute a split's metrics, with intervals where asked for, and keep them for metrics.json."""
        report = self.task.report(evaluation.outputs)
        if self.bootstrap:
            report = replace(report, intervals=self.intervals(evaluation))
        entry = self.entries.setdefault(name, {"epoch": epoch})
        entry[evaluation.split] = report.as_dict()
        if evaluation.skipped:
            self.facts.setdefault("skipped", {})[evaluation.split] = list(evaluation.skipped)
        return report

    def intervals(self, evaluation: Evaluation) -> dict[str, tuple[float, float]]:
        """95 % intervals of the metrics over the clusters that the data set declares."""
        outputs, task = evaluation.outputs, self.task
        evaluate = evaluator(task.name, outputs, len(task.classes))
        counted = outputs["confusion"].sum(axis=(1, 2)) > 0 if "confusion" in outputs else None
        numbers = cluster_numbers(evaluation.clusters, len(evaluation.names), counted=counted)
        count = self.facts.setdefault("clusters", {})[evaluation.split] = int(numbers.max()) + 1
        if count < 2:
            get_logger().warning("no interval for split %s: it has one %s", evaluation.split, self.facts["cluster"])
        return metric_intervals(evaluate, numbers, draws=self.bootstrap, seed=self.seed)

    def show(self, name: str, evaluation: Evaluation, data: SarDataset, *, epoch: int | None = None) -> Report:
        """`add`, and the tables on the console and the pictures beside the run; `data` is the evaluated split."""
        report = self.add(name, evaluation, epoch=epoch)
        log = get_logger()
        log.info("%s: %s", name, self.line(evaluation.split))
        if report.per_class:
            log.info("%s", per_class_text(report, self.task.class_columns))
        log.info("%s", self.task.format_report(report))
        folder = make_directory(self.output_dir / "pictures")
        self.task.write_pictures(folder, data, evaluation.outputs, report)
        self.keep_predictions(evaluation)
        return report

    def keep_predictions(self, evaluation: Evaluation) -> None:
        """Write `predictions_<split>.npz`: names, clusters (where the data set has them) and outputs of each sample."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"names": np.array(list(evaluation.names)), **evaluation.outputs}
        if evaluation.clusters is not None:
            arrays["clusters"] = np.array(evaluation.clusters)
        np.savez_compressed(buffer, **arrays)
        with atomic_write(self.output_dir / f"predictions_{evaluation.split}.npz") as stream:
            stream.write(buffer.getvalue())

    def write(self, filename: str = "metrics.json", **extra: Any) -> None:
        """Write everything as JSON."""
        write_json(self.output_dir / filename, {**self.facts, **extra, "results": self.entries})

    def evaluate_checkpoint(self, bench: Workbench, model: TaskModel, path: Path, *, protocol: str) -> None:
        """Val and test of one fine-tuned checkpoint. Called by every process.

        Args:
            bench: the splits to evaluate.
            model: takes the weights.
            path: of the checkpoint.
            protocol: with which the checkpoint must have been trained.

        Raises:
            UserError: a checkpoint that does not fit.
        """
        checkpoint = load_verified(path, bench.processes)
        self.task.check_settings(checkpoint.get("model_config") or {}, source=str(path))
        bands = bench.splits["test"].spec.bands
        load_trained(model, checkpoint, source=str(path), protocol=protocol, classes=self.task.classes, bands=bands)
        self.facts["selected_on"] = self._selection_of(checkpoint, path.name)
        evaluations = [bench.evaluate(model, split) for split in bench.splits]

        def work() -> None:
            for evaluation in evaluations:
                self.show(str(path), evaluation, bench.splits[evaluation.split], epoch=checkpoint.get("epoch"))
            self.entries[str(path)]["selected_on"] = self.selected_on
            self.write("metrics_eval.json")
            get_logger().info("the evaluation is in %s", self.output_dir / "metrics_eval.json")

        bench.processes.main_works(work)

    def _selection_of(self, checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
        """How the epoch of a checkpoint was selected, where its run says so."""
        best = checkpoint.get("best") or {}
        entry = best.get(name)
        if not isinstance(entry, Mapping) or entry["epoch"] != checkpoint.get("epoch"):
            return {**NOTHING_SELECTED, "epoch": checkpoint.get("epoch")}
        # earlier versions stored no name: several files meant the published rules
        published = {rule.filename: rule.name for rule in self.task.published_rules()} | {BEST: "weighted"}
        rule = entry.get("rule") or (published[name] if len(best) > 1 else self.task.primary)
        split = (checkpoint.get("selection") or {}).get("split", self.task.select_on)
        return {"split": split, "rule": rule, "epoch": entry["epoch"]}

    def _calibrate(self, name: str, held: Evaluation, test: Evaluation) -> None:
        """Fit the temperature of a result's probabilities and say what it changes."""
        found = calibrate(held.outputs, test.outputs, held.split, exclusive=self.task.exclusive)
        self.entries[name]["calibration"] = found
        error = found["expected_calibration_error"]["test"]
        get_logger().info(
            "calibration: temperature %.3f fitted on %s; expected calibration error on test %.4f, %.4f before",
            found["temperature"], held.split, error["after"], error["before"],
        )  # fmt: skip

    def report_knn(self, bench: Workbench, *, k: int) -> None:
        """Nearest neighbours on cached features, computed by rank 0. Called by every process."""
        began = time.monotonic()
        bench.processes.main_works(
            lambda: self._report_untrained(bench, lambda split: bench.knn(split, k=k), "knn", began)
        )

    def report_logistic_probe(self, bench: Workbench, model: TaskModel) -> None:
        """Linear probe by L-BFGS on cached features, fitted by rank 0; its head becomes the probe. Called by every
        process."""
        began = time.monotonic()
        train, val = bench.splits["train"], bench.splits[self.task.select_on]

        def work() -> None:
            self.facts["c_sweep"] = fit_logistic_probe(self.task, model.head, train, val)
            self.facts["selected_on"] = {"split": self.task.select_on, "rule": f"{self.task.select} (C)", "epoch": None}
            self._report_untrained(bench, lambda split: bench.evaluate(model.head, split), "linear (lbfgs)", began)

        bench.processes.main_works(work)

    def _report_untrained(
        self, bench: Workbench, evaluate: Callable[[str], Evaluation], name: str, began: float
    ) -> None:
        for split in bench.splits:
            if split != "train":
                self.show(name, evaluate(split), bench.splits[split])
        self.facts.setdefault("selected_on", NOTHING_SELECTED)
        self.entries[name]["selected_on"] = self.selected_on
        self.write(seconds=time.monotonic() - began)

    def finish(
        self,
        bench: Workbench,
        model: TaskModel,
        module: nn.Module,
        selector: Selector,
        *,
        runs: Collection[str],
        seconds: float,
    ) -> None:
        """Evaluate the best epoch of every rule on test and print the run's last lines. Called by every process.

        Args:
            bench: splits and processes.
            model: takes the checkpoint's weights.
            module: what is evaluated: the model, or its head on cached features.
            selector: knows the best epochs.
            runs: identities of this run; a file of another one is refused.
            seconds: training time of the whole run.

        Raises:
            UserError: a file is not there, or belongs to another run.
        """
        found, chosen = best_on_disk(self.output_dir, selector.state_dict(), runs), {}
        by_epoch: dict[int, Evaluation] = {}
        held: Evaluation | None = None
        for rule in selector.rules:
            path = self.output_dir / rule.filename
            if rule.filename not in found:
                raise UserError(
                    f"the best epoch by {rule.filename} cannot be reported: {path} is missing or of another run; its "
                    "writing failed, or it was removed. Evaluate what is left: --eval --resume CKPT"
                )
            chosen[rule.filename] = found[rule.filename]  # in the order of the rules
            epoch = found[rule.filename]["epoch"]
            if epoch not in by_epoch:
                load_trained(model, load_checkpoint(path), source=rule.filename)
                by_epoch[epoch] = bench.evaluate(module, "test")
                if rule is selector.rules[0] and self.task.select_on != "test" and not self.task.dense:
                    held = bench.evaluate(module, self.task.select_on)  # what the temperature is fitted on
        bench.processes.main_works(lambda: self._report_best(bench, chosen, by_epoch, seconds, held))

    def _report_best(
        self,
        bench: Workbench,
        chosen: Mapping[str, Mapping[str, Any]],
        by_epoch: Mapping[int, Evaluation],
        seconds: float,
        held: Evaluation | None = None,
    ) -> None:
        """Show and write what `finish` evaluated; `chosen` is in the order of the rules, the first one is the main."""
        log, reports = get_logger(), {}
        main = next(iter(chosen))
        split = self.task.select_on
        self.facts["selected_on"] = {"split": split, "rule": chosen[main]["rule"], "epoch": chosen[main]["epoch"]}
        for name, best in chosen.items():
            epoch = int(best["epoch"])
            if name == main:
                reports[epoch] = self.show(name, by_epoch[epoch], bench.splits["test"], epoch=epoch)
                if held is not None:
                    self._calibrate(name, held, by_epoch[epoch])
            elif epoch in reports:  # the same epoch wins by several rules
                self.entries[name] = {"epoch": epoch, "test": reports[epoch].as_dict()}
            else:
                reports[epoch] = self.add(name, by_epoch[epoch], epoch=epoch)
            self.entries[name][split + "_scalars"] = best["metrics"]
            self.entries[name]["selected_on"] = {"split": split, "rule": best["rule"], "epoch": epoch}
            log.info(
                "%s: epoch %d, best by %s on %s (%.4f), %s on test%s",
                name,
                epoch,
                best["rule"],
                split,
                best["score"],
                self.task.format_epoch(reports[epoch]),
                f"  ({ON_TEST})" if split == "test" else "",
            )
        best = chosen[main]
        self.write(best_epoch=best["epoch"], training_seconds=seconds)
        log.info("%s", self.task.summary(best, reports[best["epoch"]], len(bench.splits["test"])))
        log.info("Training time %s", format_duration(seconds))
