"""`dni-seq COMMAND ...`: runs the commands of `scripts/` from an installed package.

A command has the options, the output and the exit status of the script that it replaces.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dni_seq import __version__
from dni_seq.app.runs.options import did_you_mean, report
from dni_seq.app.runs.program import run_main, run_program

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("dni_seq.app.lm.train", "train a recurrent language model"),
        "evaluate": ("dni_seq.app.lm.evaluate", "score a trained language model"),
        "sample": ("dni_seq.app.lm.sample", "generate text with a trained language model"),
        "tasks": ("dni_seq.app.tasks.train", "train on copy, repeat copy or the adding problem"),
        "compare": ("dni_seq.app.studies.compare_runs", "compare runs, as a table and a plot"),
        "reproduce": ("dni_seq.app.studies.reproduce", "run the experiments of Jaderberg et al. 2017"),
    }
)
"""Each command's module and a short description."""

RESULTS = frozenset({"evaluate", "sample", "compare"})
"""Commands whose stdout is their result."""

PARSES_FIRST = frozenset({"train"})
"""Commands that parse their options before they import PyTorch, and print the line about that import themselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command as a program and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_program(lambda: command(given))


def command(given: Sequence[str]) -> int:
    """Runs the command that the words `given` name and returns its exit status."""
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"dni-seq {__version__}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        hint = did_you_mean(name, list(COMMANDS)) or f": choose one of {', '.join(COMMANDS)}"
        return report("dni-seq", ValueError(f"there is no command {name!r}{hint}"))
    sys.argv[0] = f"dni-seq {name}"
    module, _ = COMMANDS[name]
    if name in PARSES_FIRST:
        status: int = importlib.import_module(module).main(rest)
        return status
    return run_main(module, rest, result=name in RESULTS)


def usage() -> str:
    """Returns the text of `dni-seq --help`."""
    lines = [f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dni-seq COMMAND [options]",
            "",
            *lines,
            "",
            "dni-seq COMMAND --help lists the options of a command, dni-seq --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
