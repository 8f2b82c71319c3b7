"""What is known of any file of weights or data, for people: facts by name, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models_mixmim import MODELS
from sarwmix.data.packed import read_manifest
from sarwmix.data.registry import is_packed
from sarwmix.inference.model import BEST_CHECKPOINT, CONFIG_FILE, WEIGHTS_FILE
from sarwmix.models.loading import read_weights
from sarwmix.models.passport import find_passport
from util.errors import UserError
from util.files import sha256_file
from util.optim import stage_depths

Facts = list[tuple[str, str]]
_VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def facts_of(path: Path) -> Facts:
    """(name, value) of everything that is known.

    Args:
        path: weight file, checkpoint, folder of an export or of a run, or packed store.

    Raises:
        UserError: it does not exist, or is none of these.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a weight file, a run, an export or a packed store")
    if path.is_dir() and is_packed(path):
        return _facts_of_store(path)
    if path.is_dir():
        inside = [path / WEIGHTS_FILE] if (path / CONFIG_FILE).is_file() else []
        inside += [path / BEST_CHECKPOINT, path / "checkpoint.pth"]
        found = next((one for one in inside if one.is_file()), None)
        if found is None:
            raise UserError(
                f"{path} is a folder without {WEIGHTS_FILE}, {BEST_CHECKPOINT}, checkpoint.pth or manifest.json"
            )
        return [("file", found.name), *facts_of(found)]
    return _facts_of_weights(path)


def _facts_of_store(path: Path) -> Facts:
    manifest = read_manifest(path)
    statistics = manifest.statistics
    return [
        ("kind", "packed store" + ("" if manifest.complete else ", unfinished")),
        ("data set", manifest.dataset),
        ("samples", f"{manifest.count:,} of {' x '.join(map(str, manifest.shape[1:]))}, {manifest.dtype}"),
        ("splits", ", ".join(manifest.splits)),
        ("bands", f"{', '.join(manifest.bands)} in {manifest.unit}"),
        ("classes", "; ".join(manifest.classes) or "none"),
        ("statistics", f"mean {_numbers(statistics.get('mean'))}, std {_numbers(statistics.get('std'))}"),
        ("unreadable", f"{len(manifest.unreadable)} samples"),
    ]


def _facts_of_weights(path: Path) -> Facts:
    content = read_weights(str(path))
    state: Mapping[str, Tensor] = content["model"]
    data: Mapping[str, Any] = content.get("data") or {}
    row = find_passport(path)
    kind = str(content.get("kind") or ("export" if data else "weights of another program"))
    facts = [
        ("kind", kind),
        ("size", f"{path.stat().st_size / 1e6:,.1f} MB, {len(state)} entries, "
         f"{sum(value.numel() for value in state.values() if value.is_floating_point()):,} values"),
        ("sha256", sha256_file(path)),
        ("model", architecture(state, content.get("model_config") or {})),
    ]  # fmt: skip
    if content["left_out"]:
        facts.append(
            ("outside", f"{len(content['left_out'])} entries beside the encoder, first {content['left_out'][0]}")
        )
    if data.get("bands"):
        statistics = data.get("statistics") or {}
        facts.append(("bands", f"{', '.join(map(str, data['bands']))} in {data.get('unit')} (says the file)"))
        facts.append(("statistics", f"mean {_numbers(statistics.get('mean'))}, std {_numbers(statistics.get('std'))}"))
        facts.append(("data set", str(data.get("dataset", "not named"))))
        if data.get("preprocessing"):
            facts.append(("preparation", ", ".join(f"{key} {value}" for key, value in data["preprocessing"].items())))
    elif row is not None:
        facts.append(("bands", f"{', '.join(row.bands)} in {row.unit} (known file)"))
        facts.append(("statistics", f"mean {_numbers(row.mean)}, std {_numbers(row.std)}"))
        if row.clip:
            facts.append(("clip", row.clip))
    else:
        facts.append(("bands", "not known: give --weight_bands when it is loaded"))
    for name in ("task", "protocol", "epoch"):
        if content.get(name) is not None:
            facts.append((name, str(content[name])))
    if content.get("classes"):
        facts.append(("classes", "; ".join(map(str, content["classes"]))))
    if row is not None:
        facts += [("what", row.what), ("source", row.source), ("licence", row.licence)]
    return facts


def architecture(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """A name for ``--model`` where one is certain, else what the entries look like."""
    if config.get("name"):
        return f"{config['name']}, {config.get('in_chans', '?')} bands, input {config.get('img_size', '?')} px"
    weight = state.get("patch_embed.proj.weight")
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if weight is not None and weight.ndim == 4 and any(name.startswith("layers.0.blocks.") for name in state):
        depths, width = stage_depths(state), weight.shape[0]
        known = [name for name, size in MODELS.items() if (size["embed_dim"], tuple(size["depths"])) == (width, depths)]
        if known:
            return f"{known[0]}, {weight.shape[1]} bands"
        return f"stages of {'-'.join(map(str, depths))} blocks (Swin?), width {width}, {weight.shape[1]} bands"
    if weight is not None and weight.ndim == 4 and blocks:
        size, patch = _VIT_WIDTHS.get(weight.shape[0], f"of width {weight.shape[0]}"), weight.shape[-1]
        return f"ViT {size}, {blocks} blocks, patches of {patch} px, {weight.shape[1]} bands"
    first = next(((name, value) for name, value in state.items() if value.ndim == 4), None)
    if first is None:
        return "no convolution among its entries"
    stem = "ResNet, " if "layer1.0.conv1.weight" in state else ""
    return f"{stem}first layer {first[0]} {tuple(first[1].shape)}, {first[1].shape[1]} bands"


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(value):.4g}" for value in values) if values else "not known"
