"""Finished runs as one table: encoders x data sets x protocols, like for like, published numbers beside them.

Runs that differ in nothing but the seed are averaged. Runs of one data set whose data differ (samples, statistics,
bands, label fraction) or of one protocol whose recipe differs (epochs, batch, input size, ...) never are: they stand in
rows of their own, and a letter says what is different from the most frequent choice.
"""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import read_json

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_FILE = ROOT / "datasets" / "published_results.csv"
NOT_OURS = "published, not ours"

# the metric shown for each kind of run: the first one that it has
METRICS = {"ap_macro": "macro AP", "miou": "mean IoU", "acc": "accuracy"}
PROTOCOL_ORDER = ("linear", "linear (lbfgs)", "knn", "frozen", "finetune")
# what must agree for numbers of one data set to be comparable, and what for those of one protocol (from args.json)
DATA_FACTS = ("samples", "statistics", "statistics_origin", "bands", "train_frac", "classes")
RECIPE_FACTS = (
    "epochs",
    "stop_epoch",
    "patience",
    "batch_size",
    "accum_iter",
    "optimizer",
    "lr",
    "blr",
    "warmup_epochs",
    "weight_decay",
    "layer_decay",
    "drop_path",
    "drop_rate",
    "smoothing",
    "reprob",
    "mixup",
    "cutmix",
    "input_size",
    "test_run",
)
_UNUSED_BY = {  # recipe entries that change nothing under a protocol
    "knn": set(RECIPE_FACTS) - {"input_size", "test_run"},
    "linear (lbfgs)": set(RECIPE_FACTS) - {"input_size", "test_run"},
    "linear": {"layer_decay", "drop_path", "drop_rate", "smoothing", "reprob", "mixup", "cutmix"},
    "frozen": {"layer_decay", "drop_path"},
}


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: its metrics.json.
        dataset, protocol, seed: as named in it.
        encoder: model, with head and pooling where they are not the usual ones.
        model: name of the backbone alone.
        start: where the weights came from, short.
        scalars: test metrics of the run's main result.
        data: `DATA_FACTS` of the run, as text that can be compared.
        recipe: `RECIPE_FACTS` that its protocol uses; empty where args.json is not there.
    """

    path: Path
    dataset: str
    protocol: str
    seed: int
    encoder: str
    model: str
    start: str
    scalars: Mapping[str, float]
    data: Mapping[str, str]
    recipe: Mapping[str, str]

    @property
    def setup(self) -> tuple[Any, ...]:
        """Everything but the seed."""
        return (
            self.dataset,
            self.encoder,
            self.start,
            tuple(self.data.items()),
            self.protocol,
            tuple(self.recipe.items()),
        )


def read_run(path: str | Path) -> Run:
    """Read the result of a finished run.

    Args:
        path: its folder, or a metrics.json (or metrics_eval.json).

    Raises:
        UserError: no such folder, a run that has not finished, or a file that is cut short or of something else.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / "metrics.json"
    if not file.is_file():
        if not path.exists():
            raise UserError(f"{path} does not exist; give output folders of main_finetune.py")
        begun = path.is_dir() and any((path / name).exists() for name in ("args.json", "checkpoint.pth", "log.txt"))
        why = (
            "the run has not finished; continue it with --resume auto" if begun else "it is no run of main_finetune.py"
        )
        raise UserError(f"{path} has no metrics.json: {why}")
    content = read_json(file)
    try:
        main = next(iter(content["results"].values()))
        return Run(
            path=file,
            dataset=str(content["dataset"]),
            protocol=str(content["protocol"]),
            seed=int(content["seed"]),
            encoder=_encoder(content),
            model=str(content["model"]),
            start=_start(str(content.get("initialisation", "checkpoint"))),
            scalars={
                name: float(value)
                for name, value in main["test"]["scalars"].items()
                if name != "loss" and value is not None
            },
            data={name: _text(content[name]) for name in DATA_FACTS if name in content},
            recipe=_recipe(file.parent / "args.json", str(content["protocol"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{file} is not the result of a finished fine-tuning run ({type(error).__name__}: {error}); give output "
            "folders of main_finetune.py"
        ) from error


def _encoder(content: Mapping[str, Any]) -> str:
    extra = [str(content[key]) for key in ("head", "pool") if content.get(key) not in (None, "linear", "upernet")]
    return " + ".join([str(content["model"]), *extra])


def _start(initialisation: str) -> str:
    if initialisation in ("random", "checkpoint") or initialisation.startswith("timm "):
        return initialisation
    return "/".join(Path(initialisation).parts[-2:])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _recipe(path: Path, protocol: str) -> dict[str, str]:
    if not path.is_file():
        return {}
    args = read_json(path)
    unused = _UNUSED_BY.get(protocol, set())
    return {name: _text(args[name]) for name in RECIPE_FACTS if name in args and name not in unused}


@dataclass(frozen=True)
class Published:
    """A number that somebody else reported.

    Attributes:
        dataset, bands, protocol, model, start, train_frac, metric, value: what was measured.
        source: where it stands.
        note: what limits the comparison.
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


def read_published(path: str | Path = PUBLISHED_FILE) -> list[Published]:
    """Read published numbers.

    Raises:
        UserError: a missing file or column, or a value that is no number; names the line.
    """
    rows = []
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=2):
                try:
                    values: dict[str, Any] = {name: row[name] for name in Published.__dataclass_fields__}
                    rows.append(
                        Published(**{**values, "value": float(row["value"]), "train_frac": float(row["train_frac"])})
                    )
                except (KeyError, ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: {type(error).__name__} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the published numbers in {path}: {error.strerror}") from error
    return rows


@dataclass
class Cell:
    """Runs that differ in the seed alone."""

    runs: list[Run]

    def value(self, metric: str) -> tuple[float, float | None] | None:
        """Mean and sample deviation (None for a single run); None where the metric is not there."""
        values = [run.scalars[metric] for run in self.runs if metric in run.scalars]
        if not values:
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)


@dataclass
class Row:
    """One line of a data set's table: an encoder, with a cell for each protocol it was run with."""

    encoder: str
    start: str
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


def build_tables(runs: Iterable[Run], published: Sequence[Published] = (), *, metric: str | None = None) -> list[Table]:
    """Put runs into one table per data set.

    Args:
        runs: finished runs, in the order rows should have.
        published: others' numbers.
        metric: which one to show; None: the first of `METRICS` that a data set's runs have.

    Raises:
        UserError: the same run twice, or a metric that no run has.
    """
    by_dataset: dict[str, list[Run]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, []).append(run)
    return [_table(name, group, published, metric) for name, group in by_dataset.items()]


def _table(dataset: str, runs: list[Run], published: Sequence[Published], metric: str | None) -> Table:
    there = {name for run in runs for name in run.scalars}
    shown = metric or next((name for name in METRICS if name in there), None) or min(there)
    if shown not in there:
        raise UserError(f"no run on {dataset} has the metric {shown}; there are: {', '.join(sorted(there))}")
    cells: dict[tuple[Any, ...], Cell] = {}
    for run in runs:
        cell = cells.setdefault(run.setup, Cell([]))
        same = next((other for other in cell.runs if other.seed == run.seed), None)
        if same is not None:
            raise UserError(
                f"{same.path} and {run.path} are the same run with the same seed {run.seed}; give one of them"
            )
        cell.runs.append(run)
    rows = _rows(cells)
    common = _most_common([run.data for run in runs])
    marks, notes = _marks(list(cells.values()), common)
    _add_published(rows, dataset, runs, published, shown)
    used = {run.protocol for run in runs}
    protocols = [name for name in PROTOCOL_ORDER if name in used] + sorted(used - set(PROTOCOL_ORDER))
    return Table(dataset, shown, protocols, rows, notes, marks, common)


def _rows(cells: Mapping[tuple[Any, ...], Cell]) -> list[Row]:
    """A row takes one cell per protocol; a second one of the same protocol (another recipe) opens another row."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    for setup, cell in cells.items():
        _, encoder, start, _, protocol, _ = setup
        lines = rows.setdefault(setup[:4], [])
        free = next((row for row in lines if protocol not in row.cells), None)
        if free is None:
            free = Row(encoder, start)
            lines.append(free)
        free.cells[protocol] = cell
    return [row for lines in rows.values() for row in lines]


def _most_common(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for entry in facts for name in entry)
    return {name: Counter(entry[name] for entry in facts if name in entry).most_common(1)[0][0] for name in names}


def _marks(cells: Sequence[Cell], common: Mapping[str, str]) -> tuple[dict[int, list[str]], dict[str, str]]:
    """Letters of what is different from the usual, for each cell."""
    texts: dict[str, str] = {}
    marks: dict[int, list[str]] = {}
    usual: dict[str, dict[str, str]] = {}
    seeds: dict[str, str] = {}
    for protocol in {cell.runs[0].protocol for cell in cells}:
        same = [cell for cell in cells if cell.runs[0].protocol == protocol]
        usual[protocol] = _most_common([cell.runs[0].recipe for cell in same])
        seeds[protocol] = Counter(_text(cell.seeds) for cell in same).most_common(1)[0][0]
    for cell in cells:
        run = cell.runs[0]
        found = [*_differences(run.data, common), *_differences(run.recipe, usual[run.protocol])]
        if not run.recipe and usual[run.protocol]:
            found.append("recipe unknown: args.json is not there")
        if _text(cell.seeds) != seeds[run.protocol]:
            found.append(f"seeds {_text(cell.seeds)} instead of {seeds[run.protocol]}")
        for text in found:
            letter = texts.setdefault(text, _letter(len(texts)))
            marks.setdefault(id(cell), []).append(letter)
    return marks, {letter: text for text, letter in texts.items()}


def _differences(facts: Mapping[str, str], usual: Mapping[str, str]) -> list[str]:
    found = []
    for name, value in usual.items():
        own = facts.get(name)
        if own is None or own == value:
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


def _add_published(
    rows: list[Row], dataset: str, runs: Sequence[Run], published: Sequence[Published], metric: str
) -> None:
    """Numbers of the same data set and metric: beside the row of the same backbone, or in rows of their own."""
    fractions = {run.data.get("train_frac", "1") for run in runs}
    for entry in published:
        if entry.dataset != dataset or entry.metric != metric or f"{entry.train_frac:g}" not in fractions:
            continue
        # beside a run of the same backbone and sensors, and from random weights only where the entry is, too
        own = [
            row
            for row in rows
            if any(
                cell.runs[0].model == entry.model and _sensors(cell.runs[0].data.get("bands", "")) == entry.bands
                for cell in row.cells.values()
            )
            and (row.start == "random") == (entry.start == "random")
        ]
        for row in own:
            row.published.append(entry)
        if not own:
            name = f"{entry.model} ({entry.bands})"
            known = [row for row in rows if not row.cells and (row.encoder, row.start) == (name, entry.start)]
            if not known:
                known = [Row(name, entry.start)]
                rows += known
            known[0].published.append(entry)


# ------------------------------------------------------------------------------------------------------------ output


def _number(value: tuple[float, float | None] | None, count: int) -> str:
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f} ({count})"


def _grid(table: Table) -> list[list[str]]:
    """Header and lines of a table as text."""
    with_published = any(row.published for row in table.rows)
    lines = [["encoder", "start", *table.protocols, *([NOT_OURS] if with_published else [])]]
    for row in table.rows:
        line = [row.encoder, row.start]
        for protocol in table.protocols:
            cell = row.cells.get(protocol)
            text = "-" if cell is None else _number(cell.value(table.metric), len(cell.runs))
            letters = table.marks.get(id(cell), []) if cell is not None else []
            line.append(text + (f" [{', '.join(letters)}]" if letters else ""))
        if with_published:
            line.append(
                "; ".join(
                    f"{entry.protocol} {entry.value:.3f} ({entry.start}; {entry.source})" for entry in row.published
                )
                or "-"
            )
        lines.append(line)
    return lines


def _caption(table: Table) -> str:
    return f"{table.dataset}: {METRICS.get(table.metric, table.metric)} on the test split"


def _remarks(table: Table) -> list[str]:
    facts = [
        f"{name} {table.common[name]}"
        for name in ("samples", "statistics", "bands", "train_frac")
        if name in table.common
    ]
    remarks = [f"Shared by most runs: {'; '.join(facts)}." if facts else ""]
    if any(len(cell.runs) > 1 for row in table.rows for cell in row.cells.values()):
        remarks.append("Mean ± sample deviation (number of seeds).")
    if any(row.published for row in table.rows):
        remarks.append(f'"{NOT_OURS}": other code, splits and seeds; see datasets/published_results.csv.')
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
        body = " \\\\\n".join(" & ".join(map(_tex, line)) for line in lines)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\begin{{tabular}}{{{'l' * len(header)}}}\n\\toprule\n"
            f"{' & '.join(map(_tex, header))} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"
            f"\\caption{{{_tex(_caption(table) + '. ' + ' '.join(_remarks(table)))}}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)


def _tex(text: str) -> str:
    for special in "&%$#_{}":
        text = text.replace(special, "\\" + special)
    return text.replace("±", "$\\pm$")


CSV_COLUMNS = (
    *("origin", "dataset", "protocol", "encoder", "start", "train_frac", "metric", "mean", "std", "runs", "seeds"),
    *("source", "notes"),
)


def as_records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Every metric of every cell and every published number shown, one record each, by `CSV_COLUMNS`."""
    records: list[dict[str, Any]] = []
    for table in tables:
        for row in table.rows:
            for protocol, cell in row.cells.items():
                notes = "; ".join(table.notes[letter] for letter in table.marks.get(id(cell), []))
                for metric in sorted({name for run in cell.runs for name in run.scalars}):
                    value = cell.value(metric)
                    assert value is not None
                    records.append(
                        {
                            "origin": "ours",
                            "dataset": table.dataset,
                            "protocol": protocol,
                            "encoder": row.encoder,
                            "start": row.start,
                            "train_frac": cell.runs[0].data.get("train_frac", ""),
                            "metric": metric,
                            "mean": value[0],
                            "std": "" if value[1] is None else value[1],
                            "runs": len(cell.runs),
                            "seeds": " ".join(map(str, cell.seeds)),
                            "source": " ".join(str(run.path) for run in cell.runs),
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
                "metric": entry.metric,
                "mean": entry.value,
                "std": "",
                "runs": "",
                "seeds": "",
                "source": entry.source,
                "notes": entry.note,
            }
            for entry in shown.values()
        ]
    return records
