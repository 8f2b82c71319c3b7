#!/usr/bin/env python3
"""What a loss weight does on a data set: by class, within and between cells, against plain MixMAE, and as pictures.

    python scripts/weight_report.py --dataset sen1floods11 --data_path FLOODS --split train --out runs/weights

For each weighting: mean weight of cells of each class relative to all others (1: no emphasis), the spread of weights
between the cells of an image and within them, the rank correlation of a cell's weight with the class, and the cosine of
the gradient with that of plain MixMAE (untrained mixmim_tiny, equal masks, --norm_pix_loss). Cells of 32 px count to a
class by the majority of their labelled pixels; data without label maps have the last three columns alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sarwmix.data import registry
from util.args import positive_int
from util.cli import run_cli
from util.errors import EXIT_OK, UserError
from util.files import atomic_write, make_directory

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sarwmix.data.base import SarDataset

SIDE, CELL = 128, 32
PLAIN = "plain"
WEIGHTINGS = {
    "default": "",
    "released form": "--weight_domain zscore --weight_level pixel",
    "linear, clip 5 %": "--weight_clip 5",
    "linear, clip 5 %, s = 3": "--weight_clip 5 --weight_exp_scale 3",
    "linear, p01-p99": "--weight_norm dataset",
    "linear, p01-p99, s = 3": "--weight_norm dataset --weight_exp_scale 3",
    "linear, p01-median": "--weight_norm dataset --weight_range p01-median",
    "dB, p01-p99": "--weight_domain db --weight_norm dataset",
    "dB, p01-p99, s = 3": "--weight_domain db --weight_norm dataset --weight_exp_scale 3",
    "dB, p01-p99, s = -3": "--weight_domain db --weight_norm dataset --weight_exp_scale -3",
    "noise": "--weight_mode noise",
}


def get_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=text[0],
        epilog=f"{text[1]}\n\n{text[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", required=True, choices=registry.names(), metavar="NAME", help="registered data set"
    )
    parser.add_argument("--data_path", required=True, metavar="DIR", help="its folder or store")
    parser.add_argument("--split", default="train", help="split, or several joined with + (default %(default)s)")
    parser.add_argument(
        "--statistics", default=None, metavar="NAME|JSON", help="preset, or a file with real percentiles"
    )
    parser.add_argument("--data_option", action="append", default=[], metavar="NAME=VALUE", help="of the data set")
    parser.add_argument("--weights", action="append", default=[], metavar="FLAGS",
                        help="weight flags of main_pretrain.py, repeated (default: a list of known ones)")  # fmt: skip
    parser.add_argument("--tiles", type=positive_int, default=400, metavar="N", help="tiles of 128 px at most")
    parser.add_argument("--out", required=True, metavar="DIR", help="weights.md and weights.png")
    return parser


def main() -> int:
    import main_pretrain

    args = get_parser().parse_args()
    options = registry.parse_options(args.data_option)
    data = registry.build_dataset(args.dataset, args.data_path, args.split, statistics=args.statistics, **options)
    chosen = {flags: flags for flags in args.weights} or WEIGHTINGS
    transforms = {}
    for name, flags in {
        PLAIN: "--weight_mode none",
        **chosen,
    }.items():  # all flags are looked at before anything is read
        parsed = main_pretrain.get_parser().parse_args(["--data_path", ".", *shlex.split(flags)])
        transforms[name] = main_pretrain.make_transform(data, SIDE, main_pretrain.weight_options(parsed))
    images, labels = read_tiles(data, args.tiles)
    out = make_directory(args.out)
    classes = list(data.spec.classes) if labels is not None else []
    lines = table(images, labels, classes, transforms)
    lines += ["", f"{len(images)} tiles of {SIDE} px of {args.dataset} ({args.split}); {data.statistics.origin}.", ""]
    with atomic_write(out / "weights.md", "w") as stream:
        stream.write("\n".join(lines))
    draw(images, transforms, list(data.spec.bands), out / "weights.png")
    print("\n".join(lines))
    return EXIT_OK


def read_tiles(data: SarDataset, most: int) -> tuple[torch.Tensor, np.ndarray | None]:
    """(N, bands, 128, 128) dB and, where there are label maps, (N, 128, 128); empty tiles are left out."""
    import numpy as np
    import torch

    from sarwmix.data.base import UnreadableSample

    images: list[torch.Tensor] = []
    labels: list[np.ndarray] = []
    per_image = max(1, data.shape[1] // SIDE) ** 2
    for index in np.unique(np.linspace(0, len(data) - 1, -(-most // per_image)).astype(np.int64)):
        try:
            batch = data.get_batch(np.array([index]))
        except UnreadableSample as error:
            print(f"left out: {error}", flush=True)
            continue
        image = batch["image"][0]
        if min(image.shape[1:]) < SIDE:  # small patches are enlarged, as pretraining does
            images.append(torch.nn.functional.interpolate(image[None], size=SIDE, mode="bilinear")[0])
            continue
        for y in range(0, image.shape[1] - SIDE + 1, SIDE):
            for x in range(0, image.shape[2] - SIDE + 1, SIDE):
                tile = image[:, y : y + SIDE, x : x + SIDE]
                if torch.isfinite(tile).flatten(1).any(1).all():
                    images.append(tile)
                    if data.spec.task == "segmentation":
                        labels.append(batch["label"][0, y : y + SIDE, x : x + SIDE].numpy())
    if not images:
        raise UserError(f"{data.source}: no tile with a valid pixel in each band")
    return torch.stack(images), np.stack(labels) if len(labels) == len(images) else None


def table(images: torch.Tensor, labels: np.ndarray | None, classes: list[str], transforms: dict[str, Any]) -> list[str]:
    """The lines of weights.md."""
    import numpy as np
    from scipy.stats import spearmanr

    from sarwmix.finetune.cells import cell_shares

    shares = [] if labels is None else [cell_shares(labels, number) for number in range(len(classes))]
    wanted = [f"{name}: weight, rank correlation" for name in classes[1:]]
    lines = [f"| weighting | {' | '.join([*wanted, 'between cells', 'within cells', 'gradient cosine'])} |"]
    lines.append("|---" * (len(wanted) + 4) + "|")
    plain = gradients(images, transforms.pop(PLAIN))
    for name, transform in transforms.items():
        pixels = pixel_weights(transform, images)  # (N, bands, 128, 128), NaN where invalid
        with np.errstate(invalid="ignore"):
            cells = as_cells(pixels)
            mean, inside = np.nanmean(cells, axis=-1), np.nanstd(cells, axis=-1)
        weight = np.nanmean(mean, axis=1).ravel()  # of both bands
        row = []
        for share in shares[1:]:
            known = np.isfinite(share) & np.isfinite(weight)
            of, others = weight[known & (share > 0.5)], weight[known & (share <= 0.5)]
            ratio = of.mean() / others.mean() if len(of) and len(others) else np.nan
            row.append(f"{ratio:.3f}, {spearmanr(weight[known], share[known]).statistic:+.2f}")
        between = np.nanmean(np.nanstd(mean, axis=2) / np.nanmean(mean, axis=2))
        within = np.nanmean(inside / mean)
        # A pixel's weight is spread within its cell, a token's is not: that is what the loss sees.
        spread = f"{100 * within:.0f} %" if transform.weighting.level == "pixel" else "0 (averaged)"
        cosine = similarity(plain, gradients(images, transform))
        lines.append(f"| {name} | {' | '.join([*row, f'{100 * between:.1f} %', spread, f'{cosine:.3f}'])} |")
    return lines


def pixel_weights(transform: Any, images: torch.Tensor) -> np.ndarray:
    """Weights as a map, NaN at invalid pixels."""
    import numpy as np

    weights = transform(images).weights
    if weights.ndim == 3:
        grid = SIDE // CELL
        weights = weights.transpose(1, 2).unflatten(2, (grid, grid))
        weights = weights.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)
    found: np.ndarray = np.where(weights.numpy() > 0, weights.numpy(), np.nan)
    return found


def as_cells(maps: np.ndarray) -> np.ndarray:
    """(N, bands, 128, 128) -> (N, bands, cells, pixels)."""
    count, bands = maps.shape[:2]
    grid = SIDE // CELL
    return maps.reshape(count, bands, grid, CELL, grid, CELL).swapaxes(3, 4).reshape(count, bands, grid**2, CELL**2)


def gradients(images: torch.Tensor, transform: Any) -> torch.Tensor:
    """Gradient of the loss of an untrained model over up to 64 tiles, as one vector."""
    import torch

    from models_mixmim import MixMIM, model_config

    torch.manual_seed(0)
    model = MixMIM(img_size=SIDE, in_chans=images.shape[1], norm_pix_loss=True, **model_config("mixmim_tiny"))
    few = images[torch.linspace(0, len(images) - 1, min(64, len(images) // 2 * 2)).long()]
    batch = transform(few)
    mask = model.draw_mask(0.5, torch.Generator().manual_seed(0))
    model(batch.images, batch.weights, mask=mask).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of two vectors."""
    import torch

    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


def draw(images: torch.Tensor, transforms: dict[str, Any], bands: list[str], path: Path) -> None:
    """The first band of three tiles, spread from dark to bright, and its weights by each weighting."""
    import numpy as np
    import torch
    from matplotlib.figure import Figure

    order = torch.nanmean(images[:, 0].flatten(1), dim=1).argsort()
    few = images[order[[0, len(order) // 2, len(order) - 1]]]
    figure = Figure(figsize=(1.5 * (len(transforms) + 1), 5.2), layout="constrained")
    axes = figure.subplots(3, len(transforms) + 1, squeeze=False)
    for column, (name, transform) in enumerate([(f"{bands[0]}, dB", None), *transforms.items()]):
        maps = few.numpy()[:, 0] if transform is None else pixel_weights(transform, few)[:, 0]
        low, high = np.nanpercentile(maps, [1, 99])
        for row in range(3):
            shown = axes[row, column].imshow(
                maps[row], cmap="gray" if transform is None else "cividis", vmin=low, vmax=max(high, low + 1e-3)
            )
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        axes[0, column].set_title(name.replace(", ", ",\n"), fontsize=7)
        bar = figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.9)
        bar.ax.tick_params(labelsize=6)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=130)


if __name__ == "__main__":
    run_cli(main)
