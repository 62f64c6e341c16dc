"""RunLog: averages the measurements of a run over steps, and writes the averages to metrics.csv and to a tracker.

Measurements stay tensors until a point is written, so a training step does not synchronise with the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dni_seq.app.runs.metrics_file import MetricsFile
from dni_seq.app.runs.tensorboard import TensorBoardTracker, perplexity
from dni_seq.app.runs.trackers import LOGGERS, METRICS, Layout, NoTracker, Tracker
from dni_seq.app.runs.wandb_tracker import WandbTracker

BY_HORIZON = ("synthetic/", "fidelity/")
"""Prefixes of keys that can have a value for each horizon, and that may have no value at some steps."""


class RunLog:
    """Writes scalars of one run to metrics.csv, and scalars, texts and histograms to a tracker.

    `add` collects the measurements of single steps, and `write` writes their averages as one point. The averages are part
    of the checkpoint (`state_dict`), so a resumed run writes the same points as a run that was never stopped.

    Args:
        directory: directory of the run, None to write nothing.
        resumed_at: number of steps already done. Points of later steps, which an earlier session logged, are removed from
            metrics.csv and hidden in TensorBoard.
        written: keys for which an earlier session has logged a point at step `resumed_at`. TensorBoard does not receive
            these points again.
        logger: the tracker, one of `LOGGERS`.
        name: name of the run in the tracker; None for the directory's name.

    Raises:
        ValueError: metrics.csv is damaged, or the tracker cannot start.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | None,
        resumed_at: int = 0,
        written: Collection[str] = (),
        *,
        logger: str = "tensorboard",
        name: str | None = None,
    ) -> None:
        self._tracker: Tracker = NoTracker()
        self._metrics: MetricsFile | None = None
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        if directory is None:
            return
        self._tracker = _open_tracker(logger, directory, resumed_at, written, name)
        try:
            self._metrics = MetricsFile(directory / METRICS, resumed_at)
        except BaseException:  # an open tracker would keep writing from its own thread
            self.close()
            raise

    def add(self, measurements: Mapping[str, Tensor], weight: int | Tensor, skipped: Tensor | None = None) -> None:
        """Adds one step's measurements to the averages.

        Args:
            measurements: values by key, each 0-d, or [N] with one value per horizon. If the key has a prefix in
                `BY_HORIZON`, NaN means "not measured" and is ignored. For other keys NaN makes the average NaN.
            weight: weight of the step, such as its number of tokens; a number or a 0-d tensor.
            skipped: 0-d bool; if True the step is ignored.
        """
        for key, value in measurements.items():
            precise = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            absent = precise.isnan() if key.startswith(BY_HORIZON) else torch.zeros_like(precise, dtype=torch.bool)
            if skipped is not None:
                absent = absent | skipped
            known = ~absent * weight
            total = torch.where(absent, 0, precise) * weight
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            self._weights[key] = self._weights[key] + known if key in self._weights else known

    def mean(self, key: str) -> float:
        """Returns the average of a 0-d measurement since the last point, NaN if there is none. Waits for the device."""
        return float(self._sums[key] / self._weights[key])

    def write(self, step: int) -> None:
        """Writes the averages as the points of `step`. Writes nothing if there is no measurement."""
        self.scalars(step, self.points())

    def points(self) -> dict[str, float]:
        """Returns the averages by key, one key for each horizon, and the perplexity of the loss. Waits for the device."""
        values: dict[str, float] = {}
        for key, total in self._sums.items():
            values |= _by_horizon(key, total / self._weights[key])
        if "train/loss" in self._sums:
            values["train/perplexity"] = perplexity(self.mean("train/loss"))
        return values

    def clear(self) -> None:
        """Resets the averages."""
        self._sums, self._weights = {}, {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values as the points of `step`."""
        if self._metrics is not None:
            self._metrics.add(step, values)
        self._tracker.scalars(step, values)

    def text(self, step: int, key: str, text: str) -> None:
        """Writes `text` verbatim to the tracker."""
        self._tracker.text(step, key, text)

    def paragraph(self, step: int, key: str, text: str) -> None:
        """Writes `text` to the tracker as a paragraph of Markdown."""
        self._tracker.paragraph(step, key, text)

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Writes a histogram of the finite entries of `values` to the tracker."""
        values = values.detach().float()
        self._tracker.histogram(step, key, values[values.isfinite()].cpu())

    def dashboard(self, layout: Layout) -> None:
        """Writes the layout of the tracker's charts."""
        self._tracker.dashboard(layout)

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Writes the options and the software versions of the session that starts at `step` to the tracker."""
        self._tracker.configuration(step, config)

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, str], changed: Mapping[str, Any]) -> None:
        """Adds the run to the tracker's table of runs. Call it once, at the end of the run.

        Args:
            config: the options that affect the training.
            final: headings by key; the last value of each key is a score of the run. Write these values before this call.
            changed: the options whose values are not the defaults.
        """
        self._tracker.hyperparameters(config, final, changed)

    def flush(self) -> None:
        """Writes all pending points. Called before a checkpoint, so that no step of the checkpoint is missing in the log.

        Raises:
            OSError: metrics.csv cannot be written.
        """
        if self._metrics is not None:
            self._metrics.flush()
        self._tracker.flush()

    def close(self) -> None:
        """Writes all pending points and closes metrics.csv and the tracker."""
        try:
            if self._metrics is not None:
                self._metrics.close()
        finally:
            self._tracker.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages collected since the last point."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores the averages of `state_dict` on `device`. Closes the log if an exception is raised.

        Raises:
            ValueError: the shape of an average does not fit the shape of its weight.
        """
        try:
            self._take(state, device)
        # An open writer would keep writing from its own thread.
        except BaseException:
            self.close()
            raise

    def _take(self, state: dict[str, Any], device: torch.device) -> None:
        for key, total in state["sums"].items():
            weight = state["weights"][key]
            if total.shape != weight.shape or (total.dim() and not key.startswith(BY_HORIZON)):
                raise ValueError(
                    f"the average of {key} has shape {list(total.shape)} and its weight has shape {list(weight.shape)}"
                )
        self._sums = {key: total.to(device) for key, total in state["sums"].items()}
        self._weights = {key: weight.to(device) for key, weight in state["weights"].items()}


def _open_tracker(logger: str, directory: Path, resumed_at: int, written: Collection[str], name: str | None) -> Tracker:
    """Returns a new tracker; the arguments are those of `RunLog`.

    Raises:
        ValueError: `logger` is not a tracker's name, or the tracker cannot start.
    """
    if logger == "tensorboard":
        return TensorBoardTracker(directory, resumed_at, written)
    if logger == "wandb":
        return WandbTracker(directory, name or directory.absolute().name)
    if logger == "none":
        return NoTracker()
    raise ValueError(f"logger must be one of {', '.join(LOGGERS)}, got {logger!r}")


def _by_horizon(key: str, average: Tensor) -> dict[str, float]:
    """Returns the points of an average by key.

    A 0-d average is one point. An average [N] is one point for each horizon n, with the key `key`_n, and their mean with
    the key `key`. The keys of fidelity have no mean. Horizons without a measurement have no point.
    """
    if average.dim() == 0:
        return {} if average.isnan() else {key: float(average)}
    values = {n: value for n, value in enumerate(average.tolist(), start=1) if not math.isnan(value)}
    if key.startswith("fidelity/"):
        return {f"{key}_{n}": value for n, value in values.items()}
    points = {key: sum(values.values()) / len(values)} if values else {}
    if len(average) > 1:
        points |= {f"{key}/horizon_{n}": value for n, value in values.items()}
    return points
