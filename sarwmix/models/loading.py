"""Weights of other runs and other projects into a model: pretrained encoders, fine-tuned checkpoints, local files.

What can be read: checkpoints of this repository; released MixMIM checkpoints; MAE and FG-MAE ViTs (a dict with
`model`); MoCo v2 and v3, Lightning and compiled models, by their prefixes; state dicts of DINOv2 and timm, as .pth or
.safetensors. Nothing in a file is executed.

What is left out is left out by name and said; everything else must fit exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models_mixmim import MODELS
from sarwmix.data.spec import BANDS, unit_of_bands
from sarwmix.heads import LinearProbe, PixelProbe, TaskModel, use_probe
from sarwmix.models.passport import bands_of_file, statistics_of
from sarwmix.models.renaming import is_square, rename_by_timm, rename_dinov2, rename_torchvision_swin
from util.checkpoint import check_safetensors, load_checkpoint
from util.errors import UserError
from util.files import parse_json, read_json
from util.log import get_logger
from util.optim import stage_depths
from util.pos_embed import resize_position_table, resize_relative_bias

if TYPE_CHECKING:
    from sarwmix.models.settings import ModelSettings

_WRAPPERS = ("model", "state_dict", "teacher", "model_state_dict")  # under which files keep their weights
# DistributedDataParallel; MoCo v2 and v3 (the trained encoder, not its momentum twin); DINO and TorchGeo; Lightning
_PREFIXES = ("module.", "encoder_q.", "base_encoder.", "backbone.", "model.")
_FIRST_ELSEWHERE = ("features.0.0.weight",)  # torchvision's Swin
_CONSTANT = ("relative_position_index", "attn_mask")  # buffers that follow from sizes, nothing learned


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_pretrained` did, for the log.

    Attributes:
        dropped: names in the checkpoint that this model has no use for (decoder, mask token, replaced head).
        resized: names of tables brought to another input or window size.
        fresh: parameters of the model that keep their initial values (the head).
    """

    dropped: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]


# --------------------------------------------------------------------------------------------------- entry points


def load_start(
    model: TaskModel,
    path: str,
    *,
    bands: Sequence[str],
    statistics: Mapping[str, Any],
    new_head: bool = False,
    adapt_bands: bool = False,
    weight_bands: str | None = None,
) -> None:
    """Start from a pretrained checkpoint, or say that training is from random weights.

    Args:
        model: gets the encoder's weights.
        path: checkpoint; empty: random initialisation.
        bands: names of the data set's bands, in order.
        statistics: mean and std in use; other ones than in pretraining are warned about.
        new_head, adapt_bands: see `load_pretrained`.
        weight_bands: bands of a file that names none, joined with commas; those of the data set in another order are
            put into order.

    Raises:
        UserError: the checkpoint is of other bands, contradicts `weight_bands`, does not fit, or nobody knows the order
            of its bands (see `sarwmix.models.passport`).
    """
    log = get_logger()
    if not path:
        log.info("no --finetune: training from random initialisation")
        return
    checkpoint = read_weights(path)
    own = [str(band) for band in (checkpoint.get("data") or {}).get("bands") or ()]
    inputs = _input_bands(model, checkpoint["model"])
    if not own and not weight_bands and inputs == len(BANDS) and "absolute_pos_embed" in checkpoint["model"]:
        own = list(BANDS)  # the published implementation of MixMIM for radar reads no other order
    trained_on = list(
        bands_of_file(
            path, own, weight_bands, inputs=inputs, bands=bands,
            unit=str(unit_of_bands(bands)),
        )
    )  # fmt: skip
    # A declared order is exact: the same bands are put into the data set's order without being asked for twice.
    adapt_bands = adapt_bands or bool(weight_bands and not own and sorted(trained_on) == sorted(bands))
    if not adapt_bands:
        check_bands({"data": {"bands": trained_on}}, bands, source=path)
    before = (checkpoint.get("data") or {}).get("statistics") or statistics_of(path, bands)
    if any(list(before.get(key, statistics[key])) != list(statistics[key]) for key in ("mean", "std")):
        log.warning(
            "%s was trained with mean %s, std %s; this run standardises with %s, %s (see --statistics)",
            path,
            before.get("mean"),
            before.get("std"),
            list(statistics["mean"]),
            list(statistics["std"]),
        )
    done = load_pretrained(
        model,
        checkpoint["model"],
        source=path,
        new_head=new_head,
        adapt_bands=adapt_bands,
        bands=bands,
        trained_on=trained_on,
    )
    dropped = (*checkpoint["left_out"], *done.dropped)
    log.info(
        "weights of %s: %d entries left out (decoder, mask token, other parts): %s; resized: %s; fresh: %s",
        path,
        len(dropped),
        _shorten(dropped),
        _shorten(done.resized),
        _shorten(done.fresh),
    )


def read_weights(path: str) -> dict[str, Any]:
    """Read any of the file kinds of this module.

    The `data` of an export (bands, unit, statistics) are those of its safetensors file, or of the config.json beside.

    Returns:
        The checkpoint's entries; `model` holds the weights, without wrappers of other projects.

    Raises:
        UserError: damaged, not a file of weights, or holding objects other than tensors and plain values.
    """
    content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else load_checkpoint(path)
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            content = {**content, "model": inner}
            break
    else:
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(
                f"{path} holds no weights: expected a dict under one of {', '.join(_WRAPPERS)}, or tensors alone; it "
                f"has {_shorten(list(map(str, content)))}"
            )
        content = {"model": content, **_data_of_export(Path(path))}
    state, left_out = _unwrap(content["model"])
    return {**content, "model": state, "left_out": left_out}


def _unwrap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without the wrappers around a model, one after the other, and the names that stood outside of them.

    A compiled model's `_orig_mod.` may stand anywhere. Lightning's `model.` often holds an `encoder.` beside the parts
    of a task; our own files have no `model.`, so that their `encoder.` stays.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    left_out: list[str] = []
    lightning = False
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in state)), ""):
        lightning = lightning or prefix == "model."
        state = _inside(state, prefix, left_out)
    if lightning and any(name.startswith("encoder.") for name in state):
        state = _inside(state, "encoder.", left_out)
    return state, left_out


def _inside(state: Mapping[str, Tensor], prefix: str, left_out: list[str]) -> dict[str, Tensor]:
    left_out += [name for name in state if not name.startswith(prefix)]
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _input_bands(model: TaskModel, state: Mapping[str, Tensor]) -> int | None:
    """Channels of a file's first layer; None where it has another name than the model's."""
    own = {name.removeprefix(model.encoder_prefix): value for name, value in model.state_dict().items()}
    first = _first_layer(model, {name: value for name, value in own.items() if _of_encoder(name)})
    found = [value for name, value in state.items() if name == first or name.endswith(f".{first}")]
    found += [state[name] for name in _FIRST_ELSEWHERE if name in state]
    return next((value.shape[1] for value in found if value.ndim == 4), None)


def _read_safetensors(path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_safetensors(path)
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot load {path}: {error}; give an intact .safetensors file") from error


def _data_of_export(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        kept = (stream.metadata() or {}).get("data")
    config = parse_json(kept.encode()) if kept else None
    beside = path.with_name("config.json")
    if config is None and beside.is_file():
        found = read_json(beside)
        ours = isinstance(found, dict) and str(found.get("format", "")).startswith("sarwmix-export/")
        config = found.get("data") if ours else None
    return {"data": config} if isinstance(config, dict) else {}


def check_bands(checkpoint: Mapping[str, Any], bands: Sequence[str], *, source: str) -> None:
    """Refuse a checkpoint that was trained on other bands, or on the same ones in another order.

    Raises:
        UserError: names both.
    """
    known = list((checkpoint.get("data") or {}).get("bands") or bands)
    if known != list(bands):
        raise UserError(
            f"{source} was trained on bands {', '.join(known)}, the data set delivers {', '.join(bands)}; "
            "they must be the same and in the same order"
        )


def load_timm_weights(model: TaskModel, settings: ModelSettings) -> None:
    """timm's own pretrained weights, from the local cache of the hub or downloaded. Bands are adapted by timm.

    Raises:
        UserError: not a timm model, no weights for it, or no way to get them; says how to give a local file.
    """
    from sarwmix.models.backbones import create_encoder, is_mixmim

    if is_mixmim(settings.name):
        raise UserError(f"--pretrained fetches timm's weights; those of {settings.name} are given by --finetune FILE")
    card = getattr(model.encoder, "pretrained_cfg", {})
    if not (card.get("hf_hub_id") or card.get("url") or card.get("file")):
        raise UserError(
            f"timm has no pretrained weights for {settings.name}; leave --pretrained out, or --finetune FILE"
        )
    try:
        encoder = create_encoder(settings, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # whatever stands between here and the hub: no network, proxy, no access
        hub_id = card.get("hf_hub_id")
        where = f"https://huggingface.co/{hub_id} (model.safetensors)" if hub_id else card.get("url")
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise UserError(
            f"the pretrained weights of {settings.name} cannot be downloaded ({type(error).__name__}: {reason}). "
            f"Fetch the file elsewhere from {where} and give it: --finetune FILE, with "
            f"--adapt_bands when it was trained on RGB (the data have {settings.in_chans} bands)"
        ) from error
    load_pretrained(model, encoder.state_dict(), source=f"timm's {settings.name}")
    get_logger().info("weights of timm's %s, first layer adapted to %d bands", settings.name, settings.in_chans)


def load_pretrained(
    model: TaskModel,
    state: Mapping[str, Tensor],
    *,
    source: str,
    new_head: bool = False,
    adapt_bands: bool = False,
    bands: Sequence[str] = (),
    trained_on: Sequence[str] = (),
) -> LoadedWeights:
    """Load the encoder (and a fitting head, if there is one) from a checkpoint's weights.

    Decoder and mask token are dropped by name; position and relative-position tables are resized (bicubic) when the
    input or window size differs. The last layer of a segmentation head is left out when its classes differ. Everything
    else must fit exactly.

    Args:
        model: encoder with a `head`.
        state: the checkpoint's `model`.
        source: what messages call the checkpoint.
        new_head: leave the checkpoint's head out and train the model's fresh one.
        adapt_bands: fit a first layer made for other bands: the same ones in another order are put into order; of any
            others the mean is spread, scaled so that the response to equal bands stays. Without it another number of
            bands is refused.
        bands: names of the data set's bands.
        trained_on: names of the checkpoint's bands, where known.

    Raises:
        UserError: another model size or band count, or keys and shapes that are left over; the message names them.
    """
    prefix = model.encoder_prefix
    encoder = {name.removeprefix(prefix): value for name, value in model.state_dict().items() if _of_encoder(name)}
    theirs, head, dropped = split_foreign(model, state, encoder)
    if prefix:
        _check_timm(model, theirs, encoder, source)
    else:
        _check_architecture(model, theirs, source)
    first = _first_layer(model, encoder)
    differ = bool(trained_on) and list(trained_on) != list(bands)
    if first in theirs and (differ or theirs[first].shape[1:2] != encoder[first].shape[1:2]):
        theirs[first] = _other_bands(theirs[first], encoder[first], source, adapt_bands, bands, trained_on)
    theirs, resized = _resize_tables(theirs, encoder)
    fresh_encoder = _use_own_norm(theirs, encoder, dropped)
    if new_head:
        dropped += list(head)
        head = {}
    head, fresh = _fit_head(model, head, source, dropped)
    _load_strictly(model, {**{prefix + name: value for name, value in theirs.items()}, **head}, source)
    return LoadedWeights(tuple(dropped), tuple(resized), tuple([prefix + name for name in fresh_encoder] + fresh))


def load_trained(
    model: TaskModel,
    checkpoint: Mapping[str, Any],
    *,
    source: str,
    protocol: str | None = None,
    classes: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
) -> None:
    """Load all weights of a fine-tuned checkpoint, as `--eval` and `--resume` need them: every key and shape must fit.

    Args:
        model: gets the weights; its head becomes a linear probe where the checkpoint has one.
        checkpoint: ours or a released one (whose weights alone are there).
        source: what messages call it.
        protocol: refuse a checkpoint of another protocol.
        classes: refuse a checkpoint of other class names, or in another order.
        bands: refuse a checkpoint of other bands, or in another order.

    Raises:
        UserError: another protocol, model, number of bands or classes; the message names what differs.
    """
    trained_by = checkpoint.get("protocol", "finetune")
    if protocol is not None and trained_by != protocol:
        raise UserError(f"{source} was trained with --protocol {trained_by}, not {protocol}; give the same option")
    state = checkpoint.get("model", {})
    name = (checkpoint.get("model_config") or {}).get("name")
    own_name = getattr(model, "name", None)
    if name is not None and own_name is not None and name != own_name:
        raise UserError(f"{source} is {name}, but the model is {own_name}; choose --model to fit the checkpoint")
    if bands is not None:
        check_bands(checkpoint, bands, source=source)
    if not model.encoder_prefix:
        _check_architecture(model, state, source)
    known = checkpoint.get("classes")
    if known is not None and classes is not None and len(known) == len(classes) and list(known) != list(classes):
        raise UserError(f"{source} knows the classes {', '.join(known)}; the data set has {', '.join(classes)}")
    is_probe = "head.linear.weight" in state or "head.linear.0.weight" in state
    if is_probe and not isinstance(model.head, LinearProbe | PixelProbe):
        use_probe(model)
    _load_strictly(model, state, source)


# ---------------------------------------------------------------------------------------------------------- pieces


def _of_encoder(name: str) -> bool:
    return not name.startswith("head.")


def split_foreign(
    model: TaskModel, state: Mapping[str, Tensor], encoder: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Sort a file's entries: the encoder's by the encoder's own names, our head's, and those that have no use here.

    Args:
        model: what the weights are for.
        state: the file's entries.
        encoder: the model's encoder entries by their own names.

    Returns:
        (encoder entries, head entries, names left out).
    """
    prefix = model.encoder_prefix
    ours = not prefix or any(name.startswith(prefix) for name in state)
    last_layers = () if ours else _classifier_names(model)
    theirs: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, value in state.items():
        inner = name.removeprefix(prefix) if ours else name
        if inner == "mask_token" or inner.startswith(("decoder_", "hog.", *last_layers)) or inner.endswith("attn_mask"):
            dropped.append(name)
        elif ours and name.startswith("head."):
            head[name] = value
        elif prefix and inner.startswith("head.") and inner not in encoder:
            dropped.append(name)  # norm inside timm's pooling, which a segmenter has no use for
        else:
            theirs[inner] = value
    if not ours:
        theirs = rename_dinov2(rename_torchvision_swin(theirs), encoder)
        if set(theirs) != set(encoder):
            theirs = rename_by_timm(model, theirs, dropped)
    return theirs, head, dropped


def _classifier_names(model: TaskModel) -> tuple[str, ...]:
    """Beginnings of the names of a timm model's own last layers."""
    names = getattr(model.encoder, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(f"{name}." for name in (*names, "last_layer"))


def _first_layer(model: TaskModel, encoder: Mapping[str, Tensor]) -> str:
    """Name of the weight that sees the bands."""
    first = getattr(getattr(model, "encoder", None), "pretrained_cfg", {}).get("first_conv")
    if isinstance(first, str) and f"{first}.weight" in encoder:
        return f"{first}.weight"
    return next((name for name, value in encoder.items() if value.ndim == 4), "")


def _other_bands(
    weight: Tensor, own: Tensor, source: str, adapt: bool, bands: Sequence[str], trained_on: Sequence[str]
) -> Tensor:
    """First-layer weights (D, C', h, w) for the model's C bands.

    Raises:
        UserError: not asked for.
    """
    if not adapt:
        named = f" ({', '.join(bands)})" if bands else ""
        raise UserError(
            f"{source} was trained on {weight.shape[1]} band{'s' if weight.shape[1] != 1 else ''}, the data set has "
            f"{own.shape[1]}{named}; use a checkpoint of the same bands, or --adapt_bands to spread the mean of its "
            "first layer over them"
        )
    if sorted(trained_on) == sorted(bands) and len(bands) == weight.shape[1]:
        get_logger().info("%s: bands %s put into the order %s", source, ", ".join(trained_on), ", ".join(bands))
        return weight[:, [list(trained_on).index(band) for band in bands]]
    get_logger().warning(
        "%s was trained on %s; the mean of its first layer is spread over %s",
        source,
        ", ".join(trained_on) or f"{weight.shape[1]} bands",
        ", ".join(bands) or f"{own.shape[1]} bands",
    )
    return (weight.float().sum(dim=1, keepdim=True) / own.shape[1]).expand(-1, own.shape[1], -1, -1).to(weight.dtype)


def _resize_tables(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Bring position tables to the model's input and windows."""
    fitted, resized = {}, []
    for name, value in state.items():
        wanted = own.get(name)
        if wanted is not None and value.shape != wanted.shape and value.shape[-1:] == wanted.shape[-1:]:
            if name.endswith("absolute_pos_embed"):
                value = resize_position_table(value, wanted.shape[1])
                resized.append(name)
            elif name.endswith("pos_embed") and value.ndim == 3:
                extra = next((n for n in range(9) if is_square(wanted.shape[1] - n)), 0)  # class token and registers
                if is_square(value.shape[1] - extra):
                    grid = resize_position_table(value[:, extra:], wanted.shape[1] - extra)
                    value = torch.cat([value[:, :extra], grid], dim=1)
                    resized.append(name)
            elif name.endswith("relative_position_bias_table"):
                value = resize_relative_bias(value, wanted.shape[0])
                resized.append(name)
        if wanted is not None and value.shape != wanted.shape and name.endswith(_CONSTANT):
            value = wanted
        fitted[name] = value
    return fitted, resized


def _use_own_norm(state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str]) -> list[str]:
    """A ViT that pools all tokens has its own norm behind the pooling: it starts fresh, as in MAE's fine-tuning."""
    if "fc_norm.weight" not in own or "fc_norm.weight" in state or "norm.weight" in own:
        return []
    for name in ("norm.weight", "norm.bias"):
        if state.pop(name, None) is not None:
            dropped.append(name)
    fresh = [name for name in own if name.startswith("fc_norm.")]
    state.update({name: own[name] for name in fresh})
    return fresh


def _fit_head(
    model: TaskModel, head: Mapping[str, Tensor], source: str, dropped: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The head's entries to load, and the names of those that keep their initial values.

    Raises:
        UserError: the checkpoint's head is of another kind.
    """
    own = {name: value for name, value in model.state_dict().items() if not _of_encoder(name)}
    if not head:
        return own, list(own)
    if set(head) != set(own):
        raise UserError(
            f"{source} has another kind of head ({_shorten(sorted(set(head) - set(own)) or sorted(head))}) than the "
            f"model ({_shorten(sorted(set(own) - set(head)) or sorted(own))}); choose --head to fit, or give "
            "--new_head to take its encoder only"
        )
    last = getattr(model.head, "last_layer", None)
    swapped = [
        name
        for name in own
        if last is not None and name.startswith(f"head.{last}.") and head[name].shape[1:] == own[name].shape[1:]
    ]
    if not any(head[name].shape != own[name].shape for name in swapped):
        return dict(head), []
    weight = f"head.{last}.weight"
    get_logger().info(
        "%s labels %d classes, the data set has %d: the last layer (%s) starts fresh, everything else is loaded",
        source,
        len(head[weight]),
        len(own[weight]),
        ", ".join(swapped),
    )
    dropped += swapped
    return {**head, **{name: own[name] for name in swapped}}, swapped


def _check_timm(model: TaskModel, state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Compare kind, width, depth and patch of a file with a timm encoder, for one clear sentence."""
    name = getattr(model, "name", "the model")
    if "absolute_pos_embed" in state and "absolute_pos_embed" not in own:
        raise UserError(f"{source} is a MixMIM encoder, the model is {name}; choose --model to fit the checkpoint")
    weight, wanted = state.get("patch_embed.proj.weight"), own.get("patch_embed.proj.weight")
    if weight is None or wanted is None or weight.ndim != 4:
        if not set(state) & set(own):
            raise UserError(
                f"{source} shares no entry with {name}: it holds {_shorten(list(state))}, the model needs "
                f"{_shorten(list(own))}; choose --model to fit the checkpoint"
            )
        return
    theirs = (weight.shape[0], _blocks(state), weight.shape[-1])
    ours = (wanted.shape[0], _blocks(own), wanted.shape[-1])
    if theirs != ours:
        words = "width {}, {} blocks and patches of {} px"
        raise UserError(
            f"{source} has {words.format(*theirs)}, {name} has {words.format(*ours)}; choose --model to fit it"
        )


def _blocks(state: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _check_architecture(model: Any, state: Mapping[str, Tensor], source: str) -> None:
    """Compare width, bands and depths first: one clear sentence instead of hundreds of shapes."""
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise UserError(
            f"{source} holds no MixMIM encoder (no patch_embed.proj.weight among its {len(state)} entries); "
            "give a checkpoint of main_pretrain.py or main_finetune.py"
        )
    if "cls_token" in state and "absolute_pos_embed" not in state:
        raise UserError(
            f"{source} is a ViT (width {weight.shape[0]}, {_blocks(state)} blocks, patches of {weight.shape[-1]} px), "
            f"but the model is {_describe_size(model.embed_dim, stage_depths(model.state_dict()))}; choose --model to "
            "fit the checkpoint, such as vit_small_patch16_224"
        )
    width, bands, patch = weight.shape[:3]
    depths, own_depths = stage_depths(state), stage_depths(model.state_dict())
    if width != model.embed_dim or depths != own_depths:
        raise UserError(
            f"{source} is {_describe_size(width, depths)}, but the model is "
            f"{_describe_size(model.embed_dim, own_depths)}; choose --model to fit the checkpoint"
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
    head = next((name for name in ("head.weight", "head.linear.weight", "head.classifier.weight") if name in own), None)
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


def _shorten(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
