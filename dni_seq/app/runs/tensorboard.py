"""What a run reports to TensorBoard: the keys with their meaning, the dashboard, averages over steps, and the writer.

Measurements stay tensors until a point is written, so that a step never waits for a GPU to hand over a number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dni_seq.app.runs.crash_report import versions

KEYS = MappingProxyType(
    {
        "train/loss": "cross-entropy of the steps since the last point, nats a token",
        "train/perplexity": "exp(train/loss)",
        "train/skipped": "steps left out so far for a NaN or an infinity in the loss or the gradient",
        "valid/loss": "cross-entropy of the validation split, nats a token",
        "valid/perplexity": "exp(valid/loss)",
        "valid/bpc": "bits a character of the validation split's text",
        "valid/word_perplexity": "perplexity a word (line ends are words) of the validation split's text",
        "test/loss": "cross-entropy of the test split with the best checkpoint, nats a token",
        "test/perplexity": "exp(test/loss)",
        "test/bpc": "bits a character of the test split's text",
        "test/word_perplexity": "perplexity a word (line ends are words) of the test split's text",
        "best/valid_perplexity": "perplexity of the validation split with the best checkpoint, at the end of the run",
        "best/valid_bpc": "bits a character of the validation split's text, likewise",
        "synthetic/loss": "what the synthesizer learns by: regression in its own unit (normalised: 1 is no better "
        "than zero), or the loss of its model of the steps ahead",
        "synthetic/cosine": "cosine between predicted and target gradient; /horizon_n for the n-th window ahead",
        "synthetic/r2": "1 - squared error / squared target; /horizon_n for the n-th window ahead",
        "synthetic/injected_ratio": "norm of the injected message (scaled) over the norm of the window's own gradient there",
        "synthetic/scale": "share of the message that is injected: c, discount and reliability; /horizon_n likewise",
        "synthetic/skipped": "windows so far whose message or regression was left out: not finite, or far too large",
        "fidelity/cosine_n": "cosine between the message of horizon n and the exact gradient of the n-th window ahead",
        "fidelity/r2_n": "1 - squared error / squared exact gradient, of the same",
        "gradient/norm": "norm of the parameters' gradient before clipping",
        "gradient/synthesizer_norm": "norm of the synthesizer's gradient before clipping",
        "state/cell_rms": "root mean square of the LSTM's cells behind the latest window",
        "state/cell_max": "largest absolute value of an LSTM's cell behind the latest window",
        "progress/tokens": "tokens trained on so far, at each validation",
        "progress/seconds": "time of the run so far, over all sessions, at each validation, its own time included",
        "speed/tokens_per_second": "tokens trained on a second, since the last point",
        "memory/peak_mb": "peak memory of the process, or of the GPU where one is used, MiB",
    }
)
"""Every curve and its meaning; the horizontal axis is the number of training steps."""

OTHER_KEYS = MappingProxyType(
    {
        "config": "text: the run's options as a table",
        "sample/best": "text: what the model writes whenever a validation is the best so far",
        "sample/regular": "text: the same every --sample-every steps",
        "messages/horizon_n": "histogram: the synthesizer's messages at the latest state, raw, every 1,000 steps",
    }
)
"""What is no curve."""

Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""Categories of charts; a chart is a title and the keys it shows, each the beginning of a key as a regular expression."""

LAYOUT: Layout = MappingProxyType(
    {
        "perplexity": {
            "training and validation": ["train/perplexity", "valid/perplexity"],
            "validation: truncated BPTT against synthetic gradients, a line a run": ["valid/perplexity"],
        },
        "synthetic gradients": {
            "cosine with exact gradients, by horizon": [r"fidelity/cosine_\d+"],
            "R² against exact gradients, by horizon": [r"fidelity/r2_\d+"],
            "share injected, by horizon": ["synthetic/scale"],
            "injected over own gradient": ["synthetic/injected_ratio"],
        },
        "stability": {
            "gradient norms": ["gradient/norm", "gradient/synthesizer_norm"],
            "size of cells": ["state/cell_rms", "state/cell_max"],
        },
        "resources": {
            "tokens a second": ["speed/tokens_per_second"],
            "peak memory, MiB": ["memory/peak_mb"],
        },
    }
)
"""The dashboard of a language-model run: TensorBoard's tab "Custom Scalars"."""

FINAL = ("best/valid_perplexity", "best/valid_bpc", "test/perplexity", "test/bpc", "speed/tokens_per_second")
"""The curves whose last points are a run's scores in TensorBoard's tab "HParams"."""


BY_HORIZON = ("synthetic/", "fidelity/")
"""Keys that have a value for each horizon, or none at some steps."""


class RunLog:
    """Scalars and texts of one run, in TensorBoard's event files.

    `add` collects measurements of single steps; `write` makes one point of their averages. The averages belong to the
    checkpoint (`state_dict`), so that a resumed run writes the points of a run that never stopped.

    Args:
        directory: where the event files go, None for a rank whose log nobody keeps.
        resumed_at: number of steps that are already done; what an earlier session logged behind them is hidden by
            TensorBoard and its readers.
    """

    def __init__(self, directory: Path | None, resumed_at: int = 0):
        self._writer: Any = _NullWriter()
        if directory is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=resumed_at + 1)
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, measurements: Mapping[str, Tensor], weight: int, skipped: Tensor | None = None) -> None:
        """Collect one step's measurements, each 0-d or [N] by horizon, with the weight of its tokens.

        What a synthesizer did not do at a step is NaN there, and counts for nothing; a loss that is NaN stays one. A step
        that was left out, `skipped` (0-d bool), counts for nothing.
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
        """The average of a 0-d measurement since the last point, NaN where there is none; this waits for the device."""
        return float(self._sums[key] / self._weights[key])

    def write(self, step: int) -> None:
        """Write the averages as the points of `step`; without a measurement, nothing."""
        for key, total in self._sums.items():
            self.scalars(step, _by_horizon(key, total / self._weights[key]))
        if "train/loss" in self._sums:
            self.scalars(step, {"train/perplexity": perplexity(self.mean("train/loss"))})

    def clear(self) -> None:
        """Begin new averages."""
        self._sums, self._weights = {}, {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values as the points of `step`."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, key: str, text: str) -> None:
        """Write `text` as it is, line ends included (TensorBoard renders Markdown)."""
        self._writer.add_text(key, "\n".join("    " + line for line in text.split("\n")), step)

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Write the distribution of `values`, those that are finite."""
        values = values.detach().float()
        self._writer.add_histogram(key, values[values.isfinite()].cpu(), step)

    def dashboard(self, layout: Layout) -> None:
        """Lay out the charts of TensorBoard's tab "Custom Scalars"."""
        charts = {
            category: {title: ["Multiline", list(keys)] for title, keys in group.items()}
            for category, group in layout.items()
        }
        self._writer.add_custom_scalars(charts)

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Write the options of the session that begins at `step` as a table, with what versions it runs on."""
        rows = [f"| {name} | {'' if value is None else value} |" for name, value in {**config, **versions()}.items()]
        self._writer.add_text("config", "\n".join(["| option | value |", "|---|---|", *rows]), step)

    def hyperparameters(self, config: Mapping[str, Any], final: Sequence[str]) -> None:
        """List the run in TensorBoard's tab "HParams", once, at its end.

        `SummaryWriter.add_hparams` would put it into a run of its own, or into a second event file of this one.

        Args:
            config: the options that decide what is learned; those that are None are left out.
            final: keys whose last points are the run's scores; write them before.
        """
        from torch.utils.tensorboard.summary import hparams

        # TensorBoard shows truth values as 0.0 and 1.0 unless they are texts.
        chosen = {name: str(value) if isinstance(value, bool) else value for name, value in config.items()}
        file: Any = self._writer.file_writer
        for summary in hparams(chosen, dict.fromkeys(final, 0.0)):
            file.add_summary(summary)

    def flush(self) -> None:
        """Hand all points to the file, so that a checkpoint never knows of steps that the log does not."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the event file."""
        self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The half-filled averages."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with the averages of `state_dict`, on `device`; where they are none, the log is closed.

        Raises:
            ValueError: they are none.
        """
        try:
            self._take(state, device)
        # A writer that nobody closes goes on writing from a thread of its own.
        except BaseException:
            self.close()
            raise

    def _take(self, state: dict[str, Any], device: torch.device) -> None:
        for key, total in state["sums"].items():
            weight = state["weights"][key]
            if total.shape != weight.shape or (total.dim() and not key.startswith(BY_HORIZON)):
                raise ValueError(f"the average of {key} is of shape {list(total.shape)}, its weight {list(weight.shape)}")
        self._sums = {key: total.to(device) for key, total in state["sums"].items()}
        self._weights = {key: weight.to(device) for key, weight in state["weights"].items()}


class _NullWriter:
    """A writer that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats a token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU's tensors where `device` is one, else the process's resident memory.

    NaN where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _by_horizon(key: str, average: Tensor) -> dict[str, float]:
    """The points of an average: one for a 0-d one; for [N] one a horizon, and their mean as `key`.

    Fidelity is measured horizon by horizon only: `fidelity/r2_n`. Horizons without a measurement have no point.
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
