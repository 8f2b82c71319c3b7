"""Cached features, linear probes and k-NN against plain computations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from sarwmix.finetune.bench import Workbench
from sarwmix.finetune.probes import (
    FeatureDataset,
    feature_key,
    feature_path,
    fit_logistic_probe,
    knn_scores,
    load_features,
    pixel_fingerprint,
    save_features,
)
from sarwmix.heads import LinearProbe
from sarwmix.tasks.base import MultilabelTask, Task
from sarwmix.transforms import SarTransform
from tests.finetune_fixtures import STATISTICS, MeanModel, MemoryDataset
from util.distributed import Processes
from util.errors import UserError


def features_of(data: MemoryDataset, width: int = 12, seed: int = 0) -> np.ndarray:
    """Features that carry the labels, in noise of different scales."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((data.labels.shape[1], width))
    noise = rng.standard_normal((len(data), width))
    return ((data.labels @ mixing + noise) * np.linspace(0.1, 10, width) + 3).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_that_of_scikit_learn(k: int) -> None:
    train, test = MemoryDataset(200, seed=1), MemoryDataset(60, seed=2)
    known, queries = features_of(train), features_of(test, seed=5)
    scores = knn_scores(known, torch.from_numpy(train.labels).float(), queries, k=k)
    model = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute").fit(known, train.labels)
    expected = np.stack([p[:, 1] for p in model.predict_proba(queries)], axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_knn_needs_as_many_samples_as_neighbours() -> None:
    with pytest.raises(UserError, match="5 neighbours"):
        knn_scores(np.ones((4, 3), np.float32), torch.ones(4, 2), np.ones((1, 3), np.float32), k=5)


def test_feature_batches_keep_names_labels_and_order() -> None:
    data = MemoryDataset(9)
    cached = FeatureDataset(data, features_of(data))
    batch = cached.get_batch(np.array([4, 0, 8]))
    assert batch["name"] == [data.names[i] for i in (4, 0, 8)]
    assert np.array_equal(batch["label"].numpy(), data.labels[[4, 0, 8]])
    assert np.array_equal(batch["features"].numpy(), cached.features[[4, 0, 8]])
    assert batch["index"].tolist() == [4, 0, 8]
    assert "image" not in batch
    with pytest.raises(ValueError, match="feature rows"):
        FeatureDataset(data, cached.features[:3])


def test_cache_key_follows_everything_the_features_depend_on() -> None:
    data = MemoryDataset(5)
    torch.manual_seed(0)
    model = MeanModel()
    body = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def key(module: torch.nn.Module = body, size: int = 8, precision: str = "float32", **changes: object) -> str:
        identity = {**data.identity(), **changes}
        return feature_key(module, identity, STATISTICS.as_dict(), input_size=size, precision=precision)

    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    keys = [key(), key(size=16), key(precision="bfloat16"), key(split="val"), key(other)]
    assert len(set(keys)) == len(keys)
    assert key() == key()
    before = key(model)
    torch.nn.init.normal_(model.head.weight)
    assert key(model) == before  # features do not depend on the head


def test_cache_files_that_do_not_fit_are_computed_again(tmp_path: Path) -> None:
    path = feature_path(tmp_path / "cache", "train+val", "abc")
    assert "+" not in path.name
    assert load_features(path, 3) is None
    save_features(path, np.arange(6, dtype=np.float32).reshape(3, 2))
    loaded = load_features(path, 3)
    assert loaded is not None
    assert loaded.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert load_features(path, 4) is None
    path.write_bytes(b"not an array")
    assert load_features(path, 3) is None


def workbench(count: int = 40) -> Workbench:
    splits = {name: MemoryDataset(count, seed=i, split=name) for i, name in enumerate(("train", "val", "test"))}
    return Workbench(
        task=MultilabelTask(splits["train"].spec.classes),
        splits=splits,
        transform=SarTransform(size=8, mean=STATISTICS.mean, std=STATISTICS.std),
        processes=Processes(),
        group=Processes(),
        batch_size=16,
    )


def test_features_are_computed_once_and_used_again(tmp_path: Path) -> None:
    bench, model = workbench(), MeanModel()
    first = bench.with_features(model, tmp_path)
    assert sorted(path.name.split("_")[0] for path in tmp_path.glob("*.npy")) == ["test", "train", "val"]

    def refuse(*args: object) -> None:
        raise AssertionError("the encoder was run again")

    model.forward_features = refuse  # type: ignore[method-assign,assignment]
    second = bench.with_features(model, tmp_path)
    for name in bench.splits:
        assert np.array_equal(first.splits[name].features, second.splits[name].features)  # type: ignore[attr-defined]


def test_features_of_other_pixels_bands_or_options_are_computed_anew(tmp_path: Path) -> None:
    """The same sample names in every case."""
    bench, model = workbench(), MeanModel()
    first = bench.with_features(model, tmp_path)
    kept = len(list(tmp_path.iterdir()))
    changed = workbench()
    for data in changed.splits.values():
        data.images += 1  # type: ignore[attr-defined]
    second = changed.with_features(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * kept
    for name in bench.splits:
        new = second.splits[name].features  # type: ignore[attr-defined]
        assert not np.allclose(first.splits[name].features, new)  # type: ignore[attr-defined]
    replace(bench, options={"band_order": "VH,VV", "seed": None}).with_features(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 * kept
    replace(bench, options={"seed": None}).with_features(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 * kept
    for data in bench.splits.values():
        data.spec = replace(data.spec, bands=data.spec.bands[::-1])
    bench.with_features(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 * kept


def test_fingerprint_sees_sixteen_samples_over_the_whole_split() -> None:
    seen = []
    for changed in range(40):
        data = MemoryDataset(40)
        before = pixel_fingerprint(data)
        data.images[changed, 0, 0, 0] = np.nan
        if pixel_fingerprint(data) != before:
            seen.append(changed)
    assert len(seen) == 16
    assert {0, 39} <= set(seen)
    assert pixel_fingerprint(MemoryDataset(3)) == pixel_fingerprint(MemoryDataset(3))


def test_head_on_cached_features_equals_the_model_on_images(tmp_path: Path) -> None:
    bench, model = workbench(), MeanModel()
    cached = bench.with_features(model, tmp_path)
    on_images = bench.evaluate(model, "test").outputs["scores"]
    on_features = cached.evaluate(model.head, "test").outputs["scores"]
    np.testing.assert_allclose(on_features, on_images, atol=1e-5)


def test_knn_evaluation_has_metrics_and_no_loss(tmp_path: Path) -> None:
    bench = workbench().with_features(MeanModel(), tmp_path)
    report = bench.task.report(bench.knn("test", k=5).outputs)
    assert "loss" not in report.scalars
    assert 0 < report.scalars["ap_macro"] <= 1


def standardised(features: np.ndarray, like: np.ndarray) -> np.ndarray:
    wide = like.astype(np.float64)
    return (features - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-6)


def test_logistic_probe_is_scikit_learns_with_the_best_c_on_validation() -> None:
    splits = {name: MemoryDataset(150, seed=i, split=name) for i, name in enumerate(("train", "val", "test"))}
    cached = {name: FeatureDataset(data, features_of(data, seed=i)) for i, (name, data) in enumerate(splits.items())}
    task = MultilabelTask(splits["train"].spec.classes)
    probe = LinearProbe(12, task.num_outputs)
    grid = (0.001, 0.1, 10.0)
    sweep = fit_logistic_probe(task, probe, cached["train"], cached["val"], grid=grid)

    found = {}
    for c in grid:
        scores = []
        for k in range(task.num_outputs):
            model = LogisticRegression(C=c, max_iter=1000)
            model.fit(standardised(cached["train"].features, cached["train"].features), splits["train"].labels[:, k])
            scores.append(model.predict_proba(standardised(cached["val"].features, cached["train"].features))[:, 1])
        found[c] = np.mean([average_precision_score(splits["val"].labels[:, k], s) for k, s in enumerate(scores)])
        assert sweep[f"{c:g}"] == pytest.approx(found[c], abs=2e-3)
    best = max(grid, key=lambda c: found[c])
    with torch.no_grad():
        logits = probe(torch.from_numpy(cached["val"].features))
    value = task.report({k: v.numpy() for k, v in task.outputs(logits, torch.from_numpy(splits["val"].labels)).items()})
    assert value.scalars["ap_macro"] == pytest.approx(sweep[f"{best:g}"], abs=1e-6)


def test_logistic_probe_with_a_class_that_is_never_or_always_there() -> None:
    train, val = MemoryDataset(60, seed=1), MemoryDataset(60, seed=2)
    train.labels[:, 1], train.labels[:, 2] = 0, 1  # type: ignore[index]
    task = MultilabelTask(train.spec.classes)
    probe = LinearProbe(12, 4)
    fit_logistic_probe(task, probe, FeatureDataset(train, features_of(train)), FeatureDataset(val, features_of(val)))
    with torch.no_grad():
        logits = probe(torch.from_numpy(features_of(val)))
    assert (logits[:, 1] == -30).all()
    assert (logits[:, 2] == 30).all()


class Exclusive(MultilabelTask):
    exclusive = True
    primary = "accuracy"
    metric_names = ("accuracy",)

    def report(self, gathered):  # type: ignore[no-untyped-def]
        from sarwmix.tasks.metrics import Report

        return Report({"accuracy": float((gathered["scores"].argmax(1) == gathered["target"].argmax(1)).mean())})


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_probe_of_exclusive_classes_is_multinomial(classes: int) -> None:
    splits = []
    for seed in (1, 2):
        data = MemoryDataset(120, classes, seed=seed)
        data.labels[:] = np.eye(classes, dtype=np.uint8)[np.random.default_rng(seed).integers(0, classes, 120)]  # type: ignore[index]
        splits.append(FeatureDataset(data, features_of(data, seed=seed)))
    task: Task = Exclusive(splits[0].spec.classes)
    probe = LinearProbe(12, classes)
    sweep = fit_logistic_probe(task, probe, splits[0], splits[1], grid=(1.0,))
    model = LogisticRegression(C=1.0, max_iter=1000)
    model.fit(standardised(splits[0].features, splits[0].features), splits[0].labels.argmax(1))
    expected = model.predict_proba(standardised(splits[1].features, splits[0].features))
    with torch.no_grad():
        scores = probe(torch.from_numpy(splits[1].features)).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert sweep["1"] > 1 / classes


def test_cached_features_that_were_changed_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, values = tmp_path / "train_x.npy", np.arange(6, dtype=np.float32).reshape(3, 2)
    save_features(path, values)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load_features(path, 3) is None
    save_features(path, np.array([[1, np.nan]], np.float32))
    assert load_features(path, 1) is None
    save_features(path, values)
    assert np.array_equal(load_features(path, 3), values)  # type: ignore[arg-type]
