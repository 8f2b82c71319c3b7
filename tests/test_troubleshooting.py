"""The messages that docs/troubleshooting.md explains are the ones that the program prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = [m for line in PAGE.read_text().splitlines() if (m := re.match(r"\| `(.+?)` \|", line))]


def templates() -> list[str]:
    """All texts of the program, values as …; adjacent literals are joined by Python's parser."""
    found = []
    for pattern in ("*.py", "sarwmix/**/*.py", "util/*.py", "scripts/*.py"):
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.fixture(scope="module")
def texts() -> str:
    return "\n".join(templates())


@pytest.mark.parametrize("message", [m.group(1) for m in MESSAGES])
def test_the_program_says_so(message: str, texts: str) -> None:
    assert message.strip("…: ") in texts


def test_the_page_has_messages() -> None:
    assert len(MESSAGES) > 25
