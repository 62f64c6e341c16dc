"""A run's directory: its files by name, and who may write there.

A run directory belongs to one configuration. A new run never enters the directory of another one, and a run that goes on
keeps its configuration but for the options that may change.
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
    """The newest whole checkpoint of a run.

    Attributes:
        content: what it holds.
        note: why it is not the last one that was written, as text for the user; None where it is.
        damaged: files that were passed over.
    """

    content: dict[str, Any]
    note: str | None
    damaged: tuple[Path, ...]


class RunDirectory:
    """The files of a run: TensorBoard events, `config.json`, the tokenizer, checkpoints, `summary.json`, `lock`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.last = self.path / "checkpoints" / "last.pt"
        self.previous = self.path / "checkpoints" / "previous.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.summary = self.path / "summary.json"

    def checkpoint(self, name: str) -> Path:
        """The path of the checkpoint "last" or "best"."""
        return {"last": self.last, "best": self.best}[name]

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> RunDirectory:
        """The run that a file RUN_DIR/checkpoints/NAME.pt belongs to.

        Raises:
            ValueError: the file is not in a run directory.
        """
        run = cls(Path(checkpoint).absolute().parent.parent)
        if Path(checkpoint).absolute().parent != run.last.parent or not run.config.is_file():
            raise ValueError(f"{checkpoint} is not in the checkpoints of a run directory, RUN_DIR/checkpoints/NAME.pt")
        return run

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the directory and write its configuration.

        Raises:
            OSError: as from the file system.
        """
        self.last.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.config, dict(config))

    def newest_checkpoint(self) -> LatestCheckpoint | None:
        """The last checkpoint, or the one before where that is damaged or missing; None where none was written yet.

        Raises:
            CheckpointError: all that are there are damaged, or one is of a newer version.
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
            note = f"{'; '.join(reasons)}: going on from {path}" if reasons else None
            return LatestCheckpoint(content, note, tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{'; '.join(reasons)}: no whole one is left; try --resume {self.best}, or another --run-dir"
            )
        return None

    def set_aside(self, damaged: Collection[Path]) -> None:
        """Rename damaged checkpoints to NAME.damaged, so that they do not take the place of whole ones.

        Raises:
            OSError: as from the file system.
        """
        for path in damaged:
            path.replace(path.with_name(path.name + ".damaged"))

    def refuse_new_run(self, config: Mapping[str, Any]) -> None:
        """Raise a ValueError, in one line that says what to do, where a new run with `config` must not begin.

        Values of None in `config` are not settled yet and are not compared.
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
            f"--run-dir {self.path} holds a run already: add --resume auto to go on with it, or choose another --run-dir"
        )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Collection[str] = ()) -> str:
    """The options of `wanted` that `saved` has otherwise, as text, but for those in `may_change`; empty where none is."""
    return ", ".join(
        f"{flag(name)} {saved.get(name)} there, {value} here"
        for name, value in wanted.items()
        if name not in may_change and saved.get(name) != value
    )


def check_unused(path: Path) -> None:
    """Raise a ValueError where a run that keeps no checkpoints cannot begin: anywhere but in a new or empty directory."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"--run-dir {path} is not empty: choose another one")


def new_run_path(name: str, parent: str | Path = "runs") -> Path:
    """A path that does not exist yet: `parent`/`name`-DATE-TIME, with a number behind where that is taken."""
    base = Path(parent) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
