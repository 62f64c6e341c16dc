"""Compares runs in a table, as text or Markdown, and in a plot of perplexity over tokens and over seconds.

python scripts/compare_runs.py runs/ptb-none runs/ptb-multi-horizon
    Print a table of the options in which the runs differ, and their scores.
python scripts/compare_runs.py runs/* --markdown comparison.md --png comparison.png
    Also write the table as Markdown and the curves as a picture; needs matplotlib: pip install 'dni-seq[plots]'

Curves are read from the runs' TensorBoard events, so a run may still be in progress. The score of an unfinished run is its
best validation so far. Invalid input prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.output import output_status

CURVE = "valid/perplexity"
AXES: Mapping[str, str] = MappingProxyType({"progress/tokens": "tokens", "progress/seconds": "seconds"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    try:
        runs = [read_run(Path(path)) for path in given.run_dirs]
        rows = table(runs)
        if given.png is not None:
            plot(runs, given.png)
        if given.markdown is not None:
            page = Path(given.markdown)
            picture = None if given.png is None else Path(os.path.relpath(given.png, page.parent)).as_posix()
            page.write_text(as_markdown(rows, picture), encoding="utf-8")
    except (ValueError, OSError) as error:
        return report("compare_runs", error)
    print(as_text(rows))
    return output_status()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(
        prog="compare_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run directories of scripts/train_lm.py")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown, with a link to the plot")
    parser.add_argument("--png", metavar="FILE", help="draw the curves (needs matplotlib)")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Run:
    """The data of a run that is compared.

    Attributes:
        name: name of its directory.
        config: its options.
        curve: validation perplexity by step.
        axes: for each key of `AXES`, its value by step.
        summary: summary.json of a finished run, else empty.
    """

    name: str
    config: dict[str, Any]
    curve: dict[int, float]
    axes: dict[str, dict[int, float]]
    summary: dict[str, Any]


def read_run(path: Path) -> Run:
    """Returns a run read from its directory.

    Raises:
        ValueError: the directory holds no language-model run, or the run has no validation yet.
    """
    run = RunDirectory(path)
    try:
        config = json.loads(run.config.read_text(encoding="utf-8"))
        summary = json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run directory: config.json or summary.json cannot be read") from error
    curves = read_curves(path, [CURVE, *AXES])
    if any(not points for points in curves.values()):
        raise ValueError(
            f"{path} has no validation yet: a language-model run validates after its first epoch or --eval-every steps"
        )
    return Run(path.resolve().name, config, curves[CURVE], {key: curves[key] for key in AXES}, summary)


def read_curves(path: Path, keys: Sequence[str]) -> dict[str, dict[int, float]]:
    """Returns curves as values by step, from all event files of a run. A missing curve is empty."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    there = events.Tags()["scalars"]
    return {key: {event.step: event.value for event in events.Scalars(key)} if key in there else {} for key in keys}


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a heading and one row per run: its name, the options in which the runs differ, and its scores."""
    names = sorted({name for run in runs for name in run.config})
    differing = [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
    scores = ["valid ppl", "test ppl", "tokens", "seconds", "tokens/s", "peak MiB"]
    rows = [["run", *differing, *scores]]
    for run in runs:
        chosen = ["" if run.config.get(name) is None else str(run.config[name]) for name in differing]
        rows.append([run.name, *chosen, *scores_of(run)])
    return rows


def scores_of(run: Run) -> list[str]:
    """Returns perplexities, tokens, seconds, speed and memory as texts; of an unfinished run only what is known."""
    last = max(run.curve)
    tokens, seconds = (run.summary.get(AXES[key], run.axes[key][last]) for key in AXES)
    if not run.summary:
        return [
            f"{min(run.curve.values()):.2f} so far",
            "",
            f"{tokens:,.0f}",
            f"{seconds:,.0f}",
            f"{tokens / seconds:,.0f}",
            "",
        ]
    valid, test = run.summary["valid"]["ppl"], run.summary["test"]["ppl"]
    memory = run.summary["peak_memory_mb"]
    peak = "" if memory is None or math.isnan(memory) else f"{memory:,.0f}"
    return [f"{valid:.2f}", f"{test:.2f}", f"{tokens:,.0f}", f"{seconds:,.0f}", f"{tokens / seconds:,.0f}", peak]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as text with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]], png: str | None) -> str:
    """Returns the table as Markdown, followed by a link to the plot; `png` is relative to the page."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    if png is not None:
        lines += ["", f"![Validation perplexity over tokens and over seconds]({png})"]
    return "\n".join(lines) + "\n"


def plot(runs: Sequence[Run], path: str) -> None:
    """Draws validation perplexity over tokens and over seconds, one line per run.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--png needs matplotlib: pip install 'dni-seq[plots]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for run in runs:
            steps = [step for step in sorted(run.curve) if step in run.axes[key]]
            axes.plot([run.axes[key][s] for s in steps], [run.curve[s] for s in steps], marker=".", label=run.name)
        axes.set(xlabel=label, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.axes[0].set_ylabel("validation perplexity")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
