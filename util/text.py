"""Short pieces of text that several tools need."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import TEXT_LIMIT, read_bytes


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def tex(text: str) -> str:
    """Plain text for LaTeX: its special characters stand for themselves."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    names |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(names.get(character, character) for character in text)


def read_text(path: Path) -> str:
    """A list that people or other programs have written: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        UserError: another encoding, or no text.
        OSError: the file cannot be read, is too large, or is no regular file.
    """
    content = read_bytes(path, TEXT_LIMIT)
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if content.startswith(marks) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} is no text: it holds NUL bytes; copy it again, or save it as UTF-8")
    return text


def cells(row: Iterable[Any]) -> list[Any]:
    """Values of a CSV's line; text that a spreadsheet would take for a formula begins with an apostrophe.

    Names come from data and from folders; `=HYPERLINK(...)` must stay text. Numbers stay as they are.
    """

    def shown(value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
            return value
        try:
            float(value)
        except ValueError:
            return f"'{value}"
        return value

    return [shown(value) for value in row]


def separator_of(line: str) -> str:
    """What separates the cells of a table's first line: tab, semicolon, bar, else comma."""
    return next((mark for mark in "\t;|" if mark in line), ",")
