"""Whether a checkpoint belongs to the run that wants to continue it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from util.errors import UserError
from util.log import get_logger

_ABSENT = "(not stored)"


def differences(saved: Any, current: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (place, saved, current) for each value that differs; keys only the checkpoint has are ignored."""
    if isinstance(current, Mapping):
        saved = saved if isinstance(saved, Mapping) else {}
        for key, value in current.items():
            yield from differences(saved.get(key, _ABSENT), value, f"{where}.{key}" if where else str(key))
    elif isinstance(current, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or list(saved) != list(current):
            yield where, saved, current
    elif saved != current:
        yield where, saved, current


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, path: str, allow_mismatch: bool) -> None:
    """Compare what defines a run (data, model, weighting, schedule) with the checkpoint that shall continue it.

    Args:
        saved: the checkpoint.
        current: the same keys as this command would store them.
        path: of the checkpoint, for messages.
        allow_mismatch: warn instead of refusing.

    Raises:
        UserError: something differs; each difference is named.
    """
    found = [f"{where}: checkpoint {old!r}, now {new!r}" for where, old, new in differences(saved, current)]
    if not found:
        return
    text = "; ".join(found)
    if not allow_mismatch:
        raise UserError(
            f"{path} belongs to another run: {text}. Use the settings of the checkpoint, or --allow_mismatch to "
            "continue all the same; to start a new run from its weights use --finetune instead of --resume"
        )
    get_logger().warning("resuming a different run (--allow_mismatch): %s", text)
