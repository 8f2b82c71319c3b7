#!/usr/bin/env python
"""Export a checkpoint: weights as safetensors, config.json, model card and a torch.export program in one folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description=__doc__, epilog="Results are taken from metrics.json beside the checkpoint, where there is one."
    )
    result.add_argument("--checkpoint", required=True, metavar="CKPT", help="ours, or a released one")
    result.add_argument("--export", required=True, metavar="DIR", help="folder to make; must not exist yet")
    result.add_argument(
        "--trained_on", default=None, metavar="DATASET", help="for files that hold weights only: their data set"
    )
    result.add_argument("--no_program", action="store_true", help="leave the torch.export program out")
    result.add_argument("--onnx", action="store_true", help="also an ONNX file, from dB to probabilities")
    result.add_argument("--push_to_hub", default=None, metavar="OWNER/NAME", help="also upload to the Hugging Face hub")
    return result


def _no_file(path: Path) -> str:
    """What to say of a path that is no file."""
    if not path.is_dir():
        return f"checkpoint {path} does not exist; give the path of a .pth file"
    held = ", ".join(sorted(one.name for one in path.glob("*.pth")))
    hint = f" in it: {held}" if held else ", it holds none"
    return f"--checkpoint {path} is a folder; give a .pth file{hint}"


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    if not Path(args.checkpoint).is_file():
        raise UserError(_no_file(Path(args.checkpoint)))
    from sarwmix.inference.export import check_hub, export_model, push_to_hub
    from util.log import setup_logging

    setup_logging()
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    export_model(args.checkpoint, args.export, trained_on=args.trained_on, program=not args.no_program, onnx=args.onnx)
    if args.push_to_hub:
        print(f"pushed to {push_to_hub(args.export, args.push_to_hub)}")


if __name__ == "__main__":
    run_cli(main)
