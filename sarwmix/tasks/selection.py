"""Which epoch is the best: several rules through one mechanism, remembered across a resume, stored once.

A rule compares the metrics of a new epoch with those of its best epoch so far. The selector keeps one best per rule;
its state is plain data and travels inside the checkpoint, so an interrupted run goes on with the scores it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from util.errors import UserError

Metrics = Mapping[str, float]

# the order in which parity cases list them: (AP, F1, P) x (macro, micro)
SIX_METRICS = ("ap_macro", "ap_micro", "f1_macro", "f1_micro", "precision_macro", "precision_micro")
MACRO_METRICS = ("ap_macro", "f1_macro", "precision_macro")


ON_TEST = "selected on test: optimistic"
BEST = "checkpoint_best.pth"
"""File of the best epoch by the rule that was asked for: the run's main result."""


def as_fraction(metric: str, value: float) -> float:
    """A metric as a fraction of 1: earlier versions gave the accuracy of image pairs in percent."""
    return value / 100 if metric == "acc" and value > 1 else value


def in_fractions(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A best epoch, as `Selector.state_dict` gives it, with its metrics as fractions."""
    metrics = {name: as_fraction(name, value) for name, value in entry["metrics"].items()}
    by_accuracy = metrics != dict(entry["metrics"]) and entry["score"] == entry["metrics"]["acc"]
    return {**entry, "metrics": metrics, "score": metrics["acc"] if by_accuracy else entry["score"]}


@dataclass(frozen=True)
class Rule:
    """One selection rule.

    Attributes:
        name: what ``--select`` calls it: a metric, or the name of a published rule.
        filename: checkpoint file that holds the rule's best epoch.
        description: words for the log, e.g. "highest ap_macro".
        wins: (new metrics, best metrics so far) -> whether the new epoch replaces it. Ties keep the earlier epoch.
        score: metrics -> one number to print; for rules without one, a stand-in named in `description`.
    """

    name: str
    filename: str
    description: str
    wins: Callable[[Metrics, Metrics], bool]
    score: Callable[[Metrics], float]


def metric_rule(metric: str) -> Rule:
    """The rule that takes the epoch with the highest value of one metric."""
    return Rule(metric, BEST, f"highest {metric}", lambda new, best: new[metric] > best[metric], lambda m: m[metric])


def weighted_sum_rule(name: str, filename: str, weights: Mapping[str, float]) -> Rule:
    """The rule that maximises sum_m weights[m] * metrics[m]."""

    def score(metrics: Metrics) -> float:
        return sum(weight * metrics[name] for name, weight in weights.items())

    terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    return Rule(name, filename, f"highest {terms}", lambda new, best: score(new) > score(best), score)


def most_best_results(new: Metrics, best: Metrics) -> bool:
    """The pairwise "most best results" rule: does the new epoch replace the best so far?

    The two epochs are ranked on each of the six metrics; who has more first ranks wins. An equal number is decided by
    the three macro metrics alone, in the same way; if that is equal too, the earlier epoch stays.
    """

    def lead(names: Sequence[str]) -> int:
        return sum((new[name] > best[name]) - (new[name] < best[name]) for name in names)

    overall = lead(SIX_METRICS)
    return overall > 0 or (overall == 0 and lead(MACRO_METRICS) > 0)


def multilabel_rules() -> tuple[Rule, ...]:
    """The three rules of the published BigEarthNet protocol."""
    return (
        weighted_sum_rule(
            "weighted",
            "checkpoint_best_weighted.pth",
            {"f1_macro": 1.3, "f1_micro": 1.1, "ap_macro": 1.2, "precision_macro": 1.2},
        ),
        weighted_sum_rule("sum", "checkpoint_best_default.pth", dict.fromkeys(SIX_METRICS, 1.0)),
        Rule(
            "mbr",
            "checkpoint_best_mbr.pth",
            "most best results over the six metrics, pairwise, macro metrics break ties (score: their sum)",
            most_best_results,
            lambda metrics: sum(metrics[name] for name in SIX_METRICS),
        ),
    )


def selection_rules(
    select: str, metrics: Sequence[str], published: Sequence[Rule] = (), *, keep_published: bool = False
) -> tuple[Rule, ...]:
    """The rules of a run: first the one that was asked for, which is stored as `BEST`.

    Args:
        select: name of a metric or of a published rule.
        metrics: metrics of the task.
        published: the task's published rules.
        keep_published: whether the best epochs of the other published rules are stored, too.

    Raises:
        UserError: the task has no such metric or rule.
    """
    named = {rule.name: rule for rule in published}
    if select not in named and select not in metrics:
        raise UserError(
            f"--select {select} is neither a metric of this task ({', '.join(metrics)})"
            + (f" nor a published rule ({', '.join(named)})" if named else "")
        )
    first = replace(named[select], filename=BEST) if select in named else metric_rule(select)
    return (first, *(rule for rule in published if keep_published and rule.name != select))


def selected_text(content: Mapping[str, Any], *, epoch: bool = False) -> str:
    """How the epoch of a finished run was chosen, for tables: "ap_macro on val"; test is marked.

    Args:
        content: what metrics.json holds.
        epoch: name the epoch, too.
    """
    found = content.get("selected_on")
    if not isinstance(found, Mapping):
        return "not recorded"
    if not found.get("rule"):
        return "nothing selected"
    text = f"{found['rule']} on {found.get('split')}"
    text += f", epoch {found['epoch']}" if epoch and found.get("epoch") is not None else ""
    return f"{text} ({ON_TEST})" if found.get("split") == "test" else text


class Selector:
    """Keeps the best epoch of every rule."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        names = [rule.filename for rule in rules]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"selection rules need distinct file names, got {names}")
        self.rules = tuple(rules)
        self.best: dict[str, dict[str, Any]] = {}

    def update(self, epoch: int, metrics: Metrics) -> list[str]:
        """Compare an epoch with the best so far.

        Args:
            epoch: number of the epoch the metrics belong to.
            metrics: scalar metrics of the selection split.

        Returns:
            File names of the rules whose best epoch this now is (the first epoch always is).
        """
        improved = []
        for rule in self.rules:
            best = self.best.get(rule.filename)
            if best is None or rule.wins(metrics, best["metrics"]):
                self.best[rule.filename] = {
                    "rule": rule.name,
                    "epoch": int(epoch),
                    "score": float(rule.score(metrics)),
                    "metrics": {name: float(value) for name, value in metrics.items()},
                }
                improved.append(rule.filename)
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint's ``best``."""
        return {name: {**entry, "metrics": dict(entry["metrics"])} for name, entry in self.best.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the best scores of an earlier part of the run.

        Raises:
            UserError: the state belongs to other rules.
        """
        mine = {rule.filename: rule for rule in self.rules}
        before = state.get(BEST)
        # earlier versions stored no name: several files meant the published rules, a single one the task's metric
        name = None if before is None else before.get("rule", "weighted" if len(state) > 1 else mine[BEST].name)
        if name is not None and name != mine[BEST].name:
            raise UserError(
                f"the run selects its best epoch by {name!r}, this command by {mine[BEST].name!r}; resume with "
                f"--select {name}"
            )
        self.best = {
            name: {
                "rule": mine[name].name,
                "epoch": int(entry["epoch"]),
                "score": float(entry["score"]),
                "metrics": dict(entry["metrics"]),
            }
            for name, entry in ((name, in_fractions(entry)) for name, entry in state.items())
            if name in mine
        }

    def waited(self, epoch: int) -> int:
        """Epochs since the best one by the first rule, `epoch` being the last one that was compared."""
        best = self.best.get(self.rules[0].filename)
        return 0 if best is None else epoch - int(best["epoch"])
