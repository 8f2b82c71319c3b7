"""Argument groups shared by the entry scripts. Light on purpose: `--help` must not import torch.

Each `add_*` function adds one group with a title; a script composes what it uses, and reads every flag it offers.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from util.config import FLAG, with_config
from util.errors import UserError

MIXMIM_NAMES = ("mixmim_tiny", "mixmim_base", "mixmim_large", "mixmim_huge")
MAE_NAMES = ("mae_vit_tiny", "mae_vit_small", "mae_vit_base")
AMP_MODES = ("auto", "bf16", "fp16", "off")
WEIGHT_MODES = ("none", "per_channel", "shared_avg", "shared_intensity", "noise")
TARGET_LOOKS = (1, 2, 4, 8, 16, 32)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line first, then what was probably meant and how to get help.

    Abbreviated flags are not accepted: a new flag must not change old commands.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with the flags of `--config`; remembers the words for `error`."""
        self._words = with_config(self, sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and without the usage of all flags."""
        flags = list(self._option_string_actions)
        unknown = [word.split("=")[0] for word in self._words if word.startswith("--")]
        unknown = [word for word in unknown if len(word) > 2 and word not in flags]
        hints = [(word, difflib.get_close_matches(word, flags, n=2)) for word in dict.fromkeys(unknown)]
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice is not None:
            offered = [word.strip(" '") for word in choice[2].split(",")]
            hints.append((choice[1], difflib.get_close_matches(choice[1], offered, n=2)))
        meant = [f"{word}: did you mean {' or '.join(close)}?" for word, close in hints if close]
        self.exit(2, "\n".join([f"error: {message}", *meant, f"All flags: python {self.prog} --help"]) + "\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Parser that shows defaults in its help."""
    return Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> set[str]:
    """Names of the flags that a command line names, whatever their values.

    Args:
        parser: knows the flags.
        words: the command line; None: that of the program.
    """
    suppressed = copy.deepcopy(parser)
    suppressed._defaults = {}
    for action in suppressed._actions:
        action.default = argparse.SUPPRESS
    return set(vars(suppressed.parse_args(words)))


def args_to_dict(args: argparse.Namespace) -> dict[str, Any]:
    """Plain values for `args.json` and the checkpoint."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value)

    return {name: plain(value) for name, value in sorted(vars(args).items())}


def _number(convert: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        if not accept(value):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    return parse


positive_int = _number(int, lambda value: value > 0, "a whole number above 0")
non_negative_int = _number(int, lambda value: value >= 0, "a whole number of at least 0")
seed_number = _number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0 and below 2^63")
non_zero_float = _number(float, lambda value: 0 < abs(value) < float("inf"), "a number other than 0")
positive_float = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
non_negative_float = _number(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
open_fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1 (both excluded)")
closed_fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
half_open_fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 (included) to 1 (excluded)")
train_fraction = _number(float, lambda value: 0 < value <= 1, "a number from 0 (excluded) to 1 (included)")
percentile_clip = _number(float, lambda value: 0 <= value < 50, "a percentile from 0 (included) to 50 (excluded)")
port_number = _number(int, lambda value: 0 <= value < 65536, "a port number (0-65535)")


def add_run_args(parser: argparse.ArgumentParser, *, output_dir: str) -> None:
    """Where results go, device, seed, test run."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        default=output_dir,
        metavar="DIR",
        help="folder for checkpoints, log.txt, args.json and pictures",
    )
    group.add_argument(
        FLAG,
        default=None,
        metavar="FILE",
        help="flags from a .toml, .json or .yaml file, such as configs/*.toml or args.json of a run; the command line "
        "wins",
    )
    group.add_argument(
        "--log_dir", default=None, metavar="DIR", help="folder for TensorBoard (not given: <output_dir>/tensorboard)"
    )
    group.add_argument("--device", default="auto", help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N")
    group.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of everything that is random in the run (weights, order, augmentation, --train_frac); not of how a "
        "data set is cut into splits: that is --data_option seed=N",
    )
    group.add_argument(
        "--flops", action="store_true", help="print the operations of one sample's forward pass before training"
    )
    group.add_argument("--test_run", action="store_true",
                       help="a few batches of everything, then stop: checks an installation or a command")  # fmt: skip


def check_training(args: argparse.Namespace) -> None:
    """Refuse epochs that the schedule does not have, a --log_dir that is no folder, and a budget that nothing keeps."""
    end = args.epochs if args.stop_epoch is None else args.stop_epoch
    if end > args.epochs:
        raise UserError(f"--stop_epoch {args.stop_epoch} lies behind the schedule's end, --epochs {args.epochs}")
    if args.start_epoch is not None and args.start_epoch >= end:
        raise UserError(f"--start_epoch {args.start_epoch} leaves nothing to train: the last epoch is {end - 1}")
    if args.log_dir and Path(args.log_dir).exists() and not Path(args.log_dir).is_dir():
        raise UserError(f"--log_dir {args.log_dir} is a file; give a folder for TensorBoard")
    if args.memory_budget != 1 and not args.compile:
        raise UserError(
            f"--memory_budget {args.memory_budget:g} is kept by the compiler: add --compile, or take "
            "--activation_checkpointing, which works without it"
        )


def add_resume_args(parser: argparse.ArgumentParser, *, save_every: int) -> None:
    """Continuing a run, and what is saved for it."""
    group = parser.add_argument_group("resume and checkpoints")
    group.add_argument(
        "--resume",
        default="",
        metavar="PATH|auto",
        help="continue a run: a checkpoint, or auto = the newest whole one in --output_dir "
        "(starts fresh when there is none)",
    )
    group.add_argument(
        "--start_epoch",
        type=non_negative_int,
        default=None,
        metavar="N",
        help="begin at epoch N (from 0) instead of where --resume ends",
    )
    group.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="resume although data, model, weighting or schedule differ from the checkpoint's",
    )
    group.add_argument(
        "--save_every",
        type=positive_int,
        default=save_every,
        metavar="N",
        help="write checkpoint.pth every N epochs (and at the end)",
    )
    group.add_argument(
        "--save_minutes",
        type=non_negative_float,
        default=30.0,
        metavar="MIN",
        help="also save in mid-epoch when this many minutes have passed since the last one; 0: never",
    )
    group.add_argument("--keep_checkpoints", type=positive_int, default=2, metavar="K",
                       help="how many of the newest checkpoints stay in <output_dir>/recent; with 2 or more, "
                            "a damaged newest one has a predecessor")  # fmt: skip


def add_fault_args(parser: argparse.ArgumentParser) -> None:
    """What happens when something goes wrong."""
    group = parser.add_argument_group("faults")
    group.add_argument(
        "--skip_nonfinite",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="skip a step whose loss or gradient is not finite, at most N times in a run; 0: stop at the first",
    )
    group.add_argument("--hang_timeout", type=non_negative_float, default=30.0, metavar="S",
                       help="with several processes: end the job when one makes no progress for S seconds "
                            "(never less than a few times its slowest step); 0: wait for ever")  # fmt: skip


def add_data_args(parser: argparse.ArgumentParser, *, datasets: Sequence[str], default: str) -> None:
    """Data set and loading."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=tuple(datasets),
        default=default,
        help="registered data set; the only switch between data sets",
    )
    group.add_argument(
        "--data_path",
        required=True,
        metavar="DIR",
        help="root of the data, or a packed store made from it by scripts/pack_dataset.py",
    )
    group.add_argument(
        "--num_workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="reading processes for each training process; 0: read in the training process",
    )
    pinning = group.add_mutually_exclusive_group()
    pinning.add_argument(
        "--pin_mem",
        dest="pin_mem",
        action="store_true",
        default=True,
        help="page-locked host memory for faster copies to the GPU (no effect on CPU)",
    )
    pinning.add_argument(
        "--no_pin_mem", dest="pin_mem", action="store_false", default=argparse.SUPPRESS, help="ordinary host memory"
    )
    group.add_argument(
        "--cache",
        choices=("auto", "device", "device16", "host", "none"),
        default="auto",
        help="where training images are kept: in GPU memory (device16: rounded to float16, half the room), in the "
        "memory of each process, or nowhere; auto: in GPU memory when they take at most 45%% of it",
    )
    group.add_argument("--max_bad_samples", type=non_negative_int, default=100, metavar="N",
                       help="unreadable samples are named, counted and replaced by another one; "
                            "more than N in a run end it")  # fmt: skip


def add_model_args(parser: argparse.ArgumentParser, *, models: Sequence[str] = MIXMIM_NAMES + MAE_NAMES,
                   default: str = "mixmim_base") -> None:  # fmt: skip
    """Model size and input size."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=tuple(models),
        default=default,
        help="the method's encoder by size; mae_vit_*: plain masked autoencoders to compare with",
    )
    _add_input_size(group)


def _add_input_size(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input_size",
        type=positive_int,
        default=128,
        metavar="PX",
        help="side of the model's input in pixels; mixmim_*: a multiple of 128, mae_vit_*: of 32, other ViTs: of their "
        "patch; patches are resized to it",
    )


def add_backbone_args(parser: argparse.ArgumentParser, *, default: str = "mixmim_base") -> None:
    """Encoder by name, and what comes after it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help=f"{', '.join(MIXMIM_NAMES + MAE_NAMES)}, or any timm model (resnet50, vit_small_patch16_224, ...), "
        "or package.module:factory, which makes any encoder (docs/new_backbone.md)",
    )
    _add_input_size(group)
    group.add_argument(
        "--head",
        choices=("linear", "bn_linear", "upernet", "fused"),
        default=None,
        help="for images: linear (the default), bn_linear; for pixels: upernet (the default), fused = the last four "
        "blocks or stages",
    )
    group.add_argument(
        "--pool",
        choices=("token", "avg"),
        default=None,
        help="how a ViT makes one vector: class token, or mean of the others with a norm of its own (not given: "
        "timm's choice for the model)",
    )
    group.add_argument("--drop_rate", type=half_open_fraction, default=0.0, metavar="R",
                       help="dropout before the last layer")  # fmt: skip


def add_pretrain_args(parser: argparse.ArgumentParser) -> None:
    """Masking and target of pretraining."""
    group = parser.add_argument_group("masked pretraining")
    group.add_argument(
        "--mask_ratio",
        type=open_fraction,
        default=None,
        metavar="R",
        help="share of the 32x32-pixel cells that show the partner: int(cells * R), e.g. 16 * 0.5 = 8; of mae_vit_*: "
        "of the 16x16-pixel patches that are hidden (not given: 0.5, mae_vit_*: 0.75)",
    )
    group.add_argument("--norm_pix_loss", action="store_true",
                       help="standardise each target cell over its own values")  # fmt: skip
    group.add_argument(
        "--target",
        choices=("image", "gradient", "hog"),
        default="image",
        help="what is reconstructed: the image, its edges as ratios of mean power, or histograms of oriented gradients",
    )
    group.add_argument(
        "--target_looks",
        type=int,
        choices=TARGET_LOOKS,
        default=1,
        metavar="K",
        help="reconstruct the mean power over blocks of K x K pixels (1, 2, 4, 8, 16, 32) instead of single pixels; "
        "the input stays as it is",
    )


def add_weight_args(parser: argparse.ArgumentParser) -> None:
    """Backscatter weighting of the loss."""
    group = parser.add_argument_group("loss weights from backscatter, w = exp(s * (1 - x)), x = min-max of the power")
    group.add_argument(
        "--weight_mode",
        choices=WEIGHT_MODES,
        default="per_channel",
        help="none; own weights for VH and VV; their mean on both; weights of the mean power on both; noise: inverse "
        "error variance (m / (m + noise))^2 of the local mean power m",
    )
    group.add_argument(
        "--weight_level",
        choices=("token", "pixel"),
        default="token",
        help="average the weights over each 32x32 cell, or apply them pixel by pixel",
    )
    group.add_argument(
        "--weight_domain",
        choices=("linear", "db", "zscore"),
        default="linear",
        help="power from dB before standardisation, dB itself, or 10^(z/10) of standardised values (the released code: "
        "zscore with --weight_level pixel)",
    )
    group.add_argument("--weight_exp_scale", type=non_zero_float, default=1.0, metavar="S",
                       help="s in the formula; below 0 bright surfaces count more, a control")  # fmt: skip
    group.add_argument(
        "--weight_clip",
        type=percentile_clip,
        default=0.0,
        metavar="P",
        help="clip the power to its [P, 100-P] percentiles first; 0: no clipping",
    )
    group.add_argument(
        "--weight_norm",
        choices=("image", "dataset"),
        default="image",
        help="min and max of each image, or registered percentiles of the data set",
    )
    group.add_argument(
        "--weight_range",
        choices=("p01-p99", "p01-median"),
        default="p01-p99",
        help="which percentiles --weight_norm dataset takes",
    )
    group.add_argument("--weight_permute", action="store_true",
                       help="shuffle the weights over the cells of each image: a placebo")  # fmt: skip
    group.add_argument("--weight_renorm", action="store_true",
                       help="divide by the image's mean weight, which keeps the loss scale")  # fmt: skip


def add_optim_args(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int,
    epochs: int,
    blr: float,
    warmup_epochs: int,
    min_lr: float = 0.0,
    weight_decay: float = 0.05,
) -> None:
    """Batch, schedule, AdamW, precision."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help="samples per process (GPU) and forward pass; effective batch = batch_size * accum_iter * processes",
    )
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, metavar="N", help="forward passes per optimizer step"
    )
    group.add_argument(
        "--epochs", type=positive_int, default=epochs, metavar="N", help="epochs for which the schedule is planned"
    )
    group.add_argument(
        "--stop_epoch",
        type=positive_int,
        default=None,
        metavar="N",
        help="end after N epochs without changing the planned schedule",
    )
    group.add_argument(
        "--lr", type=positive_float, default=None, metavar="LR", help="peak learning rate (not given: from --blr)"
    )
    group.add_argument(
        "--blr",
        type=positive_float,
        default=blr,
        metavar="LR",
        help="base learning rate: lr = blr * effective batch / 256",
    )
    group.add_argument(
        "--min_lr", type=non_negative_float, default=min_lr, metavar="LR", help="learning rate at the end of the cosine"
    )
    group.add_argument(
        "--warmup_epochs",
        type=non_negative_int,
        default=warmup_epochs,
        metavar="N",
        help="epochs of linear warm-up from 0",
    )
    group.add_argument(
        "--weight_decay",
        type=non_negative_float,
        default=weight_decay,
        metavar="W",
        help="AdamW weight decay; biases, norms and 1-D parameters have none",
    )
    group.add_argument(
        "--clip_grad",
        type=positive_float,
        default=None,
        metavar="NORM",
        help="clip the gradient's L2 norm (not given: no clipping)",
    )
    group.add_argument(
        "--amp",
        choices=AMP_MODES,
        default="auto",
        help="mixed precision: auto = bf16 on CUDA, off on CPU; fp16 uses a gradient scaler; off = float32 throughout, "
        "without TF32",
    )
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the model: faster steps after minutes of compiling")  # fmt: skip
    group.add_argument("--activation_checkpointing", action="store_true",
                       help="compute blocks again in the backward pass: less memory, a third more time")  # fmt: skip
    group.add_argument("--memory_budget", type=train_fraction, default=1.0, metavar="SHARE",
                       help="with --compile: the share of activations to keep; the rest is computed again, cheapest "
                       "first (0.5: 38 %% less memory, 9 %% slower; docs/cards.md)")  # fmt: skip
    group.add_argument("--cuda_graph", action="store_true",
                       help="launch each step's forward and backward pass as one CUDA graph: faster where the host is "
                       "slower than the GPU, as in small batches")  # fmt: skip


def add_data_detail_args(parser: argparse.ArgumentParser, *, split: str | None = None) -> None:
    """Statistics and options of the chosen data set, and its split where a help text for it is given."""
    group = parser.add_argument_group("data set details")
    if split is not None:
        group.add_argument("--split", default=None, help=split)
    group.add_argument("--statistics", default=None, metavar="NAME|JSON", help="registered preset, or a file of ours")
    group.add_argument("--data_option", action="append", default=[], metavar="NAME=VALUE",
                       help="option of the data set, e.g. unit=linear for s1_scenes; may be repeated; a wrong name "
                            "lists them; seed=N cuts eurosat_sar, dfc2020, satlas and s1_scenes into other splits, "
                            "--seed does not")  # fmt: skip


def add_scene_args(parser: argparse.ArgumentParser) -> None:
    """How scenes are read and cut into tiles."""
    group = parser.add_argument_group("scenes")
    group.add_argument("--unit", choices=("dB", "linear", "amplitude"), default=None,
                       help="of VH and VV (not given: found out, with a warning)")  # fmt: skip
    group.add_argument("--band_order", default=None, metavar="NAMES",
                       help="names of all bands of multi-band files without band descriptions, e.g. VV,VH")  # fmt: skip
    group.add_argument("--stride", type=positive_int, default=None, metavar="PX",
                       help="distance of neighbouring tiles; smaller than a tile: they overlap (not given: a tile; "
                            "half a tile for class maps)")  # fmt: skip
    group.add_argument("--min_valid", type=closed_fraction, default=None, metavar="F",
                       help="least share of valid pixels of a tile (not given: 0.5); not for class maps")  # fmt: skip


def add_trained_model_args(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Which model is used, and how it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="PATH",
                       help="checkpoint, output folder of a fine-tuning run, folder written by --export, or owner/name "
                            "on the hub")  # fmt: skip
    group.add_argument("--trained_on", default=None, metavar="DATASET",
                       help="for files that hold weights only: their data set")  # fmt: skip
    group.add_argument("--batch_size", type=positive_int, default=batch_size, metavar="N",
                       help="default %(default)s")  # fmt: skip
    group.add_argument("--device", default="auto", help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N")


def add_band_args(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which bands of the data set."""
    parser.add_argument("--bands", default=None, metavar="SET|NAMES",
                        help="band set of the data set, such as s1, s2 or all, or band names joined with commas, in "
                             "the wanted order; not given: VH,VV where there are such")  # fmt: skip


def add_label_args(parser: argparse.ArgumentParser) -> None:
    """Bands, and options of data sets with label maps."""
    group = parser.add_argument_group("bands and label maps")
    add_band_args(group)
    group.add_argument("--class_weights", type=non_negative_float, nargs="+", default=None, metavar="W",
                       help="weight of each class in the loss of label maps, in the order of the classes")  # fmt: skip
    group.add_argument("--label_set", choices=("dfc", "igbp"), default=None,
                       help="dfc2020: which label files are read, hand-made (dfc, the default) or MODIS "
                            "(igbp)")  # fmt: skip
    group.add_argument("--no_savanna", action="store_true", help="dfc2020: leave class savanna out")


def add_pair_args(parser: argparse.ArgumentParser) -> None:
    """Options of tasks with two images a sample (SEN12-FLOOD)."""
    group = parser.add_argument_group("pairs of images")
    group.add_argument(
        "--patch_op",
        choices=("avg", "max"),
        default=None,
        help="how the tiles of a pair become one vector (not given: avg)",
    )
    group.add_argument(
        "--legacy_tiling", action="store_true", help="cut tiles as the published code does, for its released checkpoint"
    )
    group.add_argument("--val_frac", type=open_fraction, default=None, metavar="F",
                       help="data sets without a validation part: hold out this share of the training sequences or "
                            "samples to select the best epoch (not given: 0.1)")  # fmt: skip


def add_protocol_args(parser: argparse.ArgumentParser) -> None:
    """What of the encoder is trained, where it starts, and what is evaluated."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=("finetune", "linear", "frozen", "knn"),
        default="finetune",
        help="finetune: all weights; linear: frozen encoder, BatchNorm + linear layer by SGD; frozen: "
        "frozen encoder, the fine-tuning head by AdamW; knn: 5 neighbours by cosine, no training",
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="CKPT",
        help="pretrained checkpoint: ours, a released one, MAE, FG-MAE, DINOv2 or timm, .pth or .safetensors (not "
        "given: random initialisation)",
    )
    group.add_argument(
        "--pretrained", action="store_true", help="start a timm model from timm's own weights, which are downloaded"
    )
    group.add_argument(
        "--adapt_bands",
        action="store_true",
        help="accept a --finetune file made for other bands: put into order if they are the same, otherwise the mean "
        "of its first layer is spread",
    )
    group.add_argument(
        "--weight_bands",
        metavar="BANDS",
        help="bands of a --finetune file that names none, in its order, such as VV,VH; the data set's bands in another "
        "order are put into order",
    )
    group.add_argument(
        "--new_head",
        action="store_true",
        help="leave the head of the --finetune checkpoint out, e.g. for other classes",
    )
    group.add_argument(
        "--select",
        default=None,
        metavar="NAME",
        help="what makes an epoch the best one: a metric of the task, or a published rule of the multi-label task: "
        "weighted, sum, mbr (not given: macro AP, accuracy, IoU of water or mean IoU)",
    )
    group.add_argument(
        "--select_on",
        choices=("val", "test"),
        default="val",
        help="split that selects; test, as published for data sets without a validation part: the result is optimistic",
    )
    group.add_argument(
        "--eval",
        action="store_true",
        help="evaluate --resume CKPT on val and test, and exit; model and data options are those of the checkpoint "
        "unless given; goes to a new folder beside it (not given: --output_dir)",
    )
    group.add_argument(
        "--probe_solver",
        choices=("sgd", "lbfgs"),
        default="sgd",
        help="of --protocol linear; lbfgs: scikit-learn, C chosen on validation",
    )
    group.add_argument(
        "--feature_cache",
        default=None,
        metavar="DIR",
        help="folder for features of frozen encoders (not given: <output_dir>/features); none: run the encoder on "
        "every augmented image in every epoch",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default=None,
        help="sgd has momentum 0.9 (not given: sgd for linear, adamw otherwise)",
    )
    group.add_argument(
        "--patience",
        type=positive_int,
        default=None,
        metavar="N",
        help="stop when --select has found no better epoch for N epochs (not given: never)",
    )
    group.add_argument(
        "--train_frac",
        type=train_fraction,
        default=1.0,
        metavar="F",
        help="train on this share of the labels: stratified on the label sets, chosen by --seed",
    )
    group.add_argument("--bootstrap", type=non_negative_int, default=0, metavar="N",
                       help="95%% intervals of the test metrics from N resamples of the split's clusters (scenes, "
                            "places, events; images where the data set knows none)")  # fmt: skip


def add_finetune_args(parser: argparse.ArgumentParser) -> None:
    """Regularisation and augmentation of fine-tuning; flips are always on."""
    group = parser.add_argument_group("regularisation of --protocol finetune")
    group.add_argument(
        "--layer_decay",
        type=positive_float,
        default=None,
        metavar="F",
        help="learning rate of each layer relative to the next one, when the encoder is trained",
    )
    group.add_argument(
        "--drop_path",
        type=half_open_fraction,
        default=None,
        metavar="R",
        help="stochastic depth of the last block, growing from 0, when the encoder is trained",
    )
    group.add_argument(
        "--smoothing",
        type=half_open_fraction,
        default=0.0,
        metavar="S",
        help="label smoothing; yes/no labels y become y (1 - S) + S / 2",
    )
    group.add_argument(
        "--reprob",
        type=closed_fraction,
        default=0.0,
        metavar="P",
        help="random erasing: probability that a sample loses a rectangle",
    )
    group.add_argument(
        "--mixup", type=non_negative_float, default=0.0, metavar="A", help="mixup with lambda from Beta(A, A); 0: off"
    )
    group.add_argument(
        "--cutmix", type=non_negative_float, default=0.0, metavar="A", help="CutMix with area from Beta(A, A); 0: off"
    )
    group.add_argument(
        "--mixup_prob", type=closed_fraction, default=1.0, metavar="P", help="probability of mixing at all"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=closed_fraction,
        default=0.5,
        metavar="P",
        help="probability of CutMix when both are on",
    )
    group.add_argument("--mixup_mode", choices=("batch", "elem"), default="batch",
                       help="draw the mixing once for a batch, or for each sample")  # fmt: skip


def add_export_args(parser: argparse.ArgumentParser) -> None:
    """What happens with the finished model, and experiment tracking."""
    group = parser.add_argument_group("export and tracking (opt-in)")
    group.add_argument(
        "--export",
        default=None,
        metavar="DIR",
        help="write the best checkpoint (with --eval: the evaluated one) as safetensors, config.json and model card "
        "into a new folder",
    )
    group.add_argument(
        "--push_to_hub", default=None, metavar="OWNER/NAME", help="upload the --export folder to the Hugging Face hub"
    )
    group.add_argument("--use_wandb", action="store_true",
                       help="send the numbers of each epoch to Weights & Biases, too (needs wandb)")  # fmt: skip


def add_distributed_args(parser: argparse.ArgumentParser) -> None:
    """Processes. Nothing is needed under mpirun, torchrun or srun."""
    group = parser.add_argument_group("processes (found by themselves under mpirun, torchrun and srun)")
    group.add_argument(
        "--dist_url",
        default="auto",
        metavar="URL",
        help="auto; env:// (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); tcp://host:port of rank 0",
    )
    group.add_argument("--port", type=port_number, default=0, help="port on which rank 0 listens; 0: a free one")
    group.add_argument(
        "--world_size", type=positive_int, default=None, metavar="N", help="refuse to run unless there are N processes"
    )
    group.add_argument("--dist_on_itp", action="store_true",
                       help="rank and size from Open MPI's environment, address from MASTER_ADDR and MASTER_PORT; "
                            "does without mpi4py")  # fmt: skip
