"""Classifier on the shared encoder: mean over the final tokens, one linear layer; loading pretrained weights into it.

Shape legend: B batch, K classes, D = 8 * embed_dim features, L final tokens (16 at 128 x 128 px).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models_mixmim import MODELS, MixMIMEncoder
from sarwmix.heads import Classifier, LinearProbe, make_head, use_probe
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.log import get_logger
from util.optim import stage_depths
from util.pos_embed import resize_position_table, resize_relative_bias


class MixMIMClassifier(Classifier, MixMIMEncoder):
    """Encoder without mask, mean pooling, head.

    Args:
        num_classes: K, width of the head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        img_size, patch_size, in_chans, embed_dim, depths, num_heads, window_size: see `MixMIMEncoder`.
        head: name of the head, see `sarwmix.heads.make_head`; None: one linear layer.
        drop_rate: dropout before the last layer.
    """

    def __init__(
        self,
        num_classes: int = 19,
        drop_path_rate: float = 0.0,
        img_size: int = 128,
        patch_size: int = 4,
        in_chans: int = 2,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] = (8, 8, 8, 4),
        head: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
        )
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, name=head, drop_rate=drop_rate)

    def last_blocks(self, images: Tensor) -> list[Tensor]:
        """What heads on the last blocks of an encoder take; of a hierarchical one these are the stages."""
        return self.feature_pyramid(images)


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_pretrained` did, for the log.

    Attributes:
        dropped: names in the checkpoint that fine-tuning has no use for (decoder, mask token, replaced head).
        resized: names of tables brought to another input or window size.
        fresh: parameters of the model that keep their initial values (the head).
    """

    dropped: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]


def load_pretrained(
    model: MixMIMClassifier, state: Mapping[str, Tensor], *, source: str, new_head: bool = False
) -> LoadedWeights:
    """Load the encoder (and a fitting head, if there is one) from a checkpoint's weights.

    Decoder and mask token are dropped by name; position and relative-position tables are resized (bicubic) when the
    input or window size differs; everything else must fit exactly.

    Args:
        model: a model on the shared encoder whose last layer is `head`.
        state: the checkpoint's `model`.
        source: what messages call the checkpoint.
        new_head: leave the checkpoint's head out and train the model's fresh one.

    Raises:
        UserError: another model size or band count, or keys and shapes that are left over; the message names them.
    """
    _check_architecture(model, state, source)
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    dropped, resized = [], []
    for name, value in state.items():
        if name == "mask_token" or name.startswith("decoder_") or (new_head and name.startswith("head.")):
            dropped.append(name)
            continue
        wanted = own.get(name)
        if wanted is not None and value.shape != wanted.shape:
            if name.endswith("relative_position_index"):
                value = wanted  # follows from the window size, holds nothing learned
            elif name == "absolute_pos_embed" and value.shape[-1] == wanted.shape[-1]:
                value = resize_position_table(value, wanted.shape[1])
                resized.append(name)
            elif name.endswith("relative_position_bias_table") and value.shape[-1] == wanted.shape[-1]:
                value = resize_relative_bias(value, wanted.shape[0])
                resized.append(name)
        taken[name] = value
    has_head = any(name.startswith("head.") for name in taken)
    fresh = tuple(name for name in own if name.startswith("head.")) if not has_head else ()
    _load_strictly(model, {**{name: own[name] for name in fresh}, **taken}, source)
    return LoadedWeights(tuple(dropped), tuple(resized), fresh)


def load_trained(
    model: MixMIMClassifier,
    checkpoint: Mapping[str, Any],
    *,
    source: str,
    protocol: str | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Load all weights of a fine-tuned checkpoint, as `--eval` and `--resume` need them: every key and shape must fit.

    Args:
        model: gets the weights; its head becomes a linear probe where the checkpoint has one.
        checkpoint: ours or a released one (whose weights alone are there).
        source: what messages call it.
        protocol: refuse a checkpoint of another protocol.
        classes: refuse a checkpoint of other class names, or in another order.

    Raises:
        UserError: another protocol, model, number of bands or classes; the message names what differs.
    """
    trained_by = checkpoint.get("protocol", "finetune")
    if protocol is not None and trained_by != protocol:
        raise UserError(f"{source} was trained with --protocol {trained_by}, not {protocol}; give the same option")
    state = checkpoint.get("model", {})
    _check_architecture(model, state, source)
    known = checkpoint.get("classes")
    if known is not None and classes is not None and len(known) == len(classes) and list(known) != list(classes):
        raise UserError(f"{source} knows the classes {', '.join(known)}; the data set has {', '.join(classes)}")
    if "head.linear.weight" in state and not isinstance(model.head, LinearProbe):
        use_probe(model)
    _load_strictly(model, state, source)


def load_start(
    model: MixMIMClassifier,
    path: str,
    *,
    bands: Sequence[str],
    statistics: Mapping[str, Any],
    new_head: bool = False,
) -> None:
    """Start from a pretrained checkpoint, or say that training is from random weights.

    Args:
        model: gets the encoder's weights.
        path: checkpoint; empty: random initialisation.
        bands: names of the data set's bands, in order.
        statistics: mean and std in use; other ones than in pretraining are warned about.
        new_head: see `load_pretrained`.

    Raises:
        UserError: the checkpoint is of other bands, or does not fit.
    """
    log = get_logger()
    if not path:
        log.info("no --finetune: training from random initialisation")
        return
    checkpoint = load_checkpoint(path)
    data = checkpoint.get("data") or {}
    known = list(data.get("bands", bands))
    if known != list(bands):
        raise UserError(
            f"{path} was trained on bands {', '.join(known)}, the data set delivers {', '.join(bands)}; "
            "they must be the same and in the same order"
        )
    before = data.get("statistics") or {}
    if any(list(before.get(key, statistics[key])) != list(statistics[key]) for key in ("mean", "std")):
        log.warning(
            "%s was trained with mean %s, std %s; this run standardises with %s, %s (see --statistics)",
            path,
            before.get("mean"),
            before.get("std"),
            list(statistics["mean"]),
            list(statistics["std"]),
        )
    done = load_pretrained(model, checkpoint.get("model", {}), source=path, new_head=new_head)
    log.info(
        "weights of %s: %d entries left out (decoder, mask token), resized: %s, fresh: %s",
        path,
        len(done.dropped),
        ", ".join(done.resized) or "none",
        ", ".join(done.fresh) or "none",
    )


def _check_architecture(model: MixMIMClassifier, state: Mapping[str, Tensor], source: str) -> None:
    """Compare width, bands and depths first: one clear sentence instead of hundreds of shapes."""
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise UserError(
            f"{source} holds no MixMIM encoder (no patch_embed.proj.weight among its {len(state)} entries); "
            "give a checkpoint of main_pretrain.py or main_finetune.py"
        )
    width, bands, patch = weight.shape[:3]
    depths, own_depths = stage_depths(state), stage_depths(model.state_dict())
    if width != model.embed_dim or depths != own_depths:
        raise UserError(
            f"{source} is {_describe_size(width, depths)}, but the model is "
            f"{_describe_size(model.embed_dim, own_depths)}; choose --model to fit the checkpoint"
        )
    if bands != model.in_chans:
        raise UserError(
            f"{source} was trained on {bands} band{'s' if bands != 1 else ''}, the data set has {model.in_chans}; "
            "use a checkpoint of the same bands"
        )
    if patch != model.patch_size:
        raise UserError(f"{source} has patches of {patch} px, the model of {model.patch_size} px")


def _describe_size(width: int, depths: tuple[int, ...]) -> str:
    for name, row in MODELS.items():
        if row["embed_dim"] == width and tuple(row["depths"]) == depths:
            return f"{name} (embed_dim {width}, depths {'-'.join(map(str, depths))})"
    return f"a model with embed_dim {width} and depths {'-'.join(map(str, depths))}"


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    head = next((name for name in ("head.weight", "head.linear.weight") if name in own), None)
    if head in state and head is not None and state[head].shape[0] != own[head].shape[0]:
        raise UserError(
            f"{source} has a head for {state[head].shape[0]} classes, the data set has {own[head].shape[0]}; use the "
            "data set the checkpoint was trained on, or start from its encoder with --finetune and --new_head"
        )
    problems = [f"missing: {name}" for name in own if name not in state]
    problems += [f"left over: {name} {tuple(value.shape)}" for name, value in state.items() if name not in own]
    problems += [
        f"shape of {name}: {tuple(state[name].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{source} does not fit the model; {'; '.join(problems[:8])}{more}")
    with torch.no_grad():
        model.load_state_dict(state, strict=True)
