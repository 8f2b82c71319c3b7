#!/usr/bin/env python3
"""Write docs/api.md: what Python programs use of this project, from its signatures and docstrings.

    python scripts/api_page.py            # writes the page
    python scripts/api_page.py --check    # exit code 10 where the page is not what the code says

Names that are not on the page may change without a word.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.args import Parser
from util.cli import run_cli
from util.files import atomic_write

PAGE = ROOT / "docs" / "api.md"
EXIT_DIFFERS = 10
# module -> names, with the methods of a class that belong to it
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "sarwmix": {"open_model": (), "build_dataset": ()},
    "sarwmix.inference.model": {"Pretrained": ("to", "inputs", "logits", "scores", "features")},
    "sarwmix.data.base": {"SarDataset": ("read_into", "get_batch", "subset", "single_images", "identity")},
    "sarwmix.data.loader": {"build_loader": ()},
    "sarwmix.transforms": {"SarTransform": ()},
    "sarwmix.weighting": {"WeightOptions": (), "compute_weights": ()},
    "models_mixmim": {"MixMIMEncoder": ("forward_features", "feature_pyramid"), "MixMIM": ("forward", "draw_mask")},
    "sarwmix.models.backbones": {"build_classifier": (), "build_segmenter": ()},
    "sarwmix.tasks.intervals": {"metric_intervals": (), "paired_difference": ()},
    "sarwmix.reports.run": {"read_run": (), "group_runs": (), "score": ()},
}


def signature(name: str, value: Any) -> str:
    """``name(arguments) -> type`` on one line, without `self`."""
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    text = re.sub(r"\(self, ", "(", text).replace("(self)", "()")
    return name + text.replace("'", "").replace("<factory>", "...")


def entry(name: str, value: Any, depth: int) -> str:
    """A heading, the signature, and the docstring as text."""
    text = inspect.getdoc(value) or ""
    return f"{'#' * depth} `{name}`\n\n```python\n{signature(name, value)}\n```\n\n```text\n{text}\n```\n"


def page() -> str:
    """The whole page."""
    parts = [
        "# Python interface\n\nMade by `python scripts/api_page.py` from the code; names that are not here may change. "
        "Shapes and units stand in the texts.\n\n```python\nimport torch\n\n"
        "from sarwmix import build_dataset, open_model\n\n"
        'model = open_model("runs/finetune")  # or a checkpoint, an export, a hub repository\n'
        'data = build_dataset("demo", "data/demo", "test")\n'
        'scores = model.scores(torch.from_numpy(data[0]["image"])[None])  # (1, K) from dB\n```\n'
    ]
    for module, names in NAMES.items():
        parts.append(f"## {module}\n")
        for name, methods in names.items():
            value = getattr(import_module(module), name)
            parts.append(entry(name, value, 3))
            parts += [entry(f"{name}.{method}", getattr(value, method), 4) for method in methods]
    return "\n".join(parts)


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit code 10 where it differs"
    )
    text = page()
    if parser.parse_args().check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print("docs/api.md is what the code says" if same else "docs/api.md is old: run python scripts/api_page.py")
        return 0 if same else EXIT_DIFFERS
    with atomic_write(PAGE, "w") as stream:
        stream.write(text)
    print(f"written {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
