"""A grid of pretraining and fine-tuning runs as a list of jobs, and the table of what they gave.

A grid names flags of the entry scripts and their values. Flags of main_pretrain.py come first in each combination; a
pretraining whose settings several combinations share runs once. ``finetune.NAME`` is a flag of main_finetune.py alone,
``seed`` is the seed of both, ``checkpoint`` the file of the pretraining that is fine-tuned. Arms are named lists of any
flags of main_pretrain.py, for what is no product of values; the arm that is ``random`` starts fine-tuning from scratch.
Runs lie in folders named by their arm and values, so that another arm, axis value or seed leaves what is finished as it
is.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import itertools
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarwmix.reports.differences import Compared, correct
from sarwmix.reports.run import INTERVALS, IRRELEVANT_ARGS, MAIN_METRICS, RunRecord, Score, read_run, score
from sarwmix.tasks.intervals import difference_of_runs
from util.args import args_to_dict
from util.errors import UserError
from util.files import read_json
from util.text import cells, tex

FINETUNE = "finetune."
ARM = "arm"
CHECKPOINT = "checkpoint"
RANDOM = "random"
# Flags that the grid sets itself, and those that change how a run is carried out but not what comes out of it.
RESERVED = ("output_dir", "finetune", "resume", "inference", "eval")
INCIDENTAL = (IRRELEVANT_ARGS - {"seed"}) | {"finetune", "feature_cache", "data_path"}


@dataclass(frozen=True)
class Axis:
    """One flag of the grid and its values.

    Attributes:
        name: as the user gave it, such as ``weight_mode`` or ``finetune.lr``.
        values: texts, as on a command line; empty text for a switch that is off, ``on`` for one that is on.
    """

    name: str
    values: tuple[str, ...]

    @property
    def flag(self) -> str:
        """Name of the flag without the script."""
        return self.name.removeprefix(FINETUNE)


@dataclass(frozen=True)
class Job:
    """One run of an entry script.

    Attributes:
        script: ``main_pretrain.py`` or ``main_finetune.py``.
        flags: all of its arguments but those about resuming.
        folder: its output.
        settings: what the flags mean, parsed; plain values.
    """

    script: str
    flags: tuple[str, ...]
    folder: Path
    settings: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            UserError: the folder holds a run of other settings, or a damaged file.
        """
        marker = self.folder / ("metrics.json" if self.script == "main_finetune.py" else "ablation_done.json")
        known = self.folder / "args.json"
        if known.is_file():
            before = read_json(known)
            for name, value in self.settings.items():
                if name not in INCIDENTAL and name in before and before[name] != value:
                    raise UserError(
                        f"{self.folder} holds a run with --{name} {before[name]}, this grid has {value}; choose "
                        "another --out, or move that run away"
                    )
        return marker.is_file()


@dataclass(frozen=True)
class Combination:
    """One cell of the grid: its values, and the jobs that give its result in order."""

    values: Mapping[str, str]
    pretrain: Job | None
    finetune: Job


def parse_axis(text: str) -> Axis:
    """``weight_mode=none,per_channel`` -> Axis.

    Raises:
        UserError: no name, no value, or a value twice.
    """
    name, sign, rest = text.partition("=")
    name = name.strip().lstrip("-")
    values = tuple(value.strip() for value in rest.split(","))
    if not sign or not name or not all(values):
        raise UserError(f"--grid {text!r} is not NAME=VALUE,VALUE, for example weight_mode=none,per_channel")
    if len(set(values)) != len(values):
        raise UserError(f"--grid {text!r} names a value twice")
    if name.removeprefix(FINETUNE) in RESERVED:
        raise UserError(f"--grid {name}: the grid sets --{name.removeprefix(FINETUNE)} itself")
    return Axis(name, values)


def parse_arms(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=FLAGS`` texts -> flags by name; FLAGS may be empty, or ``random``.

    Raises:
        UserError: no name, a name twice, or flags that the grid sets itself.
    """
    arms: dict[str, str] = {}
    for text in texts:
        name, sign, flags = (part.strip() for part in text.partition("="))
        if not sign or not name or name.startswith("-"):
            raise UserError(f'--arm {text!r} is not NAME=FLAGS, for example "plain=--weight_mode none"')
        if name in arms or folder_name({ARM: name}) in [folder_name({ARM: other}) for other in arms]:
            raise UserError(f"--arm {name!r} is given twice, or its folder would be that of another arm")
        for word in split_words(flags, "--arm"):
            if word.split("=")[0].removeprefix("--") in RESERVED:
                raise UserError(f"--arm {name!r} contains {word}, which the grid sets itself; leave it out")
        arms[name] = flags
    return arms


def plan(
    axes: Sequence[Axis], pretrain: str, finetune: str, out: Path, arms: Mapping[str, str] | None = None
) -> list[Combination]:
    """All combinations with their jobs, each command line checked by the script's own parser.

    Args:
        axes: the grid.
        pretrain: flags that all pretraining runs share, as one text; empty: fine-tuning alone.
        finetune: flags that all fine-tuning runs share.
        out: folder for everything.
        arms: of `parse_arms`; each is combined with the whole grid.

    Raises:
        UserError: a flag that the scripts do not know or refuse; names the combination.
    """
    if arms:
        axes = [Axis(ARM, tuple(arms)), *axes]
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        raise UserError(f"--grid names {next(n for n in names if names.count(n) > 1)!r} twice")
    common, own = split_words(pretrain, "--pretrain"), split_words(finetune, "--finetune")
    for given, option in ((common, "--pretrain"), (own, "--finetune")):
        for name in RESERVED:
            if f"--{name}" in given:
                raise UserError(f"{option} contains --{name}, which the grid sets itself; leave it out")
    if not common and any(axis.name == CHECKPOINT for axis in axes):
        raise UserError(f"--grid {CHECKPOINT} names files of a pretraining, but there is no --pretrain")
    if not common and any(not axis.name.startswith(FINETUNE) and axis.name != "seed" for axis in axes):
        wrong = next(axis.name for axis in axes if not axis.name.startswith(FINETUNE) and axis.name != "seed")
        raise UserError(f"--grid {wrong} is a flag of pretraining, but there is no --pretrain; or did you mean "
                        f"{FINETUNE}{wrong}?")  # fmt: skip
    extra = {name: [] if flags == RANDOM else split_words(flags, "--arm") for name, flags in (arms or {}).items()}
    combinations = []
    for values in itertools.product(*(axis.values for axis in axes)):
        cell = dict(zip(names, values, strict=True))
        file = cell.get(CHECKPOINT, "checkpoint.pth")
        before = {a.flag: cell[a.name] for a in axes if not a.name.startswith(FINETUNE) and a.name != CHECKPOINT}
        after = {axis.flag: cell[axis.name] for axis in axes if axis.name.startswith(FINETUNE) or axis.name == "seed"}
        folder = out / "pretrain" / folder_name(before)
        arm = before.pop(ARM, "") if arms else ""
        job = None
        if common and not (arms and arms[arm] == RANDOM):
            job = _job("main_pretrain.py", [*common, *extra.get(arm, ())], before, folder, cell)
        if job:
            _check_written(job, file)
        start = ["--finetune", str(job.folder / file)] if job else []
        last = _job("main_finetune.py", [*own, *start], after, out / "finetune" / folder_name(cell), cell)
        combinations.append(Combination(cell, job, last))
    return combinations


def _check_written(job: Job, file: str) -> None:
    """Refuse a checkpoint that the pretraining will not leave, before hours are spent on it.

    Raises:
        UserError: says which ones it leaves.
    """
    end = min(job.settings["epochs"], job.settings["stop_epoch"] or job.settings["epochs"])
    written = ["checkpoint.pth", *(f"checkpoint_{n}.pth" for n in job.settings["save_epochs"] if n <= end)]
    if file not in written:
        raise UserError(
            f"--grid {CHECKPOINT}={file}: the pretraining leaves {', '.join(written)}; give it --save_epochs with the "
            "epochs that are wanted"
        )


def share_of(combinations: Sequence[Combination], share: str | None) -> list[Combination]:
    """What one of several commands side by side runs: every Nth pretraining, with all that starts from it.

    Args:
        combinations: of `plan`.
        share: ``K/N`` with K from 1 to N, or from 0 to N - 1 as job arrays count; None: everything.

    Raises:
        UserError: another text.
    """
    if share is None:
        return list(combinations)
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    if found is None or not int(found[1]) <= int(found[2]) > 0:
        raise UserError(f"--share {share!r} is not K/N with K up to N, such as 2/8 or $SLURM_ARRAY_TASK_ID/8")
    chains = {(c.pretrain or c.finetune).folder: None for c in combinations}
    number = {folder: i for i, folder in enumerate(chains)}
    mine = int(found[1]) % int(found[2])
    return [c for c in combinations if number[(c.pretrain or c.finetune).folder] % int(found[2]) == mine]


def split_words(text: str, option: str) -> list[str]:
    """A command line in one text as its words.

    Raises:
        UserError: quotes that do not close.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r} cannot be split into words ({error}); close its quotes") from error


def folder_name(values: Mapping[str, str]) -> str:
    """``weight_mode-none_seed-0``; a grid without such a flag has one run, ``run``."""
    return "_".join(f"{name}-{re.sub(r'[^A-Za-z0-9.+-]', '-', value)}" for name, value in values.items()) or "run"


def _entry(script: str) -> Any:
    """The module of an entry script, by the name that jobs start it by: rooms do not import what stands above them."""
    return importlib.import_module(script.removesuffix(".py"))


def _job(script: str, common: Sequence[str], flags: Mapping[str, str], folder: Path, cell: Mapping[str, str]) -> Job:
    parser = _entry(script).get_parser()
    arguments = list(common)
    for name, value in flags.items():
        if any(text == f"--{name}" or text.startswith(f"--{name}=") for text in common):
            raise UserError(f"--{name} is in the grid and among the flags that all runs share; leave one of them out")
        if value == "on":
            arguments.append(f"--{name}")
        elif value != "off":
            arguments += [f"--{name}", value]
    arguments += ["--output_dir", str(folder)]

    def refuse(message: str) -> None:
        where = ", ".join(f"{name}={value}" for name, value in cell.items()) or "the only run"
        raise UserError(f"{script} refuses the flags of {where}: {message}")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    settings: argparse.Namespace = parser.parse_args(arguments)
    if script == "main_pretrain.py":
        _entry(script).check_args(settings)
    else:
        _check_finetune(settings)
    return Job(script, tuple(arguments), folder, args_to_dict(settings))


def _check_finetune(settings: argparse.Namespace) -> None:
    start = settings.finetune
    settings.finetune = __file__ if start else ""  # the checkpoint does not exist yet; any file stands in for it
    try:
        _entry("main_finetune.py").check_args(settings)
    finally:
        settings.finetune = start


# ---------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """Combinations that differ in the seed alone.

    Attributes:
        values: of the grid, without the seed.
        score: of the finished seeds together; None while there is none.
        missing: how many seeds have no result.
        selected: what chose the epochs, on which split.
    """

    values: Mapping[str, str]
    score: Score | None
    missing: int
    selected: tuple[str, ...] = ()


def collect(combinations: Sequence[Combination], metric: str | None) -> tuple[str, list[Row]]:
    """Scores of the finished combinations on test, seeds together, in the order of the grid.

    Args:
        combinations: of `plan`.
        metric: name of a test metric; None: the first of the task's.

    Returns:
        (name of the metric, rows).

    Raises:
        UserError: no run has finished, or the metric does not exist.
    """
    finished = [(i, c) for i, c in enumerate(combinations) if c.finetune.finished]
    runs: dict[int, RunRecord] = {i: read_run(c.finetune.folder) for i, c in finished}
    if not runs:
        raise UserError("no run of the grid has finished yet; there is nothing to put into a table")
    first = next(iter(runs.values()))
    metric = metric or next((name for name in MAIN_METRICS if name in first.scalars), min(first.scalars))
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, combination in enumerate(combinations):
        key = tuple((name, value) for name, value in combination.values.items() if name != "seed")
        groups.setdefault(key, []).append(i)
    rows = []
    for key, members in groups.items():
        done = [runs[i] for i in members if i in runs]
        for run in done:
            if metric not in run.scalars:
                raise UserError(f"{run.path} has no test metric {metric!r}; it has: {', '.join(run.scalars)}")
        for run in done[1:]:  # the grid says that they differ in the seed alone; the files may say otherwise
            if (run.data, run.recipe, run.selected) != (done[0].data, done[0].recipe, done[0].selected):
                raise UserError(
                    f"{done[0].path} and {run.path} stand for one row of the grid, but differ in more than the seed "
                    "(scripts/compare.py with the two says in what); make one of them again"
                )
        selected = dict.fromkeys(run.selected for run in done)
        rows.append(Row(dict(key), score(done, metric), len(members) - len(done), tuple(selected)))
    return metric, rows


def differences(combinations: Sequence[Combination], metric: str, reference: str) -> list[Compared]:
    """Every row of the table against the row that differs from it by the reference's value alone.

    Args:
        combinations: of `plan`; those that have finished count.
        metric: a test metric.
        reference: name of an arm, or ``AXIS=VALUE`` of the grid.

    Raises:
        UserError: no such arm or value, or nothing of it has finished.
    """
    axis, sign, value = reference.partition("=")
    axis, value = (axis, value) if sign else (ARM, reference)
    groups: dict[tuple[tuple[str, str], ...], list[Combination]] = {}
    for combination in combinations:
        key = tuple((name, given) for name, given in combination.values.items() if name != "seed")
        groups.setdefault(key, []).extend([combination] if combination.finetune.finished else [])
    if not any(dict(key).get(axis) == value for key in groups):
        raise UserError(f"--reference {reference!r} is no arm or AXIS=VALUE of this grid")
    arms: list[Compared] = []
    for key, own in groups.items():
        base = groups[tuple((name, value if name == axis else given) for name, given in key)]
        if not own or not base:
            continue
        scores = [read_run(c.finetune.folder).scalars[metric] for c in own]
        difference = None
        if dict(key)[axis] != value:
            folders = [[c.finetune.folder for c in side] for side in (own, base)]
            own_seeds, base_seeds = ([int(c.values.get("seed", 0)) for c in side] for side in (own, base))
            difference = difference_of_runs(folders[0], folders[1], metric, seeds=(own_seeds, base_seeds))
        name = ", ".join(given for _, given in key)
        arms.append(Compared(name, statistics.fmean(scores), len(scores), difference))
    if not any(arm.difference for arm in arms):
        raise UserError(f"nothing can be compared with --reference {reference!r} yet: too few runs have finished")
    return correct(arms)


def _cells(row: Row) -> tuple[str, str]:
    done = 0 if row.score is None else row.score.count
    return (
        "-" if row.score is None else row.score.text(),
        str(done) if not row.missing else f"{done} of {done + row.missing}",
    )


def as_markdown(metric: str, rows: Sequence[Row]) -> str:
    """The table for a README, with what its columns mean."""
    names = list(rows[0].values)
    lines = [f"| {' | '.join([*names, metric, 'seeds'])} |", "|" + "---|" * (len(names) + 2)]
    lines += [f"| {' | '.join([*row.values.values(), *_cells(row)])} |" for row in rows]
    selected = ", ".join(dict.fromkeys(text for row in rows for text in row.selected))
    note = f"{metric} on test, mean over seeds. {INTERVALS}"
    return "\n".join([*lines, "", note, f"Best epoch by: {selected or 'not recorded'}", ""])


def as_latex(metric: str, rows: Sequence[Row]) -> str:
    """The same with booktabs."""
    names = list(rows[0].values)
    lines = [f"\\begin{{tabular}}{{{'l' * len(names)}rr}}", r"\toprule"]
    lines += [" & ".join(tex(name) for name in [*names, metric, "seeds"]) + r" \\", r"\midrule"]
    lines += [" & ".join(map(tex, [*row.values.values(), *_cells(row)])) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(combinations: Sequence[Combination]) -> str:
    """One line for each finished run with all of its test metrics."""
    done = [(c, read_run(c.finetune.folder)) for c in combinations if c.finetune.finished]
    metrics = list(dict.fromkeys(name for _, run in done for name in run.scalars))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(cells([*combinations[0].values, *metrics, "folder"]))
    for combination, run in done:
        values = [run.scalars.get(name, "") for name in metrics]
        writer.writerow(cells([*combination.values.values(), *values, combination.finetune.folder.name]))
    return text.getvalue()
