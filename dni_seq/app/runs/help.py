"""The texts of `--help`, which lists the common options on one screen, and `--help-all`, which lists every option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EXAMPLES = 3
"""Number of examples in the short description."""

LINE = 72
"""Number of characters of an option's text that fit in one line of the short help, which is 100 columns wide."""


class PrintHelp(argparse.Action):
    """An option that prints a text and ends the process with status 0.

    Args:
        option_strings: the spellings of the option.
        text: returns the text to print.
        help: what the option does.
        unused: what argparse passes to every action.
    """

    def __init__(self, option_strings: Sequence[str], text: Callable[[], str], help: str, **unused: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *parsed: Any) -> NoReturn:
        """Prints the text and ends the process."""
        sys.stdout.write(self._text())
        parser.exit()


def brief(description: str) -> str:
    """Returns the first paragraph of a command's description, and its first `EXAMPLES` examples without explanations.

    In the description, an example is a line that is not indented, followed by an indented line that explains it.
    """
    lines = description.strip().splitlines()
    end = lines.index("") if "" in lines else len(lines)
    starts = [i for i in range(end, len(lines) - 1) if lines[i][:1].strip() and lines[i + 1].startswith("    ")]
    examples = [lines[i] for i in starts[:EXAMPLES]]
    return "\n".join([*lines[:end], *([""] if examples else []), *examples])


def option_text(help: str, choices: Sequence[str] | None, default: str, *, short: bool) -> str:
    """Returns an option's text for argparse: its help, its choices and its default.

    Args:
        help: the option's help; the text after its first semicolon is remarks.
        choices: the allowed values, None for any.
        default: the default as text, empty if there is none.
        short: whether to leave out the remarks, and the default if it does not fit in the line.
    """
    listed = f": {', '.join(choices)}" if choices else ""
    text = (help.split("; ", maxsplit=1)[0] if short else help) + listed
    with_default = f"{text} (default: {default})"
    if default and not (short and len(with_default) // LINE > len(text) // LINE):
        text = with_default
    return text.replace("%", "%%")
