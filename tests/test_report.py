"""The report of runs: numbers, tables, odd files, and the page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from sarwmix.figures.base import reconstruction_panel
from sarwmix.reports import page as report
from scripts import report as script
from util.errors import UserError

CLASSES = ["Urban fabric", "Arable land", "Inland <waters>"]


def pretrain_run(folder: Path, *, epochs: int = 6, **args: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {
        "dataset": "demo",
        "model": "mixmim_tiny",
        "epochs": 16,
        "stop_epoch": 6,
        "warmup_epochs": 2,
        "seed": 0,
        "mask_ratio": 0.5,
        "weight_mode": "per_channel",
        "output_dir": str(folder),
        **args,
    }
    (folder / "args.json").write_text(json.dumps(settings))
    lines = [
        {
            "epoch": epoch,
            "train_loss": 2.0 / (epoch + 1),
            "train_lr": 1e-4,
            "images_per_s": 100.0 + epoch,
            "seconds": 10.0,
        }
        for epoch in range(epochs)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finetune_run(
    folder: Path, *, value: float = 0.5, start: str = "random", seed: int = 0, frac: float = 1.0, interval: bool = False
) -> Path:
    folder.mkdir(parents=True)
    settings = {
        "dataset": "demo",
        "model": "mixmim_tiny",
        "epochs": 3,
        "warmup_epochs": 1,
        "seed": seed,
        "protocol": "finetune",
        "finetune": "" if start == "random" else start,
        "output_dir": str(folder),
    }
    (folder / "args.json").write_text(json.dumps(settings))
    lines = [
        {
            "epoch": epoch,
            "train_loss": 0.6 - 0.1 * epoch,
            "train_lr": 1e-3,
            "images_per_s": 50.0,
            "seconds": 5.0,
            "val_ap_macro": value - 0.1 + 0.03 * epoch,
        }
        for epoch in range(3)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry: dict[str, Any] = {
        "scalars": {"ap_macro": value, "f1_macro": value / 2, "loss": 0.3},
        "per_class": [{"class": name, "support": 10 * k, "ap": None if k == 0 else value, "f1": 0.1, "precision": 0.2}
                      for k, name in enumerate(CLASSES)],
    }  # fmt: skip
    if interval:
        entry["intervals_95"] = {"ap_macro": [value - 0.04, value + 0.04]}
    content = {"protocol": "finetune", "dataset": "demo", "model": "mixmim_tiny", "classes": CLASSES, "seed": seed,
               "train_frac": frac, "initialisation": start, "training_seconds": 61.0,
               "results": {"checkpoint_best.pth": {"epoch": 2, "test": entry}}}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    target = (rng.random((40, 3)) < 0.4).astype(np.uint8)
    np.savez(
        folder / "predictions_test.npz",
        names=np.arange(40).astype(str),
        target=target,
        scores=np.clip(0.3 + 0.3 * target + rng.normal(0, 0.2, target.shape), 0, 1),
    )
    return folder


def with_pictures(run: Path) -> Path:
    (run / "reconstructions").mkdir()
    images = np.full((1, 2, 16, 16), -12.0)
    reconstruction_panel(
        run / "reconstructions" / "a.png",
        names=["a"],
        bands=("VH", "VV"),
        original_db=images,
        mixed_db=images,
        mask=np.array([1, 0, 0, 1]),
        reconstruction_db=images,
        title="t",
        weights=images / -6,
    )
    return run


def test_page_of_all_kinds(tmp_path: Path) -> None:
    runs = [
        with_pictures(pretrain_run(tmp_path / "pre")),
        pretrain_run(tmp_path / "none", weight_mode="none"),
        finetune_run(tmp_path / "ft", value=0.6, start="pre/checkpoint_4.pth", interval=True),
        finetune_run(tmp_path / "random", value=0.4),
    ]
    page = report.write_report(runs, tmp_path / "out", title="A & B")
    text = page.read_text()
    assert "<title>A &amp; B</title>" in text
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)  # nothing from outside
    for heading in (
        "Overview",
        "Curves",
        "Results",
        "Reconstructions and weight maps",
        "Precision, recall, confusion",
        "Settings",
        "Table for a paper",
    ):
        assert f">{heading}</h2>" in text
    assert "Inland &lt;waters&gt;" not in text  # class names are in the pictures only
    assert "heights of their losses do not compare" in text
    assert text.count("<img ") == 2 + 1 + 1 + 2 * 3  # curves, per class, reconstruction, three of each fine-tuning
    assert "0.600 [0.560, 0.640]" in text
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"pretraining_curves.png", "fine-tuning_curves.png", "average_precision.png", "ft_roc.png"} <= names
    plain = re.sub(r' data-head="[^"]*"', "", text)
    assert r'<tr class="differs"><td>weight_mode</td><td>per_channel</td><td>none</td>' in plain


def test_seeds_are_averaged_with_an_interval(tmp_path: Path) -> None:
    values = [0.50, 0.52, 0.57]
    runs = [finetune_run(tmp_path / f"s{seed}", value=value, seed=seed) for seed, value in enumerate(values)]
    runs.append(finetune_run(tmp_path / "other", value=0.3, start="pre/checkpoint_8.pth"))
    rows = report.paper_rows(report.load_runs(runs))
    assert [row.setting for row in rows] == [
        ("s0 and 2 more", "demo", "mixmim_tiny", "finetune", "random", "100 %", "0, 1, 2", "not recorded", "test"),
        ("other", "demo", "mixmim_tiny", "finetune", "pre/checkpoint_8.pth", "100 %", "0", "not recorded", "test"),
    ]
    cell = rows[0].cells["ap_macro"]
    # t(0.975, 2 degrees of freedom) = 4.3027; standard error = 0.0361 / sqrt(3) = 0.02082
    assert t.ppf(0.975, 2) == pytest.approx(4.3027, abs=1e-4)
    assert cell.mean == pytest.approx(0.53)
    assert cell.low == pytest.approx(0.53 - 4.3027 * 0.020817, abs=1e-4)
    assert "loss" not in rows[0].cells


def test_tables_for_a_paper(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "a_b", value=0.5123, start="pre_x/checkpoint_8.pth", frac=0.125, interval=True)
    rows = report.paper_rows(report.load_runs([run]))
    markdown = report.markdown_table(rows).splitlines()
    assert markdown[0].startswith(
        "| run | data | model | protocol | initial weights | labels | seeds | best epoch by | tested on "
        "| AP macro | F1 macro |"
    )
    assert markdown[2] == (
        "| a_b | demo | mixmim_tiny | finetune | pre_x/checkpoint_8.pth | 12.5 % | 0 | not recorded | test "
        "| 0.512 [0.472, 0.552] | 0.256 |"
    )
    latex = report.latex_table(rows)
    line = r"mixmim\_tiny & finetune & pre\_x/checkpoint\_8.pth & 12.5 \% & 0 & not recorded & test & 0.512 & 0.256 \\"
    assert line in latex
    assert r"{\scriptsize [0.472, 0.552]}" in latex


def test_transfer_curves(tmp_path: Path) -> None:
    runs = [finetune_run(tmp_path / f"e{n}", value=0.3 + 0.01 * n, start=f"pre/checkpoint_{n}.pth") for n in (2, 4, 8)]
    runs += [finetune_run(tmp_path / f"f{k}", value=0.3 - 0.05 * k, frac=0.5**k) for k in range(3)]
    written = report.transfer_figures(report.load_runs(runs), tmp_path)
    assert [one.path.name for one in written] == ["pretraining_epochs.png", "label_fractions.png"]
    assert report.transfer_figures(report.load_runs(runs[:1]), tmp_path) == []


def test_transfer_curves_keep_data_sets_and_metrics_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report.pictures, "curves_figure", lambda path, **given: drawn.update({path.stem: given}))
    runs = []
    for data, metric in (("demo", "ap_macro"), ("eurosat_sar", "acc")):
        for k in range(4):
            runs.append(finetune_run(tmp_path / f"{data}{k}", value=0.5 - 0.1 * k, frac=0.5**k))
            change(runs[-1], dataset=data, scalars={metric: 0.5 - 0.1 * k})
    report.transfer_figures(report.load_runs(runs), tmp_path)
    panels = drawn["label_fractions"]["panels"]
    assert list(panels) == ["demo: AP macro on test", "eurosat_sar: ACC on test"]
    assert all(len(xs) == 4 for curves in panels.values() for xs, _ in curves.values())
    assert drawn["label_fractions"]["ticks"] == [12.5, 25, 50, 100]


def change(run: Path, *, scalars: dict[str, float] | None = None, **facts: Any) -> None:
    """Another result in a run's metrics.json."""
    content = json.loads((run / "metrics.json").read_text()) | facts
    if scalars is not None:
        content["results"]["checkpoint_best.pth"]["test"] = {"scalars": scalars, "per_class": []}
    (run / "metrics.json").write_text(json.dumps(content))


def test_accuracy_of_pairs_in_percent_of_earlier_versions(tmp_path: Path) -> None:
    pair, single = finetune_run(tmp_path / "pair"), finetune_run(tmp_path / "single")
    change(pair, dataset="sen12flood", scalars={"acc": 55.5556, "f1": 0.7})
    change(single, dataset="eurosat_sar", scalars={"acc": 0.25})
    log = {"epoch": 0, "train_loss": 1.0, "test_acc": 55.0, "test_f1": 0.5}
    (pair / "log.txt").write_text(json.dumps(log) + "\n")
    runs = report.load_runs([pair, single])
    assert [round(row.cells["acc"].mean, 4) for row in report.paper_rows(runs)] == [0.5556, 0.25]
    assert runs[0].column("test_acc")[1].tolist() == [pytest.approx(0.55)]
    text = report.write_report([pair, single], tmp_path / "out").read_text()
    assert "ACC 0.556 on test" in text
    assert "ACC 0.250 on test" in text
    assert "| 0.556 |" in (tmp_path / "out" / "table.md").read_text()


def test_encoders_are_told_apart_by_their_pretraining(tmp_path: Path) -> None:
    """Equal last parts of the path are no equal encoder; other paths may be the same one with another seed."""
    runs = []
    for name, mode, seed in (("a0", "none", 0), ("a1", "none", 1), ("b0", "joint", 0)):
        before = pretrain_run(tmp_path / name / "pretrain", weight_mode=mode, seed=seed)
        runs.append(finetune_run(tmp_path / name / "probe", start=str(before / "checkpoint.pth"), seed=seed))
    for name in ("x", "y"):  # nothing is known about these
        runs.append(finetune_run(tmp_path / name / "probe", start=str(tmp_path / name / "pretrain" / "checkpoint.pth")))
    rows = report.paper_rows(report.load_runs(runs))
    assert [(row.setting[4], row.setting[6]) for row in rows] == [
        ("a0/pretrain/checkpoint.pth and 1 more", "0, 1"),
        ("b0/pretrain/checkpoint.pth", "0"),
        ("x/pretrain/checkpoint.pth", "0"),
        ("y/pretrain/checkpoint.pth", "0"),
    ]


def test_equal_seeds_are_not_averaged(tmp_path: Path) -> None:
    runs = report.load_runs([finetune_run(tmp_path / "a"), finetune_run(tmp_path / "b")])
    assert [row.setting[6] for row in report.paper_rows(runs)] == ["0", "0"]
    assert runs[1].notes == ["has the settings and the seed of a; it is not averaged with that run"]


def test_evaluation_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "run", start="pre/checkpoint_4.pth")
    evaluated = tmp_path / "evaluated"
    evaluated.mkdir()
    content = json.loads((run / "metrics.json").read_text())
    del content["initialisation"]
    content["results"] = {str(run / "checkpoint_best.pth"): content["results"]["checkpoint_best.pth"]}
    (evaluated / "metrics_eval.json").write_text(json.dumps(content))
    (row,) = report.paper_rows(report.load_runs([evaluated]))
    assert row.setting[4] == "pre/checkpoint_4.pth"
    assert "AP macro 0.500 on test" in report.write_report([evaluated], tmp_path / "out").read_text()
    (run / "args.json").unlink()
    (row,) = report.paper_rows(report.load_runs([evaluated]))
    assert row.setting[4] == "unknown"


def test_runs_without_epochs_and_settings_of_both_scripts(tmp_path: Path) -> None:
    probe = finetune_run(tmp_path / "probe")
    (probe / "log.txt").unlink()
    text = report.write_report([pretrain_run(tmp_path / "pre"), probe], tmp_path / "out").read_text()
    text = re.sub(r' data-head="[^"]*"', "", text)
    assert "0 of 3" not in text
    assert "<td>none</td>" in text
    assert "<tr><td>mask_ratio</td><td>0.5</td><td>-</td></tr>" in text  # no flag of fine-tuning: no difference
    assert '<tr class="differs"><td>epochs</td><td>16</td><td>3</td></tr>' in text


def test_former_page_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report.write_report([finetune_run(tmp_path / "ft")], out)
    assert {"table.md", "table.tex"} < {path.name for path in out.iterdir()}
    (out / "figures" / "mine.png").write_bytes(b"kept")
    report.write_report([pretrain_run(tmp_path / "pre")], out)
    assert {path.name for path in out.iterdir()} == {"report.html", "figures"}
    assert {path.name for path in (out / "figures").iterdir()} == {"mine.png", "pretraining_curves.png"}


def test_confusion_of_label_maps(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "map")
    np.savez(run / "predictions_test.npz", names=np.array(["a", "b"]), confusion=np.ones((2, 3, 3), dtype=np.int64))
    loaded = report.load_run(run)
    (drawn,) = report.prediction_figures(loaded, tmp_path, "map")
    assert drawn.path.name == "map_confusion.png"
    assert loaded.notes == []


@pytest.mark.parametrize("keep", [0, 30, 400])
def test_predictions_cut_short(tmp_path: Path, keep: int) -> None:
    run = finetune_run(tmp_path / "run")
    file = run / "predictions_test.npz"
    file.write_bytes(file.read_bytes()[:keep])
    loaded = report.load_run(run)
    assert report.prediction_figures(loaded, tmp_path, "run") == []
    assert "cannot be read" in loaded.notes[0]


def test_damaged_bytes_in_predictions(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "run")
    file = run / "predictions_test.npz"
    with np.load(file) as arrays:
        np.savez_compressed(file, **dict(arrays))
    content = bytearray(file.read_bytes())
    for place in range(60, len(content) - 400, 7):
        content[place] ^= 0xFF
    file.write_bytes(content)
    loaded = report.load_run(run)
    assert report.prediction_figures(loaded, tmp_path, "run") == []
    assert "cannot be read" in loaded.notes[0]


def test_marks(tmp_path: Path) -> None:
    run = report.load_run(pretrain_run(tmp_path / "a", epochs=16, stop_epoch=16, warmup_epochs=5))
    assert report._marks([run]) == {"4": 4, "8": 8, "warm-up ends (5)": 5, "cut (16)": 16}


def test_half_written_last_line_and_repeated_epoch(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "a", epochs=3)
    with (run / "log.txt").open("a") as file:
        file.write(json.dumps({"epoch": 2, "train_loss": 9.0}) + "\n" + '{"epoch": 3, "train_l')
    loaded = report.load_run(run)
    assert loaded.column("train_loss")[1].tolist() == [2.0, 1.0, 9.0]
    assert loaded.notes == ["1 line(s) of log.txt are incomplete and left out"]
    assert "incomplete" in report.write_report([run], tmp_path / "out").read_text()


def test_unfinished_finetuning_and_bad_predictions(tmp_path: Path) -> None:
    unfinished = finetune_run(tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    broken = finetune_run(tmp_path / "broken")
    (broken / "predictions_test.npz").write_bytes(b"PK no more")
    text = report.write_report([unfinished, broken], tmp_path / "out").read_text()
    assert "metrics.json is missing: the run has not come to its end" in text
    assert "predictions_test.npz cannot be read" in text


def test_two_classes_with_one_score(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "pair")
    content = json.loads((run / "metrics.json").read_text())
    content["classes"] = ["no flood", "flood"]
    (run / "metrics.json").write_text(json.dumps(content))
    np.savez(run / "predictions_test.npz", scores=np.linspace(0, 1, 10), target=np.arange(10) // 5)
    loaded = report.load_run(run)
    assert len(report.prediction_figures(loaded, tmp_path, "pair")) == 3


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        report.load_run(tmp_path / "nowhere")
    run = pretrain_run(tmp_path / "group" / "a")
    with pytest.raises(UserError, match=r"args.json is missing.*group/a"):
        report.load_run(tmp_path / "group")
    with pytest.raises(UserError, match="twice"):
        report.load_runs([run, run])
    (run / "log.txt").write_text("")
    with pytest.raises(UserError, match="no finished epoch"):
        report.load_run(run)
    (run / "log.txt").unlink()
    with pytest.raises(UserError, match=r"neither log\.txt nor"):
        report.load_run(run)
    (run / "args.json").write_text("[")
    with pytest.raises(UserError, match="not valid JSON"):
        report.load_run(run)


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    runs = report.load_runs([pretrain_run(tmp_path / "x" / "run"), pretrain_run(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain_run(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(tmp_path / "out"), "--title", "T"])
    script.main()
    assert "report.html" in capsys.readouterr().out
    assert not (tmp_path / "out" / "table.md").exists()


CHECK = """<script>
window.faults = [];
window.addEventListener('error', event => window.faults.push(String(event.message || event.target.src)), true);
window.addEventListener('load', () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    shown: images.map(image => image.getBoundingClientRect().width),
    alt: images.every(image => image.alt.length > 0),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    links: [...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href'))),
    font: parseFloat(getComputedStyle(document.body).fontSize),
    faults: window.faults});
});
</script>"""


def probe_page(browser: str, page: Path, profile: Path, width: int, height: int) -> dict[str, Any]:
    """What the page says about itself in a window of this size; fails when the console has a message."""
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},{height}",
         "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


def test_page_in_a_browser(tmp_path: Path) -> None:
    """Headless Chromium: no console message, every picture there, no sideways scrolling of the page."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed; the page is checked in a browser only where there is one")
    runs = [
        with_pictures(pretrain_run(tmp_path / "pre")),
        finetune_run(tmp_path / "ft_with_a_name_that_is_long_enough_to_be_broken", start="pre/checkpoint_4.pth"),
    ]
    page = report.write_report(runs, tmp_path / "out")
    probe = tmp_path / "out" / "probe.html"
    probe.write_text(page.read_text().replace("<head>", "<head>" + CHECK, 1))
    for width, height in ((1366, 768), (500, 900)):
        found = probe_page(browser, probe, tmp_path / "profile", width, height)
        assert found["faults"] == []
        assert found["images"] == found["loaded"] == 2 + 1 + 1 + 3
        assert found["alt"]
        assert found["links"]
        assert found["overflow"] <= 0
        assert found["font"] >= 16
        assert min(found["shown"]) > 250


def test_rates_of_images_and_of_cached_features_have_their_own_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand times as many features as images go through a second: on one axis the images would lie at 0."""
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(report.pictures, "curves_figure", lambda path, **values: drawn.append(values))
    tuned, probe = finetune_run(tmp_path / "ft"), finetune_run(tmp_path / "lin")
    metrics = json.loads((probe / "metrics.json").read_text())
    (probe / "metrics.json").write_text(json.dumps({**metrics, "protocol": "linear"}))
    report.training_figure(report.load_runs([tuned, probe]), tmp_path / "c.png", title="t")
    assert list(drawn[0]["panels"]["images/s"]) == ["ft"]
    assert list(drawn[0]["panels"]["cached features/s"]) == ["lin"]


def test_a_table_for_each_kind_of_metrics_and_the_metric_that_chose_the_epoch(tmp_path: Path) -> None:
    first, second = finetune_run(tmp_path / "a"), finetune_run(tmp_path / "b")
    metrics = json.loads((second / "metrics.json").read_text())
    entry = next(iter(metrics["results"].values()))
    entry["test"] = {"scalars": {"miou": 0.4, "iou": 0.3}}
    changed = {**metrics, "dataset": "sen1floods11", "selected_on": {"split": "val", "rule": "iou", "epoch": 1},
               "samples": {"test": 90}, "cluster": "event", "clusters": {"test": 11}}  # fmt: skip
    (second / "metrics.json").write_text(json.dumps(changed))
    text = report.write_report([first, second], tmp_path / "out").read_text()
    assert text.count("<th>best epoch by</th>") == 2
    assert ">IoU 0.300 on test<" in text
    assert "test: 90 images, 11 clusters (event)" in text
    assert (tmp_path / "out" / "figures" / "fine-tuning_sen1floods11_curves.png").is_file()
