"""The directory of a run: the names of its files, and checks before a run writes to it.

A run directory belongs to one configuration. A new run never uses the directory of another run. A resumed run keeps its
configuration, except for the options that may change (`RunOptions.MAY_CHANGE`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dni_seq.app.runs.checkpoint import CheckpointError, DamagedCheckpointError, load_checkpoint, write_json
from dni_seq.app.runs.lock import LOCK_NAME
from dni_seq.app.runs.options import flag


class LatestCheckpoint(NamedTuple):
    """The newest valid checkpoint of a run.

    Attributes:
        path: file of the checkpoint.
        content: content of the checkpoint.
        note: why an older checkpoint than the last one is used, as a message for the user; None if the last one is used.
        damaged: damaged files that were skipped.
    """

    path: Path
    content: dict[str, Any]
    note: str | None
    damaged: tuple[Path, ...]


class RunDirectory:
    """The paths of a run's files: metrics.csv, TensorBoard events, config.json, tokenizer, checkpoints, summary, lock."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.last = self.path / "checkpoints" / "last.pt"
        self.previous = self.path / "checkpoints" / "previous.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.summary = self.path / "summary.json"

    def checkpoint(self, name: str) -> Path:
        """Returns the path of the checkpoint "last" or "best"."""
        return {"last": self.last, "best": self.best}[name]

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> RunDirectory:
        """Returns the run that a file RUN_DIR/checkpoints/NAME.pt belongs to.

        Raises:
            ValueError: the file is not in a run directory.
        """
        run = cls(Path(checkpoint).absolute().parent.parent)
        if Path(checkpoint).absolute().parent != run.last.parent or not run.config.is_file():
            raise ValueError(f"{checkpoint} is not a checkpoint in a run directory: give RUN_DIR/checkpoints/NAME.pt")
        return run

    def create(self, config: Mapping[str, Any]) -> None:
        """Creates the directory and writes its config.json.

        Raises:
            OSError: the directory cannot be created or written.
        """
        self.last.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.config, dict(config))

    def newest_checkpoint(self) -> LatestCheckpoint | None:
        """Returns the last checkpoint, or the previous one if the last is damaged or missing. None if the run has neither.

        Raises:
            CheckpointError: all existing checkpoints are damaged, or one was written by a newer version of the program.
        """
        damaged: list[Path] = []
        reasons: list[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                reasons.append(f"{path} is missing")
                continue
            try:
                content = load_checkpoint(path)
            except DamagedCheckpointError as error:
                damaged.append(path)
                reasons.append(str(error))
                continue
            note = f"{'; '.join(reasons)}: resuming from {path}" if reasons else None
            return LatestCheckpoint(path, content, note, tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{'; '.join(reasons)}: no valid checkpoint is left; try --resume {self.best}, or another --run-dir"
            )
        return None

    def set_aside(self, damaged: Collection[Path]) -> None:
        """Renames damaged checkpoints to NAME.damaged, so that saving does not rename them to previous.pt.

        Raises:
            OSError: a file cannot be renamed.
        """
        for path in damaged:
            path.replace(path.with_name(path.name + ".damaged"))

    def refuse_new_run(self, config: Mapping[str, Any]) -> None:
        """Raises a ValueError if a new run with `config` must not start in this directory.

        An entry of `config` that is None is not known yet and is not compared with the directory's config.json.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"--run-dir {self.path} is a file: choose another --run-dir")
        if not self.config.is_file():
            if any(path.name != LOCK_NAME for path in self.path.iterdir()):
                raise ValueError(f"--run-dir {self.path} holds files but no run: choose another --run-dir")
            return
        try:
            saved = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError:  # not UTF-8, or not JSON
            saved = {}
        settled = {name: value for name, value in config.items() if value is not None}
        different = differences(saved, settled)
        if different:
            raise ValueError(
                f"--run-dir {self.path} holds a run with another configuration ({different}): choose another --run-dir"
            )
        raise ValueError(
            f"--run-dir {self.path} holds a run already: add --resume auto to resume it, or choose another --run-dir"
        )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Collection[str] = ()) -> str:
    """Returns a text that lists the options that differ between `saved` and `wanted`, without those in `may_change`."""
    return ", ".join(
        f"{flag(name)} {saved.get(name)} there, {value} here"
        for name, value in wanted.items()
        if name not in may_change and saved.get(name) != value
    )


def check_unused(path: Path) -> None:
    """Raises a ValueError if `path` is a file, or a directory that is not empty. For commands without checkpoints."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"--run-dir {path} is not empty: choose another --run-dir")


def new_run_path(name: str, parent: str | Path = "runs") -> Path:
    """Returns a path that does not exist: `parent`/`name`-DATE-TIME, with a number appended if that path exists."""
    base = Path(parent) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
