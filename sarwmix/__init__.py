"""Sentinel-1 specific parts: data sets, weighting, transforms, metrics, preparation.

    from sarwmix import build_dataset, open_model

Both are imported when they are asked for: whoever wants the help of a command does not wait for PyTorch.
"""

from importlib import import_module, metadata
from typing import Any

_PLACES = {"open_model": "sarwmix.inference.model", "build_dataset": "sarwmix.data.registry"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name == "__version__":
        try:
            return metadata.version("sar-w-mixmae")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            return "0.2.0"
    raise AttributeError(f"module 'sarwmix' has no attribute {name!r}")
