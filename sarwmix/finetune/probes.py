"""Frozen encoders: features computed once, kept in a file, and what is done with them: linear probes and k-NN.

Shapes: N samples, D features, K classes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sarwmix.data.base import SarDataset, labels_digest
from sarwmix.heads import LinearProbe
from sarwmix.tasks.base import Task
from util.arrays import load_npy
from util.errors import UserError
from util.files import atomic_write, make_directory, read_bytes, sha256_file
from util.log import get_logger

FINGERPRINT_SAMPLES = 16
C_GRID = tuple(float(c) for c in np.logspace(-4, 3, 8))  # inverse regularisation strengths tried on validation
KNN_CHUNK = 1024  # query rows per matrix product


class FeatureDataset(SarDataset):
    """The samples of another data set as cached features: same names, labels and order; batches hold ``features``."""

    def __init__(self, parent: SarDataset, features: np.ndarray) -> None:
        """
        Args:
            parent: what the features were computed from.
            features: (N, D) float32, in the order of parent.
        """
        if len(features) != len(parent):
            raise ValueError(f"{len(features)} feature rows for {len(parent)} samples")
        super().__init__(
            parent.spec,
            parent.split,
            parent.statistics,
            parent.names,
            parent.labels,
            source=f"features of {parent.source}",
        )
        self.features = features
        self.parent = parent

    @property
    def clusters(self) -> Sequence[str] | None:
        return self.parent.clusters

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 1, self.features.shape[1]

    def get_batch(self, indices: np.ndarray, out: np.ndarray | None = None) -> dict[str, Any]:
        """``features`` (B, D) float32, ``label``, ``name``, ``index``, ``replaced`` (always empty)."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = torch.from_numpy(np.ascontiguousarray(self.features[indices]))
        batch = self.make_batch(rows, indices, [])
        batch["features"] = batch.pop("image")
        return batch


def feature_key(
    model: nn.Module, identity: Mapping[str, Any], statistics: Mapping[str, Any], *, input_size: int, precision: str
) -> str:
    """Name of a feature file: it changes with anything the features depend on.

    Args:
        model: its weights without the head.
        identity: what tells the data apart: names and their order, bands, options, `pixel_fingerprint`.
        statistics: mean and std in use.
        input_size: side of the input.
        precision: autocast type or "float32".
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith("head."):
            continue
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    facts = {
        **identity,
        "mean": list(statistics["mean"]),
        "std": list(statistics["std"]),
        "input_size": input_size,
        "precision": precision,
        "model": type(model).__name__ + getattr(model, "feature_settings", ""),
    }
    digest.update(repr(sorted(facts.items())).encode())
    return digest.hexdigest()[:20]


def pixel_fingerprint(data: SarDataset) -> str:
    """Hash of the images of up to 16 evenly spread samples, as the transform gets them.

    Names alone do not tell whether the pixels under them are those that features were computed from.
    """
    count = min(FINGERPRINT_SAMPLES, len(data))
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(data) - 1, count).astype(np.int64)):
        batch = data.get_batch(np.array([index]))
        for key in ("image", "image1", "image2"):
            if key in batch:
                image = batch[key].numpy()
                digest.update(repr((key, image.shape)).encode())
                digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def data_hashes(data: SarDataset) -> dict[str, Any]:
    """What tells whether two runs saw the same samples: count and hashes of names, labels and some pixels.

    ``pixels_sha256`` is None where one of the samples that it reads cannot be used.
    """
    found: dict[str, Any] = {"count": len(data), "names_sha256": data.names.digest()}
    if data.labels is not None:
        found["labels_sha256"] = labels_digest(data.labels)
    try:
        found["pixels_sha256"] = pixel_fingerprint(data)
    except UserError:
        found["pixels_sha256"] = None
    return found


def feature_path(folder: str | Path, split: str, key: str) -> Path:
    """Where a split's features lie."""
    return Path(folder) / f"{split.replace('+', '_')}_{key}.npy"


def load_features(path: Path, count: int) -> np.ndarray | None:
    """Features from the cache, (N, D) float32 mapped from the file, or None when they are not there, do not fit, or are
    not what was written: a checksum lies beside them."""
    try:
        features = load_npy(path, mapped=True)
        recorded = read_bytes(_checksum_path(path), 200).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        get_logger().warning("cached features %s cannot be read (%s); they are computed again", path, error)
        return None
    if features.ndim != 2 or len(features) != count or features.dtype != np.float32:
        get_logger().warning("cached features %s do not fit %d samples; they are computed again", path, count)
        return None
    if recorded != sha256_file(path) or not np.isfinite(features.sum(dtype=np.float64)):
        get_logger().warning("cached features %s are not what was written; they are computed again", path)
        return None
    return features


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_features(path: Path, features: np.ndarray) -> None:
    """Write features and their checksum, each atomically: a kill in between leaves what is computed again."""
    make_directory(path.parent)
    with atomic_write(path) as stream:
        np.save(stream, features, allow_pickle=False)
    with atomic_write(_checksum_path(path), "w") as stream:
        stream.write(sha256_file(path) + "\n")


@torch.no_grad()
def knn_scores(
    train: np.ndarray, labels: Tensor, queries: np.ndarray, *, k: int = 5, device: torch.device | None = None
) -> np.ndarray:
    """Class scores by the k nearest neighbours in cosine similarity: the share of them that has the class.

    Args:
        train: (N, D) features of the labelled samples.
        labels: (N, K) label probabilities, multi-hot or one-hot.
        queries: (M, D).
        k: neighbours; at most N.
        device: where the products are computed.

    Returns:
        (M, K) float64 in [0, 1].

    Raises:
        UserError: fewer labelled samples than neighbours.
    """
    if len(train) < k:
        raise UserError(f"k-NN with {k} neighbours needs as many labelled samples, there are {len(train)}")
    device = device or torch.device("cpu")
    known = nn.functional.normalize(torch.from_numpy(np.array(train)).to(device), dim=1)
    values = labels.to(device, torch.float64)
    scores = []
    for start in range(0, len(queries), KNN_CHUNK):
        rows = torch.from_numpy(np.array(queries[start : start + KNN_CHUNK])).to(device)
        near = (nn.functional.normalize(rows, dim=1) @ known.T).topk(k, dim=1).indices  # (m, k)
        scores.append(values[near].mean(dim=1))
    return torch.cat(scores).cpu().numpy()


def fit_logistic_probe(
    task: Task,
    probe: nn.Module,
    train: SarDataset,
    val: SarDataset,
    *,
    grid: Sequence[float] = C_GRID,
    max_iter: int = 1000,
) -> dict[str, float]:
    """Fit a linear probe by scikit-learn's L-BFGS; the regularisation is chosen on validation.

    Features are standardised with the training split's mean and deviation, as the probe's BatchNorm without affine
    parameters does at evaluation.

    Args:
        task: gives targets, scores and the rule to maximise (`task.select`).
        probe: a `LinearProbe`; gets the best weights.
        train: labelled `FeatureDataset` to fit.
        val: labelled `FeatureDataset` to choose C on.
        grid: inverse regularisation strengths.
        max_iter: L-BFGS iterations for each fit.

    Returns:
        The validation score of each C.
    """
    assert isinstance(train, FeatureDataset)
    assert isinstance(val, FeatureDataset)
    assert isinstance(probe, LinearProbe)
    cpu = torch.device("cpu")
    device = probe.linear.weight.device
    probe.to(cpu).eval()
    features = np.asarray(train.features, dtype=np.float64)
    probe.norm.running_mean = torch.from_numpy(features.mean(axis=0)).float()
    probe.norm.running_var = torch.from_numpy(features.var(axis=0)).float()
    batch, val_batch = whole_split(train), whole_split(val)
    with torch.no_grad():
        inputs = probe.norm(batch["features"]).double().numpy()
    target = task.soft_target(task.target(batch, cpu)).numpy() > 0.5  # (N, K)
    rule = task.rules()[0]
    found: dict[str, float] = {}
    best: dict[str, Tensor] = {}
    unfinished: list[str] = []
    for c in grid:
        weight, bias, done = _logistic(inputs, target, c, exclusive=task.exclusive, max_iter=max_iter)
        if not done:
            unfinished.append(f"{c:g}")
        with torch.no_grad():
            probe.linear.weight.copy_(torch.from_numpy(weight))
            probe.linear.bias.copy_(torch.from_numpy(bias))
            outputs = task.outputs(probe(val_batch["features"]), task.target(val_batch, cpu))
        value = rule.score(task.report({key: out.numpy() for key, out in outputs.items()}).scalars)
        get_logger().info("L-BFGS probe, C = %g: validation %s %.4f", c, rule.name, value)
        if not found or value > max(found.values()):
            best = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
        found[f"{c:g}"] = value
    probe.load_state_dict(best)
    probe.to(device)
    chosen = max(found, key=found.__getitem__)
    if unfinished:
        get_logger().warning(
            "L-BFGS had not converged after %d iterations at C = %s; the numbers there depend on rounding",
            max_iter, ", ".join(unfinished),
        )  # fmt: skip
    if len(grid) > 1 and chosen in (f"{min(grid):g}", f"{max(grid):g}"):
        get_logger().warning(
            "the best C = %s is the end of the grid %g to %g: a better one may lie beyond, and rounding may decide",
            chosen, min(grid), max(grid),
        )  # fmt: skip
    return found


def whole_split(dataset: FeatureDataset) -> dict[str, Any]:
    """All samples as one batch."""
    return dataset.get_batch(np.arange(len(dataset)))


def _logistic(
    inputs: np.ndarray, target: np.ndarray, c: float, *, exclusive: bool, max_iter: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Weights (K, D) and biases (K,) of one multinomial or K logistic regressions, and whether all converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = target.shape[1]
    weight, bias = np.zeros((classes, inputs.shape[1])), np.zeros(classes)

    done = True

    def fit(y: np.ndarray) -> Any:
        nonlocal done
        with warnings.catch_warnings():  # said once for all classes, in our own words
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=c, max_iter=max_iter).fit(inputs, y)
        done = done and int(np.max(fitted.n_iter_)) < max_iter
        return fitted

    if exclusive:
        fitted = fit(target.argmax(axis=1))
        if len(fitted.classes_) == 2:  # one row decides between the two
            low, high = (int(label) for label in fitted.classes_)
            weight[high], bias[high] = fitted.coef_[0] / 2, fitted.intercept_[0] / 2
            weight[low], bias[low] = -weight[high], -bias[high]
        else:
            weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
        bias[[k for k in range(classes) if k not in fitted.classes_]] = -30.0  # never seen: never predicted
        return weight, bias, done
    for k in range(classes):
        share = target[:, k].mean()
        if share in (0.0, 1.0):  # nothing to separate: a constant answer
            bias[k] = 30.0 if share else -30.0
            continue
        fitted = fit(target[:, k])
        weight[k], bias[k] = fitted.coef_[0], fitted.intercept_[0]
    return weight, bias, done
