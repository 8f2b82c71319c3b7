"""Which epoch is the best: several rules through one mechanism, remembered across a resume, stored once.

A rule compares the metrics of a new epoch with those of its best epoch so far. The selector keeps one best per rule;
its state is plain data and travels inside the checkpoint, so an interrupted run goes on with the scores it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from util.errors import UserError

Metrics = Mapping[str, float]

# the order in which parity cases list them: (AP, F1, P) x (macro, micro)
SIX_METRICS = ("ap_macro", "ap_micro", "f1_macro", "f1_micro", "precision_macro", "precision_micro")
MACRO_METRICS = ("ap_macro", "f1_macro", "precision_macro")


@dataclass(frozen=True)
class Rule:
    """One selection rule.

    Attributes:
        filename: checkpoint file that holds the rule's best epoch.
        description: for the log, e.g. "sum of all six metrics".
        wins: (new metrics, best metrics so far) -> whether the new epoch replaces it. Ties keep the earlier epoch.
        score: metrics -> one number to print; for rules without one, a stand-in named in `description`.
    """

    filename: str
    description: str
    wins: Callable[[Metrics, Metrics], bool]
    score: Callable[[Metrics], float]


def weighted_sum_rule(filename: str, weights: Mapping[str, float]) -> Rule:
    """The rule that maximises sum_m weights[m] * metrics[m]."""

    def score(metrics: Metrics) -> float:
        return sum(weight * metrics[name] for name, weight in weights.items())

    terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    return Rule(filename, f"maximum of {terms}", lambda new, best: score(new) > score(best), score)


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
    """The three rules of the BigEarthNet protocol."""
    return (
        weighted_sum_rule(
            "checkpoint_best.pth", {"f1_macro": 1.3, "f1_micro": 1.1, "ap_macro": 1.2, "precision_macro": 1.2}
        ),
        weighted_sum_rule("checkpoint_best_default.pth", dict.fromkeys(SIX_METRICS, 1.0)),
        Rule(
            "checkpoint_best_mbr.pth",
            "most best results over the six metrics, pairwise, macro metrics break ties (score: their sum)",
            most_best_results,
            lambda metrics: sum(metrics[name] for name in SIX_METRICS),
        ),
    )


class EarlyStopping:
    """Ends training when a metric has not risen for a number of epochs.

    Args:
        metric: name of the scalar that should rise.
        patience: epochs without a new best value after which training ends; None: never.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric, self.patience = metric, patience
        self.best: float | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether training is over."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, metrics: Metrics) -> bool:
        """Take an epoch's metrics in; returns `exhausted`."""
        value = float(metrics[self.metric])
        if self.best is None or value > self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.exhausted

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint, so that a resumed run goes on counting."""
        return {"metric": self.metric, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the count of an earlier part of the run; one of another metric starts afresh."""
        if state.get("metric") == self.metric:
            self.best, self.waited = state["best"], int(state["waited"])


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
        known = {rule.filename for rule in self.rules}
        if set(state) - known:
            raise UserError(
                f"the checkpoint's best scores are those of {sorted(state)}, this task selects {sorted(known)}; "
                "resume with the data set and options the run was started with"
            )
        self.best = {
            name: {"epoch": int(entry["epoch"]), "score": float(entry["score"]), "metrics": dict(entry["metrics"])}
            for name, entry in state.items()
        }
