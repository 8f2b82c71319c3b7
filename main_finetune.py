"""Fine-tune, probe and evaluate a SAR encoder on a labelled data set.

    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --finetune checkpoint_64.pth
    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --eval --resume checkpoint_best.pth

Published recipe on 8 GPUs: 128 x 8 = 1024, lr = 5e-4 * 1024 / 256 = 2e-3, --layer_decay 0.7; 50 epochs, 5 of warm-up.
Trains on train, selects the best epochs on val, reports test.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sarwmix import registry
from util import args as groups
from util.errors import EXIT_PREEMPTED, UserError, run_cli
from util.files import make_directory, write_json

if TYPE_CHECKING:
    import torch

    from models_mixmim_ft import MixMIMClassifier
    from sarwmix.protocols import Workbench
    from sarwmix.results import Results
    from sarwmix.tasks import ModelSettings

TEST_RUN_STEPS = 3
KNN_NEIGHBOURS = 5
# Defaults that depend on the protocol. linear: FG-MAE's lr 0.5 at batch 1024 = 0.125 * 1024 / 256.
PROTOCOLS: dict[str, dict[str, float]] = {
    "finetune": {"blr": 5e-4, "min_lr": 1e-6, "warmup_epochs": 5, "weight_decay": 0.05},
    "linear": {"blr": 0.125, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0},
    "frozen": {"blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.05},
    "knn": {},
}
IMAGE_FLAGS = ("reprob", "mixup", "cutmix")


def get_parser() -> argparse.ArgumentParser:
    parser = groups.make_parser((__doc__ or "").splitlines()[0])
    labelled = [name for name in registry.names() if registry.get_spec(name).task != "unlabelled"]
    groups.add_run_args(parser, output_dir="runs/finetune")
    groups.add_data_args(parser, datasets=labelled, default="benv2")
    groups.add_data_detail_args(parser)
    groups.add_model_args(parser)
    groups.add_protocol_args(parser)
    groups.add_pair_args(parser)
    groups.add_optim_args(parser, batch_size=128, epochs=50, blr=5e-4, warmup_epochs=5, min_lr=1e-6)
    parser.set_defaults(blr=None, min_lr=None, warmup_epochs=None, weight_decay=None)
    rows = [f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in row.items()) for name, row in PROTOCOLS.items() if row]
    parser.epilog = f"--blr, --min_lr, --warmup_epochs and --weight_decay follow --protocol. {'; '.join(rows)}."
    groups.add_finetune_args(parser, layer_decay=0.75, drop_path=0.1)
    groups.add_resume_args(parser, save_every=5)
    groups.add_fault_args(parser)
    groups.add_distributed_args(parser)
    return parser


def main() -> int | None:
    args = get_parser().parse_args()
    check_args(args)

    from models_mixmim_ft import load_start
    from sarwmix.protocols import Workbench, open_splits
    from sarwmix.results import Results
    from sarwmix.tasks import ModelSettings, build_task
    from sarwmix.transforms import SarTransform
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
    )
    setup_logging(args.output_dir, rank=processes.rank)
    seed_everything(args.seed)

    spec = registry.get_spec(args.dataset)
    of_pairs = {"patch_op": args.patch_op, "legacy_tiling": args.legacy_tiling or None, "val_frac": args.val_frac}
    task = build_task(spec.task, spec.classes, of_pairs)
    splits = open_splits(
        args.dataset,
        args.data_path,
        ([] if args.eval else ["train"]) + [task.select_on, "test"],
        options={"statistics": args.statistics, "val_frac": args.val_frac} | registry.parse_options(args.data_option),
        train_frac=args.train_frac,
        seed=args.seed,
        output_dir=args.output_dir,
        limit=TEST_RUN_STEPS * args.batch_size if args.test_run else None,
    )
    statistics = splits["test"].statistics
    settings = ModelSettings(args.model, args.input_size, len(spec.bands), drop_path_rate=args.drop_path)
    model = task.build_model(settings).to(processes.device)
    bench = Workbench(
        task=task,
        splits=splits,
        transform=SarTransform(size=args.input_size, mean=statistics.mean, std=statistics.std),
        processes=processes,
        group=processes,
        batch_size=args.batch_size,
        amp_dtype=precision(args.amp, processes.device)[0],
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        cache=args.cache,
    )
    facts = {
        "protocol": args.protocol if args.probe_solver == "sgd" else f"{args.protocol} ({args.probe_solver})",
        "dataset": spec.name,
        "model": args.model,
        "classes": list(spec.classes),
        "statistics": args.statistics or spec.default_statistics,
        "statistics_origin": statistics.origin,
        "seed": args.seed,
        "train_frac": args.train_frac,
        "samples": {name: len(data) for name, data in splits.items()},
        "sample_size": list(splits["test"].shape[1:]),
    }
    results = Results(facts, Path(args.output_dir), task, bootstrap=args.bootstrap, seed=args.seed)
    get_logger().info("%s; %s", processes.describe(), results.line("+".join(splits)))
    if args.eval:
        results.evaluate_checkpoint(bench, model, args.resume, protocol=args.protocol)
    else:
        facts["initialisation"] = args.finetune or "random"
        load_start(model, args.finetune, bands=spec.bands, statistics=statistics.as_dict(), new_head=args.new_head)
        if processes.is_main:
            write_json(Path(args.output_dir) / "args.json", groups.args_to_dict(args))
        run_protocol(args, bench, model, results, settings)
    processes.close()
    return None


def check_args(args: argparse.Namespace) -> None:
    """Fill in the protocol's defaults; refuse what can be refused before anything heavy is imported."""
    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eval and (not args.resume or args.finetune):
        raise UserError("--eval evaluates a fine-tuned checkpoint: give --resume CKPT, and no --finetune")
    if args.finetune and args.resume not in ("", "auto"):  # a job that is submitted again may name both
        raise UserError("--resume continues a run, --finetune starts one from pretrained weights; give one of them")
    if args.new_head and not args.finetune:
        raise UserError("--new_head leaves out the head of a --finetune checkpoint; there is none")
    for path in (args.finetune, args.resume if args.resume != "auto" else ""):
        if path and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist; give the path of a .pth file")
    used = [name for name in IMAGE_FLAGS if getattr(args, name)]
    if used and args.protocol != "finetune":
        raise UserError(f"--{used[0]} changes images, but --protocol {args.protocol} works on cached features")
    if args.probe_solver == "lbfgs" and args.protocol != "linear":
        raise UserError(f"--probe_solver lbfgs belongs to --protocol linear, not to {args.protocol}")
    if args.stop_epoch is not None and args.stop_epoch > args.epochs:
        raise UserError(f"--stop_epoch {args.stop_epoch} lies behind the schedule's end, --epochs {args.epochs}")


def run_protocol(
    args: argparse.Namespace, bench: Workbench, model: MixMIMClassifier, results: Results, settings: ModelSettings
) -> None:
    """Train what the protocol trains; report test."""
    from models_mixmim_ft import use_probe

    if args.protocol == "finetune":
        train(args, bench, model, model, results, settings)
        return
    bench = bench.with_features(model, Path(args.feature_cache or Path(args.output_dir) / "features"))
    if args.protocol == "linear":
        use_probe(model)
    if args.protocol == "knn":
        results.report_knn(bench, k=KNN_NEIGHBOURS)
    elif args.probe_solver == "lbfgs":
        results.report_logistic_probe(bench, model)
    else:
        train(args, bench, model, model.head, results, settings)


def train(
    args: argparse.Namespace,
    bench: Workbench,
    model: MixMIMClassifier,
    module: torch.nn.Module,
    results: Results,
    settings: ModelSettings,
) -> None:
    """Everything from loader to the last table.

    Args:
        model: what checkpoints hold.
        module: what is trained: the model itself, or its head on cached features.
    """
    import torch

    from engine_finetune import Augmentation, train_one_epoch
    from engine_pretrain import BadSamples, FiniteGuard
    from models_mixmim_ft import load_trained
    from sarwmix.mixup import Mixup
    from sarwmix.results import EpochJournal
    from sarwmix.selection import Selector
    from util.log import Progress, get_logger
    from util.optim import build_adamw, build_sgd, parameter_groups
    from util.precision import precision
    from util.resume import Batch, Resumed, find_checkpoint, resume_run
    from util.saving import RunSaver
    from util.schedule import check_schedule, effective_batch, learning_rate, scaled_lr

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
    optimizer = build_sgd(parts, lr=lr) if args.protocol == "linear" else build_adamw(parts, lr=lr)
    amp_dtype, scaler = precision(args.amp if whole else "off", device)
    loader, judge = bench.loader("train", train=True), bench.loader(task.select_on, train=False)
    steps = min(TEST_RUN_STEPS, len(loader)) if args.test_run else len(loader)
    selector = Selector(task.rules())
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
            load_model=partial(load_trained, model, source=str(resume), protocol=args.protocol, classes=task.classes),
            optimizer=optimizer,
            scaler=scaler,
            batch=batch,
            steps=steps,
            allow_mismatch=args.allow_mismatch,
        )
        selector.load_state_dict(resumed.entries["best"])
        spent = float(resumed.entries["seconds"])
    start_epoch, start_step = resumed.epoch, resumed.step
    if args.start_epoch is not None:
        start_epoch, start_step = args.start_epoch, 0

    trained = module
    if args.compile and whole:
        model.compile_blocks()
    if group.world_size > 1:
        trained = torch.nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    guard = FiniteGuard(optimizer, allowed=args.skip_nonfinite, device=device)
    guard.skipped = resumed.skipped
    bad_samples = BadSamples(limit=args.max_bad_samples, found=resumed.bad_samples)
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
        fixed={**run, "args": groups.args_to_dict(args), "sample_size": results.facts["sample_size"]},
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        changing=lambda: {
            "best": selector.state_dict(),
            "bad_samples": [list(item) for item in bad_samples.found],
            "skipped_steps": guard.skipped,
            "seconds": spent + time.monotonic() - began,
        },
    )
    journal = EpochJournal(output_dir, args.log_dir, task=task, is_main=is_main, start_epoch=start_epoch)
    end_epoch = min(args.epochs, args.stop_epoch or args.epochs)
    if args.test_run:
        end_epoch = min(end_epoch, start_epoch + 2)
    log.info("effective batch %d, peak lr %.3g, %d steps an epoch, up to epoch %d", effective, lr, steps, end_epoch - 1)
    for epoch in range(start_epoch, end_epoch):
        loader.set_epoch(epoch)
        result = train_one_epoch(
            trained,
            saver.watch(loader.iter_from(start_step)),
            optimizer,
            task=task,
            transform=bench.transform,
            augmentation=augmentation,
            device=device,
            epoch=epoch,
            steps=steps,
            start_step=start_step,
            lr_at=lambda at: learning_rate(
                at, lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs
            ),
            seed=args.seed,
            rank=group.rank,
            world_size=group.world_size,
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            amp_dtype=amp_dtype,
            scaler=scaler,
            guard=guard,
            bad_samples=bad_samples,
            all_gather=group.all_gather_objects,
            all_reduce_mean=group.all_reduce_mean,
            dump=saver.dump,
            progress=Progress(steps, title=f"Epoch {epoch}", start=start_step, enabled=is_main),
            on_step=partial(saver.after_step, epoch, steps),
        )
        start_step = 0
        if not result.finished:
            saver.save_and_stop(epoch - 1, result.steps_done)
            break
        evaluation = bench.evaluate(trained, task.select_on, saver.watch(iter(judge), alone=True))
        report = task.report(evaluation.outputs)
        improved = selector.update(epoch, report.scalars)
        journal.write(epoch, result.stats, report, improved, selector.best[selector.rules[0].filename])
        due = (epoch + 1) % args.save_every == 0 or epoch + 1 == end_epoch
        if improved or due:
            names = [*improved, *(["checkpoint.pth"] if due else [])]
            saver.save(epoch, 0, names, recent=due, wait=epoch + 1 == end_epoch)
        if saver.stopping and epoch + 1 < end_epoch:
            saver.save_and_stop(epoch, 0)
            break
    else:
        saver.close()
    journal.close()
    loader.close()
    judge.close()
    if saver.stopped:
        bench.processes.close()
        raise SystemExit(EXIT_PREEMPTED)
    bench.processes.barrier()  # the best checkpoints are on disk before anybody reads them
    results.finish(bench, model, module, selector, seconds=spent + time.monotonic() - began)


if __name__ == "__main__":
    run_cli(main)
