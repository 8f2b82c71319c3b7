"""Experiment tracking with Weights & Biases: opt-in, and imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import read_json, write_json
from util.log import get_logger

PROJECT = "sar-w-mixmae"
ID_FILE = "wandb_id.json"


class Tracker:
    """Numbers of a run to Weights & Biases. A tracker that fails on the way is switched off; training goes on.

    Where and how (account, online or offline) is decided by the tracker's own settings: WANDB_MODE, WANDB_ENTITY...

    Args:
        output_dir: the run's folder; its name becomes the run's name.
        config: settings of the run.
        resumed: whether the run goes on: then it stays the same one on the tracker's side, too.

    Raises:
        UserError: wandb is not installed, or does not start.
    """

    def __init__(self, output_dir: str | Path, config: Mapping[str, Any], *, resumed: bool = False) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                "--use_wandb needs the package wandb, which is not installed: pip install wandb, or leave the flag out "
                "(log.txt and TensorBoard hold the same numbers)"
            ) from error
        folder = Path(output_dir)
        known = folder / ID_FILE
        same = {"id": str(read_json(known)["id"]), "resume": "allow"} if resumed and known.is_file() else {}
        try:
            self._run: Any = wandb.init(project=PROJECT, name=folder.name, dir=str(folder), config=dict(config), **same)
        except Exception as error:  # the client fails in every way a network does
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--use_wandb: Weights & Biases does not start ({first[:200]}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave the flag out"
            ) from error
        if isinstance(getattr(self._run, "id", None), str):
            write_json(known, {"id": self._run.id})

    def log(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Numbers of an epoch; what is no number is left out."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._try(lambda: self._run.log(numbers, step=epoch))

    def close(self) -> None:
        """End the run on the tracker's side."""
        self._try(lambda: self._run.finish())
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the client fails in every way a network does
            get_logger().error("Weights & Biases failed and is not tried again in this run: %s", error)
            self._run = None
