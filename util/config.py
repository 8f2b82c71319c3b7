"""Flags from a file: TOML, JSON or YAML, also the args.json of a run. What the command line names wins."""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from util.errors import UserError

FLAG = "--config"


def with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """A command line with the flags of its `--config` file put in front.

    Args:
        parser: knows the flags; one without `--config` gets the words as they are.
        words: the command line.

    Raises:
        UserError: the file cannot be read, or names a flag or a value that the program does not have.
    """
    path, actions = None, parser._option_string_actions
    for word, after in zip(words, [*words, ""][1:], strict=True):
        if word == FLAG:
            path = after
        elif word.startswith(f"{FLAG}="):
            path = word.split("=", 1)[1]
    if FLAG not in actions or not path:
        return list(words)
    named = [word.split("=", 1)[0] for word in words if word.startswith("--")]
    given = {actions[name].dest for name in named if name in actions}
    known = {action.dest for action in actions.values()} | {name.removeprefix("--") for name in actions}
    found: list[str] = []
    for name, value in settings_of(Path(path)).items():
        action = actions.get(f"--{name}")
        if name == "config" or action is not None and action.dest in given:
            continue
        if action is None:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{path} sets {name}, which is no flag of {parser.prog}{hint}")
        found += _words(parser, action, name, value, path)
    return [*found, *words]


def settings_of(path: Path) -> dict[str, Any]:
    """Flag names and values of a file; tables of a TOML file are headings only.

    Raises:
        UserError: missing, of another format, damaged, or it names a flag twice.
    """
    if not path.is_file():
        raise UserError(f"{FLAG} {path} does not exist; give a .toml, .json or .yaml file, such as args.json of a run")
    try:
        content = _parse(path)
    except (ValueError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{FLAG} {path} cannot be read: {first}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{FLAG} {path} holds no names with values; expected lines such as epochs = 50")
    found: dict[str, Any] = {}
    for name, value in _flat(content):
        if name in found:
            raise UserError(f"{FLAG} {path} sets {name} twice; keep one of them")
        found[name] = value
    return found


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError as error:
            raise UserError(f"{FLAG} {path} needs PyYAML: pip install pyyaml, or write it as .toml") from error
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error).replace("\n", " ")) from error
    raise ValueError(f"its name ends with {path.suffix!r}; expected .toml, .json or .yaml")


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield str(name), value


def _words(parser: argparse.ArgumentParser, action: argparse.Action, name: str, value: Any, path: str) -> Iterator[str]:
    """The words that say one setting."""
    several = action.nargs in ("+", "*") or isinstance(action.nargs, int) and action.nargs > 0
    append = isinstance(action, argparse._AppendAction)
    if value is None:
        return
    if isinstance(value, bool):
        if action.nargs != 0:
            raise UserError(f"{path} sets {name} to {str(value).lower()}; the flag --{name} takes a value")
        opposite = parser._option_string_actions.get(f"--no_{name}")
        if value:
            yield f"--{name}"
        elif opposite is not None and opposite.dest == action.dest:
            yield f"--no_{name}"
    elif action.nargs == 0:
        raise UserError(f"{path} sets {name} to {value!r}; the flag --{name} is on or off: expected true or false")
    elif isinstance(value, list):
        if append:
            yield from (f"--{name}={one}" for one in value)
        elif several:
            if value or action.nargs == "*":
                yield from (f"--{name}", *map(str, value))
        else:
            raise UserError(f"{path} sets {name} to a list; the flag --{name} takes one value")
    elif several:
        yield from (f"--{name}", str(value))
    else:
        yield f"--{name}={value}"
