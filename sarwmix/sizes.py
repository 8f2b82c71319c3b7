"""Sizes of the models by name, and which sizes fit together."""

from __future__ import annotations

from typing import Any

from util.errors import UserError

CELL_STRIDE = 32  # pixels per side of a mask cell = stride of the last stage = 4 * 2**3


def _sizes(width: int, depths: tuple[int, ...], heads: int, decoder: tuple[int, int, int]) -> dict[str, Any]:
    """A row of the size table; heads double with the width from stage to stage, windows are the same for all."""
    decoder_dim, decoder_depth, decoder_heads = decoder
    return {
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(heads * 2**stage for stage in range(len(depths))),
        "window_size": (8, 8, 8, 4),
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_heads,
    }


MODELS: dict[str, dict[str, Any]] = {
    # At most 3 M parameters with its decoder: for tests, the demo and laptops.
    "mixmim_tiny": _sizes(32, (1, 1, 4, 1), 2, (128, 2, 4)),
    "mixmim_base": _sizes(128, (2, 2, 18, 2), 4, (512, 8, 16)),
    "mixmim_large": _sizes(192, (2, 2, 18, 2), 6, (512, 8, 16)),
    "mixmim_huge": _sizes(352, (2, 2, 18, 2), 11, (512, 8, 16)),
}

# Plain masked autoencoders: the encoder by timm's name, patches of 16 px. Decoder of "base" as published.
MAE_VITS: dict[str, dict[str, Any]] = {
    "mae_vit_tiny": {
        "timm": "vit_tiny_patch16_224", "decoder_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4,
    },
    "mae_vit_small": {
        "timm": "vit_small_patch16_224", "decoder_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8,
    },
    "mae_vit_base": {
        "timm": "vit_base_patch16_224", "decoder_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16,
    },
}  # fmt: skip


def timm_name(name: str) -> str:
    """timm's name of an encoder; those of this project's plain autoencoders are timm's under another name."""
    return str(MAE_VITS[name]["timm"]) if name in MAE_VITS else name


_ENCODER_KEYS = ("embed_dim", "depths", "num_heads", "window_size")


def model_config(name: str) -> dict[str, Any]:
    """The size table's row for ``name`` (a copy).

    Raises:
        UserError: unknown name; the message lists what exists.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; available: {', '.join(MODELS)}")
    return dict(MODELS[name])


def encoder_config(name: str) -> dict[str, Any]:
    """Only the encoder's arguments of the size table's row, for classifiers."""
    row = model_config(name)
    return {key: row[key] for key in _ENCODER_KEYS}


def tile_of(
    img_size: int,
    patch_size: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    window_size: tuple[int, ...],
    embed_dim: int,
) -> int:
    """Side of a tile, the smallest square of first-stage tokens that holds whole windows and cells at each stage.

    Raises:
        UserError: sizes that do not fit, with the reason.
    """
    if patch_size * 2 ** (len(depths) - 1) != CELL_STRIDE:
        raise UserError(
            f"patch_size {patch_size} with {len(depths)} stages has stride {patch_size * 2 ** (len(depths) - 1)}; "
            f"the mask cells of the method are {CELL_STRIDE} px: use patch_size 4 and 4 stages"
        )
    if not len(depths) == len(num_heads) == len(window_size):
        raise UserError(
            f"depths {depths}, num_heads {num_heads} and window_size {window_size} must have one entry per stage"
        )
    for stage, (window, heads) in enumerate(zip(window_size, num_heads, strict=True)):
        if window < 1 or window & (window - 1):
            raise UserError(f"window_size[{stage}] is {window}; windows must be powers of two (1, 2, 4, 8, 16, ...)")
        if (embed_dim * 2**stage) % heads:
            raise UserError(f"width {embed_dim * 2**stage} of stage {stage} is not divisible by its {heads} heads")
    tile = max([window * 2**stage for stage, window in enumerate(window_size)] + [CELL_STRIDE // patch_size])
    if img_size <= 0 or img_size % (tile * patch_size):
        raise UserError(
            f"input size {img_size} px does not fit: windows {tuple(window_size)} need a multiple of "
            f"{tile * patch_size} px ({tile} tokens of {patch_size} px hold whole windows at every stage); "
            f"choose --input_size {tile * patch_size} or a multiple of it"
        )
    return tile
