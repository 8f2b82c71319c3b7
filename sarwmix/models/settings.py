"""Which model is built: what a checkpoint keeps so that its weights fit again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from util.checkpoint import check_model_config


@dataclass(frozen=True)
class ModelSettings:
    """Which model a task builds.

    Attributes:
        name: backbone, such as ``mixmim_base``.
        input_size: side of the images that `Task.inputs` delivers, px.
        in_chans: bands.
        drop_path_rate: stochastic depth of the last block.
        drop_rate: dropout before the last layer.
        head: name of the head; None: the task's usual one.
        pool: ``token`` or ``avg``, how a ViT makes one vector of its tokens; None: its usual way.
    """

    name: str
    input_size: int
    in_chans: int
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    head: str | None = None
    pool: str | None = None

    def as_config(self) -> dict[str, Any]:
        """What a checkpoint keeps as `model_config`: all that decides which weights fit."""
        return {
            "name": self.name,
            "img_size": self.input_size,
            "in_chans": self.in_chans,
            "head": self.head,
            "pool": self.pool,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSettings:
        """Inverse of `as_config`, for evaluation: nothing is dropped.

        Raises:
            CheckpointError: sizes that no model has.
        """
        check_model_config(config, {}, "the file")
        return cls(config["name"], config["img_size"], config["in_chans"], head=config["head"], pool=config.get("pool"))
