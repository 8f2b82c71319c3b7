#!/usr/bin/env python
"""Leave-three-out on a few hand-labelled Sen1Floods11 chips: a small network against Otsu's threshold on VV.

Usable chips (some valid pixel with a label) are sorted by name; fold k tests every third one from the k-th on and
trains on the others. Chips are read one after the other, so this is meant for a handful, not for the whole data set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.args import Parser, positive_int
from util.cli import run_cli
from util.errors import UserError

if TYPE_CHECKING:
    import numpy as np

FOLDS = 3
RECIPE = (
    *("--head", "fused", "--input_size", "128", "--batch_size", "6", "--lr", "1e-3", "--layer_decay", "1.0"),
    *("--drop_path", "0", "--warmup_epochs", "5", "--num_workers", "0", "--amp", "off", "--save_every", "1000"),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    result.add_argument("--data_path", required=True, metavar="DIR", help="folder with S1Hand and LabelHand")
    result.add_argument("--out", required=True, metavar="DIR", help="lists, runs and result.json; folds done are kept")
    result.add_argument("--model", default="resnet10t", help="any --model of main_finetune.py (default %(default)s)")
    result.add_argument(
        "--bands",
        default="VH",
        help="bands of the network (default %(default)s: wind makes water bright in VV, hardly in VH)",
    )
    result.add_argument("--epochs", type=positive_int, default=60, help="of one step each (default %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return result


def survey(data_path: Path, folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Usable chips and the confusion matrix of the threshold on each; others are named with the reason."""
    import numpy as np
    import torch

    from sarwmix.data import registry
    from sarwmix.data.base import UnreadableSample
    from sarwmix.data.io.rasters import list_files
    from sarwmix.datasets.sen1floods11 import find_root
    from sarwmix.inference.water_threshold import threshold_water
    from sarwmix.tasks.segmentation import IGNORED, confusion_matrices
    from util.files import make_directory

    files = list_files(find_root(data_path) / "LabelHand")
    names = [file.stem.removesuffix("_LabelHand") for file in files]
    lists = make_directory(folder / "all")
    write_list(lists / "test.txt", names)
    data = registry.build_dataset("sen1floods11", data_path, "test", lists=str(lists), missing="skip")
    usable: list[str] = []
    baseline: dict[str, np.ndarray] = {}
    for index, name in enumerate(data.names):
        try:
            batch = data.get_batch(np.array([index]))
        except UnreadableSample as error:
            print(f"left out: {name}: {error.reason}", flush=True)
            continue
        image, label = batch["image"], batch["label"]
        label[~torch.isfinite(image).all(dim=1)] = IGNORED
        if bool((label == IGNORED).all()):
            print(f"left out: {name}: no labelled pixel", flush=True)
            continue
        water = torch.from_numpy(threshold_water(image[0, data.spec.bands.index("VV")].numpy()))
        usable.append(name)
        baseline[name] = confusion_matrices(label, water[None], 2)[0].numpy()
    if len(usable) < 2 * FOLDS:
        raise UserError(f"{data_path} has {len(usable)} usable chips; leave-three-out needs {2 * FOLDS} or more")
    return usable, baseline


def write_list(path: Path, names: list[str]) -> None:
    """One name a line."""
    from util.files import atomic_write

    with atomic_write(path, "w") as file:
        file.write("".join(f"{name}\n" for name in names))


def run_fold(
    args: argparse.Namespace, fold: int, chips: list[str], pixels: dict[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    """Train on the other chips and return the confusion matrices of those left out.

    Args:
        pixels: Confusion matrices of the threshold; their row sums are the labelled pixels of each class.
    """
    from util.arrays import load_npz
    from util.files import make_directory

    test = chips[fold::FOLDS]
    train = [name for name in chips if name not in test]
    place = make_directory(folder / f"fold{fold}")
    # The training chip with the most even shares says which epoch is the best: the tested ones have no part in that.
    judge = max(train, key=lambda name: int(pixels[name].sum(axis=1).min()))
    for split, names in (("train", train), ("test", test), ("val", [judge])):
        write_list(place / f"{split}.txt", names)
    found = place / "run" / "predictions_test.npz"
    if not found.is_file():
        command = [sys.executable, str(ROOT / "main_finetune.py"), "--dataset", "sen1floods11"]
        command += ["--data_path", args.data_path, "--data_option", f"lists={place}", "--bands", args.bands]
        command += ["--model", args.model, "--epochs", str(args.epochs), "--seed", str(args.seed), *RECIPE]
        command += ["--output_dir", str(place / "run")]
        with (place / "log.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0 or not found.is_file():
            raise UserError(f"training of fold {fold} failed; see {place / 'log.txt'}")
    try:
        arrays = load_npz(found)
        return dict(zip(arrays["names"].tolist(), arrays["confusion"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{found} cannot be read ({error}); delete it and run again") from error


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    import numpy as np

    from sarwmix.tasks.metrics import align_table, confusion_metrics
    from util.files import make_directory, write_json

    folder = make_directory(args.out)
    chips, baseline = survey(Path(args.data_path), folder)
    network: dict[str, np.ndarray] = {}
    for fold in range(FOLDS):
        network |= run_fold(args, fold, chips, baseline, folder)
        print(f"fold {fold}: tested on {', '.join(chips[fold::FOLDS])}", flush=True)

    rows: list[tuple[str, ...]] = [("Chip", "Water", "Network IoU", "Otsu IoU")]
    result: dict[str, Any] = {"chips": {}, "bands": args.bands, "model": args.model, "epochs": args.epochs}
    for name in [*chips, "all"]:
        ours = sum(network.values()) if name == "all" else network[name]
        theirs = sum(baseline.values()) if name == "all" else baseline[name]
        values = {"network": confusion_metrics(np.asarray(ours)), "otsu": confusion_metrics(np.asarray(theirs))}
        result["chips"][name] = values
        water = int(np.asarray(theirs)[1].sum())
        shown = [f"{values[which]['iou']:.4f}" if water else "-" for which in ("network", "otsu")]
        rows.append((name, f"{water:,}", *shown))
    print(align_table(rows))
    write_json(folder / "result.json", json.loads(json.dumps(result, default=float)))


if __name__ == "__main__":
    run_cli(main)
