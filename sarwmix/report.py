"""One page about finished runs: what was set, how training went, how good the result is, and the table for a paper.

Reads what main_pretrain.py and main_finetune.py leave in a run's folder: args.json, log.txt, metrics.json,
predictions_test.npz and pictures. Only these files are needed, no checkpoint and no data.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix import pictures
from util.errors import UserError
from util.files import atomic_write, make_directory, read_json, read_jsonl

METRIC_NAMES = {
    "ap_macro": "AP macro", "ap_micro": "AP micro", "f1_macro": "F1 macro", "f1_micro": "F1 micro",
    "precision_macro": "precision macro", "precision_micro": "precision micro", "loss": "loss",
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "roc_auc": "ROC AUC",
    "miou": "mean IoU", "iou": "IoU", "acc": "ACC", "aacc": "aACC", "recall_macro": "recall macro",
}  # fmt: skip
EPOCH_NAMES = {"train_loss": "training loss", "train_lr": "learning rate", "images_per_s": "images/s"}
NOT_A_SETTING = ("output_dir", "log_dir", "port", "dist_url", "world_size")
RECONSTRUCTIONS = 6
"""Reconstruction pictures of a run that the page shows; the others stay in the run's folder."""


@dataclass
class Run:
    """One finished or stopped run.

    Attributes:
        name: Folder name, made unique.
        path: Folder.
        kind: "pretrain" or "finetune".
        args: Settings.
        epochs: Lines of log.txt, by epoch.
        metrics: Content of metrics.json; empty without it.
        notes: What is odd about the files.
    """

    name: str
    path: Path
    kind: str
    args: dict[str, Any]
    epochs: list[dict[str, Any]]
    metrics: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Finished epochs (1, 2, ...) and the values of a key; epochs without a number are left out."""
        pairs = [(line["epoch"] + 1, line[key]) for line in self.epochs if isinstance(line.get(key), (int, float))]
        return np.array([x for x, _ in pairs], dtype=float), np.array([y for _, y in pairs], dtype=float)

    def result(self) -> tuple[str, str, dict[str, Any]] | None:
        """Checkpoint, split and metrics that the tables show: the first rule, on test where it was evaluated."""
        for checkpoint, entry in self.metrics.get("results", {}).items():
            for split in ("test", "val", *entry):
                if isinstance(entry.get(split), dict) and "scalars" in entry[split]:
                    return checkpoint, split, entry[split]
        return None

    def initialisation(self) -> str:
        """Where the weights come from: "random", or the last two parts of the checkpoint's path."""
        start = str(self.metrics.get("initialisation") or self.args.get("finetune") or "random")
        return start if start == "random" else "/".join(Path(start).parts[-2:])


def load_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: No such folder, no run in it, or no epoch was finished.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"run {path} does not exist; give the --output_dir of main_pretrain.py or main_finetune.py")
    if not (path / "args.json").is_file():
        near = sorted(str(one.parent) for one in path.glob("*/args.json"))[:5]
        hint = f"; runs below it: {', '.join(near)}" if near else ""
        raise UserError(f"{path} is no run: args.json is missing; give the --output_dir of a run{hint}")
    args = read_json(path / "args.json")
    if not isinstance(args, dict):
        raise UserError(f"{path / 'args.json'} must hold an object with the settings of a run")
    notes: list[str] = []
    epochs: list[dict[str, Any]] = []
    log = path / "log.txt"
    if log.is_file():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        records = read_jsonl(log)
        if len(records) < len(lines):
            notes.append(f"{len(lines) - len(records)} line(s) of log.txt are incomplete and left out")
        # A resumed run may have written an epoch again: the last line counts.
        by_epoch = {line["epoch"]: line for line in records if isinstance(line.get("epoch"), int)}
        epochs = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    metrics: dict[str, Any] = {}
    for name in ("metrics.json", "metrics_eval.json"):
        if (path / name).is_file():
            content = read_json(path / name)
            if isinstance(content, dict) and isinstance(content.get("results"), dict):
                metrics = content
                break
            notes.append(f"{name} has no results and is left out")
    if not epochs and not metrics:
        why = "log.txt holds no finished epoch" if log.is_file() else "there is neither log.txt nor metrics.json"
        raise UserError(f"{path}: {why}; wait for the first epoch, or look into run.log for the reason")
    kind = "pretrain" if "mask_ratio" in args else "finetune"
    if kind == "finetune" and not metrics:
        notes.append("metrics.json is missing: the run has not come to its end")
    return Run(path.resolve().name, path, kind, args, epochs, metrics, notes)


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several runs and give them names of their own."""
    runs = [load_run(folder) for folder in folders]
    seen = [run.path.resolve() for run in runs]
    for path in seen:
        if seen.count(path) > 1:
            raise UserError(f"run {path} is given twice")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.path.resolve().parts[-2:])
    for number, run in enumerate(runs):
        if [one.name for one in runs].count(run.name) > 1:
            run.name = f"{run.name} ({number + 1})"
    return runs


# Figures ---------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A PNG on the page."""

    path: Path
    caption: str


def _marks(runs: Sequence[Run]) -> dict[str, float]:
    """Powers of two, the end of warm-up and the cut, as vertical lines."""
    last = max((line["epoch"] + 1 for run in runs for line in run.epochs), default=0)
    marks: dict[str, float] = {}
    power = 4
    while power <= last:
        marks[str(power)] = power
        power *= 2
    for run in runs:
        warmup, cut = run.args.get("warmup_epochs"), run.args.get("stop_epoch")
        if isinstance(warmup, (int, float)) and 0 < warmup <= last:
            marks[f"warm-up ends ({warmup:g})"] = warmup
        if isinstance(cut, (int, float)) and cut <= last:
            marks[f"cut ({cut:g})"] = cut
    for text in [text for text in marks if text.isdigit()]:
        if sum(place == marks[text] for place in marks.values()) > 1:
            del marks[text]
    return marks


def training_figure(runs: Sequence[Run], path: Path, *, title: str) -> Picture | None:
    """Loss, learning rate, throughput and, of fine-tuning, what selects the epoch."""
    keys = ["train_loss"]
    keys += [key for key in ("val_ap_macro", "val_f1_macro", "val_accuracy", "val_miou", "test_miou", "val_iou",
                             "test_iou", "val_aacc", "test_aacc")
             if any(len(run.column(key)[0]) for run in runs)]  # fmt: skip
    keys += ["train_lr", "images_per_s"]
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key in keys:
        split, _, metric = key.partition("_")
        label = EPOCH_NAMES.get(key) or f"{METRIC_NAMES.get(metric, key)} on {split}"
        curves = {run.name: run.column(key) for run in runs if len(run.column(key)[0])}
        if curves:
            panels[label] = curves
    if not panels:
        return None
    pictures.curves_figure(path, panels=panels, x_label="finished epochs", title=title, marks=_marks(runs))
    caption = "Dotted lines: powers of two, the end of warm-up, and the cut where there is one."
    weighting = {json.dumps([value for key, value in sorted(run.args.items()) if key.startswith("weight_")
                             and key != "weight_decay"]) for run in runs}  # fmt: skip
    if len(weighting) > 1:
        caption += " The runs weight the loss in different ways, so that the heights of their losses do not compare."
    return Picture(path, caption)


def class_figure(runs: Sequence[Run], path: Path) -> Picture | None:
    """Average precision of each class of up to four runs of the same classes."""
    rows: dict[str, list[dict[str, Any]]] = {}
    split = ""
    for run in runs:
        found = run.result()
        if found and found[2].get("per_class") and "ap" in found[2]["per_class"][0]:
            names = [row["class"] for row in found[2]["per_class"]]
            if not rows or names == [row["class"] for row in next(iter(rows.values()))]:
                rows[run.name] = found[2]["per_class"]
                split = found[1]
    shown = dict(list(rows.items())[:4])
    if not shown:
        return None
    labels = [f"{row['class']} ({row['support']:,})" for row in next(iter(shown.values()))]
    values = {name: [np.nan if row["ap"] is None else row["ap"] for row in per_class]
              for name, per_class in shown.items()}  # fmt: skip
    pictures.bar_figure(path, labels=labels, values=values, unit="average precision",
                        title=f"Average precision of each class on {split} (number of positives)")  # fmt: skip
    left = len(rows) - len(shown)
    return Picture(path, f"{left} more run(s) are in the table." if left else "")


def prediction_figures(run: Run, folder: Path, slug: str) -> list[Picture]:
    """Precision-recall, ROC and confusion of a run that kept its predictions."""
    file = run.path / "predictions_test.npz"
    classes = run.metrics.get("classes")
    if not file.is_file() or not classes:
        return []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            scores, target = np.asarray(arrays["scores"], dtype=float), np.asarray(arrays["target"])
    except (OSError, ValueError, KeyError) as error:
        run.notes.append(f"{file.name} cannot be read and is left out: {error}")
        return []
    if scores.ndim == 1:  # probability of the second of two classes
        scores = np.stack([1 - scores, scores], axis=1)
    if scores.shape[1] != len(classes) or len(scores) != len(target):
        run.notes.append(f"{file.name} does not fit the {len(classes)} classes of metrics.json and is left out")
        return []
    several = target.ndim == 2
    predicted = scores > 0.5 if several else scores.argmax(axis=1)
    heading = f"{run.name}: {{}} on {len(target):,} test samples"
    return [
        Picture(pictures.precision_recall_figure(folder / f"{slug}_precision_recall.png", target, scores, classes,
                                                 title=heading.format("precision and recall")), ""),
        Picture(pictures.roc_figure(folder / f"{slug}_roc.png", target, scores, classes,
                                    title=heading.format("receiver operating characteristic")), ""),
        Picture(pictures.confusion_matrix_figure(folder / f"{slug}_confusion.png", target, predicted, classes,
                                                 title=heading.format("confusion")),
                "Row: of the samples that have this class, the share for which each class is predicted (threshold 0.5)."
                if several else ""),
    ]  # fmt: skip


def transfer_figures(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Fine-tuned result against the epoch of pretraining, and against the share of labels."""
    written: list[Picture] = []
    by_epoch: dict[str, list[tuple[float, float]]] = {}
    by_share: dict[str, list[tuple[float, float]]] = {}
    flat: dict[str, float] = {}
    unit = ""
    for run in runs:
        found = run.result()
        if found is None:
            continue
        metric = next(iter(found[2]["scalars"]))
        value, unit = float(found[2]["scalars"][metric]), f"{METRIC_NAMES.get(metric, metric)} on {found[1]}"
        protocol = str(run.metrics.get("protocol", "fine-tuning"))
        share = float(run.metrics.get("train_frac") or 1.0)
        start = run.initialisation()
        number = re.fullmatch(r"(.*)/checkpoint_(\d+)\.pth", start)
        labels = "" if share == 1 else f", {100 * share:g} % of labels"
        if number:
            by_epoch.setdefault(f"{number[1]} ({protocol}{labels})", []).append((float(number[2]), value))
        elif start == "random":
            flat[f"random initialisation ({protocol}{labels})"] = value
        by_share.setdefault(f"{start} ({protocol})", []).append((100 * share, value))
    grown = {name: points for name, points in by_epoch.items() if len({x for x, _ in points}) > 1}
    if grown:
        ends = [x for points in grown.values() for x, _ in points]
        curves = {name: _means(points) for name, points in grown.items()}
        curves |= {name: (np.array([min(ends), max(ends)]), np.array([value, value])) for name, value in flat.items()}
        path = folder / "pretraining_epochs.png"
        pictures.curves_figure(path, panels={unit: curves}, x_label="epochs of pretraining",
                               title="Result against the length of pretraining")  # fmt: skip
        written.append(Picture(path, "Several seeds of one point are averaged."))
    shares = {name: _means(points) for name, points in by_share.items() if len({x for x, _ in points}) > 1}
    if shares:
        path = folder / "label_fractions.png"
        pictures.curves_figure(path, panels={unit: shares}, x_label="share of the training labels (%)",
                               title="Result against the share of labels")  # fmt: skip
        written.append(Picture(path, "Several seeds of one point are averaged."))
    return written


def _means(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    places = sorted({x for x, _ in points})
    return np.array(places), np.array([np.mean([y for x, y in points if x == place]) for place in places])


# Tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A metric with its 95 % interval, as a fraction of 1."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table for a paper: a run, or the mean of runs that differ in the seed alone."""

    setting: tuple[str, ...]
    cells: Mapping[str, Cell]


COLUMNS = ("run", "data", "protocol", "initial weights", "labels", "seeds")


def paper_rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs that differ only in the seed.

    One run: its bootstrap interval, where it has one. Several: mean and 95 % interval of Student's t over the seeds.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.result() is not None:
            facts = run.metrics
            key: tuple[str, ...] = (str(facts.get("dataset", "")), str(facts.get("protocol", "")), run.initialisation(),
                   f"{100 * float(facts.get('train_frac') or 1.0):g} %", _other_settings(run))  # fmt: skip
            groups.setdefault(key, []).append(run)
    rows = []
    for key, members in groups.items():
        results = [found[2] for run in members if (found := run.result()) is not None]
        seeds = ", ".join(str(run.metrics.get("seed", run.args.get("seed", "?"))) for run in members)
        name = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more"
        cells = {}
        for metric in results[0]["scalars"]:
            values = [float(one["scalars"][metric]) for one in results if one["scalars"].get(metric) is not None]
            if metric != "loss" and len(values) == len(results):
                interval = results[0].get("intervals_95", {}).get(metric) if len(results) == 1 else _t_interval(values)
                cells[metric] = Cell(float(np.mean(values)), *(interval or (None, None)))
        rows.append(Row((name, *key[:4], seeds), cells))
    return rows


def _other_settings(run: Run) -> str:
    """All settings but the seed and places, so that only repetitions are averaged."""
    skipped = (*NOT_A_SETTING, "seed", "finetune", "feature_cache")
    return json.dumps({key: value for key, value in sorted(run.args.items()) if key not in skipped}, default=str)


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, metrics in percent with their 95 % intervals."""
    metrics = _metric_names(rows)
    head = [*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(COLUMNS) + "---:|" * len(metrics)]
    for row in rows:
        cells = [_percent(row.cells.get(name), " [{low:.2f}, {high:.2f}]") for name in metrics]
        lines.append("| " + " | ".join([*(text.replace("|", r"\|") for text in row.setting), *cells]) + " |")
    return "\n".join(lines) + "\n"


def latex_table(rows: Sequence[Row]) -> str:
    """The table in LaTeX (booktabs), metrics in percent; the interval's ends stand below the value."""
    metrics = _metric_names(rows)
    head = [*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)]
    lines = [r"\begin{tabular}{" + "l" * len(COLUMNS) + "r" * len(metrics) + "}", r"\toprule",
             " & ".join(_tex(text) for text in head) + r" \\", r"\midrule"]  # fmt: skip
    for row in rows:
        lines.append(" & ".join([*(_tex(text) for text in row.setting),
                                 *(_percent(row.cells.get(name), "") for name in metrics)]) + r" \\")  # fmt: skip
        if any(cell.low is not None for cell in row.cells.values()):
            ends = [_tex(_ends(row.cells.get(name))) for name in metrics]
            lines.append(" & ".join([*("" for _ in COLUMNS), *(rf"{{\scriptsize {end}}}" for end in ends)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _percent(cell: Cell | None, interval: str) -> str:
    if cell is None:
        return "-"
    text = f"{100 * cell.value:.2f}"
    if cell.low is not None and cell.high is not None and interval:
        text += interval.format(low=100 * cell.low, high=100 * cell.high)
    return text


def _ends(cell: Cell | None) -> str:
    if cell is None or cell.low is None or cell.high is None:
        return ""
    return f"[{100 * cell.low:.2f}, {100 * cell.high:.2f}]"


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


# Page ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 68rem;
       padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
nav a { display: inline-block; margin: .15rem .9rem .15rem 0; }
a { color: #0055a4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: max-content; }
th, td { max-width: 24rem; border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; } td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.differs td:first-child::after { content: " *"; color: #b00; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid #e5e5e5; box-sizing: border-box; }
/* On a phone a figure keeps a readable size and is scrolled sideways. */
@media (max-width: 44rem) { figure img { max-width: none; width: 44rem; } }
figcaption, .note { font-size: .85rem; color: #555; }
.warning { border-left: .3rem solid #d55e00; padding: .3rem .7rem; background: #fff6ef; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; }
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0, marked: Sequence[bool] = ()) -> str:
    """An HTML table; the last `numbers` columns are right-aligned; `marked` rows get a star."""
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = []
    for number, row in enumerate(rows):
        columns = "".join(
            f'<td class="number">{html.escape(text)}</td>' if place >= len(row) - numbers
            else f"<td>{html.escape(text)}</td>" for place, text in enumerate(row))  # fmt: skip
        style = ' class="differs"' if number < len(marked) and marked[number] else ""
        body.append(f"<tr{style}>{columns}</tr>")
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _figure(picture: Picture, alt: str) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll">{image}</div>{caption}</figure>'


def _seconds(value: float) -> str:
    hours, rest = divmod(round(value), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _overview(runs: Sequence[Run]) -> str:
    head = ("run", "kind", "data", "model", "initial weights", "epochs", "last loss", "images/s", "training time",
            "result")  # fmt: skip
    rows = []
    for run in runs:
        losses, speed = run.column("train_loss")[1], run.column("images_per_s")[1]
        seconds = run.metrics.get("training_seconds") or run.column("seconds")[1].sum()
        found = run.result()
        result = ""
        if found:
            metric, value = next(iter(found[2]["scalars"].items()))
            result = f"{METRIC_NAMES.get(metric, metric)} {100 * value:.2f} % on {found[1]}"
        kind = run.kind if run.kind == "pretrain" else str(run.metrics.get("protocol", "fine-tuning"))
        planned = run.args.get("stop_epoch") or run.args.get("epochs")
        done = run.epochs[-1]["epoch"] + 1 if run.epochs else 0
        rows.append((run.name, kind, str(run.args.get("dataset", "")), str(run.args.get("model", "")),
                     run.initialisation(), f"{done} of {planned}", f"{losses[-1]:.4f}" if len(losses) else "",
                     f"{np.median(speed):.1f}" if len(speed) else "", _seconds(float(seconds)), result))  # fmt: skip
    return _table(head, rows)


def _settings(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.args))

    def text(run: Run, key: str) -> str:
        value = run.args.get(key, "")
        return "" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)

    rows, marked = [], []
    for key in keys:
        values = [text(run, key) for run in runs]
        rows.append((key, *values))
        marked.append(len(set(values)) > 1)
    order = sorted(range(len(rows)), key=lambda number: (not marked[number], rows[number][0]))
    head = ("setting", *(run.name for run in runs))
    table = _table(head, [rows[number] for number in order], marked=[marked[number] for number in order])
    note = '<p class="note">* differs between the runs; these come first.</p>' if len(runs) > 1 else ""
    return note + table


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_") or "run"


def write_report(folders: Sequence[str | Path], out: str | Path, *, title: str = "Training report") -> Path:
    """Write `report.html`, the figures, and the table as table.md and table.tex.

    Args:
        folders: Folders of the runs.
        out: Folder to write to.
        title: Heading of the page.

    Returns:
        The page.

    Raises:
        UserError: A run is missing or empty, or a file cannot be written.
    """
    runs = load_runs(folders)
    target = make_directory(out)
    figures = make_directory(target / "figures")
    pretrained = [run for run in runs if run.kind == "pretrain"]
    tuned = [run for run in runs if run.kind == "finetune"]
    sections: list[tuple[str, str, str]] = []  # anchor, heading, content

    def add(heading: str, content: str) -> None:
        if content:
            sections.append((_slug(heading).lower(), heading, content))

    rows = paper_rows(tuned)
    curves = ""
    for name, group in (("Pretraining", pretrained), ("Fine-tuning", tuned)):
        drawn = training_figure(group, figures / f"{_slug(name).lower()}_curves.png", title=f"{name}: each epoch")
        curves += _figure(drawn, f"{name}: curves") if drawn else ""
    results = ""
    if rows:
        metrics = _metric_names(rows)
        results += _table((*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)),
                          [(*row.setting, *(_percent(row.cells.get(name), " [{low:.2f}, {high:.2f}]")
                                            for name in metrics)) for row in rows], numbers=len(metrics))  # fmt: skip
        results += ('<p class="note">Percent. Intervals are 95 %: bootstrap of the test samples for one run, '
                    "Student's t over seeds for several. Without an interval, neither was there.</p>")  # fmt: skip
    per_class = class_figure(tuned, figures / "average_precision.png")
    results += _figure(per_class, "Average precision of each class") if per_class else ""
    transfer = "".join(_figure(one, one.path.stem) for one in transfer_figures(tuned, figures))
    details = ""
    for run in tuned:
        drawn_all = prediction_figures(run, figures, _slug(run.name))
        if drawn_all:
            details += f"<h3>{html.escape(run.name)}</h3>"
            details += "".join(_figure(one, f"{run.name}: {one.path.stem}") for one in drawn_all)
    panels = ""
    for run in pretrained:
        found = sorted((run.path / "reconstructions").glob("*.png"))
        if found:
            panels += f"<h3>{html.escape(run.name)}</h3>"
            panels += "".join(_figure(Picture(path, path.name), f"{run.name}: reconstruction")
                              for path in found[:RECONSTRUCTIONS])  # fmt: skip
            if len(found) > RECONSTRUCTIONS:
                place = html.escape(str(found[0].parent))
                panels += f'<p class="note">{len(found) - RECONSTRUCTIONS} more are in {place}.</p>'
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]  # after everything was read

    add("Overview", _overview(runs) + "".join(f'<p class="warning">{html.escape(note)}</p>' for note in notes))
    add("Curves", curves)
    add("Results", results)
    add("Transfer", transfer)
    add("Reconstructions and weight maps", panels)
    add("Precision, recall, confusion", details)
    add("Settings", _settings(runs))
    if rows:
        markdown, latex = markdown_table(rows), latex_table(rows)
        add("Table for a paper", f"<h3>Markdown</h3><pre>{html.escape(markdown)}</pre>"
                                 f"<h3>LaTeX (booktabs)</h3><pre>{html.escape(latex)}</pre>")  # fmt: skip
        for name, text in (("table.md", markdown), ("table.tex", latex)):
            with atomic_write(target / name, "w") as stream:
                stream.write(text)
    links = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(f'<section><h2 id="{anchor}">{html.escape(heading)}</h2>{content}</section>'
                   for anchor, heading, content in sections)  # fmt: skip
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><h1>{html.escape(title)}</h1><nav>{links}</nav>{body}</body></html>\n")  # fmt: skip
    with atomic_write(target / "report.html", "w") as stream:
        stream.write(page)
    return target / "report.html"
