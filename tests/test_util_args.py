"""Argument groups: light import, defaults, refusals."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from util import args as groups

ROOT = Path(__file__).resolve().parent.parent


def _parser():
    parser = groups.make_parser("x")
    groups.add_run_args(parser, output_dir="out")
    groups.add_resume_args(parser, save_every=5)
    groups.add_fault_args(parser)
    groups.add_data_args(parser, datasets=("demo",), default="demo")
    groups.add_model_args(parser)
    groups.add_pretrain_args(parser)
    groups.add_weight_args(parser)
    groups.add_optim_args(parser, batch_size=256, epochs=1024, blr=1.5e-4, warmup_epochs=40)
    groups.add_distributed_args(parser)
    return parser


def test_import_is_light():
    code = "import sys, util.args, util.errors, util.files; print([m for m in ('torch', 'numpy', 'pandas', 'rasterio')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_contract_defaults():
    args = _parser().parse_args(["--data_path", "d"])
    expected = {
        "batch_size": 256, "epochs": 1024, "accum_iter": 1, "model": "mixmim_base", "input_size": 128,
        "mask_ratio": None, "norm_pix_loss": False, "clip_grad": None, "weight_decay": 0.05, "lr": None, "blr": 1.5e-4,
        "min_lr": 0.0, "warmup_epochs": 40, "resume": "", "pin_mem": True, "weight_mode": "per_channel",
        "weight_level": "token", "weight_domain": "linear", "weight_exp_scale": 1.0, "weight_clip": 0.0,
        "weight_norm": "image", "weight_renorm": False, "amp": "auto", "stop_epoch": None, "test_run": False,
        "world_size": None, "port": 0, "dist_on_itp": False, "dist_url": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert not _parser().parse_args(["--data_path", "d", "--no_pin_mem"]).pin_mem


def test_every_flag_has_help():
    text = _parser().format_help()
    for action in _parser()._actions:
        assert action.help, action.dest
        assert action.option_strings[-1] in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask_ratio", "1"],
        ["--mask_ratio", "x"],
        ["--batch_size", "0"],
        ["--weight_clip", "50"],
        ["--lr", "nan"],
        ["--blr", "inf"],
        ["--port", "70000"],
        ["--model", "mixmim_small"],
        ["--epoch", "3"],  # abbreviations are not accepted
        ["--pin_mem", "--no_pin_mem"],
    ],
)
def test_refusals_name_the_flag(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        _parser().parse_args(["--data_path", "d", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_args_to_dict_is_plain():
    namespace = argparse.Namespace(b=Path("x"), a=(1, 2), c=None)
    assert groups.args_to_dict(namespace) == {"a": [1, 2], "b": "x", "c": None}


@pytest.mark.parametrize(
    ("words", "first", "meant"),
    [
        (["--batch_siz", "8"], "unrecognized arguments: --batch_siz 8", "--batch_siz: did you mean --batch_size?"),
        (["--mode", "a"], "unrecognized arguments: --mode a", "--mode: did you mean --model?"),
        (["--model", "tinny"], "invalid choice: 'tinny'", "tinny: did you mean tiny?"),
        (["--batch_size", "x"], "invalid int value: 'x'", None),
    ],
)
def test_usage_errors_say_the_error_first(
    words: list[str], first: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = groups.make_parser("test")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--model", choices=("tiny", "base"))
    with pytest.raises(SystemExit) as left:
        parser.parse_args(words)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert first in lines[0]
    assert lines[1:-1] == ([meant] if meant else [])
    assert lines[-1].endswith("--help")


def test_a_mistyped_required_flag_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    parser = groups.make_parser("test")
    parser.add_argument("--data_path", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data_pth", "d"])
    assert "--data_pth: did you mean --data_path?" in capsys.readouterr().err


def test_the_copies_of_the_weight_modes_are_equal() -> None:
    """The flags' list exists so that --help needs no torch; a mode in one of them alone could not be asked for."""
    from sarwmix.weighting import MODES

    assert groups.WEIGHT_MODES == MODES
