"""Heads, and what every model with a head on an encoder offers to tasks, loops and loading.

Shape legend: B batch, D features of the encoder, K classes, H x W pixels of the input. Maps are (B, C_i, H_i, W_i).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from util.errors import UserError

HEAD_STD = 2e-5  # the head starts almost silent, so that the first steps do not shake the pretrained encoder
CLASSIFICATION_HEADS = ("linear", "bn_linear")
SEGMENTATION_HEADS = ("upernet", "fused", "bn_linear")
DECODER_WIDTH = 256
POOL_SIDES = (1, 2, 3, 6)  # of the pyramid pooling module, arXiv 1612.01105


class TaskModel(nn.Module):
    """An encoder with a `head`. Subclasses inherit from this first and from their encoder second.

    Attributes:
        head: everything that comes after the encoder; its state-dict keys begin with ``head.``.
        in_chans: bands.
        num_features: D.
        num_classes: K.
        encoder_prefix: with which the encoder's state-dict keys begin.
        frozen: whether the encoder is only read: no gradients, evaluation mode also while the head is trained.
    """

    head: nn.Module
    in_chans: int
    num_features: int
    num_classes: int
    encoder_prefix = ""
    frozen = False

    @property
    def feature_settings(self) -> str:
        """What the encoder's output depends on beyond its weights; names cached features."""
        return ""

    def freeze_encoder(self) -> None:
        """Train the head alone from now on."""
        self.frozen = True
        for name, parameter in self.named_parameters():
            if not name.startswith("head."):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TaskModel:
        """Training or evaluation mode; a frozen encoder stays in evaluation mode (statistics, drop path)."""
        super().train(mode)
        if self.frozen:
            for name, child in self.named_children():
                if name != "head":
                    child.eval()
        return self

    def encoder_gradients(self) -> torch.set_grad_enabled:
        """Context in which the encoder runs."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)

    def trainable(self) -> int:
        """Number of trained values."""
        return count_trainable(self)


class Classifier(TaskModel):
    """One vector per sample: subclasses give ``forward_features(*inputs) -> (B, D)``, the head does the rest."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Standardised inputs -> logits (B, K)."""
        with self.encoder_gradients():
            features = self.forward_features(*inputs)  # type: ignore[operator]
        return self.apply_head(features)

    def apply_head(self, features: Tensor) -> Tensor:
        """(B, D) -> logits (B, K), in float32 also under autocast: logits of 8 bits would tie in a ranking."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


class Segmenter(TaskModel):
    """One class per pixel: subclasses give ``feature_pyramid`` and ``last_blocks``, the head takes one of them.

    Attributes:
        pyramid_channels: of the four maps of ``feature_pyramid``.
    """

    pyramid_channels: Sequence[int]

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) standardised -> logits (B, K, H, W), float32."""
        with self.encoder_gradients():
            maps = self.last_blocks(images) if isinstance(self.head, FusedHead) else self.feature_pyramid(images)  # type: ignore[operator]
        return F.interpolate(self.head(maps).float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


class LinearHead(nn.Linear):
    """Dropout and a linear layer (B, D) -> (B, K): truncated-normal weights of std 2e-5, zero bias."""

    def __init__(self, features: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__(features, num_classes)
        self.drop_rate = drop_rate
        nn.init.trunc_normal_(self.weight, std=HEAD_STD)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.dropout(features, self.drop_rate, self.training))


class LinearProbe(nn.Module):
    """Linear probe of MAE (arXiv 2111.06377, appendix A.1): BatchNorm without affine parameters, then a linear layer.

    The normalisation makes one learning rate fit encoders whose features differ in scale.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6)
        self.linear = nn.Linear(features, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.linear(self.norm(features))


def make_head(features: int, num_classes: int, *, name: str | None = None, drop_rate: float = 0.0) -> nn.Module:
    """Head of a classifier.

    Args:
        features: D.
        num_classes: K.
        name: ``linear`` (also for None) or ``bn_linear``.
        drop_rate: dropout before the linear layer.

    Raises:
        UserError: no such head for classes of whole images.
    """
    if name in (None, "linear"):
        return LinearHead(features, num_classes, drop_rate)
    if name != "bn_linear":
        raise UserError(f"--head {name} does not classify images; choose one of {', '.join(CLASSIFICATION_HEADS)}")
    if drop_rate:
        raise UserError(f"--drop_rate {drop_rate:g} has no place in --head bn_linear, which is a probe; leave it out")
    return LinearProbe(features, num_classes)


def use_probe(model: TaskModel) -> None:
    """Replace a model's head by a fresh linear probe: on its features, or of pixels on its pyramid."""
    device = next(model.parameters()).device
    if isinstance(model, Segmenter):
        model.head = PixelProbe(model.pyramid_channels, model.num_classes).to(device)
    else:
        model.head = LinearProbe(model.num_features, model.num_classes).to(device)


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; the size stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned; nothing to do where the size fits."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class UPerNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling on the last map, a feature pyramid, all levels joined, 3x3 layer.

    Args:
        channels: C_i of the four maps, finest first.
        num_classes: K.
        drop_rate: dropout of whole channels before the classifier.
        width: channels of the feature pyramid.
    """

    last_layer = "classifier"

    def __init__(
        self, channels: Sequence[int], num_classes: int, *, drop_rate: float = 0.0, width: int = DECODER_WIDTH
    ) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(ConvNormAct(channels[-1], width, 1) for _ in POOL_SIDES)
        self.bottleneck = ConvNormAct(channels[-1] + len(POOL_SIDES) * width, width, 3)
        self.lateral = nn.ModuleList(ConvNormAct(count, width, 1) for count in channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for _ in channels[:-1])
        self.join = ConvNormAct(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, finest first -> logits (B, K, H_0, W_0).

        Raises:
            UserError: one image in a training batch: the 1x1 pooling leaves BatchNorm a single value per channel.
        """
        last = maps[-1]
        if self.training and len(last) == 1:
            raise UserError(
                "--head upernet cannot train on one image at a time (BatchNorm); use --batch_size 2 or more"
            )
        pooled = [
            resize(layer(F.adaptive_avg_pool2d(last, side)), last.shape[-2:])
            for layer, side in zip(self.pooled, POOL_SIDES, strict=True)
        ]
        levels = [self.bottleneck(torch.cat([last, *pooled], dim=1))]
        for layer, finer in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            levels.append(layer(finer) + resize(levels[-1], finer.shape[-2:]))
        top, *others = levels
        smoothed = [layer(level) for layer, level in zip(reversed(self.smooth), others, strict=True)]
        size = maps[0].shape[-2:]
        joined = self.join(torch.cat([resize(level, size) for level in reversed([top, *smoothed])], dim=1))
        return self.classifier(self.dropout(joined))


class PixelProbe(nn.Module):
    """Linear probe of label maps: each pixel's class from the values that the four maps have there, standardised.

    BatchNorm without affine parameters and a 1x1 layer on each map, summed: the same as one linear layer on all maps
    brought to the size of the finest, because a linear layer and bilinear interpolation change places.

    Args:
        channels: C_i of the four maps, finest first.
        num_classes: K.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.BatchNorm2d(count, affine=False, eps=1e-6) for count in channels)
        self.linear = nn.ModuleList(nn.Conv2d(count, num_classes, 1, bias=i == 0) for i, count in enumerate(channels))
        for layer in self.linear:
            nn.init.trunc_normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.linear[0].bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, finest first -> logits (B, K, H_0, W_0)."""
        size = maps[0].shape[-2:]
        parts = [
            resize(layer(norm(level.float())), size)
            for layer, norm, level in zip(self.linear, self.norm, maps, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)


class UnitConv1x1(nn.Module):
    """Weight-normed 1x1 convolution whose gain is fixed at 1 and which has no bias: only directions are learned."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return F.conv2d(maps, F.normalize(self.weight, dim=1)[:, :, None, None])


class FusedHead(nn.Module):
    """Last four blocks (or stages) joined, Linear to D, 1x1 convolution to 256, BatchNorm, GELU, weight-normed layer.

    Maps of different sizes (stages) are brought to the size of the second one, stride 8.

    Args:
        channels: C_i of the four maps.
        features: D.
        num_classes: K.
        drop_rate: dropout of whole channels before the classifier.
        width: channels before the classifier.
    """

    last_layer = "classifier"

    def __init__(
        self,
        channels: Sequence[int],
        features: int,
        num_classes: int,
        *,
        drop_rate: float = 0.0,
        width: int = DECODER_WIDTH,
    ) -> None:
        super().__init__()
        self.join = nn.Linear(sum(channels), features)
        self.reduce = nn.Conv2d(features, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = UnitConv1x1(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps -> logits (B, K, H_1, W_1)."""
        size = maps[1].shape[-2:]
        joined = torch.cat([resize(level, size) for level in maps], dim=1)
        fused = self.join(joined.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(F.gelu(self.norm(self.reduce(fused)))))


def make_segmentation_head(
    pyramid_channels: Sequence[int],
    block_channels: Sequence[int],
    features: int,
    num_classes: int,
    *,
    name: str | None = None,
    drop_rate: float = 0.0,
) -> nn.Module:
    """Head of a segmenter.

    Args:
        pyramid_channels: channels of `feature_pyramid`.
        block_channels: channels of `last_blocks`.
        features: D.
        num_classes: K.
        name: ``upernet`` (also for None), ``fused`` or ``bn_linear``.
        drop_rate: dropout before the classifier.

    Raises:
        UserError: no such head for pixels.
    """
    if name in (None, "upernet"):
        return UPerNetHead(pyramid_channels, num_classes, drop_rate=drop_rate)
    if name == "fused":
        return FusedHead(block_channels, features, num_classes, drop_rate=drop_rate)
    if name == "bn_linear":
        return PixelProbe(pyramid_channels, num_classes)
    raise UserError(f"--head {name} does not label pixels; choose one of {', '.join(SEGMENTATION_HEADS)}")


def count_trainable(module: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
