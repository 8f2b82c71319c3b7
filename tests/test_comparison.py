"""Finished runs as one table: averaging over seeds, marks of what is not like for like, published numbers, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import main_finetune
from sarwmix.reports.comparison import (
    METRIC_LABELS,
    NOT_OURS,
    Published,
    as_latex,
    as_markdown,
    as_records,
    build_tables,
    read_published,
)
from sarwmix.reports.run import FACT_ARGS, IRRELEVANT_ARGS, read_run
from tests.conftest import Runner
from util.errors import UserError


def write_run(folder: Path, *, args: dict[str, Any] | None = None, value: float = 0.5, **facts: Any) -> Path:
    content = {
        "protocol": "linear",
        "dataset": "benv2",
        "model": "mixmim_tiny",
        "head": "linear",
        "bands": ["VH", "VV"],
        "classes": ["a", "b"],
        "statistics": "v2",
        "statistics_origin": "train",
        "seed": 0,
        "train_frac": 1.0,
        "samples": {"train": 60, "val": 20, "test": 20},
        "initialisation": "random",
        **facts,
    }
    scalars = {"ap_macro": value, "ap_micro": value + 0.1, "loss": 1.0}
    content["results"] = {"checkpoint_best.pth": {"epoch": 1, "test": {"scalars": scalars}}}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "args.json").write_text(json.dumps({"epochs": 30, "batch_size": 64, "layer_decay": 0.7, **(args or {})}))
    return folder


def test_seeds_become_mean_and_interval(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(seed), seed=seed, value=0.4 + 0.1 * seed)) for seed in range(3)]
    (table,) = build_tables(runs)
    (row,) = table.rows
    score = row.cells["linear"].score("ap_macro")
    assert score is not None
    assert (score.mean, score.deviation, score.count) == (pytest.approx(0.5), pytest.approx(0.1), 3)
    assert not table.notes
    text = as_markdown([table])
    # t(0.975, 2 degrees of freedom) = 4.3027, times 0.1 / sqrt(3)
    assert "| mixmim_tiny | random | 0.500 [0.252, 0.748] (3) |" in text
    assert NOT_OURS not in text
    assert "0.500 [0.252, 0.748] (3)" in as_latex([table])
    assert r"mixmim\_tiny" in as_latex([table])


def test_what_is_not_like_for_like_is_marked_and_never_averaged(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", model="resnet50"),
        write_run(tmp_path / "b", initialisation="runs/pretrain/checkpoint.pth"),
        write_run(tmp_path / "c"),
        write_run(tmp_path / "d", seed=1, samples={"train": 60, "val": 20, "test": 19}),
        write_run(tmp_path / "e", args={"epochs": 50}),
        write_run(tmp_path / "f", model="vit", statistics="other"),
        write_run(tmp_path / "g", model="x", args={"layer_decay": 0.9}),  # changes nothing in a linear probe
        write_run(tmp_path / "h", model="y", train_frac=0.5),
    ]
    (table,) = build_tables([read_run(run) for run in runs])
    assert [(row.encoder, row.start) for row in table.rows] == [
        ("resnet50", "random"),
        ("mixmim_tiny", "pretrain/checkpoint.pth"),
        ("mixmim_tiny", "random"),
        ("mixmim_tiny", "random"),  # another recipe
        ("mixmim_tiny", "random"),  # other samples
        ("vit", "random"),
        ("x", "random"),
        ("y", "random"),
    ]
    notes = {text: letter for letter, text in table.notes.items()}
    assert set(notes) == {
        "samples test 19, train 60, val 20 instead of test 20, train 60, val 20",
        "seeds 1 instead of 0",
        "epochs 50 instead of 30",
        "statistics other instead of v2",
        "train_frac 0.5 instead of 1",
    }
    marked = [table.marks.get(id(row.cells["linear"]), []) for row in table.rows]
    assert marked[0] == marked[1] == marked[2] == marked[6] == []
    assert marked[3] == [notes["epochs 50 instead of 30"]]
    assert len(marked[4]) == 2
    assert "Not like for like: [a]" in as_markdown([table])


@pytest.mark.parametrize(
    ("flag", "value", "note"),
    [
        ("class_weights", [0.1, 0.5], "class_weights 0.1, 0.5 instead of not given"),
        ("min_lr", 1e-5, "min_lr 1e-05 instead of not given"),
        ("clip_grad", 1.0, "clip_grad 1 instead of not given"),
        ("feature_cache", "none", "feature_cache none instead of not given"),
        ("amp", "bf16", "amp bf16 instead of not given"),
        ("mixup_prob", 0.5, "mixup_prob 0.5 instead of not given"),
        ("smoothing", 0.1, "smoothing 0.1 instead of not given"),
        ("adapt_bands", True, "adapt_bands True instead of not given"),
        ("data_option", ["seed=1"], "data_options data_option seed=1 instead of none"),
        ("label_set", "igbp", "data_options label_set igbp instead of none"),
        ("data_path", "other", "splits not recorded, data in other instead of not recorded"),
        ("a_flag_of_next_year", 3, "a_flag_of_next_year 3 instead of not given"),
    ],
)
def test_every_flag_counts_unless_it_is_listed(tmp_path: Path, flag: str, value: Any, note: str) -> None:
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    runs.append(write_run(tmp_path / "other", seed=2, args={flag: value}))
    (table,) = build_tables([read_run(run) for run in runs])
    assert [row.cells["linear"].seeds for row in table.rows] == ["0, 1", "2"]
    assert note in table.notes.values()


def test_flags_that_change_no_result_do_not_count(tmp_path: Path) -> None:
    others = [
        {"output_dir": "x", "num_workers": 3, "resume": "auto", "save_minutes": 5.0, "device": "cuda"},
        {"class_weights": None, "adapt_bands": False, "data_option": [], "feature_cache": "somewhere"},  # all off
        {"optimizer": "sgd"},
        {"optimizer": None},
    ]
    runs = [write_run(tmp_path / str(seed), seed=seed, args=args) for seed, args in enumerate(others)]
    recipes = [read_run(run).recipe for run in runs]
    assert recipes[0] == recipes[1]
    assert recipes[2] == recipes[3]
    assert recipes[2]["optimizer"] == "sgd"
    # nothing is listed that the script does not have, say after a flag got another name
    assert vars(main_finetune.get_parser().parse_args(["--data_path", "x"])).keys() >= IRRELEVANT_ARGS | FACT_ARGS


def test_what_the_run_measured_replaces_what_was_asked_for(tmp_path: Path) -> None:
    """amp auto is bf16 on one machine and float32 on another; equal batches differ with the number of processes."""
    runs = [
        write_run(tmp_path / "a", args={"amp": "auto"}, precision="float32", effective_batch=64),
        write_run(tmp_path / "b", seed=1, args={"amp": "off"}, precision="float32", effective_batch=64),
        write_run(tmp_path / "c", seed=2, args={"amp": "auto"}, precision="bfloat16", effective_batch=64),
        write_run(tmp_path / "d", seed=3, args={"amp": "auto"}, precision="float32", effective_batch=512),
    ]
    (table,) = build_tables([read_run(run) for run in runs])
    assert [row.cells["linear"].seeds for row in table.rows] == ["0, 1", "2", "3"]
    assert {"amp bfloat16 instead of float32", "effective_batch 512 instead of 64"} <= set(table.notes.values())


def test_other_labels_or_samples_never_share_a_cell_or_a_row(tmp_path: Path) -> None:
    def facts(label_set: str, names: str) -> dict[str, Any]:
        splits = {name: {"count": 20, "names_sha256": names} for name in ("train", "test")}
        return {"splits": splits, "data_options": {"label_set": label_set, "no_savanna": 0}}

    runs = [
        write_run(tmp_path / "a", **facts("dfc", "1")),
        write_run(tmp_path / "b", seed=1, **facts("dfc", "1"), args={"data_path": "packed", "label_set": "dfc"}),
        write_run(tmp_path / "c", seed=2, **facts("igbp", "1")),
        write_run(tmp_path / "d", seed=3, **facts("dfc", "2")),
        write_run(tmp_path / "e", seed=4),  # of an earlier version: cannot be told to be the same
        write_run(tmp_path / "f", protocol="finetune", **facts("igbp", "1")),
    ]
    (table,) = build_tables([read_run(run) for run in runs])
    found = [{name: cell.seeds for name, cell in row.cells.items()} for row in table.rows]
    assert found == [{"linear": "0, 1"}, {"linear": "2", "finetune": "0"}, {"linear": "3"}, {"linear": "4"}]
    notes = table.notes.values()
    assert "data_options label_set igbp, no_savanna 0 instead of label_set dfc, no_savanna 0" in notes
    assert len([note for note in notes if note.startswith("splits ")]) == 2
    marked = [bool(table.marks.get(id(cell))) for row in table.rows for cell in row.cells.values()]
    assert marked == [False, True, True, True, True]
    assert "data_options label_set dfc, no_savanna 0" in as_markdown([table])


def test_poolings_are_encoders_of_their_own(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", model="vit", pool="token", args={"pool": None}),
        write_run(tmp_path / "b", model="vit", pool="token", args={"pool": "token"}, seed=1),
        write_run(tmp_path / "c", model="vit", pool="avg", args={"pool": "avg"}, seed=2),
        write_run(tmp_path / "d", model="old", args={"pool": "token"}),  # metrics.json of an earlier version
        write_run(tmp_path / "e", model="old", args={"pool": "avg"}, seed=1),
    ]
    (table,) = build_tables([read_run(run) for run in runs])
    assert [(row.encoder, row.cells["linear"].seeds) for row in table.rows] == [
        ("vit", "0, 1"),
        ("vit + avg", "2"),
        ("old + token", "0"),
        ("old + avg", "1"),
    ]


def test_starts_are_told_apart_by_content(tmp_path: Path) -> None:
    for name, content in (("A", b"one"), ("B", b"two"), ("C", b"one")):
        (tmp_path / name / "pretrain").mkdir(parents=True)
        (tmp_path / name / "pretrain/checkpoint.pth").write_bytes(content)
    starts = [str(tmp_path / name / "pretrain/checkpoint.pth") for name in ("A", "B", "C", "gone")]
    runs = [write_run(tmp_path / f"run{i}", seed=i, initialisation=start) for i, start in enumerate(starts)]
    (table,) = build_tables([read_run(run) for run in runs])
    assert [(row.start, row.cells["linear"].seeds) for row in table.rows] == [
        ("A/pretrain/checkpoint.pth", "0, 2"),  # C is a copy
        ("B/pretrain/checkpoint.pth", "1"),
        ("gone/pretrain/checkpoint.pth", "3"),
    ]
    alone = build_tables([read_run(runs[0])])
    assert alone[0].rows[0].start == "pretrain/checkpoint.pth"

    # the file was written again between two runs, which recorded what they read
    again = [
        write_run(tmp_path / f"again{i}", seed=i, initialisation=starts[0], initialisation_sha256=digest * 8)
        for i, digest in enumerate(("0123abcd", "4567abcd"))
    ]
    (table,) = build_tables([read_run(run) for run in again])
    assert [row.start for row in table.rows] == [
        "pretrain/checkpoint.pth (content 0123abcd)",
        "pretrain/checkpoint.pth (content 4567abcd)",
    ]


def published(**changes: Any) -> Published:
    entry = {
        **{"dataset": "benv2", "bands": "s1", "protocol": "finetune", "model": "resnet50", "start": "random"},
        **{"train_frac": 1.0, "metric": "ap_macro", "value": 0.6284, "source": "model card", "note": "one seed"},
    }
    return Published(**{**entry, **changes})


def test_published_numbers_have_their_own_column_and_are_never_ours(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", model="resnet50", protocol="finetune", value=0.3)),
        read_run(write_run(tmp_path / "b", protocol="knn", value=0.2)),
    ]
    others = [
        published(),
        published(model="mobilevit_s", value=0.6312),
        published(model="mixmim_base", start="SAR-W-MixMAE", train_frac=0.5),
        published(dataset="eurosat_sar"),
        published(bands="all", value=0.7033),
        published(metric="ap_micro", value=0.8),
    ]
    (table,) = build_tables(runs, others)
    lines = as_markdown([table]).splitlines()
    assert lines[2] == f"| encoder | start | knn | finetune | {NOT_OURS} |"
    # a number of another metric is named, so that it is neither lost nor mistaken for one of this metric
    assert lines[4] == "| resnet50 | random | - | 0.300 | finetune 0.628, micro AP 0.800 (random; model card) |"
    assert lines[5] == "| mixmim_tiny | random | 0.200 | - | - |"
    assert lines[6] == "| mobilevit_s (s1) | random | - | - | finetune 0.631 (random; model card) |"
    assert lines[7] == "| resnet50 (all) | random | - | - | finetune 0.703 (random; model card) |"
    assert len([line for line in lines if line.startswith("|")]) == 6
    records = as_records([table])
    ours = [record for record in records if record["origin"] == "ours"]
    assert {record["metric"] for record in ours} == {"ap_macro", "ap_micro"}
    shown = [(record["metric"], record["mean"]) for record in records if record["origin"] == NOT_OURS]
    assert shown == [("ap_macro", 0.6284), ("ap_micro", 0.8), ("ap_macro", 0.6312), ("ap_macro", 0.7033)]
    (micro,) = build_tables(runs, others, metric="ap_micro")
    assert "finetune 0.800, macro AP 0.628 (random; model card)" in as_markdown([micro])


def test_published_numbers_stand_beside_their_label_fraction_and_name_their_split(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", model="resnet50", train_frac=1.0)),
        read_run(write_run(tmp_path / "b", model="resnet50", train_frac=0.5)),
    ]
    others = [
        published(value=0.7),
        published(value=0.6, train_frac=0.5),
        published(value=0.5, train_frac=0.25),
        published(model="x", bands="s2", metric="iou", value=0.4, split="bolivia"),
        published(model="y", metric="iou", value=0.3),
    ]
    (table,) = build_tables(runs, others)
    cells = [line.split(" | ")[-1] for line in as_markdown([table]).splitlines()[4:8]]
    assert cells == [
        "finetune 0.700 (random; model card) |",
        "finetune 0.600 (50 % of the labels; random; model card) |",
        "finetune IoU 0.300 (random; model card) |",  # the same sensors before others
        "finetune IoU on bolivia 0.400 (random; model card) |",
    ]


def test_the_repository_s_published_numbers_can_be_read() -> None:
    rows = read_published()
    assert all(row.source and row.metric and 0 < row.value <= 100 for row in rows)
    keyed = [(row.dataset, row.bands, row.protocol, row.model, row.start, row.train_frac, row.metric) for row in rows]
    with_split = [(*key, row.split) for key, row in zip(keyed, rows, strict=True)]
    assert len(set(with_split)) == len(with_split)
    by_key = {key: row.value for key, row in zip(keyed, rows, strict=True) if row.split == "test"}
    assert by_key["benv2", "s1", "finetune", "mobilevit_s", "random", 1.0, "ap_macro"] == 0.6312
    assert by_key["eurosat_sar", "s1", "finetune", "vit_huge_patch14_224", "FG-MAE", 1.0, "aacc"] == 0.431
    assert by_key["benv2", "s1", "finetune", "mixmim_base", "random", 0.125, "f1_micro"] == 0.5977
    assert by_key["benv2", "s1", "frozen", "CROMA-B", "CROMA", 0.05, "ap_micro"] == 0.708
    # a metric that no run has and that has no name could be mistaken for another one
    assert {row.metric for row in rows} <= METRIC_LABELS.keys()
    assert all(0 < row.value < 1 for row in rows)


@pytest.mark.parametrize(
    ("dataset", "metric", "model", "shown"),
    [
        ("benv1", "ap_macro", "vit_small_patch16_224", "linear micro AP 0.699, F1 0.582 (FG-MAE; FG-MAE (arXiv"),
        ("sen1floods11", "miou", "Attention U-Net (s1)", "finetune IoU 0.672 (random; Yadav 2022)"),
        ("sen1floods11", "miou", "Galileo-B (s1)", "linear 0.794 (Galileo;"),
        ("sen1floods11", "miou", "SegFormer-B2 (s1)", "finetune IoU 0.652, IoU on bolivia 0.708 (unknown;"),
        ("sen1floods11", "iou", "Presto (s1)", "finetune F1 0.718 (Presto;"),
        ("eurosat_sar", "acc", "CROMA-B (s1)", "linear 0.875 (CROMA;"),
    ],
)
def test_published_numbers_are_shown_whatever_their_metric(
    tmp_path: Path, dataset: str, metric: str, model: str, shown: str
) -> None:
    write_run(tmp_path / "run", dataset=dataset, model=model, initialisation="weights.pth")
    file = tmp_path / "run" / "metrics.json"
    file.write_text(file.read_text().replace('"ap_macro"', f'"{metric}"'))
    text = as_markdown(build_tables([read_run(file)], read_published(), metric=metric))
    # beside the run of the same backbone and sensors where there is one
    assert [line for line in text.splitlines() if line.startswith(f"| {model} ") and shown in line]


def test_missing_unfinished_damaged_and_doubled_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        read_run(tmp_path / "nowhere")
    begun = tmp_path / "begun"
    begun.mkdir()
    with pytest.raises(UserError, match="it is no run of main_finetune.py"):
        read_run(begun)
    (begun / "log.txt").write_text("")
    with pytest.raises(UserError, match=r"has not finished; continue it with --resume auto"):
        read_run(begun)
    whole = write_run(tmp_path / "whole")
    (begun / "metrics.json").write_text((whole / "metrics.json").read_text()[:100])
    with pytest.raises(UserError, match=r"begun/metrics.json is not valid JSON"):
        read_run(begun)
    (begun / "metrics.json").write_text('{"protocol": "linear"}')
    with pytest.raises(UserError, match="not the result of a finished fine-tuning run"):
        read_run(begun)
    run = read_run(whole)
    with pytest.raises(UserError, match=r"whole/metrics.json is given twice"):
        build_tables([run, run])
    with pytest.raises(UserError, match=r"no run on benv2 has the metric miou; there are: ap_macro, ap_micro"):
        build_tables([run], metric="miou")
    (tmp_path / "numbers.csv").write_text("dataset,value\nbenv2,x\n")
    with pytest.raises(UserError, match="line 2"):
        read_published(tmp_path / "numbers.csv")


def test_script_writes_all_three_files(tmp_path: Path, run_script: Runner) -> None:
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    done = run_script("scripts/compare.py", *runs, "--out", tmp_path / "new" / "table", "--latex")
    assert (tmp_path / "new" / "table.md").read_text() == done.stdout
    with open(tmp_path / "new" / "table.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["origin"] for row in rows} == {"ours", NOT_OURS}
    assert "\\toprule" in (tmp_path / "new" / "table.tex").read_text()
    failed = run_script("scripts/compare.py", tmp_path / "absent", check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")


def test_numbers_that_were_selected_on_test_are_marked_and_never_averaged_with_others(tmp_path: Path) -> None:
    """Also where all runs do it: then there is nothing that differs, and yet each number is optimistic."""
    runs = []
    for name, split, seed in (("a", "test", 0), ("b", "test", 1), ("c", "val", 2)):
        chosen = {"split": split, "rule": "ap_macro", "epoch": seed}
        runs.append(read_run(write_run(tmp_path / name, seed=seed, selected_on=chosen)))
    (table,) = build_tables(runs)
    assert [[run.seed for run in cell.runs] for row in table.rows for cell in row.cells.values()] == [[0, 1], [2]]
    (alone,) = build_tables(runs[:2])
    (text,) = alone.notes.values()
    assert text == "best epoch by ap_macro on test (selected on test: optimistic)"
    assert "[a]" in as_markdown([alone])
    assert "Best epoch by: ap_macro on test (selected on test: optimistic)." in as_markdown([alone])
    assert {record["selected_on"] for record in as_records([alone])} == {runs[0].selected}
    assert read_run(write_run(tmp_path / "old")).selected == "not recorded"


def test_the_three_tools_agree(tmp_path: Path) -> None:
    """Runs that differ in seeds (their own, or of their pretraining), device and --compile: one n, mean, interval."""
    from sarwmix.reports import page
    from sarwmix.reports.ablation import Axis, collect, plan

    values = (0.4, 0.5, 0.6)
    flags = "--dataset demo --data_path d --model mixmim_tiny --epochs 2 --warmup_epochs 0"
    grid = plan([Axis("seed", ("0", "1", "2"))], flags, f"{flags} --protocol linear", tmp_path)
    speeds: tuple[dict[str, Any], ...] = (
        {"device": "cpu"},
        {"device": "cuda", "compile": True},
        {"device": "cuda", "cuda_graph": True, "memory_budget": 0.5, "num_workers": 3},
    )
    runs = []
    for cell, value, speed in zip(grid, values, speeds, strict=True):
        assert cell.pretrain is not None
        cell.pretrain.folder.mkdir(parents=True)
        (cell.pretrain.folder / "args.json").write_text(json.dumps({**cell.pretrain.settings, **speed}))
        start = str(cell.pretrain.folder / "checkpoint.pth")
        Path(start).write_bytes(f"weights {value}".encode())
        args = {**cell.finetune.settings, **speed}
        runs.append(write_run(cell.finetune.folder, seed=args["seed"], value=value, initialisation=start, args=args))
    (table,) = build_tables([read_run(run) for run in runs])
    (row,) = table.rows
    compared = row.cells["linear"].score("ap_macro")
    assert compared is not None
    (paper,) = page.paper_rows(page.load_runs(runs))
    _, (ablated,) = collect(grid, "ap_macro")
    assert compared == paper.cells["ap_macro"] == ablated.score
    assert compared.text() == "0.500 [0.252, 0.748] (3)"  # 4.3027 * 0.1 / sqrt(3) = 0.2484
    assert paper.setting[6] == row.cells["linear"].seeds == "0, 1, 2"

    # one fine-tuning seed on three pretraining seeds: three runs, too
    for run in runs:
        content = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps({**content, "seed": 7}))
    (table,) = build_tables([read_run(run) for run in runs])
    assert table.rows[0].cells["linear"].score("ap_macro") == compared
    assert table.rows[0].cells["linear"].seeds == "7 (pretraining 0), 7 (pretraining 1), 7 (pretraining 2)"

    # another recipe of the pretraining is another start, however the files are called
    args_file = grid[0].pretrain.folder / "args.json"  # type: ignore[union-attr]
    args_file.write_text(json.dumps({**json.loads(args_file.read_text()), "mask_ratio": 0.25}))
    (table,) = build_tables([read_run(run) for run in runs])
    assert [len(row.cells["linear"].runs) for row in table.rows] == [1, 2]


def test_the_same_settings_and_seed_twice_are_not_averaged(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, value=value)) for name, value in (("a", 0.4), ("b", 0.6))]
    (table,) = build_tables(runs)
    assert [row.cells["linear"].score("ap_macro").mean for row in table.rows] == [0.4, 0.6]  # type: ignore[union-attr]
    assert list(table.notes.values()) == ["has the settings and the seed of a; it is not averaged with that run"]


def test_weights_that_were_replaced_are_not_described_by_what_lies_there_now(tmp_path: Path) -> None:
    """The run recorded what it read; args.json beside another file's content says nothing about it."""
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "args.json").write_text('{"mask_ratio": 0.5, "seed": 3}')
    (folder / "checkpoint.pth").write_bytes(b"new")
    start = str(folder / "checkpoint.pth")
    old = read_run(write_run(tmp_path / "old", initialisation=start, initialisation_sha256="0" * 64))
    new = read_run(write_run(tmp_path / "new", initialisation=start))
    assert (old.pretraining, old.origin) == (None, "0" * 64)
    assert new.pretraining is not None
    assert new.seeds == (0, "3")


def test_a_pretraining_run_is_no_unfinished_fine_tuning(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"mask_ratio": 0.5}')
    with pytest.raises(UserError, match=r"is a run of main_pretrain.py, which has no test result"):
        read_run(tmp_path)
