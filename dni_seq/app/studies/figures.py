"""Draws the curves of the study of synthetic gradients from its recorded lines. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dni_seq.app.studies.tables import COLUMNS, Line, columns_of, in_order, is_text, latest, title

COLORS = MappingProxyType(dict(zip(COLUMNS, ("#4c4c4c", "#d95f02", "#e6ab02", "#1b9e77", "#7570b3"), strict=True)))

POINTS = 400
"""Number of points of a drawn curve."""

Curve = list[tuple[float, float]]


def draw_curves(lines: list[Line], base: Path) -> list[Path]:
    """Draws one picture per task and horizontal axis, `base`-NAME.png, and returns their paths.

    A picture has a panel for each T, and a panel has a line for each column of the study. A line is the mean over seeds; the
    band around it reaches from the smallest to the largest value.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("curves need matplotlib: pip install 'dni-seq[plots]'; the tables were written") from error
    drawn = []
    found = latest(line for line in lines if line["part"] == "table1")
    for name in sorted(in_order(map(title, found))):
        of_task = [line for line in found if title(line) == name]
        for axis, curve_of in axes_of(of_task[0]).items():
            widths = sorted({line["bptt"] for line in of_task})
            figure = Figure(figsize=(1.2 + 3.4 * len(widths), 3.4), layout="constrained")
            for place, bptt in enumerate(widths, start=1):
                panel = figure.add_subplot(1, len(widths), place)
                panel.set(title=f"T = {bptt}", xlabel=axis)
                draw_panel(panel, [line for line in of_task if line["bptt"] == bptt], curve_of, columns_of(of_task))
                if place == 1:
                    panel.set_ylabel("validation bits per character" if is_text(of_task[0]) else "length solved")
                    panel.legend(frameon=False, fontsize="small")
            words = f"{name} {axis}".replace("(", " ").replace(")", " ").replace(",", " ")
            path = base.with_name("-".join([base.name, *words.split()]) + ".png")
            # Without the date and the version of matplotlib in the file, the same lines give the same file.
            figure.savefig(path, dpi=110, metadata={"Software": None})
            drawn.append(path)
    return drawn


def axes_of(line: Line) -> dict[str, Callable[[Line], Curve]]:
    """Returns the horizontal axes of a line's task by name, each with a function from a line to its curve."""
    if is_text(line):
        return {
            "tokens": lambda line: [(tokens, bpc) for tokens, _, _, bpc in line["curve"] if bpc is not None],
            "CPU seconds": lambda line: [(seconds, bpc) for _, _, seconds, bpc in line["curve"] if bpc is not None],
        }
    return {"updates": lambda line: [(0, 0), *map(tuple, line["curve"]), (line["updates"], line["result"]["length"])]}


def draw_panel(panel: Any, lines: list[Line], curve_of: Callable[[Line], Curve], columns: list[str]) -> None:
    """Draws the columns of one T."""
    for column in columns:
        color = COLORS[column]
        curves = [curve for line in lines if line["column"] == column if (curve := curve_of(line))]
        if not curves:
            panel.plot([], [], color=color, label=column)  # for the legend, which only the first panel has
            continue
        between = linear if is_text(lines[0]) else step
        x, values = joined(curves, between)
        panel.plot(x, [statistics.mean(at) for at in values], color=color, label=column)
        if len(curves) > 1:
            panel.fill_between(
                x, [min(at) for at in values], [max(at) for at in values], color=color, alpha=0.2, linewidth=0
            )


def joined(curves: list[Curve], between: Callable[[Curve, float], float]) -> tuple[list[float], list[list[float]]]:
    """Returns `POINTS` places in the range that all curves cover, and at each place the values of all curves.

    `between` computes the value of a curve at a place.
    """
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    x = [first + (last - first) * i / (POINTS - 1) for i in range(POINTS)]
    return x, [[between(curve, at) for curve in curves] for at in x]


def step(curve: Curve, at: float) -> float:
    """Returns the value of the last point at or before `at`, for lengths: a solved length stays solved."""
    return curve[max(bisect.bisect_right(curve, at, key=lambda point: point[0]) - 1, 0)][1]


def linear(curve: Curve, at: float) -> float:
    """Returns the value at `at` by linear interpolation between the points of the curve."""
    place = min(max(bisect.bisect_right(curve, at, key=lambda point: point[0]), 1), len(curve) - 1)
    if len(curve) == 1:
        return curve[0][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
