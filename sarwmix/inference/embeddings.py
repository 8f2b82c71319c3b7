"""Embeddings of a data set or a scene: computed batch by batch, kept as .npy or .parquet, and drawn as a 2-D map.

Shapes: N samples, D features, B samples of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sarwmix.data.base import SarDataset
from sarwmix.datasets.scenes import Scene, SceneReader
from sarwmix.figures import base as pictures
from sarwmix.figures.base import CYCLE
from sarwmix.inference.model import Pretrained
from sarwmix.inference.predict import Options, Source, _nothing, _tiles, radar_channels, resolve_unit, say_about_place
from sarwmix.transforms import starts
from util.errors import UserError
from util.log import Progress
from util.text import cells

FITTED = {"pca": 20_000, "tsne": 5_000}  # samples drawn, chosen at random when there are more
PANELS = 12  # classes drawn for samples with several labels
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FloatArray = NDArray[np.float32]
Batch = tuple[FloatArray, dict[str, list[Any]]]


@dataclass
class Embeddings:
    """Features with what is known of each sample.

    Attributes:
        features: (N, D) float32, may be mapped from a file.
        columns: name -> N values: name, labels, coordinates.
        colour: what the map is coloured by: multi-hot labels (N, K) bool, class numbers (N,), or VV in dB (N,) float.
        classes: names, where `colour` is labels.
    """

    features: FloatArray
    columns: dict[str, list[Any]] = field(default_factory=dict)
    colour: NDArray[Any] | None = None
    classes: tuple[str, ...] = ()


def dataset_batches(
    model: Pretrained, data: SarDataset, *, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[FloatArray, dict[str, list[Any]], NDArray[Any]]]:
    """Features of a data set, in its order.

    Yields:
        features (B, D), columns (name, label text), and what colours the map.
    """
    from sarwmix.data.loader import build_loader

    loader = build_loader(data, batch_size=batch_size, shuffle=False, drop_last=False, seed=0, num_workers=num_workers)
    progress = Progress(len(loader), title=data.spec.name)
    done = 0
    try:
        for number, batch in enumerate(loader):
            features = _checked(dataset_features(model, batch), batch["name"])
            indices = np.asarray(batch["index"])
            columns: dict[str, list[Any]] = {"name": list(batch["name"])}
            if data.labels is not None:
                colour = np.asarray(data.labels[indices])
                columns["label"] = [_label_text(row, data.spec.classes) for row in colour]
            else:
                image = batch["image1" if "image1" in batch else "image"]
                colour = _brightness(image.numpy(), data.spec.bands)
            done += len(features)
            yield features, columns, colour
            progress.update(number + 1, samples=done)
    finally:
        progress.close()
        loader.close()


@torch.no_grad()
def dataset_features(model: Pretrained, batch: Mapping[str, Any]) -> FloatArray:
    """Pooled features of a batch of the loader, (B, D)."""
    if model.task is not None and model.task.name == "pair":
        inputs = model.task.inputs(batch, model.transform, device=model.device)
        network: Any = model.model
        return network.forward_features(*inputs).float().cpu().numpy()
    return model.features(batch["image"]).cpu().numpy()


def _checked(features: FloatArray, names: Sequence[str]) -> FloatArray:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(
            f"features of {len(bad)} samples are not finite, first: {names[int(bad[0])]}; look at its pixels"
        )
    return features


def _label_text(row: Any, classes: Sequence[str]) -> str:
    if np.ndim(row):
        return "; ".join(name for name, there in zip(classes, row, strict=True) if there)
    return classes[int(row)]


def _brightness(images: NDArray[Any], bands: Sequence[str]) -> FloatArray:
    """Mean of VV (or of the first band) over the valid pixels of each image, in dB."""
    band = list(bands).index("VV") if "VV" in bands else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(images[:, band].astype(np.float64), axis=(1, 2)).astype(np.float32)


def scene_batches(
    model: Pretrained, scene: Scene, unit: str | None, options: Options
) -> Iterator[tuple[FloatArray, dict[str, list[Any]], NDArray[Any]]]:
    """Features of the tiles of a scene, row by row.

    Yields:
        features (B, D), columns (name, row, column, x, y, longitude and latitude, valid), and VV in dB.
    """
    if model.task is not None and model.task.name == "pair":
        raise UserError(
            f"{model.source} compares two images; features of a scene come from its pretraining checkpoint or from a "
            "model of single images"
        )
    say_about_place(scene)
    reader = SceneReader(None)
    source = Source(scene, reader, resolve_unit(reader, scene, unit, model.bands), radar_channels(model.bands))
    tile = model.tile
    stride = options.stride or tile
    rows, columns = starts(scene.height, tile, stride), starts(scene.width, tile, stride)
    found = False
    progress = Progress(len(rows), title=scene.name)
    try:
        for number, (row, strip, _) in enumerate(source.strips(rows, tile)):
            for some, shares, images in _tiles(strip, columns, tile, options.least, options.batch_size):
                names = [f"{scene.name}_r{row}_c{column}" for column in some]
                features = _checked(model.features(images).cpu().numpy(), names)
                found = True
                place = _coordinates(scene, row, some, tile)
                facts: dict[str, list[Any]] = {
                    "name": names,
                    "row": [row] * len(some),
                    "column": list(some),
                    **place,
                    "valid": shares,
                }
                yield features, facts, _brightness(images.numpy(), model.bands)
            progress.update(number + 1)
    finally:
        progress.close()
    if not found:
        raise _nothing(scene, options)


def _coordinates(scene: Scene, row: int, columns: Sequence[int], tile: int) -> dict[str, list[float]]:
    """Centres of tiles in the scene's system, and as longitude and latitude where it has one."""
    a, b, c, d, e, f = scene.transform
    # A scene smaller than a tile has one, which ends with the scene.
    middle, down = np.array(columns) + min(tile, scene.width) / 2, row + min(tile, scene.height) / 2
    x, y = a * middle + b * down + c, d * middle + e * down + f
    place = {"x": x.tolist(), "y": y.tolist()}
    if scene.crs:
        from rasterio.crs import CRS
        from rasterio.warp import transform

        longitude, latitude = transform(CRS.from_wkt(scene.crs), "EPSG:4326", x.tolist(), y.tolist())
        place |= {"longitude": list(longitude), "latitude": list(latitude)}
    return place


def collect(
    batches: Iterator[tuple[FloatArray, dict[str, list[Any]], NDArray[Any]]], work: Path, classes: Sequence[str]
) -> Embeddings:
    """Write the features to `work` as they come, and open them mapped: memory does not grow with their number."""
    raw, count, width = work / "features.raw", 0, 0
    columns: dict[str, list[Any]] = {}
    colours: list[NDArray[Any]] = []
    with open(raw, "wb") as stream:
        for features, facts, colour in batches:
            stream.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())
            count, width = count + len(features), features.shape[1]
            for name, values in facts.items():
                columns.setdefault(name, []).extend(values)
            colours.append(colour)
    if not count:
        raise UserError("there is no sample; nothing was written")
    mapped = np.memmap(raw, dtype=np.float32, mode="r", shape=(count, width))
    return Embeddings(mapped, columns, np.concatenate(colours), tuple(classes))


def save_npy(path: Path, found: Embeddings) -> None:
    """(N, D) float32, and a CSV of the same name with the names and all else that is known, in the same order."""
    import csv

    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=found.features.shape)
    for start in range(0, len(target), 4096):
        target[start : start + 4096] = found.features[start : start + 4096]
    target.flush()
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(cells(found.columns))
        writer.writerows(cells(row) for row in zip(*found.columns.values(), strict=True))


def save_parquet(path: Path, found: Embeddings, metadata: Mapping[str, str]) -> None:
    """One row a sample: what is known of it, and `features` as a list of D float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, width = found.features.shape
    types = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    fields = [pa.field(name, types[type(values[0])]) for name, values in found.columns.items()]
    schema = pa.schema([*fields, pa.field("features", pa.list_(pa.float32(), width))], metadata=dict(metadata))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 8192):
            part = slice(start, min(start + 8192, count))
            flat = pa.array(np.asarray(found.features[part]).ravel(), pa.float32())
            arrays = [pa.array(values[part], schema.field(name).type) for name, values in found.columns.items()]
            writer.write_table(
                pa.Table.from_arrays([*arrays, pa.FixedSizeListArray.from_arrays(flat, width)], schema=schema)
            )


def project(features: FloatArray, method: str, *, seed: int = 0) -> tuple[NDArray[Any], NDArray[np.int64], str]:
    """Features -> points in the plane.

    Args:
        features: (N, D).
        method: "pca" or "tsne".
        seed: of the choice of samples and of t-SNE.

    Returns:
        (n, 2) points, the samples they belong to (n,), and what the picture says about the method.
    """
    count = len(features)
    if count < 3:
        raise UserError(f"a map of features needs three samples or more, there are {count}; leave it out with --no_map")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[: FITTED[method]])
    values = np.asarray(features[chosen], dtype=np.float64)
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-12)
    from sklearn.decomposition import PCA

    shown = f"{len(chosen):,} of {count:,} samples" if len(chosen) < count else f"{count:,} samples"
    if method == "pca":
        reduced = PCA(n_components=2, svd_solver="randomized", random_state=seed)
        points = reduced.fit_transform(values)
        first, second = 100 * reduced.explained_variance_ratio_
        return (
            points,
            chosen,
            f"PCA of standardised features: {first:.0f} % and {second:.0f} % of the variance; {shown}",
        )
    from sklearn.manifold import TSNE

    small = PCA(n_components=min(50, *values.shape), random_state=seed).fit_transform(values)
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    points = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(small)
    return points, chosen, f"t-SNE (perplexity {perplexity:g}) of standardised features after PCA; {shown}"


def map_figure(path: Path, found: Embeddings, method: str, *, title: str, seed: int = 0) -> Path:
    """Draw the map, coloured by label, or by VV where there are none.

    Several labels a sample: a panel for each of the most frequent classes. One class a sample: a colour and a marker
    for each. Neither: the mean backscatter of the sample.
    """
    points, chosen, note = project(found.features, method, seed=seed)
    assert found.colour is not None
    colour = found.colour[chosen]
    if colour.ndim == 2:
        figure = _multilabel_map(points, colour.astype(bool), found.classes, title, note)
    else:
        figure = _single_map(points, colour, found.classes, title, note, method)
    return pictures.save_figure(figure, path)


def _axis_names(method: str) -> tuple[str, str]:
    return ("first principal component", "second principal component") if method == "pca" else ("t-SNE 1", "t-SNE 2")


def _single_map(
    points: NDArray[Any], colour: NDArray[Any], classes: Sequence[str], title: str, note: str, method: str
) -> Any:
    figure = pictures.new_figure(8.6, 6.2)
    axes = figure.add_axes((0.085, 0.1, 0.58, 0.76))
    size = float(np.clip(550 / len(points) ** 0.5, 3, 30))
    if classes and not np.issubdtype(colour.dtype, np.floating):
        for number, name in enumerate(classes):
            here = colour == number
            axes.scatter(
                points[here, 0], points[here, 1], s=size, alpha=0.8, linewidths=0,
                color=CYCLE[number % len(CYCLE)], marker=MARKERS[(number // len(CYCLE)) % len(MARKERS)],
                label=pictures.fit_text(f"{name} ({here.sum():,})", 2.1, 7.5, lines=2),
            )  # fmt: skip
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7.5, frameon=False, markerscale=1.6, title="class"
        )
    else:
        drawn = axes.scatter(points[:, 0], points[:, 1], c=colour, cmap="cividis", s=size, alpha=0.85, linewidths=0)
        bar = figure.add_axes((0.71, 0.1, 0.025, 0.76))
        figure.colorbar(drawn, cax=bar).set_label("mean VV backscatter (dB)", fontsize=9)
        bar.tick_params(labelsize=8)
    first, second = _axis_names(method)
    axes.set_xlabel(first, fontsize=9)
    axes.set_ylabel(second, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    _head(figure, title, note)
    return figure


def _multilabel_map(
    points: NDArray[Any], labels: NDArray[np.bool_], classes: Sequence[str], title: str, note: str
) -> Any:
    support = labels.sum(axis=0)
    order = [int(k) for k in np.argsort(-support, kind="stable") if support[k]][:PANELS]
    columns = 4
    rows = max(1, -(-len(order) // columns))
    width, height = 11.0, 0.95 + 2.75 * rows
    figure = pictures.new_figure(width, height)
    size = float(np.clip(200 / len(points) ** 0.5, 1.5, 16))
    for place, number in enumerate(order):
        row, column = divmod(place, columns)
        left, bottom = 0.15 + column * 2.7, height - 0.62 - (row + 1) * 2.75 + 0.12
        axes = figure.add_axes((left / width, bottom / height, 2.55 / width, 2.2 / height))
        here = labels[:, number]
        axes.scatter(points[~here, 0], points[~here, 1], s=size, color="#CCCCCC", linewidths=0)
        axes.scatter(points[here, 0], points[here, 1], s=size, color=pictures.BLUE, alpha=0.8, linewidths=0)
        axes.set_xticks([])
        axes.set_yticks([])
        name = pictures.fit_text(f"{classes[number]} ({support[number]:,})", 2.55, 7, lines=2)
        axes.set_title(name, fontsize=7, pad=3)
    more = f" The {PANELS} most frequent of {int((support > 0).sum())} classes." if len(order) == PANELS else ""
    figure.text(0.15 / width, 0.1 / height, f"Blue: has the class. Grey: has not.{more}", fontsize=8)
    _head(figure, title, note)
    return figure


def _head(figure: Any, title: str, note: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.12 / height, pictures._wrap(title, width - 0.3, 11), fontsize=11, weight="bold",
                va="top")  # fmt: skip
    lines = pictures._wrap(title, width - 0.3, 11).count("\n") + 1
    figure.text(0.15 / width, 1 - (0.18 + 0.2 * lines) / height, note, fontsize=8.5, va="top")
