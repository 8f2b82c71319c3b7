#!/usr/bin/env python
"""Embeddings of a data set or of a scene, as .npy or .parquet with names and coordinates, and a 2-D map of them.

    python scripts/extract_features.py --model runs/pretrain/checkpoint.pth --dataset demo --data_path data/demo \\
        --split test --out features/demo.parquet
    python scripts/extract_features.py --model runs/pretrain/checkpoint.pth --scene scene.tif --unit dB --out scene.npy

Pretraining and fine-tuned checkpoints. Bands and statistics come from the model's file. See docs/prediction.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sarwmix.data import registry
from util import args as groups
from util.cli import run_cli
from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.data.base import SarDataset
    from sarwmix.inference.model import Pretrained

SUFFIXES = (".npy", ".parquet")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = groups.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups.add_trained_model_args(result, batch_size=64)
    what = result.add_argument_group("what is embedded")
    what.add_argument("--dataset", choices=registry.names(), default=None, help="registered data set")
    what.add_argument("--data_path", default=None, metavar="DIR", help="root of the data, or a packed store")
    what.add_argument("--split", default="test", help="split, or several joined by + (default %(default)s)")
    what.add_argument("--data_option", action="append", default=[], metavar="NAME=VALUE", help="of the data set")
    what.add_argument(
        "--num_workers", type=groups.non_negative_int, default=0, metavar="N", help="processes reading the data set"
    )
    what.add_argument("--scene", nargs="+", default=None, metavar="PATH", help="instead of --dataset: a scene")
    groups.add_scene_args(result)
    out = result.add_argument_group("results")
    out.add_argument("--out", required=True, metavar="FILE", help="FILE.npy (with FILE.csv) or FILE.parquet")
    out.add_argument("--projection", choices=("pca", "tsne"), default="pca", help="of the map (default %(default)s)")
    out.add_argument("--no_map", action="store_true", help="do not draw FILE_map.png")
    out.add_argument("--seed", type=groups.non_negative_int, default=0, help="of the map (default %(default)s)")
    return result


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if (args.dataset is None) == (args.scene is None) or (args.dataset and not args.data_path):
        raise UserError("give either --dataset with --data_path, or --scene")
    refuse_unused(args)
    for path in args.scene or []:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist; give a GeoTIFF with VH and VV, one file for each, or a folder")

    from sarwmix.inference import embeddings
    from sarwmix.inference.model import choose_device, describe, open_model
    from sarwmix.inference.predict import Options, open_scenes
    from util.files import file_set
    from util.log import get_logger, setup_logging

    setup_logging()
    model = open_model(args.model, trained_on=args.trained_on).to(choose_device(args.device))
    get_logger().info("%s", describe(model))
    classes: tuple[str, ...] = ()
    if args.dataset:
        data = open_data(args, model)
        what = f"{args.dataset}, split {args.split}"
        classes = data.spec.classes
        batches = embeddings.dataset_batches(model, data, batch_size=args.batch_size, num_workers=args.num_workers)
    else:
        scenes = open_scenes([Path(path) for path in args.scene], model.bands, args.band_order)
        if len(scenes) != 1:
            raise UserError(
                f"--scene holds {len(scenes)} scenes; give one of them: {', '.join(s.name for s in scenes)}"
            )
        what = f"tiles of {scenes[0].name}"
        options = Options(args.stride, args.min_valid, args.batch_size)
        batches = embeddings.scene_batches(model, scenes[0], args.unit, options)
    facts = {"model": model.source, "data": what, "bands": ",".join(model.bands)}
    with file_set(out.absolute().parent) as work:
        scratch = work / "scratch"
        scratch.mkdir()
        found = embeddings.collect(batches, scratch, classes)
        if out.suffix == ".npy":
            embeddings.save_npy(work / out.name, found)
        else:
            embeddings.save_parquet(work / out.name, found, facts)
        if not args.no_map:
            embeddings.map_figure(
                work / f"{out.stem}_map.png",
                found,
                args.projection,
                title=f"Features of {model.settings.name} ({Path(model.source).name}): {what}",
                seed=args.seed,
            )
        names = ", ".join(sorted(path.name for path in work.iterdir() if path.is_file()))
    count, width = found.features.shape
    get_logger().info("%d x %d features of %s: %s in %s", count, width, what, names, out.absolute().parent)


def refuse_unused(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen input does not look at.

    Raises:
        UserError: one of them is given.
    """
    of_scenes, of_data = ("unit", "band_order", "stride", "min_valid"), ("data_path", "data_option")
    other, unused = ("--dataset", of_scenes) if args.dataset else ("--scene", of_data)
    given = [f"--{name}" for name in unused if getattr(args, name) not in (None, [])]
    if given:
        hint = "; options of a data set are given with --data_option" if args.dataset else ""
        raise UserError(f"{', '.join(given)} has no effect with {other}: leave it out{hint}")


def open_data(args: argparse.Namespace, model: Pretrained) -> SarDataset:
    """The data set with the model's bands, in its order; single images for models that look at one."""
    options: dict[str, Any] = dict(registry.parse_options(args.data_option))
    known = registry.get_spec(args.dataset).bands
    if tuple(known) != model.bands:
        options.setdefault("bands", ",".join(model.bands))
    data = registry.build_dataset(args.dataset, args.data_path, args.split, **options)
    if tuple(data.spec.bands) != model.bands:
        raise UserError(
            f"{model.source} reads {', '.join(model.bands)}; data set {args.dataset} delivers "
            f"{', '.join(data.spec.bands)}: they must be the same and in the same order"
        )
    is_pair_model = model.task is not None and model.task.name == "pair"
    if data.spec.task != "pair":
        if is_pair_model:
            raise UserError(f"{model.source} compares two images; data set {args.dataset} has single ones")
        return data
    if is_pair_model:
        return data

    return data.single_images()


if __name__ == "__main__":
    run_cli(main)
