"""Who imports whom: an upper floor uses lower ones, never the other way round, and nothing goes in circles.

All imports count: at the top, under TYPE_CHECKING and inside functions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The longest name that fits a module decides. Rooms of one floor may use one another.
FLOORS = {
    "util": 1,
    "hubconf": 8,
    "models_mixmim": 2,
    "sarwmix": 2,  # weighting, transforms, heads, mixup, window_attention
    "sarwmix.data": 3,
    "models_mixmim_ft": 3,
    "models_sen12_ft": 3,
    "sarwmix.datasets": 4,
    "sarwmix.sen12flood": 4,
    "sarwmix.models": 4,
    "sarwmix.figures": 4,
    "sarwmix.tasks": 5,
    "sarwmix.checks": 5,
    "sarwmix.synthetic": 5,
    "engine_pretrain": 6,
    "engine_finetune": 6,
    "sarwmix.inference": 6,
    "sarwmix.pretraining": 7,
    "sarwmix.finetune": 7,
    "sarwmix.reports": 7,
    "main_pretrain": 8,
    "main_finetune": 8,
    "scripts": 8,
}


def modules(root: Path) -> dict[str, Path]:
    """Own modules by dotted name."""
    found = {}
    for path in [
        *root.glob("*.py"),
        *(p for top in ("util", "sarwmix", "scripts") for p in (root / top).rglob("*.py")),
    ]:
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """Own modules that each own module imports, wherever the import stands."""
    own = modules(root)
    found: dict[str, set[str]] = {}
    for name, path in own.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                used |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        found[name] = {module for module in used if module in own} - {name}
    # A package that is named only on the way to one of its modules is not used itself.
    for name, used in found.items():
        found[name] = {m for m in used if not any(other.startswith(f"{m}.") for other in used)}
    return found


def floor(module: str, floors: Mapping[str, int]) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in floors:
            return floors[".".join(parts[:length])]
    raise KeyError(f"{module} stands on no floor; add its room to FLOORS")


def upward(graph: Mapping[str, set[str]], floors: Mapping[str, int]) -> set[tuple[str, str]]:
    return {(a, b) for a, used in graph.items() for b in used if floor(b, floors) > floor(a, floors)}


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that reach one another (strongly connected components of more than one)."""
    reach = {name: set(used) for name, used in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset(other for other in graph if other in reach[name] and name in reach[other]) for name in graph}
    return {group for group in groups if len(group) > 1}


def test_no_import_goes_upwards() -> None:
    assert not upward(imports(ROOT), FLOORS)


def test_no_circles() -> None:
    assert not circles(imports(ROOT))


@pytest.mark.parametrize(
    "inside",
    [
        "from sarwmix.data import b",
        "def f():\n    import sarwmix.data.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sarwmix.data.b import x",
    ],
)
def test_the_test_can_fail(tmp_path: Path, inside: str) -> None:
    for name, text in (("util/a.py", inside), ("sarwmix/data/b.py", "import util.a")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = imports(tmp_path)
    assert upward(graph, FLOORS) == {("util.a", "sarwmix.data.b")}
    assert circles(graph) == {frozenset({"util.a", "sarwmix.data.b"})}


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([^)]+)\)", index)) == pages


def longest_function(path: Path) -> tuple[int, str]:
    found = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    return max(((node.end_lineno or 0) - node.lineno + 1, node.name) for node in found)


@pytest.mark.parametrize(("name", "most", "function"), [("main_pretrain.py", 280, 100), ("main_finetune.py", 280, 100),
                                                        ("models_mixmim.py", 600, 100)])  # fmt: skip
def test_contents_pages_stay_short(name: str, most: int, function: int) -> None:
    """The files that readers open first: what they leave to the rooms stays there."""
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= most
    length, which = longest_function(ROOT / name)
    assert length <= function, f"{which} has {length} lines"
