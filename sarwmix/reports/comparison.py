"""Finished runs as one table: encoders x data sets x protocols, like for like, published numbers beside them.

Runs that differ in nothing but the seed are averaged. Runs of one data set whose data differ (samples, labels, options,
statistics, bands, label fraction) or of one protocol whose recipe differs never are: they stand in cells of their own,
and a letter says what is different from the most frequent choice. Every flag counts as part of the recipe unless a list
here says that it changes no result, so that a flag that is new is compared, too.
"""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from sarwmix.tasks.selection import ON_TEST, selected_text
from util.errors import UserError
from util.files import read_json, sha256_file
from util.text import tex

PUBLISHED_FILE = Path(__file__).resolve().parents[1] / "tables" / "published_results.csv"
NOT_OURS = "published, not ours"

# the metric shown for each kind of run: the first one that it has
METRICS = {"ap_macro": "macro AP", "iou": "IoU", "miou": "mean IoU", "acc": "accuracy"}
METRIC_LABELS = METRICS | {
    "ap_micro": "micro AP",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "precision_macro": "macro precision",
    "precision_micro": "micro precision",
    "aacc": "mean class accuracy",
    "f1": "F1",
}
PROTOCOL_ORDER = ("linear", "linear (lbfgs)", "knn", "frozen", "finetune")
# what must agree for numbers of one data set to be comparable
DATA_FACTS = (
    *("splits", "data_options", "samples", "statistics", "statistics_origin", "bands", "train_frac", "classes"),
)
# Flags that are no part of the recipe. They change no result: places, devices, speed, saving, reporting ...
IRRELEVANT_ARGS = frozenset(
    ("output_dir", "log_dir", "seed", "device", "num_workers", "pin_mem", "cache", "compile", "flops", "bootstrap")
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
NOT_RECORDED, NOT_GIVEN = "not recorded", "not given"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: its metrics.json.
        dataset, protocol, seed: as named in it.
        encoder: model, with head and pooling where they are not the usual ones.
        encoder_facts: model, head and pooling as used, which tell encoders apart.
        model: name of the backbone alone.
        start: where the weights came from, as named.
        start_id: tells starts apart: the hash of the file's content, or the whole path where the file has gone.
        scalars: test metrics of the run's main result.
        data: `DATA_FACTS` of the run, as text that can be compared.
        recipe: the flags that change the result under its protocol; empty where args.json is not there.
        selected: what chose the epoch, on which split.
    """

    path: Path
    dataset: str
    protocol: str
    seed: int
    encoder: str
    encoder_facts: tuple[str, ...]
    model: str
    start: str
    start_id: str
    scalars: Mapping[str, float]
    data: Mapping[str, str]
    recipe: Mapping[str, str]
    selected: str

    @property
    def line(self) -> tuple[Any, ...]:
        """What runs of one row share."""
        return (self.dataset, self.encoder_facts, self.start_id, tuple(sorted(self.data.items())))

    @property
    def setup(self) -> tuple[Any, ...]:
        """Everything but the seed."""
        return (*self.line, self.protocol, tuple(sorted(self.recipe.items())), self.selected)


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
    args_file = file.parent / "args.json"
    args = read_json(args_file) if args_file.is_file() else {}
    try:
        name, main = next(iter(content["results"].items()))
        # an evaluation alone knows the checkpoint that it was given, by which it names the result
        start = str(content.get("initialisation") or name)
        return Run(
            path=file,
            dataset=str(content["dataset"]),
            protocol=str(content["protocol"]),
            seed=int(content["seed"]),
            encoder=_encoder(content, args),
            encoder_facts=_encoder_facts(content, args),
            model=str(content["model"]),
            start=start,
            start_id=str(content.get("initialisation_sha256") or _start_id(start)),
            scalars={
                name: float(value)
                for name, value in main["test"]["scalars"].items()
                if name != "loss" and value is not None
            },
            data=_data(content, args),
            recipe=_recipe(content, args),
            selected=selected_text(content),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{file} is not the result of a finished fine-tuning run ({type(error).__name__}: {error}); give output "
            "folders of main_finetune.py"
        ) from error


def _encoder(content: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    # a pooling that was asked for is named, a model's own is not
    extra = (content.get("head"), args["pool"] if "pool" in args else content.get("pool"))
    unusual = [str(part) for part in extra if part not in (None, "linear", "upernet")]
    return " + ".join([str(content["model"]), *unusual])


def _encoder_facts(content: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[str, ...]:
    pool = content["pool"] if "pool" in content else args.get("pool")
    return str(content["model"]), str(content.get("head")), str(pool)


def _start_id(start: str) -> str:
    """Identity of a start whose run did not record it: earlier versions kept the path alone."""
    try:
        state = Path(start).stat()
        return _file_hash(start, state.st_size, state.st_mtime_ns) if Path(start).is_file() else start
    except OSError:
        return start


@lru_cache
def _file_hash(path: str, size: int, changed: int) -> str:
    """Many runs start from one file, which is read once while it stays as it is."""
    return sha256_file(path)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _given(value: Any) -> bool:
    """Whether a flag was used: one that is off is the same as one that an earlier version did not have."""
    return value is not None and value is not False and value not in ("", [])


def _data(content: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, str]:
    data = {name: _text(content[name]) for name in DATA_FACTS if name in content}
    if "splits" in content:  # hundreds of digits: their own hash is enough to tell and to show
        data["splits"] = hashlib.sha256(json.dumps(content["splits"], sort_keys=True).encode()).hexdigest()[:8]
    elif _given(args.get("data_path")):  # earlier versions did not record names and labels: other folder, other data
        data["splits"] = f"{NOT_RECORDED}, data in {Path(args['data_path'])}"
    if "data_options" not in content and args:
        data["data_options"] = _text({name: args[name] for name in LABEL_ARGS if _given(args.get(name))})
    if data.get("data_options") == "":
        data["data_options"] = "none"
    return data


def _recipe(content: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, str]:
    if not args:
        return {}
    protocol = str(content["protocol"])
    used = {name: value for name, value in args.items() if name not in IRRELEVANT_ARGS | FACT_ARGS}
    if "optimizer" in used:
        used["optimizer"] = used["optimizer"] or ("sgd" if protocol == "linear" else "adamw")
    if "patch_op" in used:
        used["patch_op"] = used["patch_op"] or "avg"
    if used.get("feature_cache") != "none":  # where features are kept changes nothing, that they are not does
        used.pop("feature_cache", None)
    # what came of --amp and of the number of processes, which args.json does not tell
    used |= {"amp": content["precision"]} if "precision" in content else {}
    used |= {"effective_batch": content["effective_batch"]} if "effective_batch" in content else {}
    unused = _UNUSED_BY.get(protocol, frozenset())
    return {name: _text(value) for name, value in used.items() if name not in unused and _given(value)}


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
        with open(path, encoding="utf-8", newline="") as stream:
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
    starts = _short_starts([run for group in by_dataset.values() for run in group])
    return [_table(name, group, published, metric, starts) for name, group in by_dataset.items()]


def _short_starts(runs: Sequence[Run]) -> dict[str, str]:
    """How each start is shown, by its identity: the last parts of its path, two or as many as make it the only one."""
    paths: dict[str, str] = {}
    for run in runs:
        paths.setdefault(run.start_id, run.start)
    names = {}
    for key, path in paths.items():
        parts = Path(path).parts
        others = [Path(other).parts for other in paths.values() if other != path]
        enough = (n for n in range(2, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
        names[key] = str(Path(*parts[-next(enough, len(parts)) :]))
        if list(paths.values()).count(path) > 1:  # one path, written again between two runs
            names[key] += f" (content {key[:8] if key != path else 'unknown'})"
    return names


def _table(
    dataset: str, runs: list[Run], published: Sequence[Published], metric: str | None, starts: Mapping[str, str]
) -> Table:
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
    rows = _rows(cells, starts)
    common = _most_common([run.data for run in runs], NOT_RECORDED)
    marks, notes = _marks(list(cells.values()), common)
    _add_published(rows, dataset, runs, published)
    used = {run.protocol for run in runs}
    protocols = [name for name in PROTOCOL_ORDER if name in used] + sorted(used - set(PROTOCOL_ORDER))
    return Table(dataset, shown, protocols, rows, notes, marks, common)


def _rows(cells: Mapping[tuple[Any, ...], Cell], starts: Mapping[str, str]) -> list[Row]:
    """A row takes one cell per protocol; a second one of the same protocol (another recipe) opens another row."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    for cell in cells.values():
        run = cell.runs[0]
        lines = rows.setdefault(run.line, [])
        free = next((row for row in lines if run.protocol not in row.cells), None)
        if free is None:
            free = Row(run.encoder, starts[run.start_id], run.data.get("train_frac", "1"))
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
        seeds[protocol] = Counter(_text(cell.seeds) for cell in same).most_common(1)[0][0]
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
        if _text(cell.seeds) != seeds[run.protocol]:
            found.append(f"seeds {_text(cell.seeds)} instead of {seeds[run.protocol]}")
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


def _add_published(rows: list[Row], dataset: str, runs: Sequence[Run], published: Sequence[Published]) -> None:
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
    if any(len(cell.runs) > 1 for row in table.rows for cell in row.cells.values()):
        remarks.append("Mean ± sample deviation (number of seeds).")
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
    *("origin", "dataset", "protocol", "encoder", "start", "train_frac", "split", "metric", "mean", "std", "runs"),
    *("seeds", "selected_on", "source", "notes"),
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
                            "split": "test",
                            "metric": metric,
                            "mean": value[0],
                            "std": "" if value[1] is None else value[1],
                            "runs": len(cell.runs),
                            "seeds": " ".join(map(str, cell.seeds)),
                            "selected_on": cell.runs[0].selected,
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
                "split": entry.split,
                "metric": entry.metric,
                "mean": entry.value,
                "std": "",
                "runs": "",
                "seeds": "",
                "selected_on": "",
                "source": entry.source,
                "notes": entry.note,
            }
            for entry in shown.values()
        ]
    return records
