"""Any encoder: ``--model package.module:factory``, and adapters for those of TorchGeo that want more than an image.

    def factory(*, in_chans: int, input_size: int) -> nn.Module

The module gives one vector an image: by ``forward_features`` and ``forward_head(..., pre_logits=True)`` where it has
both (as timm's models, TorchGeo's ResNets and ViTs), else by ``forward``: (B, in_chans, H, W) standardised -> (B, D).
For pixels it also gives ``feature_maps``: four maps (B, C_i, H_i, W_i), finest first. docs/new_backbone.md.

A factory is code. It is called when the command line names it; when only a file does (``--eval``, prediction), it has
to be trusted by the environment: ``SARWMIX_FACTORIES=package.module:factory``, several joined with commas.

Shapes: B images, C bands, D features, K classes, H x W pixels.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sarwmix.heads import Classifier, Segmenter, make_head, make_segmentation_head, resize
from util.compilation import compile_methods
from util.errors import UserError
from util.log import get_logger
from util.text import first_line

if TYPE_CHECKING:
    from sarwmix.models.settings import ModelSettings

VARIABLE = "SARWMIX_FACTORIES"
_STRIDES = (4, 8, 16, 32)
_trusted: set[str] = set()


def is_factory(name: str) -> bool:
    """Whether a model's name is ``package.module:factory``."""
    return ":" in name


def trust(name: str) -> None:
    """Let a factory that somebody named on a command line be called."""
    _trusted.add(name)


def call_factory(settings: ModelSettings) -> nn.Module:
    """The module that a factory makes.

    Raises:
        UserError: only a file names it; it cannot be imported; it fails; or what it makes is no module.
    """
    name = settings.name
    if name not in _trusted and name not in os.environ.get(VARIABLE, "").split(","):
        raise UserError(
            f"model {name} is code that a file names; if you trust it, give --model {name} or set {VARIABLE}={name}"
        )
    module_name, _, function_name = name.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--model {name}: {first_line(error)}; expected package.module:factory that can be imported from here "
            "(PYTHONPATH), see docs/new_backbone.md"
        ) from error
    options: dict[str, Any] = {"in_chans": settings.in_chans, "input_size": settings.input_size}
    try:
        parameters = inspect.signature(factory).parameters
        if "input_size" not in parameters:  # timm's and TorchGeo's own, whose other arguments are optional
            del options["input_size"]
        if settings.drop_path_rate and "drop_path_rate" in parameters:
            options["drop_path_rate"] = settings.drop_path_rate
        made = factory(**options)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UserError(f"--model {name}({options}) fails: {first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"--model {name} makes a {type(made).__name__}, expected a torch.nn.Module")
    return made


class FactoryEncoder(nn.Module):
    """Whatever a factory makes, as `encoder`."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        if settings.pool is not None:
            raise UserError(f"--pool {settings.pool} is for timm's ViTs; {settings.name} pools as it was made")
        self.name, self.in_chans = settings.name, settings.in_chans
        self.encoder: Any = call_factory(settings)

    @property
    def feature_settings(self) -> str:
        """See `TaskModel.feature_settings`."""
        return f" {self.name}"

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) standardised -> (B, D)."""
        if hasattr(self.encoder, "forward_features") and hasattr(self.encoder, "forward_head"):
            return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)
        return self.encoder(images)

    @torch.no_grad()
    def _try(self, call: Callable[[Tensor], Any], settings: ModelSettings) -> Any:
        self.encoder.eval()
        try:
            return call(torch.zeros(2, settings.in_chans, settings.input_size, settings.input_size))
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, IndexError) as error:
            raise UserError(
                f"--model {self.name} fails on images (2, {settings.in_chans}, {settings.input_size}, "
                f"{settings.input_size}): {first_line(error)}; another --input_size, or mend the factory"
            ) from error
        finally:
            self.encoder.train()

    def recompute_blocks(self) -> None:
        """
        Raises:
            UserError: nobody knows its blocks.
        """
        raise UserError(f"{self.name} has no activation checkpointing; use a smaller --batch_size with --accum_iter")

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile the module's ways to features."""
        compile_methods(self.encoder, ("forward", "forward_features", "feature_maps"), backend)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """One depth for all: nobody knows the order of its layers, so that --layer_decay has no effect."""
        get_logger().info("%s: the depth of its layers is not known, --layer_decay has no effect", self.name)
        return {name: 0 for name, _ in self.named_parameters()}, 0


class FactoryClassifier(Classifier, FactoryEncoder):
    """A factory's module and a head of this project."""

    encoder_prefix = "encoder."
    feature_settings = FactoryEncoder.feature_settings

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__(settings)
        features = self._try(self.forward_features, settings)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"--model {settings.name} gives {found} for two images; expected one vector each, a tensor (2, D): "
                "pool in its forward"
            )
        self.num_features, self.num_classes = int(features.shape[1]), num_classes
        self.head = make_head(self.num_features, num_classes, name=settings.head, drop_rate=settings.drop_rate)


class FactorySegmenter(Segmenter, FactoryEncoder):
    """A factory's module with ``feature_maps`` and a segmentation head."""

    encoder_prefix = "encoder."
    feature_settings = FactoryEncoder.feature_settings

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__(settings)
        if not hasattr(self.encoder, "feature_maps"):
            raise UserError(f"--model {settings.name} has no feature_maps, which label maps need: docs/new_backbone.md")
        maps = self._try(self.encoder.feature_maps, settings)
        if len(maps) != len(_STRIDES) or any(not isinstance(one, Tensor) or one.ndim != 4 for one in maps):
            raise UserError(
                f"--model {settings.name}: feature_maps has to give four tensors (B, C, H, W), finest first"
            )
        channels = self.pyramid_channels = [int(one.shape[1]) for one in maps]
        self.num_features, self.num_classes = channels[-1], num_classes
        self.head = make_segmentation_head(
            channels, channels, self.num_features, num_classes, name=settings.head, drop_rate=settings.drop_rate
        )

    def feature_pyramid(self, images: Tensor) -> list[Tensor]:
        """The module's maps at strides 4, 8, 16, 32."""
        sizes = [[max(1, side // stride) for side in images.shape[-2:]] for stride in _STRIDES]
        return [resize(one, size) for one, size in zip(self.encoder.feature_maps(images), sizes, strict=True)]

    def last_blocks(self, images: Tensor) -> list[Tensor]:
        """The same maps."""
        return self.feature_pyramid(images)


# TorchGeo ----------------------------------------------------------------------------------------------------------


def _torchgeo() -> Any:
    try:
        return importlib.import_module("torchgeo.models")
    except ImportError as error:
        raise ValueError(f"torchgeo is not installed ({error}): pip install torchgeo") from error


class _Croma(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(x_sar=images)["sar_GAP"]


class _Dofa(nn.Module):
    WAVELENGTH = 3.75  # what stands for C band in DOFA's training, one value a band

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images, wavelengths=[self.WAVELENGTH] * images.shape[1])


def croma_base(*, in_chans: int, input_size: int) -> nn.Module:
    """TorchGeo's CROMA on radar; it takes two bands (VV, VH)."""
    if in_chans != 2:
        raise ValueError(f"CROMA's radar encoder takes 2 bands, not {in_chans}")
    return _Croma(_torchgeo().croma_base(modalities=["sar"], image_size=input_size))


def dofa_base(*, in_chans: int, input_size: int) -> nn.Module:
    """TorchGeo's DOFA; any number of radar bands."""
    return _Dofa(_torchgeo().dofa_base_patch16_224(img_size=input_size))
