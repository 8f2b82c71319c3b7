"""A run as it lies in its folder: one reader, and one answer to "are these two the same, but for the seed?".

The page, the comparison, ablations and show_results all read runs here, so that the same runs have the same groups, the
same numbers of them, means and intervals everywhere. Only args.json, log.txt and metrics.json are read, no checkpoint
and no data. Metrics are fractions of 1.

Runs are averaged when they differ in nothing but seeds, their own and those of the pretraining they start from. Every
flag counts as a difference unless a list here says that it changes no result, so that a flag that is new is compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.reports.records import read_epochs, read_metrics, read_settings
from sarwmix.tasks.selection import as_fraction, selected_text
from util.errors import UserError
from util.files import hash_of_file, read_json

# the metric shown for each kind of run: the first one that it has
MAIN_METRICS = {"ap_macro": "macro AP", "iou": "IoU", "miou": "mean IoU", "acc": "accuracy"}
# what must agree for numbers of one data set to be comparable
DATA_FACTS = (
    *("splits", "data_options", "samples", "statistics", "statistics_origin", "bands", "train_frac", "classes"),
)
# Flags that are no part of the recipe. They change no result: places, devices, speed, saving, reporting ...
IRRELEVANT_ARGS = frozenset(
    ("output_dir", "log_dir", "seed", "device", "num_workers", "pin_mem", "cache", "compile", "flops", "bootstrap")
    + ("cuda_graph", "memory_budget", "activation_checkpointing")
    + ("resume", "save_every", "save_minutes", "keep_checkpoints", "hang_timeout", "eval", "export", "push_to_hub")
    + ("use_wandb", "dist_url", "port", "world_size", "dist_on_itp")
)
# ... or metrics.json says what came of them: encoder, start, data
LABEL_ARGS = ("label_set", "no_savanna", "val_frac", "data_option")
FACT_ARGS = frozenset(
    ("dataset", "data_path", "bands", "statistics", "train_frac", "protocol", "probe_solver", "model", "head", "pool")
    + ("finetune", "pretrained", "select", "select_on")
    + LABEL_ARGS
)
# Flags of training, which nearest neighbours and L-BFGS do without
_TRAINING = frozenset(
    ("epochs", "stop_epoch", "start_epoch", "patience", "batch_size", "accum_iter", "effective_batch", "optimizer")
    + ("lr", "blr", "min_lr", "warmup_epochs", "weight_decay", "layer_decay", "clip_grad", "drop_path", "drop_rate")
    + ("smoothing", "reprob", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode", "skip_nonfinite")
    + ("class_weights", "allow_mismatch")
)
_UNUSED_BY: dict[str, frozenset[str]] = {  # flags that change nothing under a protocol
    "knn": _TRAINING,
    "linear (lbfgs)": _TRAINING,
    "linear": frozenset(("layer_decay", "drop_path")),
    "frozen": frozenset(("layer_decay", "drop_path")),
    "finetune": frozenset(("feature_cache",)),
}
# Flags of pretraining that change nothing about its weights, beside the irrelevant ones
_NOT_OF_PRETRAINING = frozenset(("save_epochs", "inference", "finetune"))
NOT_RECORDED = "not recorded"


@dataclass
class RunRecord:
    """One run.

    Attributes:
        name: folder name, made unique among the runs of a page.
        path: folder.
        kind: "pretrain" or "finetune".
        args: flags, of args.json; of an evaluation those of the training; empty where neither is there.
        epochs: lines of log.txt, by epoch; only `load_run` reads them.
        metrics: content of metrics.json, or of metrics_eval.json; empty without either.
        file: the one of the two that was read.
        notes: what is odd about the files.
    """

    name: str
    path: Path
    kind: str
    args: dict[str, Any]
    epochs: list[dict[str, Any]]
    metrics: dict[str, Any]
    file: Path | None = None
    notes: list[str] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------------- numbers

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Finished epochs (1, 2, ...) and the values of a key; epochs without a number are left out."""
        pairs = [(line["epoch"] + 1, line[key]) for line in self.epochs if isinstance(line.get(key), (int, float))]
        values = [y for _, y in pairs]
        if key in ("val_acc", "test_acc"):
            values = [as_fraction("acc", value) for value in values]
        return np.array([x for x, _ in pairs], dtype=float), np.array(values, dtype=float)

    def result(self) -> tuple[str, str, dict[str, Any]] | None:
        """Checkpoint, split and metrics that the tables show: the first rule, on test where it was evaluated."""
        for checkpoint, entry in self.metrics.get("results", {}).items():
            for split in ("test", "val", *entry) if isinstance(entry, dict) else ():
                if isinstance(entry.get(split), dict) and "scalars" in entry[split]:
                    return checkpoint, split, entry[split]
        return None

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Metrics of `result` but the loss; those without a number are left out."""
        found = self.result()
        values = {} if found is None else found[2]["scalars"]
        return {
            name: as_fraction(name, float(value))
            for name, value in values.items()
            if name != "loss" and value is not None
        }

    def interval(self, metric: str) -> tuple[float, float] | None:
        """95 % interval of a metric of `result` over clusters of samples, where the run has one."""
        found = self.result()
        ends = None if found is None else found[2].get("intervals_95", {}).get(metric)
        if found is None or ends is None:
            return None
        percent = as_fraction(metric, found[2]["scalars"][metric]) != found[2]["scalars"][metric]
        return (ends[0] / 100, ends[1] / 100) if percent else (float(ends[0]), float(ends[1]))

    # ------------------------------------------------------------------------------------------------ what the run is

    @property
    def dataset(self) -> str:
        return str(self.metrics.get("dataset") or self.args.get("dataset") or "")

    @property
    def protocol(self) -> str:
        return str(self.metrics.get("protocol", "fine-tuning"))

    @property
    def model(self) -> str:
        """Name of the backbone alone."""
        return str(self.metrics.get("model") or self.args.get("model") or "")

    @property
    def encoder(self) -> str:
        """The backbone, with head and pooling where they are not the usual ones."""
        # a pooling that was asked for is named, a model's own is not
        extra = (self.metrics.get("head"), self.args["pool"] if "pool" in self.args else self.metrics.get("pool"))
        unusual = [str(part) for part in extra if part not in (None, "linear", "upernet")]
        return " + ".join([self.model, *unusual])

    @property
    def selected(self) -> str:
        """What chose the epoch, on which split."""
        return selected_text(self.metrics)

    @property
    def tested(self) -> str:
        """The split of `result` and of what it was made by, its samples, and what intervals count as one."""
        found = self.result()
        if found is None:
            return ""
        split, options = found[1], self.metrics.get("data_options") or {}
        of = "" if not options.get("lists") else f" of lists {Path(str(options['lists'])).name}"
        samples = (self.metrics.get("samples") or {}).get(split)
        kind, clusters = self.metrics.get("cluster"), (self.metrics.get("clusters") or {}).get(split)
        parts = [f"{samples:,} images"] if isinstance(samples, int) else []
        if isinstance(clusters, int) and kind != "image":
            parts.append(f"{clusters:,} clusters ({kind})")
        elif kind == "image":
            parts.append("no clusters known")
        return split + of + (f": {', '.join(parts)}" if parts else "")

    @property
    def start(self) -> str:
        """Where the weights come from: "random", "timm ...", a checkpoint's path, or "unknown" of an evaluation."""
        if "initialisation" not in self.metrics and not self.args:  # evaluated somewhere else than it was trained
            return "unknown"
        return str(self.metrics.get("initialisation") or self.args.get("finetune") or "random")

    @property
    def starts_from_file(self) -> bool:
        return self.start not in ("random", "unknown") and not self.start.startswith("timm ")

    @cached_property
    def pretraining(self) -> dict[str, Any] | None:
        """Flags of the pretraining that gave the weights, from args.json beside them.

        None where there is none, or where the weights there are no longer those that this run started from.
        """
        start = Path(self.start)
        file = start.parent / "args.json"
        if not self.starts_from_file or not file.is_file():
            return None
        recorded = self.metrics.get("initialisation_sha256")
        if recorded and start.is_file() and _content(str(start)) != recorded:
            return None
        try:
            content = read_json(file)
        except UserError:  # damaged: the content of the weights has to do
            return None
        return content if isinstance(content, dict) and "mask_ratio" in content else None

    @cached_property
    def start_id(self) -> str:
        """Content of the start: the hash that the run recorded, or of the file, or its path where it has gone."""
        return str(self.metrics.get("initialisation_sha256") or _content(self.start))

    @cached_property
    def origin(self) -> str:
        """What tells starts apart, but for the seed of their pretraining: its recipe, else the weights' content."""
        settings = self.pretraining
        if settings is None:
            return self.start_id
        skipped = IRRELEVANT_ARGS | _NOT_OF_PRETRAINING
        recipe = {key: value for key, value in sorted(settings.items()) if key not in skipped}
        return json.dumps([Path(self.start).name, recipe], default=str)

    @property
    def seed(self) -> int:
        return int(self.metrics.get("seed", self.args.get("seed", 0)))

    @property
    def seeds(self) -> tuple[int, str]:
        """Seed of the run, and of its pretraining ("" where that is not known)."""
        return self.seed, str((self.pretraining or {}).get("seed", ""))

    # ------------------------------------------------------------------------------------ what differs between two runs

    @cached_property
    def data(self) -> dict[str, str]:
        """`DATA_FACTS` of the run, as text that can be compared."""
        content, args = self.metrics, self.args
        data = {name: text_of(content[name]) for name in DATA_FACTS if name in content}
        if "splits" in content:  # hundreds of digits: their own hash is enough to tell and to show
            data["splits"] = hashlib.sha256(json.dumps(content["splits"], sort_keys=True).encode()).hexdigest()[:8]
        elif _given(args.get("data_path")):  # earlier versions did not record names and labels
            data["splits"] = f"{NOT_RECORDED}, data in {Path(args['data_path'])}"
        if "data_options" not in content and args:
            data["data_options"] = text_of({name: args[name] for name in LABEL_ARGS if _given(args.get(name))})
        if data.get("data_options") == "":
            data["data_options"] = "none"
        return data

    @cached_property
    def recipe(self) -> dict[str, str]:
        """The flags that change the result under the run's protocol; empty where args.json is not there."""
        args, content = self.args, self.metrics
        if not args:
            return {}
        used = {name: value for name, value in args.items() if name not in IRRELEVANT_ARGS | FACT_ARGS}
        if "optimizer" in used:
            used["optimizer"] = used["optimizer"] or ("sgd" if self.protocol == "linear" else "adamw")
        if "patch_op" in used:
            used["patch_op"] = used["patch_op"] or "avg"
        if used.get("feature_cache") != "none":  # where features are kept changes nothing, that they are not does
            used.pop("feature_cache", None)
        # what came of --amp and of the number of processes, which args.json does not tell
        used |= {"amp": content["precision"]} if "precision" in content else {}
        used |= {"effective_batch": content["effective_batch"]} if "effective_batch" in content else {}
        unused = _UNUSED_BY.get(self.protocol, frozenset())
        return {name: text_of(value) for name, value in used.items() if name not in unused and _given(value)}

    @cached_property
    def line(self) -> tuple[Any, ...]:
        """What runs of one row of a comparison share: data, encoder and start."""
        pool = self.metrics["pool"] if "pool" in self.metrics else self.args.get("pool")
        facts = (self.model, str(self.metrics.get("head")), str(pool))
        return (self.dataset, facts, self.origin, tuple(sorted(self.data.items())))

    @cached_property
    def setup(self) -> tuple[Any, ...]:
        """Everything but the seeds: runs whose setups are equal are averaged."""
        alone = str(self.path) if self.start == "unknown" else ""  # of such an evaluation nothing more is known
        return (*self.line, self.protocol, tuple(sorted(self.recipe.items())), self.selected, alone)


def _content(start: str) -> str:
    """Hash of a file; what was given where there is no such file."""
    try:
        return hash_of_file(start) if Path(start).is_file() else start
    except OSError:
        return start


def text_of(value: Any) -> str:
    """A value of args.json or metrics.json, as tables show it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text_of(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _given(value: Any) -> bool:
    """Whether a flag was used: one that is off is the same as one that an earlier version did not have."""
    return value is not None and value is not False and value not in ("", [])


# ------------------------------------------------------------------------------------------------------------ reading


def read_run(path: str | Path) -> RunRecord:
    """Read the result of a finished fine-tuning run.

    Args:
        path: its folder, or a metrics.json (or metrics_eval.json).

    Raises:
        UserError: no such folder, a run that has not finished, or a file that is cut short or of something else.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / "metrics.json"
    if not file.is_file() and path.is_dir() and (path / "metrics_eval.json").is_file():
        file = path / "metrics_eval.json"  # --eval with a folder of its own
    if not file.is_file():
        if not path.exists():
            raise UserError(f"{path} does not exist; give output folders of main_finetune.py")
        begun = path.is_dir() and any((path / name).exists() for name in ("args.json", "checkpoint.pth", "log.txt"))
        args = read_settings(path / "args.json") if begun and (path / "args.json").is_file() else {}
        if "mask_ratio" in args:
            raise UserError(
                f"{path} is a run of main_pretrain.py, which has no test result; fine-tune its checkpoint and give "
                "that run (scripts/report.py shows both)"
            )
        why = (
            "the run has not finished; continue it with --resume auto" if begun else "it is no run of main_finetune.py"
        )
        raise UserError(f"{path} has no metrics.json: {why}")
    content = read_metrics(file)
    try:
        if not isinstance(content["results"], dict) or not content["results"]:
            raise KeyError("results")
        beside = file.parent / "args.json"
        args = read_settings(beside) if beside.is_file() else _evaluated_settings(content)
        run = RunRecord(file.parent.resolve().name, file.parent, "finetune", args, [], content, file)
        if "scalars" not in next(iter(content["results"].values()))["test"]:
            raise KeyError("scalars")
        # everything once, so that what is odd is said here and not in a table
        run.scalars, run.setup, run.seeds  # noqa: B018
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{file} is not the result of a finished fine-tuning run ({type(error).__name__}: {error}); give output "
            "folders of main_finetune.py"
        ) from error
    return run


def load_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run of either script, finished or not, with the lines of its epochs.

    Raises:
        UserError: no such folder, no run in it, or no epoch was finished.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"run {path} does not exist; give the --output_dir of main_pretrain.py or main_finetune.py")
    notes: list[str] = []
    if (path / "args.json").is_file():
        args = read_settings(path / "args.json")
    elif (path / "metrics_eval.json").is_file():  # --eval with an --output_dir of its own
        args = _evaluated_settings(read_metrics(path / "metrics_eval.json"))
        if not args:
            notes.append("evaluation without the settings of its training: args.json is not beside the checkpoint")
    else:
        near = sorted(str(one.parent) for one in path.glob("*/args.json"))[:5]
        hint = f"; runs below it: {', '.join(near)}" if near else ""
        raise UserError(f"{path} is no run: args.json is missing; give the --output_dir of a run{hint}")
    epochs: list[dict[str, Any]] = []
    log = path / "log.txt"
    if log.is_file():
        epochs, incomplete = read_epochs(log)
        if incomplete:
            notes.append(f"{incomplete} line(s) of log.txt are incomplete and left out")
    metrics: dict[str, Any] = {}
    file = None
    for name in ("metrics.json", "metrics_eval.json"):
        if (path / name).is_file():
            content = read_metrics(path / name)
            if isinstance(content, dict) and isinstance(content.get("results"), dict):
                metrics, file = content, path / name
                break
            notes.append(f"{name} has no results and is left out")
    if not epochs and not metrics:
        why = "log.txt holds no finished epoch" if log.is_file() else "there is neither log.txt nor metrics.json"
        raise UserError(f"{path}: {why}; wait for the first epoch, or look into run.log for the reason")
    kind = "pretrain" if "mask_ratio" in args else "finetune"
    if kind == "finetune" and not metrics:
        notes.append("metrics.json is missing: the run has not come to its end")
    return RunRecord(path.resolve().name, path, kind, args, epochs, metrics, file, notes)


def _evaluated_settings(content: Any) -> dict[str, Any]:
    """Settings of the run whose checkpoint metrics_eval.json is about; empty where it is not there any more."""
    results = content.get("results") if isinstance(content, dict) else None
    for checkpoint in results if isinstance(results, dict) else ():
        if (Path(checkpoint).parent / "args.json").is_file():
            return read_settings(Path(checkpoint).parent / "args.json")
    return {}


# ---------------------------------------------------------------------------------------------------------- averaging


@dataclass(frozen=True)
class Score:
    """A metric of runs that differ in their seeds alone.

    Attributes:
        mean: over the runs.
        count: how many there are.
        deviation: sample deviation over them; None for a single run.
        low, high: 95 % interval: of the mean over runs (Student's t), of a single run over clusters of its samples;
            None where there is none.
    """

    mean: float
    count: int
    deviation: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        """``0.540 [0.501, 0.579] (3)``; nothing in brackets that is not there."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{ends}" + (f" ({self.count})" if self.count > 1 else "")


INTERVALS = (
    "95 % in brackets: of several runs Student's t over their seeds (their number in parentheses), of one run over "
    "clusters of its test samples."
)
"""What `Score.text` shows, for captions."""


def score_of(values: Sequence[float], own: tuple[float, float] | None = None) -> Score:
    """Mean and interval of one number a run.

    Args:
        values: of the runs, at least one.
        own: interval of a single run.
    """
    if len(values) == 1:
        return Score(values[0], 1, None, *(own or (None, None)))
    from scipy.stats import t

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Score(mean, len(values), deviation, mean - half, mean + half)


def score(runs: Sequence[RunRecord], metric: str) -> Score | None:
    """A metric of runs that were grouped together; None unless all of them have it."""
    if not runs or any(metric not in run.scalars for run in runs):
        return None
    return score_of([run.scalars[metric] for run in runs], runs[0].interval(metric))


def group_runs(runs: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ in seeds alone, together; in the order of the first of each.

    A run with the settings and the seeds of another one is not averaged with it, or it would count twice: it stands
    alone, and its notes say so.
    """
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in runs:
        key = run.setup
        while any(run.seeds == other.seeds for other in groups.get(key, ())):
            twin = groups[key][0] if key != run.setup else next(o for o in groups[key] if o.seeds == run.seeds)
            note = f"has the settings and the seed of {twin.name}; it is not averaged with that run"
            if note not in run.notes:
                run.notes.append(note)
            key = (*key, str(run.path))
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def seed_text(runs: Sequence[RunRecord]) -> str:
    """Seeds of the runs; with those of their pretraining where they are others."""
    seeds = [run.seeds for run in runs]
    if all(before in ("", str(own)) for own, before in seeds) or len({before for _, before in seeds}) == 1:
        return ", ".join(str(own) for own, _ in sorted(seeds))
    return ", ".join(f"{own} (pretraining {before})" for own, before in sorted(seeds))


def start_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Origin of a run -> what its start is called: as little of the path as tells the origins apart.

    Weights whose pretraining differs in the seed alone have one name; one path that was written again between two runs
    has two.
    """
    first: dict[str, RunRecord] = {}
    for run in runs:
        first.setdefault(run.origin, run)
    shown: dict[str, str] = {}
    for parts in range(2, 32):
        shown = {
            origin: str(Path(*Path(run.start).parts[-parts:])) if run.starts_from_file else run.start
            for origin, run in first.items()
        }
        if len(set(shown.values())) == len(shown):
            return shown
    paths = [run.start for run in first.values()]
    for origin, run in first.items():
        if paths.count(run.start) > 1:
            digest = run.start_id[:8] if run.start_id != run.start else "unknown"
            shown[origin] = str(Path(*Path(run.start).parts[-2:])) + f" (content {digest})"
    return shown
