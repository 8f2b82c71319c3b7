"""Two runs of the same command: whether their numbers agree bit by bit, and what differs where they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from util.arrays import load_npz
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.files import read_json, read_jsonl
from util.passport import PASSPORT_FILE, flat, passport_differences

# Numbers that say how fast and with how much memory, not what was computed.
TIMINGS = ("images_per_s", "memory", "seconds", "data_wait", "time", "_s")
NOT_RESULTS = ("passport.", "training_seconds", "seconds", "initialisation")
# Flags that say where and how long, not what.
PLACES = ("output_dir", "log_dir", "resume", "export", "push_to_hub", "use_wandb", "config", "feature_cache")


@dataclass
class Agreement:
    """What two runs have in common.

    Attributes:
        same: what was compared and is bit-equal.
        differing: name -> what differs, in words.
        causes: settings, code, packages, machine, data or parents that differ: name -> both values.
    """

    same: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)
    causes: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether all numbers agree."""
        return bool(self.same) and not self.differing

    def lines(self) -> list[str]:
        """The result as text."""
        said = [f"bit-equal: {', '.join(self.same)}"] if self.same else []
        said += [f"differs: {name}: {what}" for name, what in self.differing.items()]
        if not self.same and not self.differing:
            said.append("nothing to compare: neither folder holds log.txt, checkpoints or metrics.json of both")
        for name, (before, after) in self.causes.items():
            said.append(f"not the same: {name}: {_short(before)} then, {_short(after)} now")
        if self.differing and not self.causes:
            said.append("settings, code, packages, machine, data and parents are the same: the difference has another "
                        "cause, such as an operation of the device that does not repeat")  # fmt: skip
        said.append("the runs agree bit by bit" if self.equal else "the runs do not agree")
        return said


def read_passport(folder: Path) -> dict[str, Any]:
    """The passport of a run.

    Raises:
        UserError: there is none.
    """
    for name in (PASSPORT_FILE, "metrics.json", "metrics_eval.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            found = content if name == PASSPORT_FILE else content.get("passport")
            if isinstance(found, dict) and isinstance(found.get("command"), dict):
                return found
    raise UserError(
        f"{folder} holds no {PASSPORT_FILE}; expected the folder of a run of main_pretrain.py or main_finetune.py of "
        "this version (earlier ones did not write it)"
    )


def compare_runs(first: Path, second: Path) -> Agreement:
    """Compare the numbers of two finished runs.

    Compared are log.txt (losses and rates of each epoch), the weights of checkpoints that both have, predictions and
    metrics.json, all without times and places.

    Args:
        first: folder of the earlier run.
        second: of the later one.
    """
    found = Agreement()
    _note(found, "log.txt", *(_log(folder) for folder in (first, second)))
    names = sorted({path.name for path in first.glob("*.pth")} & {path.name for path in second.glob("*.pth")})
    for name in names:
        _note(found, name, *(_weights(folder / name) for folder in (first, second)))
    for path in sorted(first.glob("predictions_*.npz")):
        if (second / path.name).is_file():
            _note(found, path.name, load_npz(path), load_npz(second / path.name))
    _note(found, "metrics.json", *(_metrics(folder) for folder in (first, second)))
    settings = [_settings(folder) for folder in (first, second)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        if settings[0].get(name) != settings[1].get(name):
            found.causes[f"--{name}"] = (settings[0].get(name), settings[1].get(name))
    found.causes |= passport_differences(*(first_start(read_passport(folder)) for folder in (first, second)))
    return found


def first_start(passport: Mapping[str, Any]) -> dict[str, Any]:
    """The passport of a run's first start, where it was stopped and continued."""
    before = passport.get("before") or []
    return dict(before[0]) if before else {key: value for key, value in passport.items() if key != "before"}


def _note(found: Agreement, name: str, left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> None:
    if left is None or right is None:
        if (left is None) != (right is None):
            found.differing[name] = "only one of the runs has it"
        return
    said = differences(left, right)
    if said is None:
        found.same.append(name)
    else:
        found.differing[name] = said


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> str | None:
    """What differs between named values or arrays, in words; None: nothing, to the last bit."""
    missing = [name for name in dict.fromkeys([*left, *right]) if name not in left or name not in right]
    if missing:
        return f"{len(missing)} entries are in one of them alone, such as {missing[0]}"
    unequal: list[str] = []
    largest, place = 0.0, ""
    for name, value in left.items():
        a, b = np.asarray(value), np.asarray(right[name])
        if a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes():
            continue
        if a.dtype == object or b.dtype == object or a.dtype.kind in "US" or a.shape != b.shape:
            if a.shape == b.shape and bool(np.all(a == b)):
                continue
            unequal.append(name)
            place = place or name
            continue
        unequal.append(name)
        gap = float(np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0.0))
        if gap >= largest:
            largest, place = gap, name
    if not unequal:
        return None
    size = f", largest difference {largest:.3g}" if largest and math.isfinite(largest) else ""
    return f"{len(unequal)} of {len(left)} entries{size} ({place})"


def _log(folder: Path) -> dict[str, Any] | None:
    if not (folder / "log.txt").is_file():
        return None
    rows = read_jsonl(folder / "log.txt")
    return {
        f"epoch {row.get('epoch')} {name}": value
        for row in rows
        for name, value in flat(row)
        if not any(name.startswith(part) or name.endswith(part) for part in TIMINGS)
    }


def _weights(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path).get("model") or {}
    return {name: value.detach().cpu().float().numpy() for name, value in state.items()}


def _metrics(folder: Path) -> dict[str, Any] | None:
    if not (folder / "metrics.json").is_file():
        return None
    values = dict(flat(read_json(folder / "metrics.json")))
    return {name: repr(value) for name, value in values.items() if not name.startswith(NOT_RESULTS)}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "args.json"
    content = read_json(path) if path.is_file() else {}
    return {name: value for name, value in content.items() if name not in PLACES}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def command_of(passport: Mapping[str, Any], output_dir: str, extra: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Program and words that repeat a run into another folder.

    Args:
        passport: of the run.
        output_dir: where to.
        extra: further words, which win over the run's.

    Raises:
        UserError: a run that no entry script started.
    """
    command = passport["command"]
    program, words = str(command["program"]), [str(word) for word in command["words"]]
    if program not in ("main_pretrain.py", "main_finetune.py"):
        raise UserError(f"the run was started by {program}; expected main_pretrain.py or main_finetune.py")
    kept: list[str] = []
    skipping = False
    for word in words:
        name = word.removeprefix("--").split("=", 1)[0]
        if word.startswith("--"):
            skipping = name in ("output_dir", "log_dir", "export", "push_to_hub", "use_wandb") or (
                name == "resume" and "--eval" not in words
            )
        if not skipping:
            kept.append(word)
    return program, [*kept, *extra, "--output_dir", output_dir]
