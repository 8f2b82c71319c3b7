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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.figures import base as pictures
from sarwmix.reports.run import (
    INTERVALS,
    IRRELEVANT_ARGS,
    MAIN_METRICS,
    RunRecord,
    Score,
    group_runs,
    load_run,
    score,
    seed_text,
    start_names,
)
from util.arrays import load_npz
from util.errors import UserError
from util.files import atomic_write, make_directory
from util.text import tex

METRIC_NAMES = {
    "ap_macro": "AP macro", "ap_micro": "AP micro", "f1_macro": "F1 macro", "f1_micro": "F1 micro",
    "precision_macro": "precision macro", "precision_micro": "precision micro", "loss": "loss",
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "roc_auc": "ROC AUC",
    "miou": "mean IoU", "iou": "IoU", "acc": "ACC", "aacc": "aACC", "recall_macro": "recall macro",
    "f1": "F1", "precision": "precision", "recall": "recall",
}  # fmt: skip
CURVES = ("ap_macro", "f1_macro", "accuracy", "acc", "aacc", "f1", "miou", "iou")
"""Metrics that are drawn against the epoch, of val and of test, where log.txt has them."""
EPOCH_NAMES = {"train_loss": "training loss", "train_lr": "learning rate"}
OWN_FIGURES = re.compile(
    r"((pretraining|fine-tuning.*)_curves|average_precision|(pretraining_epochs|label_fractions)"
    r"|.+_(precision_recall|roc|confusion))\.png"
)
"""Names that the page's figures have, so that those of a former page can be told from other files."""
RECONSTRUCTIONS = 6
"""Reconstruction pictures of a run that the page shows; the others stay in the run's folder."""


def load_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
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


def _marks(runs: Sequence[RunRecord]) -> dict[str, float]:
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


def _rate_unit(run: RunRecord) -> str:
    """What a run counts in a second: probes of whole images train on cached features."""
    cached = run.protocol.split(" ")[0] in ("linear", "frozen", "knn") and run.metrics.get("task") != "segmentation"
    return "cached features/s" if cached and run.kind == "finetune" else "images/s"


def training_figure(runs: Sequence[RunRecord], path: Path, *, title: str) -> Picture | None:
    """Loss, learning rate, throughput and, of fine-tuning, what selects the epoch."""
    keys = ["train_loss", *(f"{split}_{name}" for name in CURVES for split in ("val", "test")), "train_lr"]  # fmt: skip
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key in keys:
        split, _, metric = key.partition("_")
        label = EPOCH_NAMES.get(key) or f"{METRIC_NAMES.get(metric, key)} on {split}"
        curves = {run.name: run.column(key) for run in runs if len(run.column(key)[0])}
        if curves:
            panels[label] = curves
    for run in runs:  # rates of images and of cached features differ a thousandfold
        if len(run.column("images_per_s")[0]):
            panels.setdefault(_rate_unit(run), {})[run.name] = run.column("images_per_s")
    if not panels:
        return None
    pictures.curves_figure(path, panels=panels, x_label="finished epochs", title=title, marks=_marks(runs))
    caption = "Dotted lines: powers of two, the end of warm-up, and the cut where there is one."
    weighting = {json.dumps([value for key, value in sorted(run.args.items()) if key.startswith("weight_")
                             and key != "weight_decay"]) for run in runs}  # fmt: skip
    if len(weighting) > 1:
        caption += " The runs weight the loss in different ways, so that the heights of their losses do not compare."
    return Picture(path, caption)


def class_figure(runs: Sequence[RunRecord], path: Path) -> Picture | None:
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


def prediction_figures(run: RunRecord, folder: Path, slug: str) -> list[Picture]:
    """Precision-recall, ROC and confusion of a run that kept its predictions."""
    file = run.path / "predictions_test.npz"
    classes = run.metrics.get("classes")
    if not file.is_file() or not classes:
        return []
    try:
        arrays = load_npz(file)
        if "confusion" in arrays:  # label maps: counted for each sample
            counts = np.asarray(arrays["confusion"]).sum(axis=0)
            return _pixel_confusion(run, folder / f"{slug}_confusion.png", counts, classes)
        scores, target = np.asarray(arrays["scores"], dtype=float), np.asarray(arrays["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.notes.append(f"{file.name} cannot be read and is left out (damaged or cut short?): {error}")
        return []
    if scores.ndim == 1:  # probability of the second of two classes
        scores = np.stack([1 - scores, scores], axis=1)
    count = len(classes)
    fits = target.ndim in (1, 2) and scores.shape == (len(target), count) and target.shape[1:] in ((), (count,))
    numbers = target.dtype.kind in "iub" and bool(np.isfinite(scores).all())
    if not (fits and numbers and 0 <= target.min(initial=0) <= target.max(initial=0) < max(count, 2)):
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


def _pixel_confusion(run: RunRecord, path: Path, counts: np.ndarray, classes: Sequence[str]) -> list[Picture]:
    """Confusion of the pixels of label maps."""
    if counts.shape != (len(classes), len(classes)):
        run.notes.append(f"predictions_test.npz does not fit the {len(classes)} classes of metrics.json; left out")
        return []
    title = f"{run.name}: confusion on {int(counts.sum()):,} test pixels"
    return [Picture(pictures.confusion_counts_figure(path, counts, classes, unit="pixels", title=title), "")]


def transfer_figures(runs: Sequence[RunRecord], folder: Path) -> list[Picture]:
    """Fine-tuned result against the epoch of pretraining, and against the share of labels.

    A curve joins runs that differ in that place and in seeds alone; another recipe is another curve.
    """
    # Panel (data set, metric and split) -> curve -> points. Nothing else goes into one curve.
    by_epoch: dict[str, dict[str, list[tuple[float, float]]]] = {}
    by_share: dict[str, dict[str, list[tuple[float, float]]]] = {}
    flat: dict[str, dict[str, list[float]]] = {}
    starts = start_names(runs)
    several = len({run.dataset for run in runs}) > 1
    models = len({run.model for run in runs}) > 1
    recipes: dict[str, list[Any]] = {}  # of each curve's name

    def curve(name: str, run: RunRecord, without: str) -> str:
        """The name, with a number where runs of another recipe or on other data have it already."""
        data = tuple(sorted((key, value) for key, value in run.data.items() if key not in (without, "samples")))
        key = (data, tuple(sorted(run.recipe.items())), run.selected)
        known = recipes.setdefault(name, [])
        if key not in known:
            known.append(key)
        number = known.index(key)
        return name if number == 0 else f"{name}, other settings {number}"

    for run in runs:
        found = run.result()
        metric, value = next(iter(run.scalars.items()), ("", 0.0))
        if found is None or not metric:
            continue
        panel = f"{run.dataset}: " * several + f"{METRIC_NAMES.get(metric, metric)} on {found[1]}"
        model = f"{run.model}, " * models
        share = float(run.metrics.get("train_frac") or 1.0)
        start = starts[run.origin]
        number = re.fullmatch(r"(.*)/checkpoint_(\d+)\.pth", start)
        labels = "" if share == 1 else f", {100 * share:g} % of labels"
        if number:
            name = curve(f"{number[1]} ({model}{run.protocol}{labels})", run, "")
            by_epoch.setdefault(panel, {}).setdefault(name, []).append((float(number[2]), value))
        elif start == "random":
            name = curve(f"random initialisation ({model}{run.protocol}{labels})", run, "")
            flat.setdefault(panel, {}).setdefault(name, []).append(value)
        name = curve(f"{start} ({model}{run.protocol})", run, "train_frac")
        by_share.setdefault(panel, {}).setdefault(name, []).append((100 * share, value))
    written: list[Picture] = []
    grown = _curves(by_epoch)
    if grown:
        places = sorted({float(x) for curves in grown.values() for xs, _ in curves.values() for x in xs})
        ends = np.array([places[0], places[-1]])
        for panel, curves in grown.items():
            curves |= {name: (ends, np.full(2, np.mean(values))) for name, values in flat.get(panel, {}).items()}
        path = folder / "pretraining_epochs.png"
        pictures.curves_figure(path, panels=grown, x_label="epochs of pretraining",
                               title="Result against the length of pretraining",
                               ticks=places if len(places) <= 9 else None)  # fmt: skip
        written.append(Picture(path, "Several seeds of one point are averaged."))
    shares = _curves(by_share)
    if shares:
        path = folder / "label_fractions.png"
        places = sorted({float(x) for curves in shares.values() for xs, _ in curves.values() for x in xs})
        pictures.curves_figure(path, panels=shares, x_label="share of the training labels (%)",
                               title="Result against the share of labels", ticks=places)  # fmt: skip
        written.append(Picture(path, "Several seeds of one point are averaged."))
    return written


def _curves(
    panels: Mapping[str, Mapping[str, list[tuple[float, float]]]],
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Points -> curves; those at one place alone are left out."""
    found = {panel: {name: _means(points) for name, points in curves.items() if len({x for x, _ in points}) > 1}
             for panel, curves in panels.items()}  # fmt: skip
    return {panel: curves for panel, curves in found.items() if curves}


def _means(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    places = sorted({x for x, _ in points})
    return np.array(places), np.array([np.mean([y for x, y in points if x == place]) for place in places])


# Tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table for a paper: a run, or the mean of runs that differ in seeds alone."""

    setting: tuple[str, ...]
    cells: Mapping[str, Score]


COLUMNS = ("run", "data", "model", "protocol", "initial weights", "labels", "seeds", "best epoch by", "tested on")


def paper_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """A line for each group of runs that differ in seeds alone (`sarwmix.reports.run.group_runs`)."""
    rows, starts = [], start_names(runs)
    for members in group_runs([run for run in runs if run.result() is not None]):
        run = members[0]
        name = run.name if len(members) == 1 else f"{run.name} and {len(members) - 1} more"
        others = len({one.start for one in members}) - 1
        weights = starts[run.origin] + (f" and {others} more" if others else "")
        share = f"{100 * float(run.metrics.get('train_frac') or 1.0):g} %"
        cells = {metric: found for metric in run.scalars if (found := score(members, metric)) is not None}
        setting = (name, run.dataset, run.encoder, run.protocol, weights, share, seed_text(members), run.selected,
                   run.tested)  # fmt: skip
        rows.append(Row(setting, cells))
    return rows


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown; metrics as fractions of 1 with their 95 % intervals."""
    metrics = _metric_names(rows)
    head = [*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(COLUMNS) + "---:|" * len(metrics)]
    for row in rows:
        cells = [_score(row, name) for name in metrics]
        lines.append("| " + " | ".join([*(text.replace("|", r"\|") for text in row.setting), *cells]) + " |")
    return "\n".join(lines) + "\n"


def latex_table(rows: Sequence[Row]) -> str:
    """The table in LaTeX (booktabs); the interval's ends stand below the value."""
    metrics = _metric_names(rows)
    head = [*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)]
    lines = [r"\begin{tabular}{" + "l" * len(COLUMNS) + "r" * len(metrics) + "}", r"\toprule",
             " & ".join(tex(text) for text in head) + r" \\", r"\midrule"]  # fmt: skip
    for row in rows:
        values, ends = [], []
        for name in metrics:
            found = row.cells.get(name)
            text, _, rest = found.text().partition(" [") if found else ("-", "", "")
            values.append(text)
            ends.append(f"[{rest.split(']')[0]}]" if rest else "")
        lines.append(" & ".join([*(tex(text) for text in row.setting), *values]) + r" \\")
        if any(ends):
            ends = [rf"{{\scriptsize {tex(end)}}}" for end in ends]
            lines.append(" & ".join([*("" for _ in COLUMNS), *ends]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _score(row: Row, metric: str) -> str:
    found = row.cells.get(metric)
    return "-" if found is None else found.text()


# Page ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 76rem;
       padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
nav a { display: inline-block; margin: .15rem .9rem .15rem 0; }
a { color: #0055a4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { max-width: 24rem; border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; } td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.differs td:first-child::after { content: " *"; color: #b00; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid #e5e5e5; box-sizing: border-box; }
/* A click shows a figure in its own size, scrolled sideways. */
.zoom input { position: absolute; opacity: 0; } .zoom input:checked + img { max-width: none; }
/* On a phone a row of a table is a card: each value beside the name of its column. */
@media (max-width: 44rem) {
  thead { display: none; } table, tbody, tr, td { display: block; max-width: none; }
  tr { border-bottom: 2px solid #aaa; padding: .3rem 0; } td { border: 0; padding: .1rem 0; }
  td::before { content: attr(data-head) ": "; color: #555; } td.number { text-align: left; white-space: normal; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
figcaption, .note { font-size: .85rem; color: #555; }
.warning { border-left: .3rem solid #d55e00; padding: .3rem .7rem; background: #fff6ef; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; }
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0, marked: Sequence[bool] = ()) -> str:
    """An HTML table; the last `numbers` columns are right-aligned; `marked` rows get a star."""
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = []
    for number, row in enumerate(rows):
        columns = ""
        for place, text in enumerate(row):
            kind = ' class="number"' if place >= len(row) - numbers else ""
            columns += f'<td{kind} data-head="{html.escape(head[place])}">{html.escape(text)}</td>'
        style = ' class="differs"' if number < len(marked) and marked[number] else ""
        body.append(f"<tr{style}>{columns}</tr>")
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _figure(picture: Picture, alt: str) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    image = f'<label class="zoom" title="click: own size"><input type="checkbox">{image}</label>'
    return f'<figure><div class="scroll">{image}</div>{caption}</figure>'


def _seconds(value: float) -> str:
    hours, rest = divmod(round(value), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _overview(runs: Sequence[RunRecord]) -> str:
    head = ("run", "kind", "data", "model", "initial weights", "epochs", "last loss", "rate", "training time",
            "result")  # fmt: skip
    rows, starts = [], start_names(runs)
    for run in runs:
        losses, speed = run.column("train_loss")[1], run.column("images_per_s")[1]
        seconds = run.metrics.get("training_seconds") or run.column("seconds")[1].sum()
        found = run.result()
        result = ""
        if found and run.scalars:
            # what chose the epoch, else what tables of its kind lead with
            chosen = (run.metrics.get("selected_on") or {}).get("rule")
            metric = next(name for name in (chosen, *MAIN_METRICS, *run.scalars) if name in run.scalars)
            result = f"{METRIC_NAMES.get(metric, metric)} {run.scalars[metric]:.3f} on {found[1]}"
        rate = f"{np.median(speed):.1f} {_rate_unit(run)}" if len(speed) else ""
        kind = run.kind if run.kind == "pretrain" else str(run.metrics.get("protocol", "fine-tuning"))
        planned = run.args.get("stop_epoch") or run.args.get("epochs")
        done = run.epochs[-1]["epoch"] + 1 if run.epochs else 0
        # Neighbours and L-BFGS finish without epochs, an evaluation has none.
        epochs = "none" if run.metrics and not done else f"{done} of {planned}"
        rows.append((run.name, kind, str(run.args.get("dataset", "")), str(run.args.get("model", "")),
                     starts[run.origin], epochs, f"{losses[-1]:.4f}" if len(losses) else "",
                     rate, _seconds(float(seconds)), result))  # fmt: skip
    return _table(head, rows)


def _settings(runs: Sequence[RunRecord]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.args))

    def text(run: RunRecord, key: str) -> str:
        value = run.args.get(key, "-")
        return "" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)

    rows, marked = [], []
    for key in keys:
        rows.append((key, *(text(run, key) for run in runs)))
        # A flag that the other script lacks is no difference, and places differ always.
        matters = key == "seed" or key not in IRRELEVANT_ARGS
        marked.append(matters and len({text(run, key) for run in runs if key in run.args}) > 1)
    order = sorted(range(len(rows)), key=lambda number: (not marked[number], rows[number][0]))
    head = ("setting", *(run.name for run in runs))
    table = _table(head, [rows[number] for number in order], marked=[marked[number] for number in order])
    note = (
        ('<p class="note">* differs between the runs that have it; these come first. -: the run has no such flag.</p>')
        if len(runs) > 1
        else ""
    )
    return note + table


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_") or "run"


def _remove_former(target: Path) -> None:
    """Take away tables and figures of a page written here before: beside a new page they would pass for its own."""
    if not (target / "report.html").is_file():
        return
    old = [target / "table.md", target / "table.tex"]
    old += [path for path in (target / "figures").glob("*.png") if OWN_FIGURES.fullmatch(path.name)]
    for path in old:
        path.unlink(missing_ok=True)


def write_report(folders: Sequence[str | Path], out: str | Path, *, title: str = "Training report") -> Path:
    """Write `report.html`, the figures, and the table as table.md and table.tex.

    Args:
        folders: Folders of the runs.
        out: Folder to write to.
        title: Heading of the page.

    Returns:
        The page. Tables and figures of a page that `out` held before are removed.

    Raises:
        UserError: A run is missing or empty, or a file cannot be written.
    """
    runs = load_runs(folders)
    target = make_directory(out)
    figures = make_directory(target / "figures")
    _remove_former(target)
    pretrained = [run for run in runs if run.kind == "pretrain"]
    tuned = [run for run in runs if run.kind == "finetune"]
    sections: list[tuple[str, str, str]] = []  # anchor, heading, content

    def add(heading: str, content: str) -> None:
        if content:
            sections.append((_slug(heading).lower(), heading, content))

    rows = paper_rows(tuned)
    curves = ""
    kinds = {run.dataset: [one for one in tuned if one.dataset == run.dataset] for run in tuned}
    groups = [("Pretraining", pretrained)]
    groups += [("Fine-tuning" + (f" {name}" if len(kinds) > 1 else ""), group) for name, group in kinds.items()]
    for name, group in groups:
        drawn = training_figure(group, figures / f"{_slug(name).lower()}_curves.png", title=f"{name}: each epoch")
        curves += _figure(drawn, f"{name}: curves") if drawn else ""
    results = ""
    if rows:
        of_kind: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:  # a table for each set of metrics: no column that half of the rows leave empty
            of_kind.setdefault(tuple(row.cells), []).append(row)
        for metrics, alike in of_kind.items():
            results += _table((*COLUMNS, *(METRIC_NAMES.get(name, name) for name in metrics)),
                              [(*row.setting, *(_score(row, name) for name in metrics)) for row in alike],
                              numbers=len(metrics))  # fmt: skip
        results += f'<p class="note">Fractions of 1. {html.escape(INTERVALS)}</p>'
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
