"""Fine-tune, probe and evaluate a SAR encoder on a labelled data set.

    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --finetune checkpoint_64.pth
    python main_finetune.py --dataset benv2 --data_path /data/BigEarthNet-S1 --eval --resume checkpoint_best.pth

Published recipe on 8 GPUs: 128 x 8 = 1024, lr = 5e-4 * 1024 / 256 = 2e-3, --layer_decay 0.7; 50 epochs, 5 of warm-up.
Trains on train, selects the best epoch on val (--select), reports test.

Where things are: defaults and refusals of flags in `sarwmix.finetune.settings`, splits and evaluation in
`sarwmix.finetune.bench`, an epoch in `engine_finetune`, kinds of label in `sarwmix.tasks`, results in
`sarwmix.finetune.results`, begin, save and stop in `util.run`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sarwmix.data import registry
from sarwmix.finetune.settings import (
    KNN_NEIGHBOURS,
    PROTOCOLS,
    START_FACTS,
    check_args,
    settings_of_checkpoint,
)
from util import args as groups
from util.cli import run_cli
from util.errors import EXIT_PREEMPTED
from util.files import write_json

if TYPE_CHECKING:
    import torch

    from sarwmix.finetune.bench import Workbench
    from sarwmix.finetune.results import Results
    from sarwmix.heads import TaskModel
    from sarwmix.models.settings import ModelSettings


def get_parser() -> argparse.ArgumentParser:
    parser = groups.make_parser((__doc__ or "").splitlines()[0])
    labelled = [name for name in registry.names() if name != "s1_scenes"]
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

    from sarwmix.finetune.bench import open_bench, passport_of
    from sarwmix.finetune.results import Results, evaluation_folder, export_result, facts_of
    from sarwmix.models.custom import trust
    from sarwmix.models.settings import ModelSettings
    from util.compilation import limit_memory
    from util.log import get_logger
    from util.run import start_processes

    choose = (lambda: evaluation_folder(args.output_dir, args.resume)) if args.eval else None
    if ":" in args.model and "model" in groups.given_flags(parser):
        trust(args.model)
    processes = start_processes(args, choose)
    bench = open_bench(args, processes)
    task, bands = bench.task, bench.splits["test"].spec.bands
    settings = ModelSettings(
        args.model,
        args.input_size,
        len(bands),
        drop_path_rate=args.drop_path or 0.0,
        drop_rate=args.drop_rate,
        head=args.head,
        pool=args.pool,
    )
    model = task.build_model(settings).to(processes.device)
    facts = facts_of(args, bench, model)
    facts["passport"] = passport_of(args, bench)
    results = Results(facts, Path(args.output_dir), task, bootstrap=args.bootstrap, seed=args.seed)
    get_logger().info("%s; %s", processes.describe(), results.line("+".join(bench.splits)))
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
        load_initial_weights(args, bench, model, results, settings)
        run_protocol(args, bench, model, results, settings)
    if args.export and processes.is_main:
        export_result(results, args.export, evaluated=args.eval, repository=args.push_to_hub)
    processes.close()
    return None


def load_initial_weights(
    args: argparse.Namespace, bench: Workbench, model: TaskModel, results: Results, settings: ModelSettings
) -> None:
    """Where training starts from: timm's weights, a checkpoint, or what the model was made with."""
    from sarwmix.models.loading import load_start, load_timm_weights
    from util.files import hash_of_file

    test = bench.splits["test"]
    results.facts["initialisation"] = args.finetune or (f"timm {args.model}" if args.pretrained else "random")
    if args.finetune and bench.processes.is_main:  # the file may be written again while or after this run trains
        results.facts["initialisation_sha256"] = hash_of_file(args.finetune)
    if args.pretrained:
        load_timm_weights(model, settings)
        return
    load_start(
        model,
        args.finetune,
        bands=test.spec.bands,
        statistics=test.statistics.as_dict(),
        new_head=args.new_head,
        adapt_bands=args.adapt_bands,
        weight_bands=args.weight_bands,
    )


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
    """Everything from the loader to the last table.

    Args:
        model: what checkpoints hold.
        module: what is trained: the model itself (its encoder may be frozen), or its head on cached features.
    """
    from engine_finetune import train_one_epoch
    from sarwmix.finetune.bench import make_augmentation, make_optimizer
    from sarwmix.finetune.results import EpochJournal, best_on_disk
    from sarwmix.finetune.settings import identity_of
    from sarwmix.heads import count_trainable
    from sarwmix.models.loading import load_trained
    from sarwmix.tasks.selection import Selector
    from util.distributed import share_statistics
    from util.log import get_logger
    from util.run import TrainingRun, plan_batch

    log, task, everyone = get_logger(), bench.task, bench.processes
    augmentation, batch = make_augmentation(args, task), plan_batch(args, everyone.world_size)
    optimizer, name = make_optimizer(args, module, lr=batch.lr)
    loader, judge = bench.loader("train", train=True), bench.loader(task.select_on, train=False)
    selector = Selector(task.rules(keep_published=args.protocol == "finetune"))
    results.facts |= {"trainable_parameters": count_trainable(module), "effective_batch": batch.effective}
    identity = identity_of(args, task, bench.splits["train"], settings, optimizer=name)
    run = TrainingRun(
        args,
        identity,
        group=bench.group,
        everyone=everyone,
        model=model,
        module=module,
        optimizer=optimizer,
        batch=replace(batch, world_size=bench.group.world_size),
        steps=len(loader),
        amp=args.amp if bench.transform is not None else "off",
        passport=results.facts["passport"],
    )
    must_fit = {"protocol": args.protocol, "classes": task.classes, "bands": identity["data"]["bands"]}
    resumed = run.begin(lambda checkpoint, source: load_trained(model, checkpoint, source=source, **must_fit))
    spent = 0.0
    if resumed.path is not None:
        selector.load_state_dict(resumed.entries["best"])
        spent = float(resumed.entries["seconds"])
        # the file may have changed since, and a run may be resumed without naming it
        results.facts |= {name: resumed.entries[name] for name in START_FACTS if name in resumed.entries}
    run.arm(
        # the ground that a sample covers, in pixels of the data: scenes are cut into tiles of that size
        {name: results.facts[name] for name in ("sample_size", *START_FACTS) if name in results.facts},
        changing=lambda: {"best": selector.state_dict(), "seconds": spent + run.seconds},
    )
    best = best_on_disk(run.folder, selector.state_dict(), resumed.runs, resumed=resumed) if run.is_main else None
    selector.load_state_dict(everyone.broadcast_object(best))
    journal = EpochJournal(run.folder, args, task=task, is_main=run.is_main, start_epoch=resumed.epoch)

    def given_up(epoch: int) -> bool:
        """Whether no epoch has been better for --patience epochs."""
        return args.patience is not None and selector.waited(epoch) >= args.patience

    done = resumed.epoch - 1
    if given_up(done):  # the checkpoint is that of a run that has ended early
        run.end = resumed.epoch
    log.info("best epoch: %s on %s%s", selector.rules[0].description, task.select_on,
             ", which is then no independent measure" if task.select_on == "test" else "")  # fmt: skip
    log.info("%d trainable parameters", results.facts["trainable_parameters"])
    log.info("effective batch %d, peak lr %.3g, %d steps an epoch, up to epoch %d",
             batch.effective, batch.lr, run.steps, run.end - 1)  # fmt: skip
    for epoch in run.epochs(loader):
        given = {"task": task, "transform": bench.transform, "augmentation": augmentation}
        result = run.train(train_one_epoch, loader, epoch, title=f"Epoch {epoch}", **given)
        if result is None:
            break
        share_statistics(module, bench.group)
        evaluation = bench.evaluate(run.trainer.model, task.select_on, run.saver.watch(iter(judge), alone=True))
        report = task.report(evaluation.outputs)
        improved, done = selector.update(epoch, report.scalars), epoch
        journal.write(epoch, result.stats, report, improved, selector.best[selector.rules[0].filename])
        last = given_up(epoch) or epoch + 1 == run.end
        due = (epoch + 1) % args.save_every == 0 or last
        run.save(epoch, [*improved, *(["checkpoint.pth"] if due else [])], last=last, recent=due)
        if last:
            break
    stopped = run.close()
    if given_up(done):
        log.info("stopped early: no better epoch by %s for %d epochs (--patience)", task.select, args.patience)
    for part in (journal, loader, judge):
        part.close()
    if stopped:
        everyone.close()
        raise SystemExit(EXIT_PREEMPTED)
    everyone.barrier()  # the best checkpoints are on disk before anybody reads them
    results.finish(bench, model, module, selector, runs=resumed.runs, seconds=spent + run.seconds)


if __name__ == "__main__":
    run_cli(main, resumable=True)
