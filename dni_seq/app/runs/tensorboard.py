"""TensorBoard output of a run: the keys with their meaning, the dashboard, and the writer."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dni_seq.app.runs.crash_report import versions
from dni_seq.app.runs.trackers import Layout

KEYS = MappingProxyType(
    {
        "Perplexity/train": "train/perplexity again, in the group that TensorBoard shows first",
        "Perplexity/valid": "valid/perplexity again, in the group that TensorBoard shows first",
        "train/loss": "mean cross-entropy since the last point, nats per token",
        "train/perplexity": "exp(train/loss)",
        "train/skipped": "steps skipped so far because the loss or the gradient held a NaN or an infinity",
        "train/lr": "learning rate of the model's next update, if it is not constant",
        "train/updates": "updates of the model so far, if --accumulate is above 1",
        "valid/loss": "cross-entropy of the validation split, nats per token",
        "valid/perplexity": "exp(valid/loss)",
        "valid/bpc": "bits per character of the validation split's text",
        "valid/word_perplexity": "perplexity per word of the validation split's text; line ends count as words",
        "test/loss": "cross-entropy of the test split with the best checkpoint, nats per token",
        "test/perplexity": "exp(test/loss)",
        "test/bpc": "bits per character of the test split's text",
        "test/word_perplexity": "perplexity per word of the test split's text; line ends count as words",
        "synthetic/loss": "loss of the synthesizer: regression in its own unit (normalised: 1 is no better than a zero "
        "message), or the loss of its future model",
        "synthetic/cosine": "cosine between message and target; /horizon_n for the n-th future window",
        "synthetic/r2": "1 - squared error / squared target of the message; /horizon_n for the n-th future window",
        "synthetic/injected_ratio": "norm of the injected message over that of the window's own gradient at its first state",
        "synthetic/scale": "injected share of the message, c times discount and automatic scale; /horizon_n as above",
        "synthetic/skipped": "windows so far whose message or regression was skipped: not finite, or far too large",
        "fidelity/cosine_n": "cosine between the message of horizon n and the exact gradient of the n-th future window",
        "fidelity/r2_n": "R² of the message of horizon n, 1 - squared error / squared exact gradient",
        "fidelity/parameters_cosine": "cosine between the parameters' gradient and that of full BPTT over the next "
        "windows: at least 8, and 40 steps",
        "gradient/norm": "norm of the parameters' gradient before clipping",
        "gradient/synthesizer_norm": "norm of the synthesizer's gradient before clipping",
        "state/cell_rms": "root mean square of the LSTM's cell state after the latest window",
        "state/cell_max": "largest absolute value in the LSTM's cell state after the latest window",
        "progress/tokens": "tokens trained on so far, written at each validation",
        "progress/seconds": "time of the run so far over all sessions, validation included, written at each validation",
        "progress/process_seconds": "CPU time of the process so far over all sessions, written at each validation",
        "speed/tokens_per_second": "training tokens per second of this session",
        "memory/peak_mb": "peak memory of the process, or of the GPU if one is used, MiB",
    }
)
"""Meaning and unit of every curve. The horizontal axis is the number of training steps."""

OTHER_KEYS = MappingProxyType(
    {
        "about/method": "text: what is trained by which gradient in this run, in one sentence",
        "about/result": "text: the scores of the best checkpoint, written at the end of the run",
        "config": "text: the values in force of the run's options, as a table",
        "sample/best": "text: a sample from the model at each best validation so far",
        "sample/regular": "text: a sample from the model every --sample-every steps",
        "messages/horizon_n": "histogram: the synthesizer's unscaled messages at the latest state, every 1,000 steps",
    }
)
"""Meaning of every entry that is not a curve."""

FIRST = MappingProxyType(
    {
        "train/perplexity": "Perplexity/train",
        "valid/perplexity": "Perplexity/valid",
        "task/length": "Length/solved",
        "task/training_length": "Length/training",
    }
)
"""A second key for the most important curves, which are written under both keys. TensorBoard sorts groups of keys by name,
capital letters first, and opens the first two groups. An event file can neither pin a chart nor order the groups, and the
names of the first keys are a promise."""

LAYOUT: Layout = MappingProxyType(
    {
        "perplexity": {
            "training and validation": ["train/perplexity", "valid/perplexity"],
            "validation, one line per run": ["valid/perplexity"],
        },
        "synthetic gradients": {
            "loss of the synthesizer": ["synthetic/loss"],
            "norm of the synthesizer's gradient": ["gradient/synthesizer_norm"],
            "cosine with targets, by horizon": ["synthetic/cosine"],
            "cosine with exact gradients, by horizon": [r"fidelity/cosine_\d+"],
            "R² against exact gradients, by horizon": [r"fidelity/r2_\d+"],
            "share injected, by horizon": ["synthetic/scale"],
            "injected message over own gradient": ["synthetic/injected_ratio"],
        },
        "estimator": {"cosine of the parameters' gradient with full BPTT": ["fidelity/parameters_cosine"]},
        "stability": {
            "learning rate": ["train/lr"],
            "gradient norm": ["gradient/norm"],
            "size of LSTM cells": ["state/cell_rms", "state/cell_max"],
        },
        "resources": {
            "tokens per second": ["speed/tokens_per_second"],
            "peak memory, MiB": ["memory/peak_mb"],
        },
    }
)
"""The dashboard of a language-model run in TensorBoard's tab "Custom Scalars". `dashboard.charts` skips the charts of keys
that a run does not write. A run writes either all keys of a chart or no key of it: TensorBoard joins the layouts of several
runs, and would show two charts of one title if the keys in the two layouts differed."""

FINAL: Mapping[str, str] = MappingProxyType(
    {
        "valid/perplexity": "valid ppl (last)",
        "test/perplexity": "test ppl (best)",
        "valid/bpc": "valid bpc (last)",
        "test/bpc": "test bpc (best)",
        "speed/tokens_per_second": "tokens/s",
    }
)
"""Headings in TensorBoard's tab "HParams" by key; the last value of a key is a score of the run. TensorBoard takes scores
only from curves. The last value of a key in `valid/` is from the last validation, that in `test/` from the best
checkpoint."""

LEADING = ("synthesizer", "bptt", "lr", "model")
"""The options in the first four columns of the tab "HParams". The tab shows five columns until the user ticks others."""

OTHERS = "others"
"""The name of the fifth column: the other options whose values are not the defaults, as text."""


class TensorBoardTracker:
    """Writes curves, texts and histograms to TensorBoard's event files.

    Args:
        directory: directory of the event files.
        resumed_at: number of steps already done. TensorBoard hides points of later steps, which an earlier session logged.
        written: keys for which an earlier session has logged a point at step `resumed_at`. `scalars` does not write these
            points again.
    """

    def __init__(self, directory: Path, resumed_at: int = 0, written: Collection[str] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=resumed_at + 1)
        self._written = {(key, resumed_at) for key in written}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values as the points of `step`."""
        for key, value in values.items():
            for name in (key, FIRST.get(key)):
                if name is not None and (name, step) not in self._written:
                    self._writer.add_scalar(name, value, step)

    def text(self, step: int, key: str, text: str) -> None:
        """Writes `text` as a Markdown code block: TensorBoard renders Markdown, and a code block is shown verbatim."""
        self._writer.add_text(key, "\n".join("    " + line for line in text.split("\n")), step)

    def paragraph(self, step: int, key: str, text: str) -> None:
        """Writes `text` as a paragraph of Markdown."""
        self._writer.add_text(key, text, step)

    def histogram(self, step: int, key: str, values: Tensor) -> None:
        """Writes a histogram of `values`."""
        self._writer.add_histogram(key, values, step)

    def dashboard(self, layout: Layout) -> None:
        """Writes the layout of TensorBoard's tab "Custom Scalars"."""
        charts = {
            category: {title: ["Multiline", list(keys)] for title, keys in group.items()}
            for category, group in layout.items()
        }
        self._writer.add_custom_scalars(charts)

    def configuration(self, step: int, config: Mapping[str, Any]) -> None:
        """Writes the options and the software versions of the session that starts at `step` as a table."""
        rows = [f"| {name} | {'' if value is None else value} |" for name, value in {**config, **versions()}.items()]
        self._writer.add_text("config", "\n".join(["| option | value |", "|---|---|", *rows]), step)

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, str], changed: Mapping[str, Any]) -> None:
        """Adds the run to TensorBoard's tab "HParams"; see `RunLog.hyperparameters`.

        `SummaryWriter.add_hparams` is not used, because it creates a separate run or a second event file for this run.
        """
        from tensorboard.plugins.hparams.api_pb2 import HParamInfo
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        others = " ".join(f"{name}={_in_short(name, value)}" for name, value in changed.items() if name not in LEADING)
        headings = _columns({**config, OTHERS: others or "none"})
        # Bools are written as texts. TensorBoard would show them as 0.0 and 1.0.
        chosen = {name: str(value) if isinstance(value, bool) else value for name, (_, value) in headings.items()}
        experiment, start, end = hparams(chosen, dict.fromkeys(final, 0.0))
        # TensorBoard reads the list of options of only one run in a directory, so every run lists all options.
        plugin = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        absent = [HParamInfo(name=name, type="DATA_TYPE_STRING") for name, value in chosen.items() if value is None]
        data.experiment.hparam_infos.extend(absent)
        for info in data.experiment.hparam_infos:
            info.display_name = headings[info.name][0]
            # TensorBoard lists the options with `differs` before the others, next to the first columns.
            info.differs = info.display_name in (*LEADING, OTHERS, *changed)
        for info in data.experiment.metric_infos:
            info.display_name = final[info.name.tag]
        plugin.content = data.SerializeToString()
        file: Any = self._writer.file_writer
        for summary in (experiment, start, end):
            file.add_summary(summary)

    def flush(self) -> None:
        """Writes all pending points to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Writes all pending points and closes the event file."""
        self._writer.close()


def keys_at(directory: Path, step: int) -> set[str]:
    """Returns the keys of the scalars that have a point at `step` in a run's event files. Reads all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {key for key in events.Tags()["scalars"] if any(event.step == step for event in events.Scalars(key))}


def _columns(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Returns the heading and the value of each column of "HParams" by the column's name.

    TensorBoard sorts columns by name, digits before letters. So the names of the first five columns begin with a digit.
    """
    first = {name: f"{place} {name}" for place, name in enumerate((*LEADING, OTHERS), start=1)}
    return {first.get(name, name): (name, value) for name, value in config.items()}


def _in_short(name: str, value: Any) -> Any:
    """Returns the value of an option. Of a path of a text, returns the file name only."""
    return Path(value).name if name.endswith("_file") else value


def perplexity(loss: float) -> float:
    """Returns exp(loss) for a loss in nats per token; infinity if it exceeds the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak memory in MiB: for a CUDA device that of its tensors, else the resident memory of the process.

    Returns NaN on Windows, which does not report the peak of the resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
