"""Pretrain SAR-W-MixMAE on Sentinel-1 patches.

    python main_pretrain.py --dataset demo --data_path data/demo --model mixmim_tiny --batch_size 16
    mpirun -np 8 python main_pretrain.py --dataset benv2 --data_path /data/BigEarthNet-S1 --norm_pix_loss

Published recipe (8 GPUs x 256 = 2048, lr = 1.5e-4 * 2048 / 256 = 1.2e-3): --epochs 1024 --stop_epoch 64
--warmup_epochs 40 --norm_pix_loss; these are the defaults where they are not flags.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarwmix.data import registry
from sarwmix.data.spec import DECIBEL, NOISE_DB
from util import args as groups
from util.cli import run_cli
from util.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from util.files import make_directory, write_json

if TYPE_CHECKING:
    import torch

    from models_mixmim import MixMIM
    from sarwmix.data.base import SarDataset
    from sarwmix.transforms import SarTransform
    from sarwmix.weighting import WeightOptions
    from util.distributed import Processes

TEST_RUN_STEPS = 3


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


def main() -> int | None:
    args = get_parser().parse_args()
    check_args(args)

    from util.distributed import setup_processes
    from util.log import get_logger, setup_logging
    from util.schedule import check_schedule, effective_batch, scaled_lr
    from util.seeding import seed_everything

    processes = setup_processes(
        device=args.device,
        dist_url=args.dist_url,
        port=args.port,
        world_size=args.world_size,
        dist_on_itp=args.dist_on_itp,
        hang_timeout=args.hang_timeout,
    )
    setup_logging(args.output_dir, rank=processes.rank)
    log = get_logger()
    seed_everything(args.seed)

    weighting = weight_options(args)
    dataset = open_data(args)
    transform = make_transform(dataset, args.input_size, weighting, args.target, args.target_looks)
    model = make_model(args, bands=len(dataset.spec.bands)).to(processes.device)
    log.info("%s, %s", processes.describe(), describe_data(dataset))
    if args.inference:
        if processes.is_main:
            draw_reconstructions(args, model, dataset, transform, processes.device)
        processes.close()
        return None

    if args.flops:
        show_flops(model, args.input_size)
    effective = effective_batch(args.batch_size, args.accum_iter, processes.world_size)
    lr = scaled_lr(args.blr, effective) if args.lr is None else args.lr
    check_schedule(lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs)
    log.info(
        "effective batch %d = %d per process x %d accumulated x %d processes; peak lr %.3g",
        effective,
        args.batch_size,
        args.accum_iter,
        processes.world_size,
        lr,
    )
    run = {
        "kind": "pretrain",
        "model_config": {"name": args.model, "img_size": args.input_size, "norm_pix_loss": args.norm_pix_loss},
        "data": {
            **dataset.identity(),
            "bands": list(dataset.spec.bands),
            "unit": dataset.spec.unit,
            "statistics": dataset.statistics.as_dict(),
        },
        "weighting": {
            **asdict(weighting),
            "mask_ratio": args.mask_ratio,
            "target": args.target,
            "target_looks": args.target_looks,
        },
        # The peak rate follows from --lr or --blr and the effective batch, which may change when a run is resumed.
        "schedule": {
            "epochs": args.epochs,
            "warmup_epochs": args.warmup_epochs,
            "lr": args.lr,
            "blr": args.blr,
            "min_lr": args.min_lr,
        },
        "seed": args.seed,
        "recipe": {"weight_decay": args.weight_decay, "clip_grad": args.clip_grad},
        "test_run": args.test_run,  # a real run must not continue where a trial stopped
    }
    code = train(args, processes, dataset, transform, model, lr=lr, run=run)
    processes.close()
    if code != EXIT_OK:
        raise SystemExit(code)
    return None


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


def weight_options(args: argparse.Namespace) -> WeightOptions:
    """The weighting of the command line; refuses flags that do not go together."""
    from sarwmix.weighting import WeightOptions

    return WeightOptions(
        mode=args.weight_mode,
        level=args.weight_level,
        domain=args.weight_domain,
        exp_scale=args.weight_exp_scale,
        clip=args.weight_clip,
        norm=args.weight_norm,
        renorm=args.weight_renorm,
        range=args.weight_range,
        permute=args.weight_permute,
    )


def open_data(args: argparse.Namespace) -> SarDataset:
    """The data set of the command line; pretraining uses train and validation patches together."""
    spec = registry.get_spec(args.dataset, args.bands)
    if spec.unit != DECIBEL:
        raise UserError(
            f"pretraining weights pixels by backscatter in dB; the bands of {spec.name!r} are in {spec.unit}. Choose a "
            "Sentinel-1 data set, such as benv2 or s1_scenes"
        )
    options: dict[str, Any] = {"statistics": args.statistics, "on_error": "replace", "bands": args.bands}
    if "labels" in spec.options:
        options["labels"] = "none"  # pretraining does without; reading them from a store per patch takes long
    options |= registry.parse_options(args.data_option)
    without_val = spec.task != "pair" and "val_frac" in spec.options
    split = args.split or ("train" if spec.task == "unlabelled" or without_val else "train+val")
    return registry.build_dataset(args.dataset, args.data_path, split, **options).single_images()


def describe_data(dataset: SarDataset) -> str:
    spec = dataset.spec
    return f"{len(dataset):,} samples of {spec.name} ({dataset.split}), bands {', '.join(spec.bands)} in {spec.unit}"


def make_transform(
    dataset: SarDataset, size: int, weighting: WeightOptions, target: str = "image", target_looks: int = 1
) -> SarTransform:
    from sarwmix.transforms import SarTransform

    statistics = dataset.statistics
    median = weighting.range == "p01-median"
    return SarTransform(
        size=size,
        mean=statistics.mean,
        std=statistics.std,
        weighting=weighting,
        range_db=(statistics.p01, statistics.median if median else statistics.p99),
        noise_db=[NOISE_DB[band] for band in dataset.spec.bands] if weighting.mode == "noise" else None,
        target=target,
        target_looks=target_looks,
        all_finite=dataset.all_finite,
    )


def make_model(args: argparse.Namespace, *, bands: int) -> MixMIM:
    from models_mixmim import MixMIM, model_config

    model = MixMIM(
        img_size=args.input_size, in_chans=bands, norm_pix_loss=args.norm_pix_loss, **model_config(args.model)
    )
    model.draw_mask(args.mask_ratio)  # refuses a ratio that leaves nothing to do at this input size
    if args.activation_checkpointing:
        model.recompute_blocks()
    return model


def show_flops(model: MixMIM, size: int) -> None:
    import torch

    from util.flops import count_flops
    from util.log import get_logger

    pair = torch.zeros(2, model.in_chans, size, size, device=model.mask_token.device)  # a sample is mixed with another
    total, table = count_flops(model, partial(model, pair), samples=2)
    get_logger().info("forward pass of one sample: %.2f GFLOP (2 a multiply-add)\n%s", total / 1e9, table)


def load_weights(model: MixMIM, path: str) -> dict[str, Any]:
    """Load a pretraining checkpoint strictly; returns the whole checkpoint."""
    from util.checkpoint import load_checkpoint, load_model_state

    checkpoint = load_checkpoint(path)
    load_model_state(model, checkpoint, path=path)
    return checkpoint


def train(
    args: argparse.Namespace,
    processes: Processes,
    dataset: SarDataset,
    transform: SarTransform,
    model: MixMIM,
    *,
    lr: float,
    run: dict[str, Any],
) -> int:
    """Everything from loader to last checkpoint; returns the exit code."""
    from engine_pretrain import train_one_epoch
    from models_mixmim import ERRORS
    from sarwmix.data.loader import build_loader
    from util.checkpoint import load_model_state
    from util.compilation import limit_memory
    from util.log import EpochLog, Progress, ScalarWriter, format_duration, get_logger, memory_mib
    from util.optim import build_adamw, parameter_groups
    from util.precision import precision
    from util.resume import Batch, find_checkpoint, resume_run, start_afresh
    from util.saving import RunSaver
    from util.schedule import learning_rate
    from util.training import Trainer, arrange

    log, device, output_dir = get_logger(), processes.device, make_directory(args.output_dir)
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
    steps = min(TEST_RUN_STEPS, len(loader)) if args.test_run else len(loader)
    batch = Batch(args.batch_size, args.accum_iter, processes.world_size, lr)
    optimizer = build_adamw(parameter_groups(model, weight_decay=args.weight_decay), lr=lr, betas=(0.9, 0.95))
    amp_dtype, scaler = precision(args.amp, device)

    resume = find_checkpoint(args.resume, output_dir, processes)
    if resume is not None:
        resumed = resume_run(
            resume,
            run,
            processes=processes,
            load_model=partial(load_model_state, model, path=resume),
            optimizer=optimizer,
            scaler=scaler,
            batch=batch,
            steps=steps,
            allow_mismatch=args.allow_mismatch,
            is_branch=args.resume != "auto",
        )
    else:
        if args.finetune:
            load_weights(model, args.finetune)
            log.info("started from the weights of %s", args.finetune)
        resumed = start_afresh(output_dir, processes, test_run=args.test_run)
    if args.start_epoch is not None:
        resumed = resumed.at_epoch(args.start_epoch)
    start_epoch, start_step = resumed.epoch, resumed.step
    if processes.is_main:
        write_json(output_dir / "args.json", groups.args_to_dict(args))

    if args.compile:
        limit_memory(args.memory_budget)
        model.compile_blocks()
    trained, graphs = arrange(model, processes, cuda_graph=args.cuda_graph)
    trainer = Trainer(
        trained,
        optimizer,
        processes=processes,
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
    saver = RunSaver(
        output_dir,
        processes=processes,
        is_main=processes.is_main,
        keep=args.keep_checkpoints,
        minutes=args.save_minutes,
        hang_timeout=args.hang_timeout,
        seed=args.seed,
        batch=batch,
        resumed=resumed,
        fixed={**run, "args": groups.args_to_dict(args), "best": {}},
        model=model,
        trainer=trainer,
    )
    epoch_log = EpochLog(output_dir, start_epoch=start_epoch) if processes.is_main else None
    scalars = ScalarWriter(
        (args.log_dir or output_dir / "tensorboard") if processes.is_main else None,
        start=1000 * start_epoch if resume is not None else None,
    )
    end_epoch = min(args.epochs, args.stop_epoch or args.epochs)
    if args.test_run:
        end_epoch = min(end_epoch, start_epoch + 2)

    log.info("training epochs %d to %d of %d, %d steps each", start_epoch, end_epoch - 1, args.epochs, steps)
    began = time.monotonic()
    for epoch in range(start_epoch, end_epoch):
        loader.set_epoch(epoch)
        result = train_one_epoch(
            trainer,
            saver.watch(loader.iter_from(start_step)),
            transform=transform,
            mask_ratio=args.mask_ratio,
            seed=args.seed,
            epoch=epoch,
            steps=steps,
            start_step=start_step,
            progress=Progress(
                steps, title=f"Epoch {epoch + 1}/{end_epoch}", start=start_step, enabled=processes.is_main
            ),
            on_step=partial(saver.after_step, epoch, steps),
        )
        start_step = 0
        if not result.finished:
            saver.save_and_stop(epoch - 1, result.steps_done)
            return EXIT_PREEMPTED
        done = epoch + 1
        record = {"epoch": epoch, **result.stats, "memory_mib": max(memory_mib())}
        if epoch_log is not None:
            epoch_log.write(record)
        shown = {name: record[name] for name in ("train_loss", *ERRORS) if name in record}
        scalars.add(1000 * epoch, {**shown, "lr": record["train_lr"]})
        left = (time.monotonic() - began) / (done - start_epoch) * (end_epoch - done)
        log.info(
            "Epoch %d/%d  loss %.4f  unweighted %.4f  lr %.3g  %.1f images/s  ETA %s",
            done,
            end_epoch,
            record["train_loss"],
            record.get("plain_error", float("nan")),
            record["train_lr"],
            record["images_per_s"],
            format_duration(left),
        )
        names = ["checkpoint.pth"] if done % args.save_every == 0 or done == end_epoch else []
        names += [f"checkpoint_{done}.pth"] if done in args.save_epochs else []
        if names:  # after the log: a resumed run writes the rows of the epochs that it trains
            saver.save(epoch, 0, names, wait=done == end_epoch)
        if saver.stopping and done < end_epoch:
            saver.save_and_stop(epoch, 0)
            return EXIT_PREEMPTED
    saver.close()
    scalars.close()
    loader.close()
    log.info("Training time %s; results in %s", datetime.timedelta(seconds=int(time.monotonic() - began)), output_dir)
    return EXIT_OK


def draw_reconstructions(
    args: argparse.Namespace, model: MixMIM, dataset: SarDataset, transform: SarTransform, device: torch.device
) -> None:
    """Pictures of the same batch and mask for each checkpoint."""
    import torch

    from engine_pretrain import reconstruct
    from sarwmix.figures.base import reconstruction_panel
    from util.log import get_logger
    from util.seeding import step_generator

    count = min(args.batch_size, 8, len(dataset) - len(dataset) % 2)  # a page
    chosen = torch.randperm(len(dataset), generator=step_generator(args.seed, 0, 0, 0, "inference"))[:count]
    batch = dataset.get_batch(chosen.numpy())
    mask = model.draw_mask(args.mask_ratio, step_generator(args.seed, 0, 0, 0, "mask"))
    for path, picture in zip(args.inference, picture_paths(args.inference, Path(args.output_dir)), strict=True):
        checkpoint = load_weights(model, path)
        check_statistics(checkpoint, dataset, path)
        config = checkpoint.get("model_config") or {}  # released files have none
        model.norm_pix_loss = bool(config.get("norm_pix_loss", args.norm_pix_loss))
        result = reconstruct(model, batch, transform=transform, mask=mask)
        make_directory(picture.parent)
        reconstruction_panel(
            picture,
            names=result.names,
            bands=dataset.spec.bands,
            original_db=result.original,
            mixed_db=result.mixed,
            mask=result.mask,
            reconstruction_db=result.reconstruction,
            weights=result.weights,
            title=f"{args.model}, {Path(path).name}: weighted loss {result.loss:.4f} on this batch",
            note="With norm_pix_loss the model predicts the pattern within a cell: mean and deviation of each cell are "
            "the true ones."
            if model.norm_pix_loss
            else "",
        )
        get_logger().info("%s: loss %.4f, %d samples drawn in %s", path, result.loss, count, picture)


def picture_paths(checkpoints: Sequence[str], output_dir: Path) -> list[Path]:
    """A picture for each checkpoint, named by its folder and file, and by more folders where these are the same."""
    parts = [Path(path).resolve().with_suffix("").parts for path in checkpoints]
    depth = 2
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [output_dir / "reconstructions" / ("_".join(part[-depth:]) + ".png") for part in parts]


def check_statistics(checkpoint: dict[str, Any], dataset: SarDataset, path: str) -> None:
    """Pictures in dB need the statistics of training."""
    saved = (checkpoint.get("data") or {}).get("statistics") or {}
    for name in ("mean", "std"):
        used = list(getattr(dataset.statistics, name))
        if name in saved and list(saved[name]) != used:
            raise UserError(
                f"{path} was trained with {name} {list(saved[name])} per band, this command uses {used}; give the "
                "--dataset and --statistics of the training"
            )


if __name__ == "__main__":
    run_cli(main, resumable=True)
