"""Every encoder by name: `mixmim_*` of this project and any timm model, with a head for images or for pixels.

    model = build_classifier(ModelSettings("vit_small_patch16_224", 224, 2), num_classes=10)
    model = build_segmenter(ModelSettings("mixmim_base", 256, 2, head="upernet"), num_classes=10)

State-dict keys: ``head.*`` for the head; the encoder's keys are flat for `mixmim_*` (as published) and begin with
``encoder.`` for timm models (timm's own names follow).

Shape legend: B batch, C_i channels of map i, D features, K classes, H x W pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models_mixmim import MODELS, MixMIMEncoder, encoder_config
from models_mixmim_ft import MixMIMClassifier
from sarwmix.heads import Classifier, Segmenter, TaskModel, make_head, make_segmentation_head, resize
from sarwmix.models.custom import FactoryClassifier, FactorySegmenter, is_factory
from sarwmix.sizes import MAE_VITS, timm_name
from util.compilation import compile_methods
from util.errors import UserError
from util.log import get_logger

if TYPE_CHECKING:
    from sarwmix.models.settings import ModelSettings

STRIDES = (4, 8, 16, 32)  # of the four maps of `feature_pyramid`


def is_mixmim(name: str) -> bool:
    """Whether a name is one of this project's encoders."""
    return name in MODELS or (name.startswith("mixmim") and ":" not in name)


def build_encoder(settings: ModelSettings) -> MixMIMEncoder | TimmEncoder:
    """An encoder alone, as pretraining leaves it: ``forward_features(images) -> (B, D)``.

    Raises:
        UserError: as of `build_classifier`.
    """
    if not is_mixmim(settings.name):
        return TimmEncoder(settings, for_pixels=False)
    return MixMIMEncoder(img_size=settings.input_size, in_chans=settings.in_chans, **encoder_config(settings.name))


def build_classifier(settings: ModelSettings, num_classes: int) -> Classifier:
    """Model with one output vector per image.

    Args:
        settings: name, input size, bands, drop rates, head ("linear" or "bn_linear").
        num_classes: K.

    Returns:
        A model with ``forward_features(images) -> (B, D)``, ``feature_pyramid``, ``last_blocks`` and `head`.

    Raises:
        UserError: no such backbone or head, or an input size that the backbone cannot take.
    """
    if is_factory(settings.name):
        return FactoryClassifier(settings, num_classes)
    if not is_mixmim(settings.name):
        return TimmClassifier(settings, num_classes)
    _no_pool(settings)
    return MixMIMClassifier(
        num_classes=num_classes,
        drop_path_rate=settings.drop_path_rate,
        img_size=settings.input_size,
        in_chans=settings.in_chans,
        head=settings.head,
        drop_rate=settings.drop_rate,
        **encoder_config(settings.name),
    )


def build_segmenter(settings: ModelSettings, num_classes: int) -> Segmenter:
    """Model with one output vector per pixel; arguments and errors as for `build_classifier`.

    Heads: "upernet" on ``feature_pyramid``, "fused" on ``last_blocks``.
    """
    _no_pool(settings)
    if is_factory(settings.name):
        return FactorySegmenter(settings, num_classes)
    if not is_mixmim(settings.name):
        return TimmSegmenter(settings, num_classes)
    return MixMIMSegmenter(settings, num_classes)


def _no_pool(settings: ModelSettings) -> None:
    if settings.pool is not None:
        raise UserError(f"--pool {settings.pool} chooses how a ViT pools for classification; leave it out here")


class MixMIMSegmenter(Segmenter, MixMIMEncoder):
    """Segmentation on the four stages of a MixMIM encoder; the encoder's keys are those of every other MixMIM model."""

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__(
            img_size=settings.input_size,
            in_chans=settings.in_chans,
            drop_path_rate=settings.drop_path_rate,
            **encoder_config(settings.name),
        )
        self.num_classes = num_classes
        channels = self.pyramid_channels = [self.embed_dim * 2**stage for stage in range(4)]
        self.head = make_segmentation_head(
            channels,
            channels,
            self.num_features,
            num_classes,
            name=settings.head,
            drop_rate=settings.drop_rate,
        )

    def last_blocks(self, images: Tensor) -> list[Tensor]:
        """What heads on the last blocks of an encoder take; of a hierarchical one these are the stages."""
        return self.feature_pyramid(images)


# ---------------------------------------------------------------------------------------------------------- timm


class TimmEncoder(nn.Module):
    """A timm model without its last layer, as `encoder`.

    Attributes:
        encoder: the timm model.
        name: timm's name of it.
        pool: ``token`` or ``avg`` where asked for, else None: the model's usual pooling.
        stages: entries of the encoder's intermediate outputs that make up `feature_pyramid`.
        blocks: ... that make up `last_blocks`.
        normed: whether the model can put its last norm on intermediate outputs (Hiera cannot).
    """

    def __init__(self, settings: ModelSettings, *, for_pixels: bool) -> None:
        super().__init__()
        self.name, self.pool = settings.name, settings.pool
        self.in_chans = settings.in_chans
        self.encoder = create_encoder(replace(settings, name=timm_name(settings.name)))
        _check_input_size(self.encoder, settings)
        self.num_features = int(getattr(self.encoder, "head_hidden_size", self.encoder.num_features))
        self.channels, reductions = _intermediate_outputs(self.encoder)
        self.stages = pyramid_stages(reductions)
        self.blocks = last_four(reductions)
        self.normed = True
        if for_pixels:
            if not self.channels:
                raise UserError(f"{self.name} gives no intermediate features; choose another --model for segmentation")
            # Layers behind the last map would be trained by nothing.
            self.encoder.prune_intermediate_layers(len(self.channels) - 1, prune_norm=False, prune_head=True)
            self._try_maps(settings.input_size)

    @property
    def feature_settings(self) -> str:
        """See `TaskModel.feature_settings`."""
        return f" {self.name} pool={self.pool}"

    @property
    def pool_used(self) -> str | None:
        """How a ViT makes one vector, asked for or by timm's choice; None for models that have no such choice."""
        used = getattr(self.encoder, "global_pool", None)
        return self.pool or (used if isinstance(used, str) and used else None)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) standardised -> pooled features (B, D), as timm's own classifier would see them."""
        return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)

    def feature_pyramid(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H / s, W / s) at strides 4, 8, 16, 32.

        Stages of those strides as they are. Encoders of one resolution (ViT: blocks 3, 5, 7, 11 of 12, counted from 0,
        with the last norm applied) are resampled bilinearly.
        """
        sizes = [[max(1, side // stride) for side in images.shape[-2:]] for stride in STRIDES]
        maps = self._intermediates(images, self.stages)
        return [resize(level, size) for level, size in zip(maps, sizes, strict=True)]

    def last_blocks(self, images: Tensor) -> list[Tensor]:
        """Outputs of the last four blocks of a ViT, or of the four stages of any other encoder, as maps."""
        return self._intermediates(images, self.blocks)

    def _intermediates(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        wanted = sorted(set(indices))
        maps = self.encoder.forward_intermediates(
            images, indices=wanted, norm=self.normed, output_fmt="NCHW", intermediates_only=True
        )
        return [maps[wanted.index(index)] for index in indices]

    @torch.no_grad()
    def _try_maps(self, input_size: int) -> None:
        """Ask for maps once, so that a model that gives none says so before training.

        Raises:
            UserError: names the model and what timm says.
        """
        images = torch.zeros(1, self.in_chans, input_size, input_size)
        self.encoder.eval()
        for self.normed in (True, False):
            try:
                self._intermediates(images, (*self.stages, *self.blocks))
                break
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                if self.normed and "norm" in str(error):
                    continue
                raise UserError(
                    f"{self.name} gives no maps of images of {input_size} px ({error}); choose another --input_size, "
                    "or another --model for segmentation"
                ) from error
        self.encoder.train()

    def recompute_blocks(self) -> None:
        """Keep little for the backward pass, which computes the rest again.

        Raises:
            UserError: timm has no such way for this encoder.
        """
        try:
            self.encoder.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError, TypeError) as error:
            raise UserError(
                f"{self.name} has no activation checkpointing in timm; use a smaller --batch_size with --accum_iter"
            ) from error

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile the encoder's ways to features; its ``forward`` is not one of them."""
        compile_methods(self.encoder, ("forward_features", "forward_intermediates"), backend)

    def no_weight_decay(self) -> set[str]:
        """Names of tables that timm never decays (position table, tokens)."""
        method = getattr(self.encoder, "no_weight_decay", set)
        return {f"encoder.{name}" for name in method()}

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Depth of each parameter for layer-wise learning-rate decay, and the number that stands for "no decay".

        timm's coarse grouping: stem (with tokens and position table) 0, then one number per block of a ViT or per
        stage of any other model; the last norm and the head are not decayed.
        """
        from timm.models._manipulate import group_with_matcher

        matcher = self.encoder.group_matcher(coarse=True)
        grouped = group_with_matcher(self.encoder.named_parameters(), matcher, reverse=True)
        final = ("norm.", "fc_norm.", "head.")  # timm counts the last norm to the last block
        last = 1 + max((depth for name, depth in grouped.items() if not name.startswith(final)), default=0)
        ids = {f"encoder.{name}": last if name.startswith(final) else depth for name, depth in grouped.items()}
        ids |= {name: last for name, _ in self.named_parameters() if name.startswith("head.")}
        return ids, last


class TimmClassifier(Classifier, TimmEncoder):
    """A timm encoder, its own pooling, a head of this project."""

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__(settings, for_pixels=False)
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, name=settings.head, drop_rate=settings.drop_rate)

    encoder_prefix = "encoder."
    feature_settings = TimmEncoder.feature_settings


class TimmSegmenter(Segmenter, TimmEncoder):
    """A timm encoder and a segmentation head."""

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__(settings, for_pixels=True)
        self.num_classes = num_classes
        self.pyramid_channels = [self.channels[index] for index in self.stages]
        self.head = make_segmentation_head(
            self.pyramid_channels,
            [self.channels[index] for index in self.blocks],
            int(self.encoder.num_features),
            num_classes,
            name=settings.head,
            drop_rate=settings.drop_rate,
        )

    encoder_prefix = "encoder."
    feature_settings = TimmEncoder.feature_settings


def create_encoder(settings: ModelSettings, *, pretrained: bool = False) -> Any:
    """A timm model without its last layer, with the right bands and, where its weights depend on it, the input size.

    Args:
        settings: its name may carry timm's tag (``vit_base_patch14_dinov2.lvd142m``).
        pretrained: with timm's own weights, downloaded or from the local cache of the hub.

    Raises:
        UserError: timm knows no such model (close names are given), or it does not take these settings.
    """
    import timm

    check_timm_name(settings.name)
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": settings.in_chans}
    card = timm.get_pretrained_cfg(settings.name)
    if card is not None and card.fixed_input_size:
        options["img_size"] = settings.input_size
    if settings.pool is not None:
        options["global_pool"] = settings.pool
    if settings.drop_path_rate:
        options["drop_path_rate"] = settings.drop_path_rate
    try:
        try:
            return timm.create_model(settings.name, **options)
        except TypeError as error:
            if "drop_path_rate" not in options or "drop_path_rate" not in str(error):
                raise
            get_logger().warning("%s has no stochastic depth; --drop_path has no effect", settings.name)
            del options["drop_path_rate"]
            return timm.create_model(settings.name, **options)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{name} {value}" for name, value in options.items() if name != "pretrained")
        raise UserError(
            f"timm cannot build {settings.name} with {given}: {error}; choose another --input_size, --pool or --model"
        ) from error


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        UserError: with the closest names.
    """
    import timm

    architecture, _, tag = timm_name(name).partition(".")
    if timm.is_model(architecture):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise UserError(f"timm's {architecture} has no weights {tag!r}; there are: {', '.join(tags) or 'none'}")
        return
    close = difflib.get_close_matches(name, [*MODELS, *MAE_VITS, *timm.list_models()], n=5, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists all"
    raise UserError(f"unknown model {name!r}: neither one of {', '.join([*MODELS, *MAE_VITS])} nor a timm model{hint}")


def _check_input_size(encoder: Any, settings: ModelSettings) -> None:
    """Inputs that are no multiple of the patch would be refused in the first step only, by an assertion."""
    embed = getattr(encoder, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    # Only timm's PatchEmbed asserts; overlapping embeddings (PVT) and those that pad take any size.
    if patch is None or not getattr(embed, "strict_img_size", False) or getattr(embed, "dynamic_img_pad", False):
        return
    sides = set(patch) if isinstance(patch, tuple | list) else {patch}
    for side in sides:
        if settings.input_size % side:
            lower = settings.input_size // side * side
            close = [size for size in (lower, lower + side) if size]
            raise UserError(
                f"{settings.name} has patches of {side} px, and --input_size {settings.input_size} is no multiple of "
                f"that; choose {' or '.join(map(str, close))}"
            )


def _intermediate_outputs(encoder: Any) -> tuple[list[int], list[int]]:
    """Channels and strides of all intermediate outputs; empty where the model has none."""
    if not hasattr(encoder, "forward_intermediates") or not hasattr(encoder, "feature_info"):
        return [], []
    entries = list(encoder.feature_info)
    return [int(entry["num_chs"]) for entry in entries], [int(entry["reduction"]) for entry in entries]


def _evenly(count: int, of: Callable[[int], int]) -> tuple[int, ...]:
    """Four outputs of `count`, none before the first."""
    return tuple(max(0, min(count - 1, of(third))) for third in range(4))


def pyramid_stages(reductions: Sequence[int]) -> tuple[int, ...]:
    """Which of a model's intermediate outputs become the four maps of the pyramid.

    The last one at each of the strides 4, 8, 16, 32 where all are there; otherwise blocks at 4/12, 6/12, 8/12 and 12/12
    of the depth: 3, 5, 7, 11 of 12; 7, 11, 15, 23 of 24; 9, 15, 20, 31 of 32 (counted from 0).
    """
    if not reductions:
        return ()
    if set(STRIDES) <= set(reductions):
        return tuple(max(i for i, reduction in enumerate(reductions) if reduction == stride) for stride in STRIDES)
    depth = len(reductions)
    return _evenly(depth, lambda i: depth * (4, 6, 8, 12)[i] // 12 - 1)


def last_four(reductions: Sequence[int]) -> tuple[int, ...]:
    """The last four blocks of an encoder of one resolution; the stages of any other."""
    if set(STRIDES) <= set(reductions):
        return pyramid_stages(reductions)
    return _evenly(len(reductions), lambda i: len(reductions) - 4 + i) if reductions else ()


__all__ = ["TaskModel", "build_classifier", "build_segmenter", "check_timm_name", "create_encoder", "is_mixmim"]
