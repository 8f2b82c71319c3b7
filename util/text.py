"""Short pieces of text that several tools need."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def tex(text: str) -> str:
    """Plain text for LaTeX: its special characters stand for themselves."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    names |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(names.get(character, character) for character in text)
