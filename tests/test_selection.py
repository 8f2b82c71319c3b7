"""Selection rules: the published cases, ties, and scores that survive a resume."""

from __future__ import annotations

import json

import pytest

from sarwmix.tasks.selection import (
    BEST,
    SIX_METRICS,
    Selector,
    in_fractions,
    most_best_results,
    multilabel_rules,
    selection_rules,
    weighted_sum_rule,
)
from tests.conftest import PARITY
from util.errors import UserError


def metrics(*values: float) -> dict[str, float]:
    return dict(zip(SIX_METRICS, values, strict=True))


def test_most_best_results_agrees_with_all_published_cases() -> None:
    content = json.loads((PARITY / "most_best_results.json").read_text())
    assert [name.replace("prec_", "precision_") for name in content["metrics"]] == list(SIX_METRICS)
    assert len(content["cases"]) == 60
    for new, best, replaces in content["cases"]:
        assert most_best_results(metrics(*new), metrics(*best)) is replaces, (new, best)


def test_most_best_results_by_hand() -> None:
    best = metrics(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert most_best_results(metrics(0.6, 0.5, 0.5, 0.5, 0.5, 0.5), best)
    assert not most_best_results(best, best)  # the earlier epoch stays
    # 3 against 3: the macro ones (1st, 3rd, 5th) decide
    assert most_best_results(metrics(0.6, 0.4, 0.6, 0.4, 0.6, 0.4), best)
    assert not most_best_results(metrics(0.4, 0.6, 0.4, 0.6, 0.4, 0.6), best)
    # 2 against 2 with equal macro counts: nothing decides, the earlier stays
    assert not most_best_results(metrics(0.6, 0.4, 0.4, 0.6, 0.5, 0.5), best)


def test_the_three_rules_and_their_weights() -> None:
    first, second, third = multilabel_rules()
    assert [(rule.name, rule.filename) for rule in (first, second, third)] == [
        ("weighted", "checkpoint_best_weighted.pth"),
        ("sum", "checkpoint_best_default.pth"),
        ("mbr", "checkpoint_best_mbr.pth"),
    ]
    values = metrics(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    # 1.3 F1macro + 1.1 F1micro + 1.2 APmacro + 1.2 Pmacro
    assert first.score(values) == pytest.approx(1.3 * 0.3 + 1.1 * 0.4 + 1.2 * 0.1 + 1.2 * 0.5)
    assert second.score(values) == pytest.approx(2.1)


def test_an_epoch_that_only_ties_does_not_replace() -> None:
    selector = Selector(multilabel_rules())
    values = metrics(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert len(selector.update(0, values)) == 3
    assert selector.update(1, values) == []
    assert {entry["epoch"] for entry in selector.best.values()} == {0}


def test_rules_choose_independently() -> None:
    selector = Selector(multilabel_rules())
    selector.update(0, metrics(0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    # precision micro alone is much better: the sum rises, the weighted sum does not see it, five of six ranks are lost
    assert selector.update(1, metrics(0.49, 0.49, 0.49, 0.49, 0.49, 0.9)) == ["checkpoint_best_default.pth"]
    assert selector.best["checkpoint_best_default.pth"]["epoch"] == 1
    assert selector.best["checkpoint_best_weighted.pth"]["epoch"] == 0


def test_best_scores_survive_a_resume() -> None:
    epochs = [metrics(*(value + 0.01 * k for k in range(6))) for value in (0.3, 0.5, 0.4, 0.5, 0.6)]
    whole = Selector(multilabel_rules())
    for epoch, values in enumerate(epochs):
        whole.update(epoch, values)
    first = Selector(multilabel_rules())
    for epoch in range(2):
        first.update(epoch, epochs[epoch])
    state = json.loads(json.dumps(first.state_dict()))
    second = Selector(multilabel_rules())
    second.load_state_dict(state)
    assert second.update(2, epochs[2]) == []  # worse than epoch 1: would be "best" had the scores been forgotten
    for epoch in (3, 4):
        second.update(epoch, epochs[epoch])
    assert second.best == whole.best


def test_the_epoch_shown_is_the_best_by_the_metric_shown() -> None:
    """An untrained probe that claims much wins by the composite of F1 and precision, never by average precision."""
    rules = selection_rules("ap_macro", SIX_METRICS, multilabel_rules(), keep_published=True)
    assert [(rule.name, rule.filename) for rule in rules] == [
        ("ap_macro", "checkpoint_best.pth"),
        ("weighted", "checkpoint_best_weighted.pth"),
        ("sum", "checkpoint_best_default.pth"),
        ("mbr", "checkpoint_best_mbr.pth"),
    ]
    selector = Selector(rules)
    selector.update(0, metrics(0.24, 0.24, 0.35, 0.4, 0.25, 0.3))
    selector.update(1, metrics(0.38, 0.38, 0.1, 0.2, 0.3, 0.5))
    assert {entry["rule"]: entry["epoch"] for entry in selector.best.values()} == {
        "ap_macro": 1, "weighted": 0, "sum": 1, "mbr": 1,
    }  # fmt: skip
    assert selector.best["checkpoint_best.pth"]["score"] == 0.38
    assert selector.waited(1) == 0
    assert selector.waited(4) == 3


def test_a_published_rule_by_name_and_rules_that_do_not_exist() -> None:
    rules = selection_rules("weighted", SIX_METRICS, multilabel_rules(), keep_published=True)
    assert [rule.filename for rule in rules] == [
        "checkpoint_best.pth", "checkpoint_best_default.pth", "checkpoint_best_mbr.pth",
    ]  # fmt: skip
    (alone,) = selection_rules("mbr", SIX_METRICS, multilabel_rules())
    assert (alone.name, alone.filename) == ("mbr", "checkpoint_best.pth")
    with pytest.raises(UserError, match="--select ap is neither a metric of this task .* nor a published rule"):
        selection_rules("ap", SIX_METRICS, multilabel_rules())
    with pytest.raises(UserError, match=r"neither a metric of this task \(acc\)$"):
        selection_rules("mbr", ["acc"])


def test_a_run_goes_on_with_the_rule_that_it_was_started_with() -> None:
    started = Selector(selection_rules("f1_macro", SIX_METRICS, multilabel_rules()))
    started.update(0, metrics(*[0.5] * 6))
    other = Selector(selection_rules("ap_macro", SIX_METRICS, multilabel_rules()))
    with pytest.raises(UserError, match="by 'f1_macro', this command by 'ap_macro'; resume with --select f1_macro"):
        other.load_state_dict(started.state_dict())


def test_runs_of_earlier_versions_selected_by_the_published_rules() -> None:
    """Three files without names of rules; one file was the highest metric."""
    entry = {"epoch": 3, "score": 1.0, "metrics": metrics(*[0.5] * 6)}
    old = {"checkpoint_best.pth": entry, "checkpoint_best_default.pth": entry, "checkpoint_best_mbr.pth": entry}
    with pytest.raises(UserError, match="resume with --select weighted"):
        Selector(selection_rules("ap_macro", SIX_METRICS, multilabel_rules())).load_state_dict(old)
    selector = Selector(selection_rules("weighted", SIX_METRICS, multilabel_rules(), keep_published=True))
    selector.load_state_dict(old)
    assert [one["rule"] for one in selector.best.values()] == ["weighted", "sum", "mbr"]
    single = Selector(selection_rules("acc", ["acc"]))
    single.load_state_dict({"checkpoint_best.pth": {"epoch": 1, "score": 0.5, "metrics": {"acc": 0.5}}})
    assert single.best["checkpoint_best.pth"]["epoch"] == 1


def test_two_rules_with_one_file_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Selector([weighted_sum_rule("x", "a.pth", {"x": 1.0}), weighted_sum_rule("y", "a.pth", {"y": 1.0})])


def test_accuracy_in_percent_of_earlier_versions_becomes_a_fraction() -> None:
    """A flood run of an earlier version goes on: 80 % is not better than .9 of a new epoch."""
    selector = Selector(selection_rules("acc", ["acc", "f1"]))
    entry = {"rule": "acc", "epoch": 3, "score": 80.0, "metrics": {"acc": 80.0, "f1": 0.5}}
    selector.load_state_dict({BEST: entry})
    assert selector.best[BEST] == {"rule": "acc", "epoch": 3, "score": 0.8, "metrics": {"acc": 0.8, "f1": 0.5}}
    assert selector.update(4, {"acc": 0.9, "f1": 0.4}) == [BEST]
    by_f1 = in_fractions({"rule": "f1", "epoch": 0, "score": 0.5, "metrics": {"acc": 55.0, "f1": 0.5}})
    assert (by_f1["score"], by_f1["metrics"]["acc"]) == (0.5, 0.55)
    assert in_fractions({"epoch": 0, "score": 1.0, "metrics": {"acc": 1.0}})["score"] == 1.0
