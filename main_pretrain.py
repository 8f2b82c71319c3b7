"""Pretrain SAR-W-MixMAE on Sentinel-1 patches.

    python main_pretrain.py --dataset demo --data_path data/demo --model mixmim_tiny --batch_size 16
    mpirun -np 8 python main_pretrain.py --dataset benv2 --data_path /data/BigEarthNet-S1 --norm_pix_loss

Published recipe (8 GPUs x 256 = 2048, lr = 1.5e-4 * 2048 / 256 = 1.2e-3): --epochs 1024 --stop_epoch 64
--warmup_epochs 40 --norm_pix_loss; these are the defaults where they are not flags.

Where things are: data, transform and model of the flags in `sarwmix.pretraining`, an epoch in `engine_pretrain`, an
optimizer step in `util.training`, begin, save and stop in `util.run`, the model in `models_mixmim`.
"""

from __future__ import annotations

import argparse
import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sarwmix.data import registry
from sarwmix.pretraining import (
    describe_data,
    draw_reconstructions,
    identity_of,
    make_model,
    make_transform,
    open_data,
    passport_of,
    show_flops,
    start_from,
    weight_options,
)
from util import args as groups
from util.cli import run_cli
from util.errors import EXIT_PREEMPTED, UserError

if TYPE_CHECKING:
    from models_mixmim import MixMIM
    from sarwmix.data.base import SarDataset
    from sarwmix.models.mae import MaskedViT
    from sarwmix.transforms import SarTransform
    from util.distributed import Processes


def get_parser() -> argparse.ArgumentParser:
    parser = groups.make_parser((__doc__ or "").splitlines()[0])
    groups.add_run_args(parser, output_dir="runs/pretrain")
    groups.add_data_args(parser, datasets=registry.names(), default="benv2")
    groups.add_data_detail_args(parser, split="e.g. train or train+val (not given: all but test)")
    groups.add_band_args(parser)
    groups.add_model_args(parser)
    groups.add_pretrain_args(parser)
    groups.add_weight_args(parser)
    groups.add_optim_args(parser, batch_size=256, epochs=1024, blr=1.5e-4, warmup_epochs=40)
    groups.add_resume_args(parser, save_every=8)
    start = parser.add_argument_group("other starts, extra checkpoints, pictures")
    start.add_argument("--finetune", default="", metavar="CKPT", help="start from these weights, with a new schedule")
    start.add_argument(
        "--save_epochs", type=groups.positive_int, nargs="*", default=[64], metavar="N", help="also checkpoint_<N>.pth"
    )
    start.add_argument(
        "--inference",
        nargs="+",
        default=[],
        metavar="CKPT",
        help="draw reconstructions by these checkpoints and exit; --batch_size samples each",
    )
    groups.add_fault_args(parser)
    groups.add_distributed_args(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported or any process is started."""
    if args.batch_size % 2:
        raise UserError(
            f"--batch_size {args.batch_size} is odd: the partner of sample i is sample B-1-i, so the middle sample "
            "would be mixed with itself; use an even number"
        )
    if args.finetune and args.resume not in ("", "auto"):  # a job that is submitted again may name both
        raise UserError("--resume continues a run and --finetune starts a new one from its weights; give one of them")
    groups.check_training(args)
    if args.mask_ratio is None:
        args.mask_ratio = 0.75 if args.model in groups.MAE_NAMES else 0.5  # as published for each
    for path in [args.finetune, *args.inference]:
        if path and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist; give the path of a .pth file")
    if args.target != "image" and args.target_looks != 1:
        raise UserError(
            f"--target_looks averages the image and has no effect on --target {args.target}; drop one of them"
        )
    if args.target != "image" and args.inference:
        raise UserError(f"--inference draws images; a model of --target {args.target} predicts none")
    weight_options(args)


def main() -> int | None:
    args = get_parser().parse_args()
    check_args(args)

    from util.log import get_logger
    from util.run import start_processes

    processes = start_processes(args)
    dataset = open_data(args)
    transform = make_transform(dataset, args.input_size, weight_options(args), args.target, args.target_looks)
    model = make_model(args, bands=len(dataset.spec.bands)).to(processes.device)
    get_logger().info("%s, %s", processes.describe(), describe_data(dataset))
    if args.inference:
        if processes.is_main:
            draw_reconstructions(args, model, dataset, transform)
        processes.close()
        return None
    if args.flops:
        show_flops(model, args.input_size)
    stopped = train(args, processes, dataset, transform, model)
    processes.close()
    if stopped:
        raise SystemExit(EXIT_PREEMPTED)
    return None


def train(
    args: argparse.Namespace,
    processes: Processes,
    dataset: SarDataset,
    transform: SarTransform,
    model: MixMIM | MaskedViT,
) -> bool:
    """Everything from the loader to the last checkpoint; whether it was stopped on request before its end."""
    from engine_pretrain import train_one_epoch
    from sarwmix.data.loader import build_loader
    from util.checkpoint import load_model_state
    from util.compilation import limit_memory
    from util.log import get_logger
    from util.optim import build_adamw, parameter_groups
    from util.run import EpochNotes, TrainingRun, plan_batch

    log, device = get_logger(), processes.device
    batch = plan_batch(args, processes.world_size)
    log.info(
        "effective batch %d = %d per process x %d accumulated x %d processes; peak lr %.3g",
        batch.effective,
        args.batch_size,
        args.accum_iter,
        processes.world_size,
        batch.lr,
    )
    loader = build_loader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        seed=args.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        device=device,
        cache=args.cache,
    )
    run = TrainingRun(
        args,
        identity_of(args, dataset, weight_options(args)),
        group=processes,
        everyone=processes,
        model=model,
        module=model,
        optimizer=build_adamw(parameter_groups(model, weight_decay=args.weight_decay), lr=batch.lr, betas=(0.9, 0.95)),
        batch=batch,
        steps=len(loader),
        amp=args.amp,
        passport=passport_of(args, processes, dataset),
    )
    run.begin(
        lambda checkpoint, source: load_model_state(model, checkpoint, path=source),
        start=partial(start_from, model, args.finetune),
    )
    if args.compile:
        limit_memory(args.memory_budget)
        model.compile_blocks()
    run.arm()
    notes = EpochNotes(run, args.log_dir)
    first = run.resumed.epoch
    log.info("training epochs %d to %d of %d, %d steps each", first, run.end - 1, args.epochs, run.steps)
    for epoch in run.epochs(loader):
        done, last = epoch + 1, epoch + 1 == run.end
        title = f"Epoch {done}/{run.end}"
        result = run.train(train_one_epoch, loader, epoch, title=title, transform=transform, mask_ratio=args.mask_ratio)
        if result is None:
            break
        notes.write(epoch, result.stats)
        names = ["checkpoint.pth"] if done % args.save_every == 0 or last else []
        names += [f"checkpoint_{done}.pth"] if done in args.save_epochs else []
        # After the log: a resumed run writes the rows of the epochs that it trains.
        run.save(epoch, names, last=last)
    stopped = run.close()
    notes.close()
    loader.close()
    if not stopped:
        log.info("Training time %s; results in %s", datetime.timedelta(seconds=int(run.seconds)), run.folder)
    return stopped


if __name__ == "__main__":
    run_cli(main, resumable=True)
