"""The workbench of a fine-tuning run: its splits, how they are read and evaluated, and frozen encoders on them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine_finetune import Augmentation, Evaluation, evaluate, extract_features
from sarwmix.data import registry
from sarwmix.data.base import IGNORED, MaskDataset, SarDataset, UnreadableSample, labels_digest
from sarwmix.data.fraction import take_fraction
from sarwmix.data.loader import Loader, build_loader
from sarwmix.data.spec import EmptySplit
from sarwmix.finetune.probes import (
    FeatureDataset,
    data_hashes,
    feature_key,
    feature_path,
    knn_scores,
    load_features,
    pixel_fingerprint,
    save_features,
)
from sarwmix.finetune.probes import whole_split as all_of
from sarwmix.finetune.settings import data_options, task_options
from sarwmix.mixup import Mixup
from sarwmix.tasks.base import Task, build_task
from sarwmix.transforms import SarTransform
from util.distributed import Processes
from util.errors import UserError
from util.files import make_directory
from util.flops import count_flops
from util.log import get_logger
from util.optim import build_adamw, build_sgd, parameter_groups
from util.passport import take_passport
from util.precision import precision
from util.run import TEST_RUN_STEPS

# options that say where names and labels stand, or how thoroughly files are checked
PLACES = ("metadata", "id_col", "lists", "labels", "check")


def check_protocol(task: Task, protocol: str, *, head: str | None) -> None:
    """Refuse a protocol or a head that the kind of label has no use for.

    Raises:
        UserError: says what fits.
    """
    if task.dense and protocol == "knn":
        raise UserError(
            "--protocol knn works on one vector per image, the labels are per pixel; use --protocol linear, a linear "
            "layer on the frozen maps, frozen, which trains a whole head, or finetune"
        )
    if task.dense and protocol == "linear" and head not in (None, "bn_linear"):
        raise UserError(f"--protocol linear is a linear layer on frozen maps, not --head {head}; use --protocol frozen")
    if head is not None and head not in task.heads:
        raise UserError(f"--head {head} does not fit the {task.name} task; choose one of {', '.join(task.heads)}")


def open_splits(
    dataset: str,
    data_path: str,
    names: Sequence[str],
    *,
    options: Mapping[str, Any],
    train_frac: float,
    seed: int,
    output_dir: str,
    limit: int | None,
) -> dict[str, SarDataset]:
    """Open the splits of a run.

    Args:
        dataset: registered name.
        data_path: root of the data.
        names: "train" where something is trained, the split that selects, "test"; extra splits of the data set, which
            are left out where they are absent.
        options: of the data set.
        train_frac: share of the training labels; below 1 the chosen names go to train_ids.txt.
        seed: decides the share.
        output_dir: the run's folder.
        limit: evaluate on that many samples only (test runs).
    """
    spec = registry.get_spec(dataset, options.get("bands"), options, data_path)
    splits = {}
    for name in dict.fromkeys(names):
        # Replacing an unreadable sample is for training; in an evaluation it would count another one twice.
        on_error = "replace" if name == "train" else "skip" if spec.task == "segmentation" else "raise"
        try:
            splits[name] = registry.build_dataset(dataset, data_path, name, on_error=on_error, **options)
        except EmptySplit as error:
            if name not in spec.extra_splits:
                raise
            get_logger().info("split %s is not evaluated: %s", name, error)
    if train_frac < 1 and "train" in splits:
        ids = make_directory(output_dir) / "train_ids.txt"
        splits["train"] = take_fraction(splits["train"], train_frac, seed=seed, ids_file=ids)
    if limit is not None:
        for name in set(splits) - {"train"}:
            splits[name] = splits[name].subset(np.arange(min(limit, len(splits[name]))))
    if isinstance(splits.get("train"), MaskDataset):
        check_labelled(splits["train"])
    return splits


def data_facts(splits: Mapping[str, SarDataset], options: Mapping[str, Any]) -> dict[str, Any]:
    """What tells from metrics.json alone whether two runs saw the same samples and labels.

    Args:
        splits: those of the run; of a part (label fractions, test runs) the whole split is named, so that seeds agree.
        options: of the data set, as given; None: not given.

    Returns:
        ``splits``: for each the number of samples and hashes of their names and labels; ``data_options``: the label set
        and every option that is not the default. Places of files are left out: the hashes tell what was found there.
    """
    found: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    spec = next(iter(splits.values())).spec
    defaults = registry.option_defaults(spec)
    for name, value in options.items():
        if name in defaults and name not in PLACES and value is not None and str(value) != str(defaults[name]):
            found[name] = value
    for split, part in splits.items():
        identity = {key: value for key, value in part.whole.identity().items() if key not in ("dataset", "split")}
        entries[split] = {key: identity.pop(key) for key in ("count", "names_sha256")}
        found |= identity  # what a data set adds to its identity: the label set
        if part.whole.labels is not None:
            entries[split]["labels_sha256"] = labels_digest(part.whole.labels)
    return {"splits": entries, "data_options": found}


def check_labelled(train: SarDataset) -> None:
    """Refuse training label maps that say nothing: the loss would be 0 from the first step to the last.

    Maps are read until one labelled pixel is found, which is usually in the first.

    Raises:
        UserError: not one pixel of any sample counts.
    """
    assert isinstance(train, MaskDataset)
    image, label = np.empty(train.shape, dtype=np.float32), np.empty(train.shape[1:], dtype=np.uint8)
    ignored = invalid = 0
    unreadable: list[UnreadableSample] = []
    for index in range(len(train)):
        try:
            train.read_pair(index, image, label)
        except UnreadableSample as error:
            unreadable.append(error)
            continue
        labelled = label != IGNORED
        if (labelled & np.isfinite(image).all(axis=0)).any():
            return
        ignored += not labelled.any()
        invalid += bool(labelled.any())
    seen = [
        f"{ignored} label maps hold nothing but ignored values" if ignored else "",
        f"{invalid} have labels only where the image has no valid value" if invalid else "",
        f"{len(unreadable)} cannot be used, such as {unreadable[0]}" if unreadable else "",
    ]
    raise UserError(
        f"not one pixel of the {len(train)} training samples of {train.spec.name} in {train.source} is labelled: "
        f"{'; '.join(part for part in seen if part)}. Expected label maps with some pixels of "
        f"{' or '.join(train.spec.classes)}; check the label files and the options that ignore classes"
    )


@dataclass(frozen=True)
class Workbench:
    """What all steps of a run share.

    Attributes:
        task: kind of label.
        splits: data sets by split name; `FeatureDataset` once the features are cached.
        transform: device transform; None for cached features.
        processes: all processes of the run.
        group: those that share batches and evaluations. With cached features each process works alone on everything,
            so that nothing depends on their number.
        batch_size: samples per process and forward pass.
        amp_dtype: autocast type; None: float32.
        seed: of the training order.
        num_workers: reading processes of each training process.
        pin_memory: page-locked batches.
        cache: where the images of the training split are kept, see `sarwmix.data.loader.build_loader`.
        options: of the data set; cached features belong to them.
        said: splits whose skipped samples have been named.
    """

    task: Task
    splits: Mapping[str, SarDataset]
    transform: SarTransform | None
    processes: Processes
    group: Processes
    batch_size: int
    amp_dtype: torch.dtype | None = None
    seed: int = 0
    num_workers: int = 0
    pin_memory: bool = False
    cache: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where models live."""
        return self.processes.device

    def loader(self, split: str, *, train: bool) -> Loader:
        """Shuffled full batches for training, or this process's share of every sample once."""
        data, cached = self.splits[split], self.transform is None
        batch = self.batch_size * (self.processes.world_size if cached else 1)
        return build_loader(
            data,
            batch_size=batch,
            shuffle=train,
            drop_last=train and (not cached or len(data) >= batch),
            seed=self.seed,
            rank=self.group.rank,
            world_size=self.group.world_size,
            num_workers=0 if cached else self.num_workers,
            pin_memory=self.pin_memory,
            device=self.device,
            cache=self.cache if train and not cached else "none",
            each_image_once=not train,
        )

    def count_flops(self, model: nn.Module) -> tuple[float, str]:
        """Operations of the forward pass of a test sample; see `util.flops.count_flops`."""
        assert self.transform is not None
        batch = self.splits["test"].get_batch(np.zeros(1, dtype=np.int64))
        prepared = self.task.prepare(batch, self.transform, device=self.device)
        return count_flops(model, partial(model, *prepared.inputs))

    def evaluate(self, model: nn.Module, split: str, batches: Iterable[Mapping[str, Any]] | None = None) -> Evaluation:
        """All outputs of a split.

        Args:
            batches: of this bench's loader, for a look after an epoch; None: final results, with what pictures need.
        """
        evaluation = evaluate(
            model,
            batches if batches is not None else self.loader(split, train=False),
            whole=self.splits[split] if batches is None else None,
            task=self.task,
            transform=self.transform,
            device=self.device,
            split=split,
            names=self.splits[split].names,
            all_gather=self.group.all_gather_objects,
            all_gather_arrays=self.group.all_gather_arrays,
            amp_dtype=self.amp_dtype,
        )
        evaluation = replace(evaluation, clusters=self.splits[split].clusters)
        if evaluation.skipped and split not in self.said and self.processes.is_main:
            self.said.add(split)
            get_logger().warning(
                "%d of %d samples of split %s have no valid pixel; they count in no metric: %s",
                len(evaluation.skipped),
                len(evaluation.names),
                split,
                ", ".join(evaluation.skipped),
            )
        return evaluation

    def with_features(self, model: nn.Module, cache: Path) -> Workbench:
        """The same bench on the features of a frozen encoder, computed once by all processes and kept in files.

        What is trained on them is one layer: it works in float32.
        """
        cached = {name: self._features(model, name, cache) for name in self.splits}
        return replace(self, splits=cached, transform=None, group=Processes(device=self.device), amp_dtype=None)

    def _features(self, model: nn.Module, split: str, cache: Path) -> FeatureDataset:
        assert self.transform is not None
        data = self.splits[split]
        facts = {
            **data.identity(),
            "bands": list(data.spec.bands),
            "preprocessing": data.spec.preprocessing.as_dict(),
            "options": sorted((name, str(value)) for name, value in self.options.items() if value is not None),
            "pixels": pixel_fingerprint(data),
        }
        key = feature_key(
            model,
            facts,
            data.statistics.as_dict(),
            input_size=self.transform.size,
            precision=str(self.amp_dtype or torch.float32),
        )
        path = feature_path(cache, split, key)
        features = load_features(path, len(data))
        there = self.processes.maximum([int(features is None)]) == [0]  # all of them see it, or all compute
        if there and features is not None:
            get_logger().info("features of %s: %s (cached)", split, path)
            return FeatureDataset(data, features)
        computed = extract_features(
            model,
            self.loader(split, train=False),
            task=self.task,
            transform=self.transform,
            device=self.device,
            split=split,
            names=data.names,
            all_gather=self.processes.all_gather_objects,
            all_gather_arrays=self.processes.all_gather_arrays,
            amp_dtype=self.amp_dtype,
        )
        if self.processes.is_main:
            save_features(path, computed)
        get_logger().info("features of %s: computed, %d x %d, kept in %s", split, *computed.shape, path)
        return FeatureDataset(data, computed)

    def knn(self, split: str, *, k: int) -> Evaluation:
        """k nearest neighbours among the cached training features; there is no model and no loss."""
        train, queries = self.splits["train"], self.splits[split]
        assert isinstance(train, FeatureDataset)
        assert isinstance(queries, FeatureDataset)
        cpu = torch.device("cpu")
        labels = self.task.soft_target(self.task.target(all_of(train), cpu))
        scores = knn_scores(train.features, labels, queries.features, k=k, device=self.device)
        outputs: dict[str, Any] = {"scores": scores, "target": self.task.target(all_of(queries), cpu).numpy()}
        return Evaluation(split, outputs, queries.names, clusters=queries.clusters)


def open_bench(args: argparse.Namespace, processes: Processes) -> Workbench:
    """The workbench of a command line: its task, splits and how they are read.

    Args:
        args: flags of main_finetune.py.
        processes: all of the run.

    Raises:
        UserError: a protocol, rule or head that the task does not have, or data that cannot be used.
    """
    options = data_options(args)
    spec = registry.get_spec(args.dataset, args.bands, options, args.data_path)
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
    transform = SarTransform(
        size=args.input_size,
        mean=statistics.mean,
        std=statistics.std,
        preprocessing=spec.preprocessing,
        all_finite=all(data.all_finite for data in splits.values()),
    )
    return Workbench(
        task=task,
        splits=splits,
        transform=transform,
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


def passport_of(args: argparse.Namespace, bench: Workbench) -> dict[str, Any]:
    """Passport of a fine-tuning or an evaluation; empty where this process writes nothing."""
    processes = bench.processes
    if not processes.is_main:
        return {}
    data = {name: data_hashes(split) for name, split in bench.splits.items()}
    return take_passport(args, device=processes.device, processes=processes.world_size, data=data)


def make_augmentation(args: argparse.Namespace, task: Task) -> Augmentation:
    """Mixing, erasing and smoothing of a command line.

    Raises:
        UserError: mixing of labels that cannot be mixed.
    """
    augmentation = Augmentation(
        Mixup(args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode),
        erase_prob=args.reprob,
        smoothing=args.smoothing,
    )
    if augmentation.mixup.active and not task.mixable:
        raise UserError(f"--mixup and --cutmix do not work with the {task.name} task")
    return augmentation


def make_optimizer(args: argparse.Namespace, module: nn.Module, *, lr: float) -> tuple[torch.optim.Optimizer, str]:
    """Optimizer of what is trained, and its name: SGD for a linear probe, else AdamW, unless --optimizer says so."""
    layer_decay = args.layer_decay if args.protocol == "finetune" else None
    groups = parameter_groups(module, weight_decay=args.weight_decay, layer_decay=layer_decay)
    name = args.optimizer or ("sgd" if args.protocol == "linear" else "adamw")
    return (build_sgd(groups, lr=lr) if name == "sgd" else build_adamw(groups, lr=lr)), name
