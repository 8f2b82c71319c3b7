"""Fine-tune, probe and evaluate a SAR encoder on a labelled data set.

    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --finetune checkpoint_64.pth
    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --eval --resume checkpoint_best.pth

Published recipe on 8 GPUs: 128 x 8 = 1024, lr = 5e-4 * 1024 / 256 = 2e-3, --layer_decay 0.7; 50 epochs, 5 of warm-up.
Trains on train, selects the best epoch on val (--select), reports test.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sarwmix.data import registry
from util import args as groups
from util.cli import run_cli
from util.errors import EXIT_PREEMPTED, UserError
from util.files import make_directory, sha256_file, write_json

if TYPE_CHECKING:
    import torch

    from sarwmix.finetune.bench import Workbench
    from sarwmix.finetune.results import Results
    from sarwmix.heads import TaskModel
    from sarwmix.models.settings import ModelSettings

TEST_RUN_STEPS = 3
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
TASK_DEFAULTS: dict[tuple[str, str], dict[str, float]] = {("linear", "multiclass"): {"blr": 0.1, "weight_decay": 0.001}}
# What a resumed run must not change, beside data, model and schedule.
RECIPE = (
    "weight_decay", "layer_decay", "drop_path", "drop_rate", "clip_grad", "smoothing", "mixup", "cutmix", "mixup_prob",
    "mixup_switch_prob", "mixup_mode", "reprob", "class_weights",
)  # fmt: skip
# What an evaluation takes from its checkpoint.
MODEL_FLAGS = ("model", "input_size", "head", "pool", "protocol", "patch_op", "legacy_tiling")
DATA_FLAGS = ("dataset", "bands", "statistics", "label_set", "no_savanna", "val_frac", "select_on", "data_option")
VAL_FRAC = 0.1  # of the training samples, or of whole sequences, where a data set has no validation part
IMAGE_FLAGS = ("reprob", "mixup", "cutmix")
START_FACTS = ("initialisation", "initialisation_sha256")  # where the weights came from; kept in checkpoints


def get_parser() -> argparse.ArgumentParser:
    parser = groups.make_parser((__doc__ or "").splitlines()[0])
    labelled = [name for name in registry.names() if registry.get_spec(name).task != "unlabelled"]
    groups.add_run_args(parser, output_dir="runs/finetune")
    groups.add_data_args(parser, datasets=labelled, default="benv2")
    groups.add_data_detail_args(parser)
    groups.add_label_args(parser)
    groups.add_backbone_args(parser)
    groups.add_protocol_args(parser)
    groups.add_pair_args(parser)
    groups.add_optim_args(parser, batch_size=128, epochs=50, blr=5e-4, warmup_epochs=5, min_lr=1e-6)
    parser.set_defaults(blr=None, min_lr=None, warmup_epochs=None, weight_decay=None)
    rows = [f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in row.items()) for name, row in PROTOCOLS.items() if row]
    parser.epilog = f"Options without a default here follow --protocol. {'; '.join(rows)}."
    groups.add_finetune_args(parser)
    groups.add_resume_args(parser, save_every=5)
    groups.add_fault_args(parser)
    groups.add_export_args(parser)
    groups.add_distributed_args(parser)
    return parser


def main() -> int | None:
    parser = get_parser()
    args = parser.parse_args()
    if args.eval:
        settings_of_checkpoint(args, groups.given_flags(parser))
    check_args(args)

    from sarwmix.finetune.bench import Workbench, check_protocol, data_facts, open_splits
    from sarwmix.finetune.results import Results, evaluation_folder
    from sarwmix.models.loading import load_start, load_timm_weights
    from sarwmix.models.settings import ModelSettings
    from sarwmix.tasks.base import build_task
    from sarwmix.transforms import SarTransform
    from util.compilation import limit_memory
    from util.distributed import setup_processes
    from util.log import get_logger, setup_logging
    from util.precision import precision
    from util.seeding import seed_everything

    processes = setup_processes(
        device=args.device,
        dist_url=args.dist_url,
        port=args.port,
        world_size=args.world_size,
        dist_on_itp=args.dist_on_itp,
        hang_timeout=args.hang_timeout,
    )
    if args.eval:
        folder = evaluation_folder(args.output_dir, args.resume) if processes.is_main else None
        args.output_dir = str(processes.broadcast_object(folder))
    setup_logging(args.output_dir, rank=processes.rank)
    seed_everything(args.seed)

    options = data_options(args)
    spec = registry.get_spec(args.dataset, args.bands, options)
    task = build_task(spec.task, spec.classes, task_options(args, spec, options))
    task.rules()  # refuses an unknown --select before any data is read
    check_protocol(task, args.protocol, head=args.head)
    splits = open_splits(
        args.dataset,
        args.data_path,
        ([*spec.extra_splits] if args.eval else ["train"]) + [task.select_on, "test"],
        options=options,
        train_frac=args.train_frac,
        seed=args.seed,
        output_dir=args.output_dir,
        limit=TEST_RUN_STEPS * args.batch_size if args.test_run else None,
    )
    statistics = splits["test"].statistics
    settings = ModelSettings(
        args.model,
        args.input_size,
        len(spec.bands),
        drop_path_rate=args.drop_path or 0.0,
        drop_rate=args.drop_rate,
        head=args.head,
        pool=args.pool,
    )
    model = task.build_model(settings).to(processes.device)
    bench = Workbench(
        task=task,
        splits=splits,
        transform=SarTransform(
            size=args.input_size,
            mean=statistics.mean,
            std=statistics.std,
            preprocessing=spec.preprocessing,
            all_finite=all(data.all_finite for data in splits.values()),
        ),
        processes=processes,
        group=processes,
        batch_size=args.batch_size,
        amp_dtype=precision(args.amp, processes.device)[0],
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        cache=args.cache,
        options=options,
    )
    facts = {
        "task": task.name,
        "cluster": spec.cluster[0] if spec.cluster else "image",  # what intervals are computed over
        "protocol": args.protocol if args.probe_solver == "sgd" else f"{args.protocol} ({args.probe_solver})",
        "dataset": spec.name,
        "model": args.model,
        "head": args.head or task.heads[0],
        "pool": getattr(model, "pool_used", None),
        "bands": list(spec.bands),
        "classes": list(spec.classes),
        "statistics": args.statistics or spec.default_statistics,
        "statistics_origin": statistics.origin,
        "seed": args.seed,
        "train_frac": args.train_frac,
        "samples": {name: len(data) for name, data in splits.items()},
        "sample_size": list(splits["test"].shape[1:]),
        "precision": str(bench.amp_dtype or "float32").removeprefix("torch."),
        **data_facts(splits, options),
    }
    results = Results(facts, Path(args.output_dir), task, bootstrap=args.bootstrap, seed=args.seed)
    get_logger().info("%s; %s", processes.describe(), results.line("+".join(splits)))
    if args.flops:
        total, table = bench.count_flops(model)
        get_logger().info("forward pass of one sample: %.2f GFLOP (2 a multiply-add)\n%s", total / 1e9, table)
    if args.activation_checkpointing:
        model.recompute_blocks()  # type: ignore[operator]
    if args.compile:
        limit_memory(args.memory_budget)
        model.compile_blocks()  # type: ignore[operator]
    if args.eval:
        results.evaluate_checkpoint(bench, model, Path(args.resume), protocol=args.protocol)
    else:
        facts["initialisation"] = args.finetune or (f"timm {args.model}" if args.pretrained else "random")
        if args.finetune and processes.is_main:  # the file may be written again while or after this run trains
            facts["initialisation_sha256"] = sha256_file(args.finetune)
        if args.pretrained:
            load_timm_weights(model, settings)
        else:
            load_start(
                model,
                args.finetune,
                bands=spec.bands,
                statistics=statistics.as_dict(),
                new_head=args.new_head,
                adapt_bands=args.adapt_bands,
                weight_bands=args.weight_bands,
            )
        run_protocol(args, bench, model, results, settings)
    if args.export and processes.is_main:
        export_result(args, results)
    processes.close()
    return None


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
    kind = registry.get_spec(args.dataset).task
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
    if args.probe_solver == "lbfgs" and args.select_on == "test":
        raise UserError("--probe_solver lbfgs chooses C on samples that are not tested; leave out --select_on test")
    if args.protocol == "knn" and args.select:
        raise UserError("--select chooses an epoch; --protocol knn has none")
    choose_validation(args)
    groups.check_training(args)


def export_result(args: argparse.Namespace, results: Results) -> None:
    """Export the evaluated checkpoint, or the best one of the run that has just ended."""
    from sarwmix.inference.export import export_model, push_to_hub
    from sarwmix.tasks.selection import BEST
    from util.log import get_logger

    if args.eval:
        name, entry = next(iter(results.entries.items()))
        checkpoint = Path(name)
    else:
        checkpoint = Path(args.output_dir) / BEST
        entry = results.entries[checkpoint.name]
    export_model(checkpoint, args.export, metrics=entry)
    if args.push_to_hub:
        get_logger().info("pushed to %s", push_to_hub(args.export, args.push_to_hub))


def run_protocol(
    args: argparse.Namespace, bench: Workbench, model: TaskModel, results: Results, settings: ModelSettings
) -> None:
    """Train what the protocol trains; report test."""
    from sarwmix.heads import use_probe

    if args.protocol == "linear":
        use_probe(model)
        settings = replace(settings, head="bn_linear")
    if args.protocol == "finetune":
        train(args, bench, model, model, results, settings)
        return
    model.freeze_encoder()
    if bench.task.dense or args.feature_cache == "none":
        train(args, bench, model, model, results, settings)
        return
    bench = bench.with_features(model, Path(args.feature_cache or Path(args.output_dir) / "features"))
    if bench.processes.is_main and (args.protocol == "knn" or args.probe_solver == "lbfgs"):
        write_json(Path(args.output_dir) / "args.json", groups.args_to_dict(args))
    if args.protocol == "knn":
        results.report_knn(bench, k=KNN_NEIGHBOURS)
    elif args.probe_solver == "lbfgs":
        results.report_logistic_probe(bench, model)
    else:
        train(args, bench, model, model.head, results, settings)


def train(
    args: argparse.Namespace,
    bench: Workbench,
    model: TaskModel,
    module: torch.nn.Module,
    results: Results,
    settings: ModelSettings,
) -> None:
    """Everything from loader to the last table.

    Args:
        model: what checkpoints hold.
        module: what is trained: the model itself (its encoder may be frozen), or its head on cached features.
    """
    from engine_finetune import Augmentation, train_one_epoch
    from sarwmix.finetune.results import EpochJournal, best_on_disk
    from sarwmix.heads import count_trainable
    from sarwmix.mixup import Mixup
    from sarwmix.models.loading import load_trained
    from sarwmix.tasks.selection import Selector
    from util.distributed import share_statistics
    from util.log import Progress, get_logger
    from util.optim import build_adamw, build_sgd, parameter_groups
    from util.precision import precision
    from util.resume import Batch, Resumed, find_checkpoint, resume_run, start_afresh
    from util.saving import RunSaver
    from util.schedule import check_schedule, effective_batch, learning_rate, scaled_lr
    from util.tracking import Tracker
    from util.training import Trainer, arrange

    log, task, group, device, is_main = get_logger(), bench.task, bench.group, bench.device, bench.processes.is_main
    output_dir, whole = make_directory(args.output_dir), args.protocol == "finetune"
    augmentation = Augmentation(
        Mixup(args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode),
        erase_prob=args.reprob,
        smoothing=args.smoothing,
    )
    if augmentation.mixup.active and not task.mixable:
        raise UserError(f"--mixup and --cutmix do not work with the {task.name} task")
    effective = effective_batch(args.batch_size, args.accum_iter, bench.processes.world_size)
    lr = scaled_lr(args.blr, effective) if args.lr is None else args.lr
    check_schedule(lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs)
    parts = parameter_groups(module, weight_decay=args.weight_decay, layer_decay=args.layer_decay if whole else None)
    by_sgd = (args.optimizer or ("sgd" if args.protocol == "linear" else "adamw")) == "sgd"
    optimizer = build_sgd(parts, lr=lr) if by_sgd else build_adamw(parts, lr=lr)
    amp_dtype, scaler = precision(args.amp if bench.transform is not None else "off", device)
    loader, judge = bench.loader("train", train=True), bench.loader(task.select_on, train=False)
    steps = min(TEST_RUN_STEPS, len(loader)) if args.test_run else len(loader)
    selector = Selector(task.rules(keep_published=whole))
    results.facts["trainable_parameters"] = count_trainable(module)
    results.facts["effective_batch"] = effective
    run = {
        "kind": "finetune",
        "task": task.name,
        "protocol": args.protocol,
        "classes": list(task.classes),
        "model_config": {**settings.as_config(), **task.model_settings},
        "data": bench.splits["train"].provenance(),
        # not the peak rate, which follows from these and the effective batch: that may change when a run is resumed
        "schedule": {name: getattr(args, name) for name in ("epochs", "warmup_epochs", "lr", "blr", "min_lr")},
        "seed": args.seed,
        "selection": {"rule": task.select, "split": task.select_on},
        "recipe": {name: getattr(args, name) for name in RECIPE} | {"optimizer": "sgd" if by_sgd else "adamw"},
        "test_run": args.test_run,  # a real run must not continue where a trial stopped
    }
    batch = Batch(args.batch_size, args.accum_iter, group.world_size, lr)
    resumed, spent = Resumed(), 0.0
    resume = find_checkpoint(args.resume, output_dir, bench.processes)
    if resume is not None:
        resumed = resume_run(
            resume,
            run,
            processes=group,
            load_model=partial(
                load_trained,
                model,
                source=str(resume),
                protocol=args.protocol,
                classes=task.classes,
                bands=run["data"]["bands"],
            ),
            optimizer=optimizer,
            scaler=scaler,
            batch=batch,
            steps=steps,
            allow_mismatch=args.allow_mismatch,
            is_branch=args.resume != "auto",
        )
        resumed = replace(resumed, run_id=bench.processes.broadcast_object(resumed.run_id))  # `group` may be alone
        selector.load_state_dict(resumed.entries["best"])
        spent = float(resumed.entries["seconds"])
        # the file may have changed since, and a run may be resumed without naming it
        results.facts |= {name: resumed.entries[name] for name in START_FACTS if name in resumed.entries}
    else:
        resumed = start_afresh(output_dir, bench.processes, test_run=args.test_run)
    if args.start_epoch is not None:
        resumed = resumed.at_epoch(args.start_epoch)
    start_epoch, start_step = resumed.epoch, resumed.step
    if is_main:
        write_json(output_dir / "args.json", groups.args_to_dict(args))

    trained, graphs = arrange(module, group, cuda_graph=args.cuda_graph)
    trainer = Trainer(
        trained,
        optimizer,
        processes=group,
        output_dir=output_dir,
        lr_at=partial(learning_rate, lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs),
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        amp_dtype=amp_dtype,
        scaler=scaler,
        skip_nonfinite=args.skip_nonfinite,
        max_bad_samples=args.max_bad_samples,
        resumed=resumed,
        graphs=graphs,
    )
    began = time.monotonic()
    saver = RunSaver(
        output_dir,
        processes=group,
        is_main=is_main,
        keep=args.keep_checkpoints,
        minutes=args.save_minutes,
        hang_timeout=args.hang_timeout,
        seed=args.seed,
        batch=batch,
        resumed=resumed,
        # the ground that a sample covers, in pixels of the data: scenes are cut into tiles of that size
        fixed={
            **run,
            "args": groups.args_to_dict(args),
            "sample_size": results.facts["sample_size"],
            **{name: results.facts[name] for name in START_FACTS if name in results.facts},
        },
        model=model,
        trainer=trainer,
        changing=lambda: {
            "best": selector.state_dict(),
            "seconds": spent + time.monotonic() - began,
        },
    )
    best = best_on_disk(output_dir, selector.state_dict(), resumed.runs, resumed=resumed) if is_main else None
    selector.load_state_dict(bench.processes.broadcast_object(best))
    tracker = Tracker(output_dir, groups.args_to_dict(args)) if args.use_wandb and is_main else None
    journal = EpochJournal(
        output_dir, args.log_dir, task=task, is_main=is_main, start_epoch=start_epoch, tracker=tracker
    )
    end_epoch = min(args.epochs, args.stop_epoch or args.epochs)
    if args.test_run:
        end_epoch = min(end_epoch, start_epoch + 2)

    def given_up(epoch: int) -> bool:
        """Whether no epoch has been better for --patience epochs."""
        return args.patience is not None and selector.waited(epoch) >= args.patience

    done = start_epoch - 1
    if given_up(done):  # the checkpoint is that of a run that has ended early
        end_epoch = start_epoch
    log.info("best epoch: %s on %s%s", selector.rules[0].description, task.select_on,
             ", which is then no independent measure" if task.select_on == "test" else "")  # fmt: skip
    log.info("%d trainable parameters", results.facts["trainable_parameters"])
    log.info("effective batch %d, peak lr %.3g, %d steps an epoch, up to epoch %d", effective, lr, steps, end_epoch - 1)
    for epoch in range(start_epoch, end_epoch):
        loader.set_epoch(epoch)
        result = train_one_epoch(
            trainer,
            saver.watch(loader.iter_from(start_step)),
            task=task,
            transform=bench.transform,
            augmentation=augmentation,
            seed=args.seed,
            epoch=epoch,
            steps=steps,
            start_step=start_step,
            progress=Progress(steps, title=f"Epoch {epoch}", start=start_step, enabled=is_main),
            on_step=partial(saver.after_step, epoch, steps),
        )
        start_step = 0
        if not result.finished:
            saver.save_and_stop(epoch - 1, result.steps_done)
            break
        share_statistics(module, group)
        evaluation = bench.evaluate(trainer.model, task.select_on, saver.watch(iter(judge), alone=True))
        report = task.report(evaluation.outputs)
        improved, done = selector.update(epoch, report.scalars), epoch
        journal.write(epoch, result.stats, report, improved, selector.best[selector.rules[0].filename])
        last = given_up(epoch) or epoch + 1 == end_epoch
        due = (epoch + 1) % args.save_every == 0 or last
        if improved or due:
            names = [*improved, *(["checkpoint.pth"] if due else [])]
            saver.save(epoch, 0, names, recent=due, wait=last)
        if last:
            break
        if saver.stopping:
            saver.save_and_stop(epoch, 0)
            break
    if not saver.stopped:
        saver.close()
    if given_up(done):
        log.info("stopped early: no better epoch by %s for %d epochs (--patience)", task.select, args.patience)
    journal.close()
    loader.close()
    judge.close()
    if saver.stopped:
        bench.processes.close()
        raise SystemExit(EXIT_PREEMPTED)
    bench.processes.barrier()  # the best checkpoints are on disk before anybody reads them
    seconds = spent + time.monotonic() - began
    results.finish(bench, model, module, selector, runs=resumed.runs, seconds=seconds)


if __name__ == "__main__":
    run_cli(main, resumable=True)
