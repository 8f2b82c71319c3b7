"""Commands of the installed package: ``sarwmix finetune ...``, ``python -m sarwmix predict ...``.

sarwmix                      names all commands
sarwmix pretrain ...         main_pretrain.py
sarwmix finetune ...         main_finetune.py
sarwmix check_data ...       scripts/check_data.py, and so on for every Python program in scripts/
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

ENTRY = {"pretrain": "main_pretrain", "finetune": "main_finetune"}


def commands() -> dict[str, str]:
    """Module of each command."""
    found = importlib.util.find_spec("scripts")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    names = sorted({path.stem for folder in folders for path in Path(folder).glob("*.py") if path.stem[0] != "_"})
    return {**ENTRY, **{name: f"scripts.{name}" for name in names}}


def main() -> None:
    """Run a command as if its file had been started."""
    known = commands()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.stderr.write(f"error: give a command, one of: {', '.join(known)}; each has --help\n")
        raise SystemExit(2)
    name = sys.argv.pop(1)
    runpy.run_module(known[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
