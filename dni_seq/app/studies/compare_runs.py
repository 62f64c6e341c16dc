"""Compares runs in a table, as text or Markdown, and in a plot of perplexity over tokens, CPU seconds and seconds.

python scripts/compare_runs.py runs/ptb-none runs/ptb-multi-horizon
    Print a table of the options in which the runs differ, and their scores.
python scripts/compare_runs.py runs/* --markdown comparison.md --png comparison.png
    Also write the table as Markdown and the curves as a picture; needs matplotlib: pip install 'dni-seq[plots]'

Runs of different lengths are compared at two points: at the largest number of tokens that all runs have reached, and at the
largest number of CPU seconds that all runs have reached. The table has each run's perplexity at the last validation at or
before the point.

Curves are read from the runs' TensorBoard events and metrics.csv, so a run may still be in progress. The score of an
unfinished run is its best validation so far. A path without a run is skipped with a note on stderr. If no run is left, or
if other input is not valid, the command prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dni_seq.app.runs.options import OneLineParser, program, report
from dni_seq.app.runs.output import output_status
from dni_seq.app.studies.compared_runs import Axis, Run, common_point, differing_options, read_run

_PROG = "compare_runs"

AXES: Mapping[str, Axis] = MappingProxyType(
    {
        "tokens": lambda validation: validation.tokens,
        "CPU seconds": lambda validation: validation.cpu_seconds,
        "seconds": lambda validation: validation.seconds,
    }
)
"""The horizontal axes of the plot, each with a function from a validation to its place on the axis."""

POINTS: Mapping[str, tuple[str, int]] = MappingProxyType({"tokens": ("tokens", 0), "CPU seconds": ("CPU s", 1)})
"""The axes on which runs are compared at a common point, each with its unit in the table and its decimal places."""

EXPLANATION = '"ppl at" is of the last validation at or before that point, never of one after it; "(at ...)" is its place'

TEXT_OPTIONS = ("dataset", "data_file", "tokenizer", "vocab_size")
"""The options that decide what a token is. Tokens and perplexities of runs are comparable if these options are equal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    try:
        runs = read_runs([Path(path) for path in given.run_dirs])
        rows, remarks = table(runs), notes(runs)
        if given.png is not None:
            plot(runs, given.png)
        if given.markdown is not None:
            page = Path(given.markdown)
            picture = None if given.png is None else Path(os.path.relpath(given.png, page.parent)).as_posix()
            page.write_text(as_markdown(rows, remarks, picture), encoding="utf-8")
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    print(as_text(rows), *remarks, sep="\n")
    return output_status()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run directories of scripts/train_lm.py")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown, with a link to the plot")
    parser.add_argument("--png", metavar="FILE", help="draw the curves (needs matplotlib)")
    return parser.parse_args(arguments)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Returns the runs in directories. Skips a path without a run, with a note on stderr.

    Raises:
        ValueError: none of the paths holds a run.
    """
    runs, skipped = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except ValueError as error:
            skipped.append(str(error))
    if not runs:
        raise ValueError("; ".join(skipped))
    for reason in skipped:
        print(f"{program(_PROG)}: skipped: {reason}", file=sys.stderr)
    return runs


def names_of(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run: the name of its directory, or its path if several directories have that name."""
    names = [run.path.resolve().name for run in runs]
    count = Counter(names)
    return [name if count[name] == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a heading and one row per run: its name, the options in which the runs differ, and its scores."""
    differing = differing_options(runs)
    points = {name: point for name in POINTS if (point := common_point(runs, AXES[name])) is not None}
    at = [f"ppl at {_number(point, name)} {POINTS[name][0]}" for name, point in points.items()]
    rows = [["run", *differing, "valid ppl", "test ppl", *at, "tokens", "seconds", "CPU s", "tokens/s", "peak MiB"]]
    for i, (name, run) in enumerate(zip(names_of(runs), runs, strict=True)):
        chosen = ["" if values[i] is None else str(values[i]) for values in differing.values()]
        reached = [score_at(run, name, point) for name, point in points.items()]
        rows.append([name, *chosen, *scores(run), *reached, *costs(run)])
    return rows


def scores(run: Run) -> list[str]:
    """Returns validation and test perplexity as texts. For an unfinished run: the best validation so far, and no test."""
    if not run.summary:
        return [f"{min(each.perplexity for each in run.validations):.2f} so far", ""]
    return [f"{run.summary[split]['ppl']:.2f}" for split in ("valid", "test")]


def score_at(run: Run, name: str, point: float) -> str:
    """Returns the perplexity of the last validation at or before `point` on an axis; empty without such a validation."""
    axis = AXES[name]
    found = run.at(axis, point)
    place = None if found is None else axis(found)
    if found is None or place is None:
        return ""
    return f"{found.perplexity:.2f}" + ("" if place == point else f" (at {_number(place, name)})")


def costs(run: Run) -> list[str]:
    """Returns tokens, seconds, CPU seconds, speed and memory as texts, empty if unknown."""
    last = run.validations[-1]
    tokens, seconds = run.summary.get("tokens", last.tokens), run.summary.get("seconds", last.seconds)
    cpu_seconds, memory = run.summary.get("process_seconds", last.cpu_seconds), run.summary.get("peak_memory_mb")
    rest = ["" if number is None or math.isnan(number) else f"{number:,.0f}" for number in (cpu_seconds, memory)]
    return [f"{tokens:,.0f}", f"{seconds:,.0f}", rest[0], f"{tokens / seconds:,.0f}", rest[1]]


def _number(place: float, axis: str) -> str:
    """Returns a place on an axis as text."""
    return f"{place:,.{POINTS[axis][1]}f}"


def notes(runs: Sequence[Run]) -> list[str]:
    """Returns remarks on the table: how runs are compared, and why some runs cannot be compared."""
    different = [name for name in differing_options(runs) if name in TEXT_OPTIONS]
    remarks = [EXPLANATION] if len(runs) > 1 else []
    if different:
        options = ", ".join(different)
        remarks.append(f"the runs differ in {options}: their tokens and perplexities are not comparable")
    return remarks


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as text with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]], remarks: Sequence[str], png: str | None) -> str:
    """Returns the table as Markdown, followed by the remarks and a link to the plot; `png` is relative to the page."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    for remark in remarks:
        lines += ["", remark]
    if png is not None:
        lines += ["", f"![Validation perplexity over tokens, CPU seconds and seconds]({png})"]
    return "\n".join(lines) + "\n"


def plot(runs: Sequence[Run], path: str) -> None:
    """Draws validation perplexity over every axis of `AXES` that is known, one line per run.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--png needs matplotlib: pip install 'dni-seq[plots]'") from error
    known = {label: axis for label, axis in AXES.items() if common_point(runs, axis) is not None}
    figure = Figure(figsize=(5.5 * len(known), 4.2), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for panel, (label, axis) in zip(panels, known.items(), strict=True):
        for name, run in zip(names_of(runs), runs, strict=True):
            line = [(place, each.perplexity) for each in run.validations if (place := axis(each)) is not None]
            panel.plot([place for place, _ in line], [score for _, score in line], marker=".", label=name)
        panel.set(xlabel=label, yscale="log")
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].set_ylabel("validation perplexity")
    panels[0].legend()
    figure.savefig(path, dpi=120)
