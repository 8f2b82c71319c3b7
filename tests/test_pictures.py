"""Pictures: they are written whole, hold what they should, and nothing is clipped or covered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sarwmix.data.labels import CLASSES_19
from sarwmix.figures import base as pictures
from sarwmix.figures import quicklook


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Figures that were saved during a test, checked for texts outside the picture at its end."""
    seen: list[Figure] = []
    save = pictures.save_figure

    def remember(figure: Figure, *args: Any, **options: Any) -> Path:
        seen.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(pictures, "save_figure", remember)
    yield seen
    for figure in seen:
        check_nothing_is_clipped(figure)


def check_nothing_is_clipped(figure: Figure) -> None:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.bbox.width, figure.bbox.height
    texts = list(figure.texts)
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)
            texts += [label for place, label in ticks if low <= place <= high]
    for text in texts:
        if text.get_text() and text.get_visible():
            box = text.get_window_extent(renderer)
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, f"{text.get_text()!r} leaves the picture: {box} in {width}x{height}"


def batch(count: int = 3, size: int = 128) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    original = rng.normal(-12, 3, (count, 2, size, size)) - np.array([6.0, 0.0])[None, :, None, None]
    mask = np.array([1, 0, 1, 0] * 4)
    hidden = np.kron(mask.reshape(4, 4), np.ones((size // 4, size // 4))) > 0
    return {
        "original_db": original,
        "mixed_db": np.where(hidden, original[::-1], original),
        "mask": mask,
        "reconstruction_db": np.where(hidden, original + 2.0, original),
        "weights": np.full(original.shape, 2.0),
    }


def test_reconstruction_panel(tmp_path: Path, figures: list[Figure]) -> None:
    data = batch()
    data["original_db"][0, :, :10, :10] = np.nan
    names = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_{number}" for number in range(3)]
    path = tmp_path / "r.png"
    written = pictures.reconstruction_panel(path, names=names, bands=("VH", "VV"), title="a " * 80, **data)
    assert written == [path]
    assert imread(written[0]).ndim == 3
    images = [axes for axes in figures[0].axes if axes.images]
    assert len(images) == 3 * 2 * 6
    # Fixed grey scales: the same for every sample.
    assert {axes.images[0].get_clim() for axes in images[0::12]} == {pictures.GREY_DB["VH"]}
    assert {axes.images[0].get_clim() for axes in images[6::12]} == {pictures.GREY_DB["VV"]}
    titles = " ".join(axes.get_title() for axes in figures[0].axes)
    for expected in (
        "original",
        "mixed input",
        "mask",
        "reconstruction",
        "absolute error",
        "loss weight",
        "VH backscatter (dB)",
        "VV backscatter (dB)",
        "absolute error (dB)",
    ):
        assert expected in titles
    texts = " ".join(text.get_text() for text in figures[0].texts)
    assert texts.count("VH 2.00 dB, VV 2.00 dB") == 3
    assert all(name in texts for name in names)
    # Cells that the model saw are covered: 8 of 16.
    assert len(images[3].patches) == 8
    assert images[5].images[0].get_clim() == (1.0, math.e)


def test_more_samples_go_to_more_pages(tmp_path: Path) -> None:
    data = batch(10, 32)
    written = pictures.reconstruction_panel(
        tmp_path / "r.png", names=[str(i) for i in range(10)], bands=("VH", "VV"), title="pages", **data
    )
    assert [path.name for path in written] == ["r.png", "r_page02.png"]
    assert all(path.is_file() for path in written)


def test_weights_beyond_the_usual_range_have_their_own_scale(tmp_path: Path, figures: list[Figure]) -> None:
    data = batch(1, 32)
    data["weights"] = np.linspace(0.5, 7.0, data["weights"].size).reshape(data["weights"].shape)
    pictures.reconstruction_panel(tmp_path / "r.png", names=["a"], bands=("VH", "VV"), title="t", **data)
    assert figures[0].axes[5].images[0].get_clim() == (0.5, 7.0)


@pytest.mark.parametrize(("change", "message"), [
    ({"mask": np.ones(15)}, "no square"),
    ({"weights": np.ones((3, 2, 4, 4))}, "weights has shape"),
    ({"names": ["one"]}, "1 names"),
    ({"mask": np.ones(25)}, "cannot be cut"),
])  # fmt: skip
def test_shapes_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"names": ["a", "b", "c"], "bands": ("VH", "VV"), "title": "t"}
    arguments |= {**batch(3, 32), **change}
    with pytest.raises(ValueError, match=message):
        pictures.reconstruction_panel(tmp_path / "r.png", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet(tmp_path: Path, figures: list[Figure]) -> None:
    images = batch(7, 24)["original_db"]
    images[2] = np.nan
    captions = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_{n}: " + ", ".join(CLASSES_19[:n]) for n in range(7)]
    pictures.contact_sheet(tmp_path / "c.png", images, bands=("VH", "VV"), captions=captions, title="title", columns=3)
    assert sum(bool(axes.images) for axes in figures[0].axes) == 14
    pictures.contact_sheet(tmp_path / "one.png", images[:1], bands=("VH", "VV"), captions=["x"], title="one")


def test_histogram_bars_curves_and_table(tmp_path: Path, figures: list[Figure]) -> None:
    edges = np.arange(-40.0, 10.5, 0.5)
    pixels = {"VH": np.random.default_rng(0).normal(-18, 3, 5000), "VV": np.random.default_rng(1).normal(-11, 3, 5000)}
    pictures.histogram_figure(
        tmp_path / "h.png",
        edges=edges,
        title="t",
        counts={band: np.histogram(values, edges)[0] for band, values in pixels.items()},
        marks={band: {"mean": float(values.mean())} for band, values in pixels.items()},
    )
    assert figures[0].axes[-1].get_xlabel() == "backscatter (dB)"
    values = np.linspace(0, 1, 19)
    values[4] = np.nan
    pictures.bar_figure(
        tmp_path / "b.png",
        labels=CLASSES_19,
        values={"a": values, "b": values / 2},
        unit="AP",
        title="t",
        intervals={"a": np.stack([values - 0.05, values + 0.05], axis=1)},
    )
    assert "none" in [text.get_text() for text in figures[1].axes[0].texts]
    epochs = np.arange(64)
    pictures.curves_figure(
        tmp_path / "c.png",
        x_label="epoch",
        title="t",
        marks={"warm-up ends (40)": 40, "cut (64)": 64},
        panels={"loss": {"a": (epochs, 1 / (epochs + 1))}, "rate": {"a": (epochs, epochs + 1.0)}},
        log_panels=("rate",),
    )
    assert figures[2].axes[1].get_yscale() == "log"
    pictures.per_class_table_figure(tmp_path / "t.png", CLASSES_19, {"AP": values, "support": np.arange(19) * 1000})
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_figures_of_merit_for_several_labels(tmp_path: Path, figures: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((80, 19)) < 0.3
    truth[:, 4] = False
    score = truth + rng.normal(0, 0.7, truth.shape)
    pictures.precision_recall_figure(tmp_path / "p.png", truth, score, CLASSES_19)
    pictures.roc_figure(tmp_path / "r.png", truth, score, CLASSES_19)
    pictures.confusion_matrix_figure(tmp_path / "c.png", truth, score > 0.5, CLASSES_19)
    from sklearn.metrics import average_precision_score

    assert f"AP {average_precision_score(truth[:, 0], score[:, 0]):.3f}" in figures[0].axes[0].get_title()
    assert "undefined" in figures[1].axes[4].get_title()
    shown = {text.get_position(): text.get_text() for text in figures[2].axes[0].texts}
    recall = 100 * (truth[:, 2] & (score[:, 2] > 0.5)).sum() / truth[:, 2].sum()
    assert shown[(2, 2)] == f"{recall:.0f}"
    assert shown[(0, 4)] == "-"
    with pytest.raises(ValueError, match="columns for"):
        pictures.roc_figure(tmp_path / "x.png", truth[:, :5], score, CLASSES_19)


def test_confusion_of_two_classes(tmp_path: Path, figures: list[Figure]) -> None:
    truth, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    pictures.confusion_matrix_figure(tmp_path / "c.png", truth, predicted, ("no flood", "flood"))
    pictures.roc_figure(tmp_path / "r.png", truth, np.eye(2)[predicted], ("no flood", "flood"))
    shown = {text.get_position(): text.get_text() for text in figures[0].axes[0].texts}
    assert shown == {(0, 0): "75", (1, 0): "25", (0, 1): "50", (1, 1): "50"}


def test_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(MemoryError):
        pictures.per_class_table_figure(tmp_path / "t.png", ("a",), {"AP": np.array([1.0])})
    assert list(tmp_path.iterdir()) == []


def test_many_long_names_in_a_legend(tmp_path: Path, figures: list[Figure]) -> None:
    """The legend stands below the panels, whole, and takes nothing of their size."""
    names = [f"finetune/weight_mode-{mode}_mask_ratio-{ratio}_norm_pix_loss-on_seed-{seed}"
             for mode in ("none", "per_channel", "joint") for ratio in (0.5, 0.75) for seed in range(3)]  # fmt: skip
    panels = {label: {name: ([1, 2], [0.1, 0.2]) for name in names} for label in ("loss", "lr")}
    pictures.curves_figure(tmp_path / "c.png", panels=panels, x_label="epochs", title="t", marks={"4": 4})
    pictures.curves_figure(tmp_path / "one.png", panels={"loss": {"x": ([1], [1])}}, x_label="epochs", title="t")
    many, one = figures
    for figure in figures:
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        box, lowest = figure.legends[0].get_window_extent(renderer), figure.axes[-1].get_tightbbox(renderer)
        assert box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= lowest.y0
    assert len(many.legends[0].get_texts()) == 18
    assert many.axes[0].bbox.height > 0.8 * one.axes[0].bbox.height
    assert [tick for tick in one.axes[0].get_xticks() if tick % 1] == []


def test_ticks_are_the_places_given(tmp_path: Path, figures: list[Figure]) -> None:
    curve = {"AP": {"random": ([12.5, 25, 50, 100], [0.1, 0.2, 0.3, 0.4])}}
    pictures.curves_figure(tmp_path / "c.png", panels=curve, x_label="%", title="t", ticks=(100, 50, 25, 12.5))
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == ["12.5", "25", "50", "100"]


def test_fitted_text_keeps_width_lines_and_end(tmp_path: Path) -> None:
    name = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39"
    assert pictures.fit_text(name, 9, 6, lines=1) == name
    lines = pictures.fit_text(name, 1.1, 5.8, lines=3).split("\n")
    assert "".join(lines) == name
    assert max(pictures.text_width(line, 5.8) for line in lines) <= 1.1
    short = pictures.fit_text(f"{name * 5} (mean 0.12)", 2.0, 7, lines=2)
    assert short.count("\n") == 1
    assert short.startswith("S1A")
    assert short.endswith("(mean 0.12)")


def test_captions_of_a_contact_sheet_stay_in_their_column(tmp_path: Path, figures: list[Figure]) -> None:
    names = [f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{number}_39" for number in range(7)]
    pictures.contact_sheet(tmp_path / "c.png", np.zeros((7, 1, 8, 8)), bands=("VV",), captions=names, title="t")
    renderer = figures[0].canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent(renderer) for text in figures[0].texts if "S1A" in text.get_text()]
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_class_without_negatives(tmp_path: Path, figures: list[Figure]) -> None:
    """Average precision is 1, as in the tables; there is no ROC curve."""
    target, scores = np.array([[1, 0], [1, 1]]), np.array([[0.2, 0.1], [0.7, 0.8]])
    pictures.precision_recall_figure(tmp_path / "p.png", target, scores, ["all", "some"])
    pictures.roc_figure(tmp_path / "r.png", target, scores, ["all", "some"])
    assert [figure.axes[0].get_title().split("\n")[1] for figure in figures] == ["AP 1.000, n = 2", "undefined, n = 2"]


def test_class_colours() -> None:
    classes = ["Broad-leaved forest", "Arable land", "Inland waters"]
    assert pictures.class_colours(classes)[2] == pictures.BLUE
    assert pictures.class_colours(["dry", "water"]) == (pictures.LIGHT, pictures.BLUE)
    many = pictures.class_colours([f"class {k}" for k in range(14)])
    assert len(set(many[:10])) == 10
    assert set(many[10:]) == {pictures.OTHER}


@pytest.mark.parametrize("shape", [(100, 1200), (1200, 40), (300, 300)])
def test_scale_bar_holds_its_text(tmp_path: Path, figures: list[Figure], shape: tuple[int, int]) -> None:
    thumbnail = quicklook.Thumbnail(*shape, ("VH", "VV"))
    thumbnail.add(0, np.full((2, *shape), -12, dtype=np.float32))
    names = ["Broad-leaved forest", "Water", "Land principally occupied by agriculture, with natural vegetation " * 2]
    cells = np.full((3, -(-shape[0] // 20), -(-shape[1] // 20)), 0.3, dtype=np.float32)
    quicklook.classification_figure(tmp_path / "q.png", thumbnail, cells, names, cell=20, metres=10.0, title="t",
                                    exclusive=True)  # fmt: skip
    figure = figures[0]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    back, text = figure.axes[0].patches[0], figure.axes[0].texts[0]
    box, inside = back.get_window_extent(renderer), text.get_window_extent(renderer)
    assert box.x0 <= inside.x0
    assert box.y0 <= inside.y0
    assert inside.x1 <= box.x1
    assert inside.y1 <= box.y1 + 1
    assert any(axes.get_title().endswith("(mean 0.30)") and "..." in axes.get_title() for axes in figure.axes)


def test_blue_is_water_whatever_the_order() -> None:
    from sarwmix.figures.base import BLUE, LIGHT, class_colours

    assert class_colours(("no water", "water")) == (LIGHT, BLUE)
    assert class_colours(("flood", "no flood")) == (BLUE, LIGHT)
    three = class_colours(("no water", "water", "forest"))
    assert three[1] == BLUE
    assert three[0] != BLUE
    assert BLUE not in class_colours(("arable land", "pastures"), part=True)[1:]
