"""Selection rules: the published cases, ties, and scores that survive a resume."""

from __future__ import annotations

import json

import pytest

from sarwmix.selection import SIX_METRICS, Selector, most_best_results, multilabel_rules, weighted_sum_rule
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
    assert [first.filename, second.filename, third.filename] == [
        "checkpoint_best.pth",
        "checkpoint_best_default.pth",
        "checkpoint_best_mbr.pth",
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
    assert selector.best["checkpoint_best.pth"]["epoch"] == 0


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


def test_state_of_another_task_is_refused() -> None:
    selector = Selector([weighted_sum_rule("checkpoint_best.pth", {"accuracy": 1.0})])
    other = Selector(multilabel_rules())
    other.update(0, metrics(*[0.5] * 6))
    with pytest.raises(UserError, match="best scores"):
        selector.load_state_dict(other.state_dict())


def test_two_rules_with_one_file_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Selector([weighted_sum_rule("a.pth", {"x": 1.0}), weighted_sum_rule("a.pth", {"y": 1.0})])
