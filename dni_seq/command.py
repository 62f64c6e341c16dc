"""`dni-seq COMMAND ...`: the scripts, for whoever has installed the package without a clone.

A command is its script's `main`, with the same options, output and exit status. A wheel has the scripts inside the
package, a clone has them beside it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .bugs import guarded
from .options import did_you_mean, report

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("train_lm", "train a language model"),
        "evaluate": ("evaluate_lm", "score a trained one"),
        "sample": ("sample_lm", "let a trained one write"),
        "tasks": ("train_tasks", "train on copy, repeat copy or the adding problem"),
        "compare": ("compare_runs", "put runs side by side, as a table and a plot"),
        "reproduce": ("reproduce_paper", "run the experiments of the paper"),
    }
)
"""Each command's script, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    there = available()
    if not given or given[0] in ("-h", "--help"):
        print(usage(there))
        return 0 if given else 2
    name, *rest = given
    if name not in there:
        hint = did_you_mean(name, list(there)) or f": choose one of {', '.join(there)}"
        return report("dni-seq", ValueError(f"there is no command {name!r}{hint}"))
    sys.argv[0] = f"dni-seq {name}"
    sys.path.insert(0, str(there[name].parent))  # as Python does for a script: it may import those beside it
    script = importlib.import_module(there[name].stem)
    return guarded(lambda: script.main(rest))


def scripts_directory() -> Path:
    """Where the scripts are."""
    inside = Path(__file__).parent / "scripts"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "scripts"


def available() -> dict[str, Path]:
    """The script of each command, as far as it is there."""
    paths = {name: scripts_directory() / f"{script}.py" for name, (script, _) in COMMANDS.items()}
    return {name: path for name, path in paths.items() if path.is_file()}


def usage(there: Mapping[str, Path]) -> str:
    """What `dni-seq --help` prints."""
    lines = [f"  {name:<10}{COMMANDS[name][1]}" for name in there]
    return "\n".join(
        ["usage: dni-seq COMMAND [options]", "", *lines, "", "dni-seq COMMAND --help lists the options of a command."]
    )


if __name__ == "__main__":
    sys.exit(main())
