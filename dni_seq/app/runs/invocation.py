"""Texts in the form in which the user calls the commands: as scripts of a clone, or as `dni-seq COMMAND`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dni_seq.app.runs.trackers import METRICS

SCRIPTS: Mapping[str, str] = MappingProxyType(
    {
        "train": "train_lm",
        "evaluate": "evaluate_lm",
        "sample": "sample_lm",
        "tasks": "train_tasks",
        "compare": "compare_runs",
        "reproduce": "reproduce_paper",
    }
)
"""The script of each command of `dni-seq`."""


def command_line(name: str) -> str:
    """Returns the words that call the command `name` of `dni-seq`, as a script or not, as this process was called."""
    script = Path(sys.argv[0]).with_name(f"{SCRIPTS[name]}.py")
    called_by_script = sys.argv[0].endswith(".py") and script.is_file()
    return f"python {shlex.quote(str(script))}" if called_by_script else f"dni-seq {name}"


def as_called(text: str) -> str:
    """Returns a help text for the form of this call. If the call is `dni-seq COMMAND`, replaces scripts by commands."""
    if not sys.argv[0].startswith("dni-seq "):
        return text
    for name, script in SCRIPTS.items():
        text = re.sub(rf"(?:python )?(?:scripts/)?\b{script}\.py", f"dni-seq {name}", text)
    return text


def curves_command(run: Path, logger: str) -> str:
    """Returns a line that says where the curves of a run are: the command that shows them, or their file."""
    if logger == "tensorboard":
        return f"curves: tensorboard --logdir {shlex.quote(str(run.parent))}"
    return f"curves: {'at wandb, and in' if logger == 'wandb' else 'in'} {shlex.quote(str(run / METRICS))}"
