"""One ONNX file of a fine-tuned model: images in dB in, probabilities out; nothing of this project is needed to run it.

Filling of invalid pixels, resizing, standardisation and sigmoid or softmax are inside. Resizing is a product with the
matrices of the bilinear (where it shrinks: antialiased) resize, so that every runtime computes the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sarwmix.inference.model import Pretrained
from sarwmix.transforms import SarTransform, resize
from util.errors import UserError
from util.files import atomic_write
from util.text import first_line

ONNX_FILE = "model.onnx"
TOLERANCE = 1e-5  # largest difference of a probability
OPSET = 18
MOST_BYTES = 1_900_000_000  # a file of one piece ends at 2 GB
WANTED = "pip install onnx onnxscript onnxruntime"


def resize_matrix(length: int, size: int) -> Tensor:
    """(size, length): what the resize of evaluation does along one axis."""
    if length == size:
        return torch.eye(length)
    # an image that is constant along its columns shows what happens along its rows
    columns = torch.eye(length).view(length, 1, length, 1).expand(length, 1, length, length).contiguous()
    return resize(columns, size)[:, 0, :, 0].T.contiguous()


class DecibelToProbabilities(nn.Module):
    """(B, bands, H, W) in dB, NaN or infinite where invalid -> class probabilities (B, K) or (B, K, S, S).

    Args:
        model: in evaluation mode, on the CPU.
        height: of the images.
        width: of the images.

    Raises:
        UserError: a preprocessing that ONNX cannot do.
    """

    rows: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: Pretrained, height: int, width: int) -> None:
        super().__init__()
        transform: SarTransform = model.transform
        how, side, wide = transform.preprocessing, transform.size, transform.evaluation_size
        if how.normalisation == "quantiles":
            raise UserError(f"{model.source} is normalised by quantiles of each image, which --onnx does not write")
        self.network, self.softmax = model.model, model.need_task().exclusive or model.need_task().dense
        start = (wide - side) // 2
        kept = slice(start, start + side)
        self.register_buffer("rows", resize_matrix(height, wide)[kept], persistent=False)
        self.register_buffer("columns", resize_matrix(width, wide)[kept].T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(model.statistics.mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(model.statistics.std, dtype=torch.float32).view(-1, 1, 1))
        self.clip, self.temperature = how.clip, model.temperature

    def prepare(self, image: Tensor) -> Tensor:
        """What `SarTransform` does in evaluation."""
        valid = (image - image) == 0  # neither NaN nor infinite, in operators that every runtime has
        filled = torch.where(valid, image, self.mean)
        if self.clip is not None:
            black, white = self.clip
            return self.rows @ ((filled.clamp(black, white) - black) / (white - black)) @ self.columns
        # a resized pixel is valid when all pixels it was interpolated from are
        whole = self.rows @ valid.to(image.dtype) @ self.columns > 1.0 - 1e-4
        db = torch.where(whole, self.rows @ filled @ self.columns, self.mean)
        return (db - self.mean) / self.std

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        inputs = [self.prepare(first)] if second is None else [self.prepare(first), self.prepare(second)]
        logits = self.network(*inputs).float() / self.temperature
        return torch.softmax(logits, dim=1) if self.softmax else torch.sigmoid(logits)


def write_onnx(path: Path, model: Pretrained) -> dict[str, Any]:
    """Write the ONNX file of a model and compare it with the model on images with invalid pixels.

    Args:
        path: of the file.
        model: fine-tuned.

    Returns:
        What config.json says about it: file, opset, inputs, largest difference of a probability.

    Raises:
        UserError: packages are missing, the model cannot be written, or the file computes something else.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: {WANTED}") from error
    task = model.need_task()
    window = model.transform.preprocessing.geometry == "window"
    height, width = (model.settings.input_size,) * 2 if window else model.sample_size
    size = 4 * sum(value.numel() for value in model.model.parameters())
    if size > MOST_BYTES:
        raise UserError(f"{model.source} holds {size / 1e9:.1f} GB of weights; one ONNX file takes 2 GB at most")
    names = ["first", "second"] if task.name == "pair" else ["images"]
    module = DecibelToProbabilities(model, height, width).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    examples = tuple(example_db(model, 2, height, width, number) for number in range(len(names)))
    try:
        with torch.no_grad():
            program = torch.export.export(module, examples, dynamic_shapes=tuple({0: batch} for _ in examples))
            written = torch.onnx.export(
                program, examples, dynamo=True, opset_version=OPSET, input_names=names, output_names=["probabilities"],
                external_data=False, verbose=False,
            )  # fmt: skip
            assert written is not None
            proto = written.model_proto
    except Exception as error:
        raise UserError(
            f"{model.settings.name} cannot be written as ONNX ({type(error).__name__}: {first_line(error)}); export "
            "without --onnx"
        ) from error
    facts = {"bands": list(model.bands), "unit": model.unit, "classes": list(model.classes), "invalid": "NaN",
             "temperature": model.temperature}  # fmt: skip
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    with atomic_write(path) as stream:
        stream.write(proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, 2, 3):
        images = [example_db(model, count, height, width, 10 * count + number) for number in range(len(names))]
        expected = model.scores(*images).double().numpy()
        given = session.run(None, {name: image.numpy() for name, image in zip(names, images, strict=True)})[0]
        worst = max(worst, float(np.abs(expected - given).max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the ONNX file of {model.source} differs from the model by {worst:.3g} (at most {TOLERANCE:g}); nothing "
            "was written, export without --onnx"
        )
    return {
        "file": path.name,
        "opset": OPSET,
        "inputs": {name: ["batch", len(model.bands), height, width] for name in names},
        "output": "probabilities",
        "largest_difference": worst,
    }


def example_db(model: Pretrained, batch: int, height: int, width: int, seed: int) -> Tensor:
    """Images in dB with invalid pixels, (batch, bands, height, width) float32."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(model.statistics.mean).view(-1, 1, 1)
    std = torch.tensor(model.statistics.std).view(-1, 1, 1)
    images = torch.randn(batch, len(model.bands), height, width, generator=generator) * std + mean
    images[0, :, : height // 4, :5] = torch.nan
    images[-1, 0, -1, -3:] = -torch.inf
    return images.float()
