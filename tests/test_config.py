"""Flags from files: what the command line names wins, and what is no flag is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import main_finetune
import main_pretrain
from tests.conftest import ROOT
from util.args import args_to_dict, given_flags
from util.errors import UserError


def parse(path: Path, *words: str) -> dict[str, object]:
    return args_to_dict(main_finetune.get_parser().parse_args(["--config", str(path), *words]))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.toml",
            'data_path = "D"\nepochs = 7\n[optimizer]\nlr = 5e-4\nclass_weights = [1, 2.5]\nno_savanna = true\n',
        ),
        (
            "a.json",
            '{"data_path": "D", "epochs": 7, "lr": 5e-4, "class_weights": [1, 2.5], "no_savanna": true, "head": null}',
        ),
        ("a.yaml", "data_path: D\nepochs: 7\nlr: 5e-4\nclass_weights: [1, 2.5]\nno_savanna: true\n"),
    ],
)  # fmt: skip
def test_formats_say_the_same_and_the_command_line_wins(tmp_path: Path, name: str, text: str) -> None:
    file = write(tmp_path / name, text)
    expected = main_finetune.get_parser().parse_args(
        ["--data_path", "D", "--epochs", "7", "--lr", "5e-4", "--class_weights", "1", "2.5", "--no_savanna"]
    )
    found = parse(file)
    assert found.pop("config") == str(file)
    assert found == {name: value for name, value in args_to_dict(expected).items() if name != "config"}
    assert parse(file, "--epochs", "9", "--class_weights", "3")["epochs"] == 9
    assert parse(file, "--class_weights", "3")["class_weights"] == [3.0]


def test_switches_with_an_opposite(tmp_path: Path) -> None:
    off = write(tmp_path / "a.toml", 'data_path = "D"\npin_mem = false\n')
    assert parse(off)["pin_mem"] is False
    on = write(tmp_path / "b.toml", 'data_path = "D"\npin_mem = true\ndata_option = ["a=1", "b=2"]\n')
    assert parse(on, "--no_pin_mem")["pin_mem"] is False
    assert parse(on)["data_option"] == ["a=1", "b=2"]


def test_args_of_a_run_are_a_config(tmp_path: Path) -> None:
    words = ["--data_path", "D", "--lr", "0.1", "--no_pin_mem", "--save_epochs", "1", "4", "--data_option", "a=1"]
    before = args_to_dict(main_pretrain.get_parser().parse_args(words))
    file = write(tmp_path / "args.json", json.dumps(before))
    after = args_to_dict(main_pretrain.get_parser().parse_args(["--config", str(file)]))
    assert {**after, "config": None} == before


def test_flags_of_the_file_count_as_given(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'data_path = "D"\ndataset = "demo"\n')
    given = given_flags(main_finetune.get_parser(), ["--config", str(file), "--seed", "1"])
    assert given == {"config", "data_path", "dataset", "seed"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "epoch = 3", "epoch, which is no flag of .*did you mean epochs"),
        ("a.toml", "epochs = [1, 2]", "takes one value"),
        ("a.toml", "epochs = true", "takes a value"),
        ("a.toml", "no_savanna = 2", "on or off"),
        ("a.toml", "epochs = ", "cannot be read"),
        ("a.toml", "epochs = 3\n[b]\nepochs = 4", "sets epochs twice"),
        ("a.json", "[1]", "no names with values"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.ini", "x", "expected .toml, .json or .yaml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(write(tmp_path / name, text), "--data_path", "D")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        parse(tmp_path / "none.toml")


RECIPES = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood_and_says_what_it_costs(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    for word in ("command:", "effective batch:", "cost:", "memory:", "expected:"):
        assert word in head, word
    program = main_pretrain if "main_pretrain.py" in head.split("command:")[1].splitlines()[0] else main_finetune
    args = program.get_parser().parse_args(["--config", str(path), "--data_path", "D"])
    program.check_args(args) if program is main_pretrain else None
    batch = int(head.split("effective batch:")[1].split("=")[0].replace(",", ""))
    processes = int(head.split("mpirun -np ")[1].split()[0]) if "mpirun" in head else 1
    assert batch == args.batch_size * args.accum_iter * processes


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


def test_a_command_without_any_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Says what is missing, as with any other words."""
    with pytest.raises(SystemExit):
        main_finetune.get_parser().parse_args([])
    assert "required: --data_path" in capsys.readouterr().err
