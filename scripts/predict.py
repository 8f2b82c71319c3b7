#!/usr/bin/env python
"""Predict Sentinel-1 scenes of any size with a fine-tuned model: class probabilities, flood from two dates, class maps.

    python scripts/predict.py --model runs/finetune/checkpoint_best.pth --scene scene.tif --unit dB --out maps/
    python scripts/predict.py --model runs/flood --scene before.tif --second after.tif --unit linear --out maps/

Writes GeoTIFF, CSV, JSON and a quick-look PNG for each scene; see docs/prediction.md. Bands, statistics and classes
come from the model's file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util import args as groups
from util.cli import run_cli
from util.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = groups.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups.add_trained_model_args(result, batch_size=32)
    what = result.add_argument_group("what is predicted")
    what.add_argument(
        "--scene",
        required=True,
        nargs="+",
        metavar="PATH",
        help="GeoTIFF with the bands of the model, one file for each band, or a folder of scenes",
    )
    what.add_argument(
        "--second", nargs="+", default=None, metavar="PATH", help="second date on the same grid, for flood models"
    )
    what.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    what.add_argument(
        "--probabilities", action="store_true", help="class maps: also write the probability of each class"
    )
    groups.add_scene_args(result)
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    for path in [*args.scene, *(args.second or [])]:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist; give a GeoTIFF with the model's bands, one file each, or a folder")

    from sarwmix.inference.model import choose_device, describe, open_model
    from sarwmix.inference.predict import EmptyScene, Options, UnreadableScene, open_scenes, predict_scene
    from util.log import get_logger, memory_mib, setup_logging

    setup_logging()
    log, began = get_logger(), time.monotonic()
    model = open_model(args.model, trained_on=args.trained_on).to(choose_device(args.device))
    model.need_task()
    log.info("%s", describe(model))
    damaged: list[str] = []
    scenes = open_scenes([Path(path) for path in args.scene], model.bands, args.band_order, broken=damaged)
    seconds = open_scenes([Path(path) for path in args.second], model.bands, args.band_order) if args.second else []
    if args.second and (len(scenes), len(seconds)) != (1, 1):
        raise UserError(
            f"--scene holds {len(scenes)} scene(s) and --second {len(seconds)}; two dates need one scene each"
        )
    options = Options(args.stride, args.min_valid, args.batch_size, args.probabilities)
    failed: list[str] = []
    for scene in scenes:
        try:
            outcome = predict_scene(
                model, scene, Path(args.out), second=seconds[0] if seconds else None, unit=args.unit, options=options
            )
        except (EmptyScene, UnreadableScene) as error:
            if len(scenes) == 1:
                raise
            log.warning("left out: %s", error)
            failed.append(scene.name)
            if isinstance(error, UnreadableScene):
                damaged.append(str(error))
            continue
        log.info("%s: %s", outcome.name, headline(outcome.summary))
        log.info("  %s", ", ".join(path.name for path in outcome.files))
    if len(failed) == len(scenes):
        raise UserError(f"none of the {len(scenes)} scenes could be predicted; the warnings above say why")
    log.info(
        "%d scene(s) in %s, %d left out, %.1f s, peak memory %.0f MiB (device %.0f MiB)",
        len(scenes) - len(failed),
        args.out,
        len(failed),
        time.monotonic() - began,
        *memory_mib(),
    )
    if damaged:
        listed = "\n".join(f"  {text}" for text in damaged)
        raise UserError(f"{len(damaged)} file(s) could not be read; all other scenes were predicted:\n{listed}")


def headline(summary: dict[str, object]) -> str:
    """The result of a scene in one line."""
    if "probability_flood" in summary:
        return (
            f"probability of flood {summary['probability_flood']:.4f}; {summary['windows']} window(s), highest "
            f"{summary['highest_window']:.4f}, {100 * summary['share_of_windows_with_flood']:.1f} % above 0.5"  # type: ignore[operator]
        )
    values = summary.get("share") or summary["mean_probability"]
    assert isinstance(values, dict)
    best = sorted(values.items(), key=lambda item: -item[1])[:3]
    kind = "area" if "share" in summary else "mean probability"
    return f"{summary['tiles']} tiles; {kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in best)


if __name__ == "__main__":
    run_cli(main)
