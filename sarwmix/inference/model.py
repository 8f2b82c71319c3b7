"""A trained model ready for use: from a checkpoint, or from an exported folder or hub repository.

    model = from_checkpoint("runs/finetune/checkpoint_best.pth")
    model = from_pretrained("exported/")                 # or from_pretrained("owner/name") from the Hugging Face hub
    probabilities = model.scores(images_in_db)           # (B, C, H, W) dB, NaN = no data -> (B, K)

Bands and their order, unit, statistics and classes come from the file alone. Files of other programs (the released
checkpoints) hold weights only; for them `trained_on` names the registered data set whose conventions they follow.

Shapes: B images, C bands, H x W pixels as read, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models_mixmim import MODELS
from sarwmix.data import registry
from sarwmix.data.spec import Statistics
from sarwmix.models.backbones import build_encoder
from sarwmix.models.loading import load_trained
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import Task, build_task, task_class
from sarwmix.transforms import transform_of
from util.checkpoint import (
    CheckpointError,
    check_model_config,
    check_safetensors,
    checked_weights,
    load_checkpoint,
    taking_apart,
)
from util.errors import UserError
from util.files import read_json, sha256_file
from util.optim import stage_depths
from util.text import first_line

EXPORT_FORMAT = "sarwmix-export/1"
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, PROGRAM_FILE = "model.safetensors", "config.json", "README.md", "model.pt2"
BEST_CHECKPOINT = "checkpoint_best.pth"
_RECORD_KEYS = (
    "kind",
    "task",
    "protocol",
    "classes",
    "model_config",
    "data",
    "epoch",
    "sample_size",
    "passport",
    "temperature",
)


@dataclass
class Pretrained:
    """A model in evaluation mode and all that belongs to its inputs and outputs.

    Attributes:
        model: in evaluation mode, float32.
        kind: "finetune", or "pretrain" (an encoder without labels, good for features).
        task: turns batches into inputs and logits into probabilities; None for an encoder.
        settings: which model it is.
        bands: names in the order of the channels.
        unit: of the images that go in, such as "dB".
        statistics: mean and standard deviation of each band, in `unit`.
        classes: names in the order of the outputs; empty for an encoder.
        sample_size: (height, width) of a training sample in pixels of the data, before resizing.
        record: the plain entries that an export repeats.
        source: what messages call it.
        metrics: results, where the file has them.
        temperature: by which logits are divided before they become probabilities; fitted on validation, 1 where not.
    """

    model: nn.Module
    kind: str
    task: Task | None
    settings: ModelSettings
    bands: tuple[str, ...]
    unit: str
    statistics: Statistics
    classes: tuple[str, ...]
    sample_size: tuple[int, int]
    record: dict[str, Any]
    source: str
    metrics: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.transform = transform_of(self.record["data"], size=self.settings.input_size)

    def to(self, device: torch.device | str) -> Pretrained:
        """Move the model; returns self."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def need_task(self, *names: str) -> Task:
        """The task.

        Args:
            names: the tasks that will do; none: any.

        Raises:
            UserError: an encoder without a task, or another task.
        """
        wanted = " or ".join(names) or "any task"
        if self.task is None:
            raise UserError(
                f"{self.source} is a pretraining checkpoint: it has no classes and can only give features "
                "(scripts/extract_features.py); fine-tune it first with main_finetune.py --finetune"
            )
        if names and self.task.name not in names:
            raise UserError(f"{self.source} was trained for the task {self.task.name}, expected {wanted}")
        return self.task

    @property
    def tile(self) -> int:
        """Side of the ground that the model looks at, in pixels of the data.

        The side of a training sample; for models that read windows of larger images in their own resolution
        (segmentation) the input size.
        """
        if self.transform.preprocessing.geometry == "window":
            return self.settings.input_size
        return self.sample_size[0]

    def inputs(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Images in dB -> standardised inputs of the model, on its device; what training's evaluation does."""
        for image in images:
            if image.ndim != 4 or image.shape[1] != len(self.bands):
                raise UserError(
                    f"images have shape {tuple(image.shape)}; expected (B, {len(self.bands)}, H, W) with the bands "
                    f"{', '.join(self.bands)} in {self.unit}"
                )
        wanted = 2 if self.task is not None and self.task.name == "pair" else 1
        if len(images) != wanted:
            what = "compares two images of one place" if wanted == 2 else "looks at one image"
            raise UserError(f"{self.source} {what}; {len(images)} given")
        # Pairs are stored as power and come to the task as such; here they are dB already, with zero at -60 as there.
        return self.transform.model_input(torch.cat(images).to(self.device)).chunk(wanted)

    @torch.no_grad()
    def logits(self, *images: Tensor) -> Tensor:
        """Images in dB, NaN = no data -> logits float32, (B, K) or (B, K, S, S) of a segmentation."""
        self.need_task()
        return self.model(*self.inputs(*images)).float()

    @torch.no_grad()
    def scores(self, *images: Tensor) -> Tensor:
        """Images in dB, NaN = no data -> class probabilities, float64 (B, K) or float32 (B, K, S, S)."""
        self.need_task()
        return self.probabilities(self.model(*self.inputs(*images)).float())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, K) or (B, K, S, S) -> class probabilities at the fitted temperature, here alone."""
        logits = logits / self.temperature
        return torch.softmax(logits, dim=1) if logits.ndim == 4 else self.need_task().scores(logits)

    @torch.no_grad()
    def features(self, *images: Tensor) -> Tensor:
        """Images in dB, NaN = no data -> pooled features before the head, (B, D) float32."""
        inputs = self.inputs(*images)
        network: Any = self.model
        if self.task is not None and self.task.name == "segmentation":  # the mean of the deepest map
            return network.feature_pyramid(*inputs)[-1].mean(dim=(2, 3)).float()
        return network.forward_features(*inputs).float()


def choose_device(name: str) -> torch.device:
    """The device of a tool: "auto" is CUDA when there is a GPU.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}; give auto, cpu or cuda:N") from error
    return device


def open_model(path: str | Path, *, trained_on: str | None = None) -> Pretrained:
    """A checkpoint file, the folder of a run (its best checkpoint), an exported folder, or a hub repository.

    Raises:
        UserError: nothing of that kind is there.
    """
    place = Path(path)
    if place.is_file():
        return from_checkpoint(place, trained_on=trained_on)
    if place.is_dir() and not (place / CONFIG_FILE).is_file():
        if (place / BEST_CHECKPOINT).is_file():
            return from_checkpoint(place / BEST_CHECKPOINT, trained_on=trained_on)
        raise UserError(
            f"{place} holds neither {CONFIG_FILE} of an export nor {BEST_CHECKPOINT} of a run; give a checkpoint, the "
            "output folder of main_finetune.py, or a folder written by --export"
        )
    return from_pretrained(path)


def from_checkpoint(path: str | Path, *, trained_on: str | None = None) -> Pretrained:
    """Open a checkpoint of main_finetune.py or main_pretrain.py, or a released one.

    Args:
        path: the file.
        trained_on: data set (as in --dataset) whose bands, statistics and classes the weights follow; only for files
            that do not say it themselves.

    Raises:
        UserError: missing, damaged, of an unknown kind, or `trained_on` contradicts or is needed.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("model")
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} has no weights under 'model'; give a checkpoint of this program")
    if isinstance(checkpoint.get("data"), Mapping) and checkpoint.get("kind") in ("finetune", "pretrain"):
        record = {key: checkpoint[key] for key in _RECORD_KEYS if key in checkpoint}
        entry = metrics_beside(Path(path))
        calibration = entry.get("calibration")
        if isinstance(calibration, Mapping) and entry.get("epoch") == checkpoint.get("epoch"):
            record["temperature"] = calibration.get("temperature", 1.0)
        known = record["data"].get("dataset")
        if trained_on is not None and trained_on != known:
            raise UserError(f"{path} says that it was trained on {known}; leave --trained_on {trained_on} out")
    else:
        record = _record_of_released(state, checkpoint.get("args") or {}, str(path), trained_on)
    return _assemble(record, state, str(path))


def metrics_beside(checkpoint: Path) -> dict[str, Any]:
    """Results of a checkpoint from `metrics.json` or `metrics_eval.json` of its run; empty when there are none."""
    for name in ("metrics.json", "metrics_eval.json"):
        path = checkpoint.parent / name
        if not path.is_file():
            continue
        content = read_json(path)
        results = content.get("results", {}) if isinstance(content, dict) else {}
        for key, entry in results.items():
            if Path(key).name == checkpoint.name:
                return entry
    return {}


def from_pretrained(source: str | Path, *, revision: str | None = None) -> Pretrained:
    """Open what `--export` wrote: a folder, or a repository of the Hugging Face hub that such a folder was pushed to.

    Args:
        source: folder, or "owner/name".
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: not there, damaged, or the hub cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision)
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or config.get("format") != EXPORT_FORMAT:
        raise UserError(
            f"{folder / CONFIG_FILE} does not say format {EXPORT_FORMAT}; give a folder written by --export of this "
            "program"
        )
    record = {key: config[key] for key in _RECORD_KEYS if config.get(key) is not None}
    weights, recorded = folder / WEIGHTS_FILE, config.get("weights_sha256")  # not in exports of earlier versions
    if recorded is not None and weights.is_file() and sha256_file(weights) != recorded:
        raise UserError(f"{weights} is not what was exported (its SHA-256 differs from {CONFIG_FILE}); export it again")
    return _assemble(record, _read_weights(weights), str(source), metrics=config.get("metrics") or {})


def _download(name: str, revision: str | None) -> Path:
    """Fetch weights and configuration of a hub repository; nothing else, and nothing that could run."""
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith(("/", ".", "~")):
        raise UserError(
            f"{name} does not exist; expected a checkpoint, a folder written by --export, or owner/name of a "
            "repository on the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{name} is no folder here, and reading it from the Hugging Face hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except Exception as error:  # the client fails in every way a network does
        raise UserError(
            f"{name} is no folder here, and the Hugging Face hub does not deliver it ({first_line(error)}); check "
            "the name and the connection, or download it elsewhere and give the folder"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_safetensors(path)
        return checked_weights(load_file(path), path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the exported folder is not complete, export it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); the file is damaged, export it again") from error


def _record_of_released(
    state: Mapping[str, Tensor], args: Mapping[str, Any], source: str, trained_on: str | None
) -> dict[str, Any]:
    """Entries of a file that holds weights only, from its weights and the named data set."""
    if trained_on is None:
        raise UserError(
            f"{source} holds weights, but not on which data they were trained; say it with --trained_on, one of "
            f"{', '.join(registry.names())}: bands, statistics and classes follow from that"
        )
    spec = registry.get_spec(trained_on)
    depths, weight = stage_depths(state), state.get("patch_embed.proj.weight")
    name = next(
        (
            name
            for name, row in MODELS.items()
            if weight is not None and row["embed_dim"] == weight.shape[0] and tuple(row["depths"]) == depths
        ),
        None,
    )
    if name is None or weight is None:
        raise UserError(f"{source} holds no MixMIM encoder of a known size ({', '.join(MODELS)})")
    position = state.get("absolute_pos_embed")
    side = 128 if position is None else round(position.shape[1] ** 0.5) * weight.shape[-1]
    data = {
        "dataset": spec.name,
        "bands": list(spec.bands),
        "unit": spec.unit,
        "statistics": spec.statistics[spec.default_statistics].as_dict(),
    }
    config = {"name": name, "img_size": side, "in_chans": int(weight.shape[1]), "head": None}
    if not any(key.startswith("head.") for key in state):
        return {"kind": "pretrain", "model_config": config, "data": data}
    if spec.task == "pair":  # the published code's tiling; its weights compute something else with ours
        config |= {"patch_op": args.get("patch_op") or "avg", "legacy_tiling": True, "img_size": spec.size}
    return {"kind": "finetune", "task": spec.task, "classes": list(spec.classes), "model_config": config, "data": data}


def _assemble(
    record: dict[str, Any], state: Mapping[str, Tensor], source: str, *, metrics: dict[str, Any] | None = None
) -> Pretrained:
    """Build the model that the entries describe and load its weights strictly."""
    try:
        kind, config, data = str(record["kind"]), dict(record["model_config"]), dict(record["data"])
        bands = tuple(str(band) for band in data["bands"])
        unit = str(data["unit"])
        statistics = Statistics.from_dict(data["statistics"], source=f"statistics of {source}")
        temperature = float(record.get("temperature", 1.0))
        config = {"in_chans": len(bands), "head": None, **config}
        check_model_config(config, state, source)
        settings = ModelSettings.from_config(config)
        classes = tuple(str(name) for name in record.get("classes") or ())
        if len(statistics.mean) != len(bands):
            raise UserError(f"{source} names {len(bands)} bands, but statistics of {len(statistics.mean)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source} does not describe its model completely ({type(error).__name__}: {first_line(error)}); give a "
            "file written by this version of main_finetune.py, main_pretrain.py or --export"
        ) from error
    task: Task | None = None
    model: nn.Module
    with taking_apart(source):
        if kind == "pretrain":
            model = build_encoder(replace(settings, in_chans=len(bands)))
            _load_encoder(model, state, source)
        elif kind == "finetune":
            name = str(record.get("task"))
            options = {key: config[key] for key in task_class(name).options if key in config}
            task = build_task(name, classes, options)
            model = task.build_model(settings)
            load_trained(model, {**record, "model": state}, source=source, classes=classes)
        else:
            raise UserError(f"{source} is of kind {kind!r}; expected finetune or pretrain")
        size = record.get("sample_size") or _registered_size(data.get("dataset"), settings.input_size)
        if any(type(side) is not int or not 0 < side <= 1 << 15 for side in size):
            raise ValueError(f"sample_size is {size}")
    return Pretrained(
        model=model,
        kind=kind,
        task=task,
        settings=settings,
        bands=bands,
        unit=unit,
        statistics=statistics,
        classes=classes,
        sample_size=(int(size[0]), int(size[1])),
        record={**record, "model_config": config},
        source=source,
        metrics=metrics or {},
        temperature=temperature,
    )


def _registered_size(dataset: Any, otherwise: int) -> Sequence[int]:
    side = registry.get_spec(dataset).size if dataset in registry.names() else otherwise
    return (side, side)


def _load_encoder(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Weights of a pretraining checkpoint without its decoder; everything else must fit."""
    own = model.state_dict()
    taken = {name: value for name, value in state.items() if name != "mask_token" and not name.startswith("decoder_")}
    wrong = [name for name in own if name not in taken or taken[name].shape != own[name].shape]
    wrong += [name for name in taken if name not in own]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} does not fit the encoder it describes: {', '.join(wrong[:5])}{more}")
    model.load_state_dict(taken)


def describe(model: Pretrained) -> str:
    """One line: what it is, what goes in and what comes out."""
    what = "encoder" if model.task is None else f"{model.task.name} task, {len(model.classes)} classes"
    return (
        f"{model.source}: {model.settings.name}, {what}, bands {', '.join(model.bands)} in {model.unit}, trained on "
        f"{model.record['data'].get('dataset', 'unknown data')} samples of {model.sample_size[0]} x "
        f"{model.sample_size[1]} px, input {model.settings.input_size} px"
    )
