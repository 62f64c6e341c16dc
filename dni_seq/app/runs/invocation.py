"""How the user calls the commands: by the scripts of a clone, or as `dni-seq COMMAND`."""

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
    """Returns how to call the `dni-seq` command `name`, in the form in which this process was called."""
    script = Path(sys.argv[0]).with_name(f"{SCRIPTS[name]}.py")
    called_by_script = sys.argv[0].endswith(".py") and script.is_file()
    return f"python {shlex.quote(str(script))}" if called_by_script else f"dni-seq {name}"


def as_called(text: str) -> str:
    """Returns a help text in the words of this call: `dni-seq COMMAND` has no scripts, and names commands instead."""
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
