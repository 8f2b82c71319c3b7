"""Flags of main_finetune.py: defaults of each protocol, what an evaluation takes from its checkpoint, what is refused.

Nothing here needs torch, so that --help and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarwmix.data import registry
from util import args as groups
from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.data.base import SarDataset
    from sarwmix.models.settings import ModelSettings
    from sarwmix.tasks.base import Task

KNN_NEIGHBOURS = 5
# Defaults that depend on the protocol. linear: FG-MAE's lr 0.5 at batch 1024 = 0.125 * 1024 / 256.
PROTOCOLS: dict[str, dict[str, float]] = {
    "finetune": {
        "blr": 5e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 5,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "drop_path": 0.1,
    },
    "linear": {"blr": 0.125, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0},
    "frozen": {"blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.05},
    "knn": {},
}
# ... and on the task. linear on classes of whole images: FG-MAE's lr 0.1 at batch 256 for EuroSAT-SAR.
# linear on label maps: few images a step, each with thousands of pixels (chosen on generated flood chips).
TASK_DEFAULTS: dict[tuple[str, str], dict[str, float]] = {
    ("linear", "multiclass"): {"blr": 0.1, "weight_decay": 0.001},
    ("linear", "segmentation"): {"blr": 1.0},
}
# What a resumed run must not change, beside data, model and schedule.
RECIPE = (
    "weight_decay", "layer_decay", "drop_path", "drop_rate", "clip_grad", "smoothing", "mixup", "cutmix", "mixup_prob",
    "mixup_switch_prob", "mixup_mode", "reprob", "class_weights", "amp",
)  # fmt: skip
# What an evaluation takes from its checkpoint.
MODEL_FLAGS = ("model", "input_size", "head", "pool", "protocol", "patch_op", "legacy_tiling")
DATA_FLAGS = ("dataset", "bands", "statistics", "label_set", "no_savanna", "val_frac", "select_on", "data_option")
VAL_FRAC = 0.1  # of the training samples, or of whole sequences, where a data set has no validation part
IMAGE_FLAGS = ("reprob", "mixup", "cutmix")
START_FACTS = ("initialisation", "initialisation_sha256")  # where the weights came from; kept in checkpoints


def data_options(args: argparse.Namespace) -> dict[str, object]:
    """Options of the data set, from their own flags and from --data_option; None where not given."""
    own = {
        "statistics": args.statistics,
        "bands": args.bands,
        "val_frac": args.val_frac,
        "label_set": args.label_set,
        "no_savanna": args.no_savanna or None,
    }
    return own | registry.parse_options(args.data_option)


def task_options(
    args: argparse.Namespace, spec: registry.DatasetSpec, options: Mapping[str, object]
) -> dict[str, object]:
    """Options of the task; None where not given."""
    own = {
        "patch_op": args.patch_op,
        "legacy_tiling": args.legacy_tiling or None,
        "class_weights": args.class_weights,
    }
    return own | {"select": args.select, "select_on": args.select_on}


def choose_validation(args: argparse.Namespace) -> None:
    """Hold out a part of train where the data set has no validation split, unless test selects, as published.

    Raises:
        UserError: flags that contradict each other.
    """
    if "val_frac" not in registry.get_spec(args.dataset).options:
        return
    if args.select_on == "test" and args.val_frac is not None:
        raise UserError(
            f"--val_frac {args.val_frac} holds out samples to select on, which --select_on test does not use; "
            "leave one of them out"
        )
    if args.protocol == "knn" and args.val_frac is None:
        args.select_on = "test"  # nothing is selected: all of train are neighbours
    elif args.select_on == "val" and "val_frac" not in registry.parse_options(args.data_option):
        args.val_frac = VAL_FRAC if args.val_frac is None else args.val_frac


def settings_of_checkpoint(args: argparse.Namespace, given: Collection[str]) -> None:
    """Take model and data options for an evaluation from its checkpoint; what the command line names stays.

    Args:
        args: with `resume`; changed in place.
        given: names of the flags on the command line.

    Raises:
        UserError: no such checkpoint.
    """
    from util.checkpoint import load_checkpoint, resolve_resume

    if not args.resume:
        raise UserError("--eval evaluates a fine-tuned checkpoint: give --resume CKPT")
    if args.resume != "auto" and not Path(args.resume).is_file():
        raise UserError(f"checkpoint {args.resume} does not exist; give the path of a .pth file")
    path = resolve_resume(args.resume, args.output_dir)
    if path is None:
        raise UserError(f"--eval --resume auto found no checkpoint in {args.output_dir}")
    args.resume = str(path)
    if "output_dir" not in given:
        args.output_dir = str(path.parent)
    saved = load_checkpoint(path, verify=False).get("args")
    if not isinstance(saved, Mapping) or "protocol" not in saved:
        return  # released weights and those of other tools: the command line must tell
    same_data = "dataset" not in given or args.dataset == saved.get("dataset")
    if "val_frac" in saved and "select_on" not in saved:  # of earlier versions, which selected on test without val_frac
        held_out = "val_frac" not in registry.get_spec(str(saved["dataset"])).options or saved["val_frac"] is not None
        saved = {**saved, "select_on": "val" if held_out else "test"}
    for name in (*MODEL_FLAGS, *(DATA_FLAGS if same_data else ())):
        if name in saved and name not in given:
            setattr(args, name, saved[name])


def check_args(args: argparse.Namespace) -> None:
    """Fill in the protocol's defaults; refuse what can be refused before anything heavy is imported."""
    kind = registry.get_spec(args.dataset, args.bands, data_options(args), args.data_path).task
    for name in ("layer_decay", "drop_path"):
        if args.protocol != "finetune" and getattr(args, name) is not None:
            raise UserError(f"--{name} is about a trained encoder; --protocol {args.protocol} keeps it frozen")
    for name, value in (PROTOCOLS[args.protocol] | TASK_DEFAULTS.get((args.protocol, kind), {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eval and args.finetune:
        raise UserError("--eval evaluates a fine-tuned checkpoint: give --resume CKPT, and no --finetune")
    if args.finetune and args.resume not in ("", "auto"):  # a job that is submitted again may name both
        raise UserError("--resume continues a run, --finetune starts one from pretrained weights; give one of them")
    if args.pretrained and (args.finetune or args.eval):
        raise UserError("--pretrained takes timm's own weights; it does not go with --finetune CKPT or --eval")
    for flag, what in (
        ("new_head", "leaves out the head"),
        ("adapt_bands", "spreads the first layer"),
        ("weight_bands", "names the bands"),
    ):
        if getattr(args, flag) and not args.finetune:
            raise UserError(f"--{flag} {what} of a --finetune checkpoint; there is none")
    for path in (args.finetune, args.resume if args.resume != "auto" else ""):
        if path and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist; give the path of a .pth file")
    if args.push_to_hub and not args.export:
        raise UserError("--push_to_hub uploads what --export writes; give --export DIR, too")
    if args.export and Path(args.export).exists():
        raise UserError(f"--export {args.export} exists already; give a new folder")
    if args.export and (args.protocol == "knn" or args.probe_solver == "lbfgs"):
        raise UserError("--export writes a trained checkpoint; --protocol knn and --probe_solver lbfgs leave none")
    used = [name for name in IMAGE_FLAGS if getattr(args, name)]
    cached = args.protocol != "finetune" and kind != "segmentation" and args.feature_cache != "none"
    if used and cached:
        raise UserError(f"--{used[0]} changes images, but --protocol {args.protocol} works on cached features")
    if args.feature_cache == "none" and (args.protocol == "knn" or args.probe_solver == "lbfgs"):
        raise UserError(
            "--feature_cache none trains by SGD on images; neighbours and --probe_solver lbfgs need features"
        )
    if args.drop_rate and args.protocol in ("linear", "knn"):
        raise UserError(f"--drop_rate has no place in --protocol {args.protocol}; leave it out")
    if args.probe_solver == "lbfgs" and args.protocol != "linear":
        raise UserError(f"--probe_solver lbfgs belongs to --protocol linear, not to {args.protocol}")
    if args.probe_solver == "lbfgs" and kind == "segmentation":
        raise UserError(
            "--probe_solver lbfgs fits vectors of whole images; the linear probe of label maps is trained by SGD"
        )
    if args.probe_solver == "lbfgs" and args.select_on == "test":
        raise UserError("--probe_solver lbfgs chooses C on samples that are not tested; leave out --select_on test")
    if args.protocol == "knn" and args.select:
        raise UserError("--select chooses an epoch; --protocol knn has none")
    choose_validation(args)
    groups.check_training(args)


def identity_of(
    args: argparse.Namespace, task: Task, train: SarDataset, settings: ModelSettings, *, optimizer: str
) -> dict[str, Any]:
    """What makes a fine-tuning this run and no other; stored in its checkpoints, compared when one is continued."""
    from util.run import schedule_of

    return {
        "kind": "finetune",
        "task": task.name,
        "protocol": args.protocol,
        "classes": list(task.classes),
        "model_config": {**settings.as_config(), **task.model_settings},
        "data": train.provenance(),
        "schedule": schedule_of(args),
        "seed": args.seed,
        "selection": {"rule": task.select, "split": task.select_on},
        "recipe": {name: getattr(args, name) for name in RECIPE} | {"optimizer": optimizer},
        "test_run": args.test_run,  # a real run must not continue where a trial stopped
    }
