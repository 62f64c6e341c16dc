"""Trackers, which receive the curves of a run: the choices of `--logger`, and the interface of a tracker.

To add a tracker, write a class with the methods of `Tracker`, and add its name to `LOGGERS`, its package to `check_logger`,
and a line to `run_log._open_tracker`. This module does not import torch, because the options, which are parsed before torch
is imported, need the names of the trackers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

LOGGERS = ("tensorboard", "wandb", "none")
"""The trackers by name. Every run writes metrics.csv, with "none" too."""

METRICS = "metrics.csv"
"""Name of the file in a run's directory that holds its curves, see `metrics_file`."""

LOGGER_HELP = "where curves go besides metrics.csv; wandb needs the extra wandb"
"""What `--logger` does, for `--help`."""

Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""Charts by category and title. A chart lists the keys that it shows, as regular expressions that match a key's start."""


class Tracker(Protocol):
    """The interface of a tracker. `RunLog` sends it everything that a run logs; metrics.csv is written apart."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values as the points of `step`."""

    def text(self, step: int, key: str, text: str) -> None:
        """Logs `text` verbatim."""

    def paragraph(self, step: int, key: str, text: str) -> None:
        """Logs `text` as a paragraph of Markdown."""

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Logs a histogram of `values`, finite and on the CPU."""

    def dashboard(self, layout: Layout) -> None:
        """Lays out the charts."""

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Logs the options and the versions of the session that starts at `step`."""

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, str], changed: Mapping[str, Any]) -> None:
        """Adds the finished run to a table of runs; see `RunLog.hyperparameters`."""

    def flush(self) -> None:
        """Writes all pending points."""

    def close(self) -> None:
        """Writes all pending points and closes the tracker."""


class NoTracker:
    """Receives everything and keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def text(self, step: int, key: str, text: str) -> None:
        """Does nothing."""

    def paragraph(self, step: int, key: str, text: str) -> None:
        """Does nothing."""

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Does nothing."""

    def dashboard(self, layout: Layout) -> None:
        """Does nothing."""

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Does nothing."""

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, str], changed: Mapping[str, Any]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def check_logger(name: str) -> None:
    """Checks that the package of a tracker is installed. Call this before anything is written.

    Raises:
        ValueError: the package is not installed; the message says what to install.
    """
    install = {"tensorboard": "tensorboard", "wandb": "'dni-seq[wandb]'"}
    if name in install and find_spec(name) is None:
        raise ValueError(f"--logger {name} needs the package {name}: pip install {install[name]}, or choose --logger none")


def logger_change(checkpoint: Mapping[str, Any] | None, logger: str) -> str | None:
    """Returns a message for the user if a resumed run changes its logger; None if the logger stays the same.

    Args:
        checkpoint: content of the checkpoint to resume from, None for a new run.
        logger: the logger of this session.
    """
    if checkpoint is None:
        return None
    before = checkpoint["config"].get("logger", "tensorboard")  # runs of older versions have no such option
    if before == logger:
        return None
    there = "in metrics.csv alone" if before == "none" else f"in {before} and metrics.csv"
    return f"--logger {logger} from here on; earlier points stay {there}"
