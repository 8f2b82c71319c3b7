"""Names of other publishers' weights -> timm's: DINOv2, DINOv3, torchvision's Swin."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from util.errors import UserError

if TYPE_CHECKING:
    from sarwmix.heads import TaskModel


def rename_dinov2(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's published names -> timm's: registers; the class token's position, which timm adds to the token."""
    renamed = dict(state)
    if "register_tokens" in renamed and "reg_token" in own:
        renamed["reg_token"] = renamed.pop("register_tokens")
        table = renamed.get("pos_embed")
        if table is not None and "cls_token" in renamed and is_square(table.shape[1] - 1):
            renamed["cls_token"] = renamed["cls_token"] + table[:, :1]
            renamed["pos_embed"] = table[:, 1:]
    return {
        name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): value for name, value in renamed.items()
    }


def is_square(count: int) -> bool:
    """Whether so many tokens fill a square grid."""
    return round(count**0.5) ** 2 == count


def rename_torchvision_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's Swin -> timm's: stages are features 1, 3, 5, 7, and the even ones between them join patches."""
    if "features.1.0.norm1.weight" not in state:
        return state
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "features" and parts[1] == "0":
            name = ".".join(("patch_embed", {"0": "proj", "2": "norm"}.get(parts[2], parts[2]), *parts[3:]))
        elif parts[0] == "features" and int(parts[1]) % 2:
            rest = ".".join(parts[3:]).replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            name = f"layers.{int(parts[1]) // 2}.blocks.{parts[2]}.{rest}"
        elif parts[0] == "features":
            name = ".".join((f"layers.{int(parts[1]) // 2}.downsample", *parts[2:]))
        if not name.endswith("relative_position_index"):  # follows from the window's size
            renamed[name] = value
    return renamed


def rename_by_timm(model: TaskModel, state: dict[str, Tensor], dropped: list[str]) -> dict[str, Tensor]:
    """Other publishers' names -> timm's, by timm's own filter of the model's file (DINOv3 and others).

    Raises:
        UserError: a DINOv3 file with biases that the model does not have.
    """
    encoder: Any = model.encoder
    rename = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return state
    if "storage_tokens" in state and not any(name.endswith("q_bias") for name in encoder.state_dict()):
        biased = [name for name, value in state.items() if name.endswith("qkv.bias") and bool(value.any())]
        if biased:
            raise UserError(
                f"the file has biases in its attention ({biased[0]} ...), {getattr(model, 'name', 'the model')} has "
                "none; choose the --model of the same name that ends with _qkvb"
            )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it leaves out
            renamed = dict(rename(dict(state), encoder))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return state  # not a file that it is made for; what does not fit is named by the strict loading
    kept = {id(value) for value in renamed.values()}
    named = ("mask_token", "bias_mask", "periods", "qkv.bias")
    dropped += [name for name, value in state.items() if id(value) not in kept and name.endswith(named)]
    return renamed
