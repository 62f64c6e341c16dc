"""Draws the frontier study: quality over CPU time and over memory, a panel for each task. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from plans import GRIDS, TEXT, Grid, Known
from records import Times
from report import best_line, saved_of, unit_of

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "dni_seq"  # the same bytes each time
from matplotlib import pyplot as plt  # noqa: E402

PICTURES = ("frontier_time.svg", "frontier_memory.svg")
NAMES = {
    "none": "truncated BPTT",
    "multi-horizon": "next windows, the default",
    "dense": "dense messages",
    "past": "past",
    "exact": "exact gradient of the next steps",
    "overlap": "truncated BPTT, overlapping windows",
}


def draw_all(folder: Path, known: Known, times: Times) -> None:
    """Writes the two pictures, each with a panel for each task that has trials."""
    begun = {line["trial"]["task"] for line in known.values() if line["trial"]["part"] == "frontier"}
    grids = [grid for grid in GRIDS.values() if grid.task in begun]
    columns = min(3, len(grids))
    rows = math.ceil(len(grids) / 3)
    for name, draw in zip(PICTURES, (draw_time, draw_memory), strict=True):
        size = (4.5 * columns, 3.6 * rows)
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for axes in panels.flat[len(grids) :]:
            axes.remove()
        for grid, axes in zip(grids, panels.flat, strict=False):
            draw(axes, grid, known, times)
            axes.set(title=grid.task.replace("-", " "), ylabel=unit_of(grid.task))
            if axes.has_data():  # a task can have trials without having memory on record
                axes.legend(frameon=False, fontsize="small")
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)


def draw_time(axes: Axes, grid: Grid, known: Known, times: Times) -> None:
    """Draws quality over CPU time: on text at the end of each budget, on sequences the whole curve of the longest run."""
    for number, column in enumerate(grid.columns):
        style: dict[str, Any] = {"label": NAMES[column.method], "color": f"C{number}"}
        found = [best_line(grid, column, known, budget) for budget in grid.budgets]
        lines = [line for line in found if line is not None]
        if lines and grid.task in TEXT:
            axes.plot([line["seconds"] for line in lines], [line["quality"] for line in lines], "o-", **style)
        elif lines:
            curve = lines[-1]["curve"]
            ends = [(0.0, 0.0), *((point[3], point[0]) for point in curve), (lines[-1]["seconds"], lines[-1]["quality"])]
            axes.step(*zip(*ends, strict=True), where="post", **style)
    axes.set_xlabel("idle CPU seconds")


def draw_memory(axes: Axes, grid: Grid, known: Known, times: Times) -> None:
    """Draws quality over memory: the best quality of each method and T at the smallest budget, over an update's saved bytes.

    The saved bytes are those that an update saves for its backward passes.
    """
    for number, column in enumerate(grid.columns):
        best: dict[int, tuple[float, float]] = {}
        better = min if grid.task in TEXT else max
        for line in known.values():
            trial, saved = line["trial"], saved_of(line, times)
            at = (trial["part"], trial["task"], trial["method"], trial.get(grid.unit))
            if saved is not None and at == ("frontier", grid.task, column.method, grid.budgets[0]):
                quality = line["quality"]
                best[trial["T"]] = (saved / 2**20, better(quality, best.get(trial["T"], (0.0, quality))[1]))
        if best:
            axes.plot(*zip(*sorted(best.values()), strict=True), "o-", label=NAMES[column.method], color=f"C{number}")
    if axes.has_data():
        axes.set_xscale("log")
    axes.set_xlabel("MiB saved for the backward pass, smallest budget")
