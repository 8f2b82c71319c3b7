"""Export of a trained model: a folder that works without the repository's checkpoints and can be pushed to a hub.

    model.safetensors   weights
    config.json         architecture, bands in order, unit, statistics, preprocessing, classes, metrics
    README.md           model card
    model.pt2           torch.export program: standardised images -> logits, any batch size

`sarwmix.inference.model.from_pretrained` opens it. The folder appears whole or not at all, and before that it is opened
and compared with the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sarwmix.inference.model import (
    CARD_FILE,
    CONFIG_FILE,
    EXPORT_FORMAT,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    Pretrained,
    from_checkpoint,
    from_pretrained,
    metrics_beside,
)
from util.errors import UserError
from util.files import atomic_write, new_folder, sha256_file, write_json
from util.log import get_logger
from util.passport import passport_lines, public_passport
from util.text import first_line

TOLERANCE = 1e-5  # largest difference of the program's logits, relative to the largest logit
PROGRAM_BATCHES = (2, 3)  # the program is traced with the first size and must work with the second one


def export_model(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    trained_on: str | None = None,
    program: bool = True,
    onnx: bool = False,
) -> Path:
    """Write the export of a checkpoint.

    Args:
        checkpoint: of main_finetune.py or main_pretrain.py, or a released one.
        folder: must not exist, or be empty.
        metrics: results to keep in config.json and on the card; None: those beside the checkpoint, where there are any.
        trained_on: see `from_checkpoint`.
        program: write the torch.export program, too.
        onnx: write an ONNX file from dB to probabilities, too.

    Returns:
        The folder.

    Raises:
        UserError: not a checkpoint, the folder exists, or the written model does not give the same outputs.
    """
    found = from_checkpoint(checkpoint, trained_on=trained_on)
    found.metrics = dict(metrics if metrics is not None else metrics_beside(Path(checkpoint)))
    with new_folder(folder) as work:
        _write_weights(work / WEIGHTS_FILE, found)
        config = config_of(found) | {"weights_sha256": sha256_file(work / WEIGHTS_FILE)}
        if program:
            config["program"] = write_program(work / PROGRAM_FILE, found)
        if onnx:
            from sarwmix.inference.onnx import ONNX_FILE, write_onnx

            config["onnx"] = write_onnx(work / ONNX_FILE, found)
        write_json(work / CONFIG_FILE, config)
        with atomic_write(work / CARD_FILE, "w") as stream:
            stream.write(model_card(found, program=program, onnx=config.get("onnx")))
        _compare(found, from_pretrained(work))
    get_logger().info("%s exported to %s", checkpoint, folder)
    return Path(folder)


def passport_of(model: Pretrained) -> dict[str, str]:
    """What the safetensors file says about itself: bands, unit and statistics go with the weights."""
    return {"format": "pt", "program": EXPORT_FORMAT, "data": json.dumps(model.record["data"])}


def config_of(model: Pretrained) -> dict[str, Any]:
    """What config.json holds."""
    side = model.settings.input_size
    return {
        "format": EXPORT_FORMAT,
        **model.record,
        **({"passport": public_passport(model.record["passport"])} if model.record.get("passport") else {}),
        "sample_size": list(model.sample_size),
        "preprocessing": {
            "unit": model.unit,
            "bands": list(model.bands),
            "invalid_pixels": "NaN or infinite: band mean",
            "resize": f"bilinear to {side} x {side} px, antialiased when it shrinks",
            **model.transform.preprocessing.as_dict(),
            "mean": list(model.statistics.mean),
            "std": list(model.statistics.std),
        },
        "metrics": model.metrics,
    }


def _write_weights(path: Path, model: Pretrained) -> None:
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.model.state_dict().items()}
    with atomic_write(path) as stream:
        stream.write(save(state, metadata=passport_of(model)))


def example_inputs(model: Pretrained, batch: int) -> tuple[Tensor, ...]:
    """Standardised images for a trial run, with a few invalid pixels."""
    generator = torch.Generator().manual_seed(batch)
    side = model.settings.input_size
    mean = torch.tensor(model.statistics.mean).view(-1, 1, 1)
    std = torch.tensor(model.statistics.std).view(-1, 1, 1)
    count = 2 if model.task is not None and model.task.name == "pair" else 1
    images = []
    for _ in range(count):
        image = torch.randn(batch, len(model.bands), side, side, generator=generator) * std + mean
        image[0, :, :3, :5] = torch.nan
        images.append(image)
    return model.inputs(*images)


@torch.no_grad()
def _run(model: Pretrained, inputs: tuple[Tensor, ...]) -> Tensor:
    return model.model(*inputs).float()


def _compare(before: Pretrained, after: Pretrained) -> None:
    inputs = example_inputs(before, 2)
    same = all(torch.equal(a, b) for a, b in zip(inputs, example_inputs(after, 2), strict=True))
    if not same or not torch.equal(_run(before, inputs), _run(after, inputs)) or before.classes != after.classes:
        raise UserError(
            f"the export of {before.source} does not give the outputs of the checkpoint; nothing was written. This is "
            "a fault of the program: please report it with the checkpoint's settings"
        )


class _OneInput(nn.Module):
    """Gives the program named inputs, whatever signature the model has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class _TwoInputs(_OneInput):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(first, second)


def write_program(path: Path, model: Pretrained) -> dict[str, Any]:
    """Trace the model with torch.export, save it, load it again and compare the numbers.

    Returns:
        What config.json says about it: torch version, inputs, largest difference.

    Raises:
        UserError: the model cannot be traced, or the program computes something else.
    """
    inputs = example_inputs(model, PROGRAM_BATCHES[0])
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        with torch.no_grad():
            module = (_OneInput if len(inputs) == 1 else _TwoInputs)(model.model)
            program = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        with atomic_write(path) as stream:
            torch.export.save(program, stream)
        loaded = torch.export.load(path).module()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"torch.export cannot trace {model.settings.name} ({type(error).__name__}: {first_line(error)}); export "
            "without the program: scripts/export.py --no_program"
        ) from error
    worst = 0.0
    for size in PROGRAM_BATCHES:
        inputs = example_inputs(model, size)
        with torch.no_grad():
            expected, given = _run(model, inputs), loaded(*inputs).float()
        difference = float((expected - given).abs().max())
        if expected.shape != given.shape or not difference <= TOLERANCE * max(float(expected.abs().max()), 1.0):
            raise UserError(
                f"the torch.export program of {model.source} differs from the model by {difference:.3g}; nothing was "
                "written. Export without it: scripts/export.py --no_program"
            )
        worst = max(worst, difference)
    side = model.settings.input_size
    return {
        "file": PROGRAM_FILE,
        "torch": torch.__version__,
        "inputs": [["batch", len(model.bands), side, side]] * len(inputs),
        "largest_difference": worst,
    }


def model_card(model: Pretrained, *, program: bool = True, onnx: Mapping[str, Any] | None = None) -> str:
    """README.md of the export."""
    data, task = model.record["data"], model.task
    rows = zip(model.bands, model.statistics.mean, model.statistics.std, strict=True)
    what = {
        "multilabel": "Multi-label scene classification: the probability of each class in a patch.",
        "multiclass": "Scene classification: one class for each patch.",
        "pair": "Flood or no flood from two images of one place.",
        "segmentation": "A class for each pixel.",
    }.get(task.name if task is not None else "", "Encoder pretrained without labels: features of a patch.")
    call = "model.scores(first, second)" if task is not None and task.name == "pair" else "model.scores(images)"
    call = call if task is not None else "model.features(images)"
    height, width = model.sample_size
    if task is None:
        scenes = (
            "Tiles of a scene: `python scripts/extract_features.py --model FOLDER --scene SCENE --out OUT.parquet`."
        )
    else:
        dates = "--scene FIRST --second SECOND" if task.name == "pair" else "--scene SCENE"
        scenes = f"Whole scenes: `python scripts/predict.py --model FOLDER {dates} --out OUT`."
    lines = [
        "---",
        "library_name: sar-w-mixmae",
        "tags: [sentinel-1, sar, remote-sensing, mixmae]",
        "---",
        "",
        f"# {model.settings.name} trained on {data.get('dataset', 'unknown data')}",
        "",
        what,
        "",
        "## Input",
        "",
        f"Patches of {height} x {width} px as in training ({data.get('dataset')}), in {model.unit}, NaN where there is "
        "no data. Bands in this order:",
        "",
        "| band | mean | std |",
        "|---|---|---|",
        *[f"| {band} | {mean:g} | {std:g} |" for band, mean, std in rows],
        "",
        f"Invalid pixels become the band mean, patches are brought to {model.settings.input_size} x "
        f"{model.settings.input_size} px and normalised ({model.transform.preprocessing.normalisation}). "
        "`from_pretrained` does all of it.",
        "",
        "## Use",
        "",
        "```python",
        "from sarwmix.inference.model import from_pretrained",
        "",
        'model = from_pretrained("this folder, or owner/name on the hub")',
        f"result = {call}  # (B, {len(model.bands)}, H, W) tensors in {model.unit}",
        "```",
        "",
        scenes,
    ]
    lines += [
        "",
        "## Licence",
        "",
        f"The program is MIT. These weights come from {data.get('dataset', 'unknown data')} (and from the weights they "
        "started from, if any): their licences hold too, see docs/sources.md; who publishes this card states the rest.",
    ]
    if program:
        lines += ["", f"`{PROGRAM_FILE}` is the same network as a torch.export program; it takes standardised images."]
    if onnx is not None:
        shapes = "; ".join(f"`{name}` {shape}" for name, shape in onnx["inputs"].items())
        lines += ["", f"`{onnx['file']}` (ONNX) takes float32 {model.unit}, NaN where there is no data: {shapes}; it "
                  "gives `probabilities` in the order of the classes."]  # fmt: skip
    if model.classes:
        lines += ["", "## Classes", "", *[f"{number}. {name}" for number, name in enumerate(model.classes)]]
    lines += ["", "## Results", "", *_metric_lines(model)]
    if model.record.get("passport"):
        lines += ["", "## Made by", "", *passport_lines(model.record["passport"])]
    lines += [
        "",
        "## Limits",
        "",
        "Trained on the data set named above; other regions, seasons, sensors and processing chains were not tested "
        f"unless the results say so. {_calibration_line(model)}",
        "",
        "```json",
        json.dumps({key: model.record.get(key) for key in ("kind", "task", "protocol", "epoch")}),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _calibration_line(model: Pretrained) -> str:
    found = model.metrics.get("calibration")
    if model.temperature == 1 or not isinstance(found, Mapping):
        return "Probabilities are not calibrated."
    error = found.get("expected_calibration_error", {}).get("test")
    said = f"; expected calibration error on test {error['after']:.3f}, {error['before']:.3f} before" if error else ""
    return (
        f"Probabilities are calibrated by a temperature of {model.temperature:.3f}, fitted on "
        f"{found.get('fitted_on', 'validation')}{said}."
    )


def _metric_lines(model: Pretrained) -> list[str]:
    tables = {split: entry["scalars"] for split, entry in model.metrics.items() if _is_report(entry)}
    if not tables:
        return ["No results were stored with the checkpoint."]
    names = list(dict.fromkeys(name for scalars in tables.values() for name in scalars))
    lines = [f"| metric | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for name in names:
        values = [scalars.get(name) for scalars in tables.values()]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _is_report(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("scalars"), Mapping)


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Upload an exported folder; makes the repository (private) when it does not exist.

    Args:
        folder: written by `export_model`.
        repository: "owner/name".

    Returns:
        Address of the repository.

    Raises:
        UserError: huggingface_hub is missing, nobody is logged in, or the hub refuses or cannot be reached.
    """
    check_hub(repository)
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload of an export")
    except Exception as error:  # the client fails in every way a network does
        raise UserError(
            f"{folder} was written, but pushing it to {repository} failed ({first_line(error)}); log in with `hf auth "
            "login` and check the name and the connection, then push the folder again"
        ) from error
    return str(address)


def check_hub(repository: str) -> None:
    """Refuse early what cannot work: before hours of training rather than after.

    Raises:
        UserError: the name is not owner/name, or huggingface_hub is not installed.
    """
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts):
        raise UserError(f"--push_to_hub {repository} is no name on the hub; expected owner/name")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError("--push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
