"""What main_pretrain.py trains, on what, and how the loss is weighted: from flags to data, transform and model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarwmix.data import registry
from sarwmix.data.spec import DECIBEL, NOISE_DB
from util.errors import UserError
from util.files import make_directory

if TYPE_CHECKING:
    from models_mixmim import MixMIM
    from sarwmix.data.base import SarDataset
    from sarwmix.models.mae import MaskedViT
    from sarwmix.transforms import SarTransform
    from sarwmix.weighting import WeightOptions
    from util.distributed import Processes


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
    given = registry.parse_options(args.data_option)
    spec = registry.get_spec(args.dataset, args.bands, given, args.data_path)
    if spec.unit != DECIBEL:
        raise UserError(
            f"pretraining weights pixels by backscatter in dB; the bands of {spec.name!r} are in {spec.unit}. Choose a "
            "Sentinel-1 data set, such as benv2 or s1_scenes"
        )
    options: dict[str, Any] = {"statistics": args.statistics, "on_error": "replace", "bands": args.bands}
    if "labels" in spec.options:
        options["labels"] = "none"  # pretraining does without; reading them from a store per patch takes long
    options |= given
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


def make_model(args: argparse.Namespace, *, bands: int) -> MixMIM | MaskedViT:
    from models_mixmim import MixMIM, model_config
    from sarwmix.models.mae import MaskedViT
    from sarwmix.sizes import MAE_VITS

    inputs = {"img_size": args.input_size, "in_chans": bands, "norm_pix_loss": args.norm_pix_loss}
    model: MixMIM | MaskedViT
    if args.model in MAE_VITS:
        model = MaskedViT(args.model, **inputs)
    else:
        model = MixMIM(**inputs, **model_config(args.model))
    model.draw_mask(args.mask_ratio)  # refuses a ratio that leaves nothing to do at this input size
    if args.activation_checkpointing:
        model.recompute_blocks()
    return model


def show_flops(model: MixMIM | MaskedViT, size: int) -> None:
    import torch

    from util.flops import count_flops
    from util.log import get_logger

    pair = torch.zeros(2, model.in_chans, size, size, device=model.mask_token.device)  # a sample is mixed with another
    total, table = count_flops(model, partial(model, pair), samples=2)
    get_logger().info("forward pass of one sample: %.2f GFLOP (2 a multiply-add)\n%s", total / 1e9, table)


def load_weights(model: MixMIM | MaskedViT, path: str) -> dict[str, Any]:
    """Load a pretraining checkpoint strictly; returns the whole checkpoint."""
    from util.checkpoint import load_checkpoint, load_model_state

    checkpoint = load_checkpoint(path)
    load_model_state(model, checkpoint, path=path)
    return checkpoint


def start_from(model: MixMIM | MaskedViT, path: str) -> None:
    """The initial weights of --finetune, a path, or those that the model was made with where it is empty."""
    from util.log import get_logger

    if path:
        load_weights(model, path)
        get_logger().info("started from the weights of %s", path)


def identity_of(args: argparse.Namespace, dataset: SarDataset, weighting: WeightOptions) -> dict[str, Any]:
    """What makes a pretraining this run and no other; stored in its checkpoints, compared when one is continued."""
    from util.run import schedule_of

    return {
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
        "schedule": schedule_of(args),
        "seed": args.seed,
        "recipe": {"weight_decay": args.weight_decay, "clip_grad": args.clip_grad, "amp": args.amp},
        "test_run": args.test_run,  # a real run must not continue where a trial stopped
    }


def passport_of(args: argparse.Namespace, processes: Processes, dataset: SarDataset) -> dict[str, Any]:
    """Passport of a pretraining; empty where this process writes nothing."""
    from sarwmix.finetune.probes import data_hashes
    from util.passport import take_passport

    if not processes.is_main:
        return {}
    data = {dataset.split: data_hashes(dataset)}
    return take_passport(args, device=processes.device, processes=processes.world_size, data=data)


def check_statistics(checkpoint: Mapping[str, Any], dataset: SarDataset, path: str) -> None:
    """Pictures in dB need the statistics of training."""
    saved = (checkpoint.get("data") or {}).get("statistics") or {}
    for name in ("mean", "std"):
        used = list(getattr(dataset.statistics, name))
        if name in saved and list(saved[name]) != used:
            raise UserError(
                f"{path} was trained with {name} {list(saved[name])} per band, this command uses {used}; give the "
                "--dataset and --statistics of the training"
            )


def draw_reconstructions(
    args: argparse.Namespace, model: MixMIM | MaskedViT, dataset: SarDataset, transform: SarTransform
) -> None:
    """Pictures of the same batch and mask for each checkpoint of --inference."""
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
