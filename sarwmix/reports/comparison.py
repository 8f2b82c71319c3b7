"""Finished runs as one table: encoders x data sets x protocols, like for like, published numbers beside them.

Runs that differ in nothing but seeds are averaged (`sarwmix.reports.run`). Runs of one data set whose data differ
(samples, labels, options, statistics, bands, label fraction) or of one protocol whose recipe differs never are: they
stand in cells of their own, and a letter says what is different from the most frequent choice.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from sarwmix.reports.run import (
    INTERVALS,
    MAIN_METRICS,
    NOT_RECORDED,
    RunRecord,
    Score,
    group_runs,
    score,
    seed_text,
    start_names,
)
from sarwmix.tasks.selection import ON_TEST
from util.errors import UserError
from util.text import read_text, tex

PUBLISHED_FILE = Path(__file__).resolve().parents[1] / "tables" / "published_results.csv"
NOT_OURS = "published, not ours"

METRIC_LABELS = MAIN_METRICS | {
    "ap_micro": "micro AP",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "precision_macro": "macro precision",
    "precision_micro": "micro precision",
    "aacc": "mean class accuracy",
    "f1": "F1",
}
PROTOCOL_ORDER = ("linear", "linear (lbfgs)", "knn", "frozen", "finetune")
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Published:
    """A number that somebody else reported.

    Attributes:
        dataset, bands, protocol, model, start, train_frac, metric, value: what was measured.
        source: where it stands.
        note: what limits the comparison.
        split: on which it was measured; ``test``, or a split of its own such as ``bolivia``.
    """

    dataset: str
    bands: str
    protocol: str
    model: str
    start: str
    train_frac: float
    metric: str
    value: float
    source: str
    note: str
    split: str = "test"


def read_published(path: str | Path = PUBLISHED_FILE) -> list[Published]:
    """Read published numbers, one a line; column ``split`` may be absent.

    Raises:
        UserError: a missing file or column, or a value that is no number; names the line.
    """
    rows = []
    try:
        with io.StringIO(read_text(Path(path)), newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=2):
                try:
                    values: dict[str, Any] = {
                        entry.name: row[entry.name] if entry.default is MISSING else row.get(entry.name, entry.default)
                        for entry in fields(Published)
                    }
                    rows.append(
                        Published(**{**values, "value": float(row["value"]), "train_frac": float(row["train_frac"])})
                    )
                except (KeyError, ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: {type(error).__name__} {error}") from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the published numbers in {path}: {reason}") from error
    return rows


@dataclass
class Cell:
    """Runs that differ in their seeds alone."""

    runs: list[RunRecord]

    def score(self, metric: str) -> Score | None:
        """Mean and interval; None unless all runs have the metric."""
        return score(self.runs, metric)

    @property
    def seeds(self) -> str:
        return seed_text(self.runs)


@dataclass
class Row:
    """One line of a data set's table: an encoder, with a cell for each protocol it was run with."""

    encoder: str
    start: str
    train_frac: str = "1"
    cells: dict[str, Cell] = field(default_factory=dict)
    published: list[Published] = field(default_factory=list)


@dataclass
class Table:
    """One data set.

    Attributes:
        dataset: name.
        metric: which one is shown.
        protocols: columns.
        rows: ours first, then those that are published only.
        notes: letter -> what is different.
        marks: id of a cell -> its letters.
        common: what most runs share, for the caption.
    """

    dataset: str
    metric: str
    protocols: list[str]
    rows: list[Row]
    notes: dict[str, str]
    marks: dict[int, list[str]]
    common: dict[str, str]


def build_tables(
    runs: Iterable[RunRecord], published: Sequence[Published] = (), *, metric: str | None = None
) -> list[Table]:
    """Put runs into one table per data set.

    Args:
        runs: finished runs, in the order rows should have.
        published: others' numbers.
        metric: which one to show; None: the first of `MAIN_METRICS` that a data set's runs have.

    Raises:
        UserError: the same folder twice, or a metric that no run has.
    """
    by_dataset: dict[str, list[RunRecord]] = {}
    for run in runs:
        own = by_dataset.setdefault(run.dataset, [])
        if any(run.file == other.file for other in own):
            raise UserError(f"{run.file} is given twice")
        own.append(run)
    starts = start_names([run for group in by_dataset.values() for run in group])
    return [_table(name, group, published, metric, starts) for name, group in by_dataset.items()]


def _table(
    dataset: str,
    runs: list[RunRecord],
    published: Sequence[Published],
    metric: str | None,
    starts: Mapping[str, str],
) -> Table:
    there = {name for run in runs for name in run.scalars}
    shown = metric or next((name for name in MAIN_METRICS if name in there), None) or min(there)
    if shown not in there:
        raise UserError(f"no run on {dataset} has the metric {shown}; there are: {', '.join(sorted(there))}")
    cells = [Cell(members) for members in group_runs(runs)]
    rows = _rows(cells, starts)
    common = _most_common([run.data for run in runs], NOT_RECORDED)
    marks, notes = _marks(cells, common)
    _add_published(rows, dataset, runs, published)
    used = {run.protocol for run in runs}
    protocols = [name for name in PROTOCOL_ORDER if name in used] + sorted(used - set(PROTOCOL_ORDER))
    return Table(dataset, shown, protocols, rows, notes, marks, common)


def _rows(cells: Sequence[Cell], starts: Mapping[str, str]) -> list[Row]:
    """A row takes one cell per protocol; a second one of the same protocol (another recipe) opens another row."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    for cell in cells:
        run = cell.runs[0]
        lines = rows.setdefault(run.line, [])
        free = next((row for row in lines if run.protocol not in row.cells), None)
        if free is None:
            free = Row(run.encoder, starts[run.origin], run.data.get("train_frac", "1"))
            lines.append(free)
        free.cells[run.protocol] = cell
    return [row for lines in rows.values() for row in lines]


def _most_common(facts: Sequence[Mapping[str, str]], absent: str) -> dict[str, str]:
    names = dict.fromkeys(name for entry in facts for name in entry)
    return {name: Counter(entry.get(name, absent) for entry in facts).most_common(1)[0][0] for name in names}


def _marks(cells: Sequence[Cell], common: Mapping[str, str]) -> tuple[dict[int, list[str]], dict[str, str]]:
    """Letters of what is different from the usual, for each cell."""
    texts: dict[str, str] = {}
    marks: dict[int, list[str]] = {}
    usual: dict[str, dict[str, str]] = {}
    seeds: dict[str, str] = {}
    selected: dict[str, str] = {}
    for protocol in {cell.runs[0].protocol for cell in cells}:
        same = [cell for cell in cells if cell.runs[0].protocol == protocol]
        usual[protocol] = _most_common([cell.runs[0].recipe for cell in same if cell.runs[0].recipe], NOT_GIVEN)
        seeds[protocol] = Counter(cell.seeds for cell in same).most_common(1)[0][0]
        selected[protocol] = Counter(cell.runs[0].selected for cell in same).most_common(1)[0][0]
    for cell in cells:
        run = cell.runs[0]
        found = _differences(run.data, common, NOT_RECORDED)
        if run.recipe:
            found += _differences(run.recipe, usual[run.protocol], NOT_GIVEN)
        elif usual[run.protocol]:
            found.append("recipe unknown: args.json is not there")
        if ON_TEST in run.selected:  # never like for like, however many do it
            found.append(f"best epoch by {run.selected}")
        elif run.selected != selected[run.protocol]:
            found.append(f"best epoch by {run.selected} instead of {selected[run.protocol]}")
        if cell.seeds != seeds[run.protocol]:
            found.append(f"seeds {cell.seeds} instead of {seeds[run.protocol]}")
        found += run.notes
        for text in found:
            letter = texts.setdefault(text, _letter(len(texts)))
            marks.setdefault(id(cell), []).append(letter)
    return marks, {letter: text for text, letter in texts.items()}


def _differences(facts: Mapping[str, str], usual: Mapping[str, str], absent: str) -> list[str]:
    found = []
    for name, value in usual.items():
        own = facts.get(name, absent)
        if own == value:
            continue
        short = name == "classes" or len(own) > 80
        found.append(f"other {name}" if short else f"{name} {own} instead of {value}")
    return found


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"n{number}"


def _sensors(bands: str) -> str:
    """``s1``, ``s2`` or ``all`` from band names joined with commas."""
    names = {name.strip() for name in bands.split(",")}
    radar = names & {"VV", "VH"}
    return "all" if radar and names - radar else "s1" if radar else "s2"


def _add_published(rows: list[Row], dataset: str, runs: Sequence[RunRecord], published: Sequence[Published]) -> None:
    """Numbers of the same data set and label fraction: beside rows of the same backbone, or in rows of their own."""
    fractions = {row.train_frac for row in rows}
    ours, others = list(rows), dict[tuple[str, str, str], Row]()
    for entry in published:
        fraction = f"{entry.train_frac:g}"
        if entry.dataset != dataset or fraction not in fractions:
            continue
        # beside a run of the same backbone and sensors, and from random weights only where the entry is, too
        own = [
            row
            for row in ours
            if any(
                cell.runs[0].model == entry.model and _sensors(cell.runs[0].data.get("bands", "")) == entry.bands
                for cell in row.cells.values()
            )
            and row.train_frac == fraction
            and (row.start == "random") == (entry.start == "random")
        ]
        for row in own:
            row.published.append(entry)
        if not own:
            name = f"{entry.model} ({entry.bands})"
            key = (name, entry.start, fraction)
            others.setdefault(key, Row(name, entry.start, fraction)).published.append(entry)
    used = {_sensors(run.data.get("bands", "")) for run in runs}
    rows += sorted(others.values(), key=lambda row: row.published[0].bands not in used)  # the same sensors first


# ------------------------------------------------------------------------------------------------------------ output


def _grid(table: Table) -> list[list[str]]:
    """Header and lines of a table as text."""
    with_published = any(row.published for row in table.rows)
    lines = [["encoder", "start", *table.protocols, *([NOT_OURS] if with_published else [])]]
    for row in table.rows:
        line = [row.encoder, row.start]
        for protocol in table.protocols:
            cell = row.cells.get(protocol)
            value = None if cell is None else cell.score(table.metric)
            text = "-" if value is None else value.text()
            letters = table.marks.get(id(cell), []) if cell is not None else []
            line.append(text + (f" [{', '.join(letters)}]" if letters else ""))
        if with_published:
            line.append(_published_text(row.published, table.metric))
        lines.append(line)
    return lines


def _published_text(entries: Sequence[Published], metric: str) -> str:
    """Numbers by protocol, start and source; the table's metric first and bare, others with their names."""
    groups: dict[tuple[str, str, str], list[Published]] = {}
    for entry in entries:
        groups.setdefault((entry.protocol, entry.start, entry.source), []).append(entry)
    parts = []
    for (protocol, start, source), group in groups.items():
        ordered = sorted(group, key=lambda entry: (entry.split != "test", entry.metric != metric))
        numbers = []
        for entry in ordered:
            label = "" if entry.metric == metric else METRIC_LABELS.get(entry.metric, entry.metric)
            place = "" if entry.split == "test" else f"on {entry.split}"
            numbers.append(" ".join(filter(None, (label, place, f"{entry.value:.3f}"))))
        share = "" if group[0].train_frac == 1 else f"{100 * group[0].train_frac:g} % of the labels; "
        parts.append(f"{protocol} {', '.join(numbers)} ({share}{start}; {source})")
    return "; ".join(parts) or "-"


def _caption(table: Table) -> str:
    return f"{table.dataset}: {METRIC_LABELS.get(table.metric, table.metric)} on the test split"


def _remarks(table: Table) -> list[str]:
    facts = [
        f"{name} {table.common[name]}"
        for name in ("samples", "statistics", "bands", "train_frac", "data_options")
        if table.common.get(name, NOT_RECORDED) not in (NOT_RECORDED, "none")
    ]
    remarks = [f"Shared by most runs: {'; '.join(facts)}." if facts else ""]
    chosen = Counter(run.selected for row in table.rows for cell in row.cells.values() for run in cell.runs)
    remarks.append("Best epoch by: " + ", ".join(chosen) + "." if chosen else "")
    scores = [cell.score(table.metric) for row in table.rows for cell in row.cells.values()]
    if any(value is not None and value.low is not None for value in scores):
        remarks.append(INTERVALS)
    if any(row.published for row in table.rows):
        remarks.append(f'"{NOT_OURS}": other code, splits and seeds; see sarwmix/tables/published_results.csv.')
    if table.notes:
        listed = "; ".join(f"[{letter}] {text}" for letter, text in table.notes.items())
        remarks.append(f"Not like for like: {listed}.")
    return [remark for remark in remarks if remark]


def as_markdown(tables: Sequence[Table]) -> str:
    """All tables as Markdown."""
    parts = []
    for table in tables:
        header, *lines = _grid(table)
        rows = [header, ["---"] * len(header), *lines]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        parts.append(f"### {_caption(table)}\n\n{text}\n\n" + "\n".join(_remarks(table)))
    return "\n\n".join(parts) + "\n"


def as_latex(tables: Sequence[Table]) -> str:
    """All tables as LaTeX (booktabs)."""
    parts = []
    for table in tables:
        header, *lines = _grid(table)
        body = " \\\\\n".join(" & ".join(map(tex, line)) for line in lines)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\begin{{tabular}}{{{'l' * len(header)}}}\n\\toprule\n"
            f"{' & '.join(map(tex, header))} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"
            f"\\caption{{{tex(_caption(table) + '. ' + ' '.join(_remarks(table)))}}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)


CSV_COLUMNS = (
    *("origin", "dataset", "protocol", "encoder", "start", "train_frac", "split", "metric"),
    *("mean", "std", "low", "high", "runs", "seeds", "selected_on", "tested_on", "source", "notes"),
)


def as_records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Every metric of every cell and every published number shown, one record each, by `CSV_COLUMNS`."""
    records: list[dict[str, Any]] = []
    for table in tables:
        for row in table.rows:
            for protocol, cell in row.cells.items():
                notes = "; ".join(table.notes[letter] for letter in table.marks.get(id(cell), []))
                for metric in sorted({name for run in cell.runs for name in run.scalars}):
                    value = cell.score(metric)
                    if value is None:  # of another task or version
                        continue
                    records.append(
                        {
                            "origin": "ours",
                            "dataset": table.dataset,
                            "protocol": protocol,
                            "encoder": row.encoder,
                            "start": row.start,
                            "train_frac": cell.runs[0].data.get("train_frac", ""),
                            "split": "test",
                            "metric": metric,
                            "mean": value.mean,
                            "std": "" if value.deviation is None else value.deviation,
                            "low": "" if value.low is None else value.low,
                            "high": "" if value.high is None else value.high,
                            "runs": value.count,
                            "seeds": cell.seeds,
                            "selected_on": cell.runs[0].selected,
                            "tested_on": cell.runs[0].tested,
                            "source": " ".join(str(run.file) for run in cell.runs),
                            "notes": notes,
                        }
                    )
        shown = {id(entry): entry for row in table.rows for entry in row.published}
        records += [
            {
                "origin": NOT_OURS,
                "dataset": entry.dataset,
                "protocol": entry.protocol,
                "encoder": f"{entry.model} ({entry.bands})",
                "start": entry.start,
                "train_frac": f"{entry.train_frac:g}",
                "split": entry.split,
                "metric": entry.metric,
                "mean": entry.value,
                "std": "",
                "low": "",
                "high": "",
                "runs": "",
                "seeds": "",
                "selected_on": "",
                "tested_on": "",
                "source": entry.source,
                "notes": entry.note,
            }
            for entry in shown.values()
        ]
    return records
