"""main_finetune on generated data of each neighbouring data set: train, resume, evaluate, independent metrics."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from prediction_fixtures import write_scene
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, jaccard_score

import main_finetune
from sarwmix.data.registry import build_dataset, get_spec
from sarwmix.inference.model import open_model
from sarwmix.inference.predict import Options, open_scenes, predict_scene
from sarwmix.synthetic.neighbours import make_neighbour_data
from sarwmix.transforms import transform_of
from util.checkpoint import load_checkpoint
from util.errors import UserError

Script = Callable[..., dict[str, Any]]
REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata" / "sen1floods11"
CASES: dict[str, tuple[str, ...]] = {
    "eurosat_sar": ("--input_size", "64", "--bands", "VV,VH"),
    "benv2": ("--input_size", "64", "--bands", "all"),
    "dfc2020": ("--input_size", "128", "--label_set", "igbp", "--no_savanna", "--batch_size", "2"),
    "sen1floods11": ("--input_size", "256", "--bands", "s1s2", "--class_weights", "0.1", "0.5"),
    "satlas": ("--input_size", "256", "--bands", "rgb", "--val_frac", "0.4", "--batch_size", "2"),
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Script]:
    """Run main_finetune in this process; returns metrics.json (or metrics_eval.json)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(dataset: str, data: Path, *args: object) -> dict[str, Any]:
        command = ["main_finetune.py", "--dataset", dataset, "--data_path", data, "--model", "resnet10t"]
        command += ["--num_workers", 0, "--device", "cpu", "--output_dir", tmp_path / "run", "--batch_size", 3]
        command += ["--warmup_epochs", 0, "--lr", 1e-3, "--epochs", 2, *args]
        if get_spec(dataset).task == "segmentation":
            command += ["--head", "fused"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main_finetune.main()
        if "--eval" in args:  # each evaluation has a folder of its own
            newest = max((tmp_path / "run").glob("eval_*/metrics_eval.json"), key=lambda path: path.stat().st_mtime_ns)
            return json.loads(newest.read_text())
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "dataset", [pytest.param(name, marks=[pytest.mark.slow] if name == "satlas" else []) for name in CASES]
)
def test_train_resume_evaluate(script: Script, tmp_path: Path, dataset: str) -> None:
    root, options = tmp_path / "data", CASES[dataset]
    make_neighbour_data(dataset, root, samples=3)
    script(dataset, root, *options, "--stop_epoch", 1)
    metrics = script(dataset, root, *options, "--resume", "auto")
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert epochs == [0, 1]

    choice = {key: metrics_option(options, f"--{key}") for key in ("bands", "label_set", "val_frac")}
    choice["no_savanna"] = True if "--no_savanna" in options else None
    test = build_dataset(dataset, root, "test", **choice)
    assert metrics["bands"] == list(test.spec.bands)
    assert metrics["splits"]["test"]["names_sha256"] == test.identity()["names_sha256"]
    used = {
        "dfc2020": {"label_set": "igbp", "no_savanna": 1, "val_frac": 0.1},
        "eurosat_sar": {"val_frac": 0.1},
        "satlas": {"val_frac": 0.4},
    }
    assert metrics["selected_on"]["split"] == "val"
    assert metrics["data_options"] == used.get(dataset, {})
    scalars = metrics["results"]["checkpoint_best.pth"]["test"]["scalars"]
    with np.load(tmp_path / "run/predictions_test.npz") as arrays:
        found = {key: arrays[key] for key in arrays.files}
    assert found["names"].tolist() == list(test.names)
    check_scores(test, found, scalars)

    checkpoint = load_checkpoint(tmp_path / "run/checkpoint_best.pth")
    assert checkpoint["data"]["bands"] == list(test.spec.bands)
    transform = transform_of(checkpoint["data"], size=int(options[1]))
    assert transform.preprocessing == test.spec.preprocessing

    again = script(dataset, root, *options, "--eval", "--resume", tmp_path / "run/checkpoint_best.pth")
    evaluated = next(iter(again["results"].values()))
    assert evaluated["test"]["scalars"] == pytest.approx(scalars)
    if dataset == "sen1floods11":
        assert evaluated["bolivia"]["scalars"]["iou"] >= 0
    check_scene(test, found, tmp_path)
    folder = tmp_path / "run/pictures"
    expected = {"multilabel": "per_class_test.png", "multiclass": "confusion_test.png"}
    assert (folder / expected.get(test.spec.task, "segmentation_test.png")).stat().st_size > 5000


def check_scene(test: Any, found: dict[str, np.ndarray], folder: Path) -> None:
    """The first test sample as a scene of its own gives the scores that the run gave it."""
    image = test.get_batch(np.zeros(1, dtype=np.int64))["image"][0].numpy()
    path = write_scene(folder / "scene.tif", image, descriptions=test.spec.bands)
    model = open_model(str(folder / "run"))
    model.temperature = 1.0  # predictions are calibrated on validation, the run's own scores are not
    (scene,) = open_scenes([path], model.bands)
    unit = "dB" if {"VH", "VV"} & set(model.bands) else None
    options = Options(probabilities=True) if test.spec.task == "segmentation" else Options(min_valid=0.0)
    predict_scene(model, scene, folder / "maps", unit=unit, options=options)
    with rasterio.open(folder / "maps/scene_probability.tif") as source:
        probability = source.read()
    if test.spec.task == "segmentation":
        valid = np.isfinite(image).all(axis=0)
        same = probability.argmax(axis=0)[valid] == found["prediction"][0][valid]
        assert same.mean() > 0.9999  # the same windows, blended in the same way
    else:
        assert np.allclose(probability[:, 0, 0], found["scores"][0], atol=1e-4)


def metrics_option(options: tuple[str, ...], flag: str) -> str | None:
    return options[options.index(flag) + 1] if flag in options else None


def check_scores(test: Any, found: dict[str, np.ndarray], scalars: dict[str, float]) -> None:
    """The run's metrics against scikit-learn on labels that are read again."""
    if test.spec.task == "segmentation":
        batch = test.get_batch(np.arange(len(test)))
        counted = (batch["label"].numpy() != 255) & np.isfinite(batch["image"].numpy()).all(axis=1)
        truth, predicted = batch["label"].numpy()[counted], found["prediction"][counted]
        assert scalars["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        assert scalars["miou"] == pytest.approx(jaccard_score(truth, predicted, average="macro"))
        if len(test.spec.classes) == 2:
            assert scalars["iou"] == pytest.approx(jaccard_score(truth, predicted))
            assert scalars["f1"] == pytest.approx(f1_score(truth, predicted))
    elif test.spec.task == "multiclass":
        predicted = found["scores"].argmax(axis=1)
        assert np.array_equal(found["target"], test.labels)
        assert scalars["acc"] == pytest.approx(accuracy_score(test.labels, predicted))
        assert scalars["aacc"] == pytest.approx(balanced_accuracy_score(test.labels, predicted))
    else:
        predicted = found["scores"] > 0.5
        assert np.array_equal(found["target"], test.labels)
        assert scalars["f1_micro"] == pytest.approx(f1_score(test.labels, predicted, average="micro", zero_division=0))


def test_refusals(script: Script, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_neighbour_data("dfc2020", root, samples=3)
    for args, message in (
        (("--bands", "s2"), "has no band s2"),
        (("--class_weights", 1, 2), r"--class_weights has 2 value\(s\), the data set has 10 classes"),
        (("--no_savanna", "--class_weights", *[1] * 10), "has 9 classes"),
        (("--mixup", 0.8), "do not work with the segmentation task"),
        (("--protocol", "knn"), "knn"),
    ):
        with pytest.raises(UserError, match=message):
            script("dfc2020", root, "--input_size", 64, *args)
    with pytest.raises(UserError, match="has no option 'label_set'"):
        script("eurosat_sar", root, "--label_set", "dfc")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not REALDATA.is_dir(), reason="../shared/realdata is not beside the checkout")
def test_real_chips_beat_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave-three-out over the nine usable real chips: water IoU clearly above Otsu's threshold on smoothed VV."""
    from scripts import flood_chips

    command = ["flood_chips", "--data_path", str(REALDATA), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    flood_chips.main()
    result = json.loads((tmp_path / "result.json").read_text())["chips"]["all"]
    assert result["otsu"]["iou"] == pytest.approx(0.409, abs=0.005)
    assert result["network"]["iou"] > result["otsu"]["iou"] + 0.15


def test_reben_recipe_standardises_as_published() -> None:
    """Without the option the data set's own default would be used."""
    text = (Path(__file__).resolve().parents[1] / "docs/backbones.md").read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "--dataset benv2" in line and "--model resnet50" in line)
    args = main_finetune.get_parser().parse_args(shlex.split(line, comments=True)[2:])
    statistics = get_spec(args.dataset, args.bands).statistics[args.statistics]
    assert dict(zip(("VH", "VV"), zip(statistics.mean, statistics.std, strict=True), strict=True)) == {
        "VV": (-12.6439, 5.1335),
        "VH": (-19.3526, 5.5905),
    }


def test_help_says_which_seed_cuts_splits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_finetune.get_parser().parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "not of how a data set is cut into splits: that is --data_option seed=N" in said


@pytest.mark.parametrize("dataset", ["eurosat_sar", "sen12flood"])
def test_the_test_split_does_not_choose_the_regularisation(script: Script, tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match="lbfgs chooses C on samples that are not tested; leave out --select_on test"):
        script(dataset, tmp_path / "nowhere", "--protocol", "linear", "--probe_solver", "lbfgs", "--select_on", "test")


def test_lbfgs_probe_with_a_validation_part(script: Script, tmp_path: Path) -> None:
    make_neighbour_data("eurosat_sar", tmp_path / "data", samples=6)
    options = ("--input_size", 64, "--protocol", "linear", "--probe_solver", "lbfgs", "--val_frac", 0.3)
    metrics = script("eurosat_sar", tmp_path / "data", *options)
    assert len(metrics["c_sweep"]) == 8
    assert set(metrics["samples"]) == {"train", "val", "test"}


def overwrite(path: Path, value: float) -> None:
    """Give all pixels of a raster one value."""
    with rasterio.open(path, "r+") as file:
        file.write(np.full_like(file.read(), value))


@pytest.mark.slow
def test_floods_without_bolivia_and_with_an_empty_chip(script: Script, tmp_path: Path) -> None:
    """As the official test list has it: the chip is named and changes no metric."""
    root, options = tmp_path / "floods", ("--input_size", 128, "--epochs", 1, "--bootstrap", 20)
    make_neighbour_data("sen1floods11", root, samples=3)
    empty = build_dataset("sen1floods11", root, "test").names[0]
    folder = root / "data/flood_events/HandLabeled"
    overwrite(folder / f"S1Hand/{empty}_S1Hand.tif", np.nan)
    trained = script("sen1floods11", root, *options)
    log = tmp_path / "run/run.log"
    assert f"1 of 2 samples of split test have no valid pixel; they count in no metric: {empty}" in log.read_text()
    assert trained["skipped"] == {"test": [empty]}

    for path in folder.glob("*/Bolivia_*"):
        path.unlink()
    evaluate = (*options, "--eval", "--resume", tmp_path / "run/checkpoint_best.pth")
    found = script("sen1floods11", root, *evaluate)
    log = tmp_path / "run/eval_checkpoint_best/run.log"
    assert "split bolivia is not evaluated: none of the 1 chips" in log.read_text()
    (root / "splits/flood_handlabeled/flood_bolivia_data.csv").unlink()
    expected = script("sen1floods11", root, *evaluate, "--data_option", f"skip={empty}")
    log = tmp_path / "run/eval_checkpoint_best_2/run.log"
    assert "split bolivia is not evaluated: split 'bolivia' of sen1floods11" in log.read_text()
    ((entry,), (alone,)) = (list(metrics["results"].values()) for metrics in (found, expected))
    assert set(entry) == {"epoch", "val", "test", "selected_on"}
    for other in (alone["test"], trained["results"]["checkpoint_best.pth"]["test"]):
        # another batch size rounds the loss differently
        assert entry["test"] == {**other, "scalars": pytest.approx(other["scalars"], rel=1e-6)}
    assert "skipped" not in expected


def test_labels_that_are_all_ignored_are_refused_before_training(script: Script, tmp_path: Path) -> None:
    root = tmp_path / "floods"
    make_neighbour_data("sen1floods11", root, samples=3)
    train, folder = build_dataset("sen1floods11", root, "train"), root / "data/flood_events/HandLabeled"
    for name in list(train.names)[:2]:
        overwrite(folder / f"LabelHand/{name}_LabelHand.tif", -1)
    overwrite(folder / f"S1Hand/{train.names[2]}_S1Hand.tif", np.nan)
    message = (
        "not one pixel of the 3 training samples of sen1floods11 .* is labelled: 2 label maps hold nothing but ignored "
        f"values; 1 cannot be used, such as sample {train.names[2]} .*no water or water"
    )
    with pytest.raises(UserError, match=message):
        script("sen1floods11", root, "--input_size", 128)
    assert not (tmp_path / "run/log.txt").exists()


@pytest.mark.slow
def test_land_cover_first_and_water_after_it(script: Script, tmp_path: Path) -> None:
    """All weights but the last layer are taken over; with a frozen encoder only the head changes."""
    make_neighbour_data("satlas", tmp_path / "satlas", samples=3)
    make_neighbour_data("sen1floods11", tmp_path / "floods", samples=3)
    script("satlas", tmp_path / "satlas", "--input_size", 128, "--epochs", 1)
    (tmp_path / "run").rename(tmp_path / "first")
    start = tmp_path / "first" / "checkpoint_best.pth"
    options = ("--input_size", 128, "--epochs", 1, "--finetune", start, "--protocol", "frozen")
    script("sen1floods11", tmp_path / "floods", *options, "--bands", "satlas")
    before, after = (load_checkpoint(tmp_path / name / "checkpoint_best.pth")["model"] for name in ("first", "run"))
    for key, value in before.items():
        if not key.startswith("head."):
            assert torch.equal(value, after[key]), key
    assert after["head.classifier.weight"].shape[0] == 2
    with pytest.raises(UserError, match="B02.*VH, VV|VH, VV.*B02"):
        script("sen1floods11", tmp_path / "floods", *options)
