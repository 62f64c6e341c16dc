"""Measures how the time of a step grows with one quantity at a time, and the memory that credit over many steps needs.

python benchmarks/growth.py --output docs/results/growth.jsonl --pictures docs/images
    Measure all points, each in a process of its own, in five minutes on two cores, and draw growth.png and memory.png. The
    pictures need matplotlib. Then record their settings: python -m docs.images.settings growth.png memory.png
python benchmarks/growth.py --only lanes horizons
    Measure the points of some quantities only.
python benchmarks/growth.py --draw --output docs/results/growth.jsonl --pictures docs/images
    Measure nothing, and draw the recorded points.

Except for the quantity that is varied, all points have these sizes: an LSTM of 256 units on 50 token ids, 32 lanes, windows
of 5 steps, and one horizon with a lookahead of 5 steps, its whole window.
A line has the median and the mean CPU time of a step, and the peak of resident memory above that of an interpreter that has
imported all modules. growth.png shows the mean time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from steps import OURS, Setting, our_step, peak_mb, warm_up

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import read_lines

WAYS = ("none", "multi-horizon")

WARM, MEASURED = warm_up("multi-horizon"), 60
"""Number of steps of a point before the timed steps, and number of timed steps. The points of "windows" have more steps."""


class Point(NamedTuple):
    """The sizes with which one process trains. `windows` is the number of steps."""

    bptt: int = 5
    lanes: int = 32
    hidden: int = 256
    vocabulary: int = 50
    horizons: int = 1
    lookahead: int | None = None
    windows: int = WARM + MEASURED


GROWTH: Mapping[str, Sequence[int]] = MappingProxyType(
    {
        "bptt": (1, 2, 5, 10, 20, 40),
        "lanes": (8, 16, 32, 64, 128),
        "hidden": (64, 128, 256, 512),
        "vocabulary": (50, 1_000, 10_000),
        "horizons": (1, 2, 4, 8),
        "lookahead": (0, 2, 5, 10, 20),
        "windows": (500, 2_000, 8_000),
    }
)
"""The values of each quantity that is varied, by the name of its field in `Point`."""

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "bptt": "T, steps a window",
        "lanes": "B, lanes",
        "hidden": "H, hidden units",
        "vocabulary": "tokens of the vocabulary",
        "horizons": "K, horizons",
        "lookahead": "lookahead, steps",
        "windows": "windows of the stream",
    }
)

REACH = (5, 10, 20, 40, 80)
"""The numbers of steps over which credit reaches: with horizons of 5 steps each, and with one window of full BPTT."""


def points(only: Sequence[str]) -> list[tuple[str, int, str, Point]]:
    """Returns the points of the quantities `only`: the varied quantity, its value, the way of training, and the sizes."""
    found = [
        (name, value, way, Point()._replace(**{name: value}))
        for name, values in GROWTH.items()
        for value in values
        for way in WAYS
        if not (way == "none" and name in ("horizons", "lookahead"))
    ]
    for reach in REACH:
        found += [("reach", reach, "none", Point(bptt=reach)), ("reach", reach, "multi-horizon", Point(horizons=reach // 5))]
    return [point for point in found if point[0] in only]


def measure(way: str, point: Point) -> dict[str, float]:
    """Returns median and mean CPU milliseconds of a step, and the peak memory in MiB. Call it in a fresh process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    bare = peak_mb()
    setting = Setting(point.vocabulary, "lstm", 64, point.hidden, 1, 0.0, point.lanes, (point.bptt,))
    options = {**OURS[way], "horizons": point.horizons, "lookahead": point.lookahead} if way != "none" else OURS[way]
    step = our_step(setting, point.bptt, options)
    times = []
    for _ in range(point.windows):
        begin = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - begin))
    late = times[WARM:]
    return {"ms": statistics.median(late), "mean_ms": statistics.mean(late), "mb": peak_mb() - bare}


def in_process(way: str, point: Point) -> dict[str, float]:
    """Calls `measure` in a fresh process and returns its result."""
    command = [sys.executable, __file__, "--one", way, json.dumps(point._asdict())]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def draw(lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draws two pictures: growth.png with a panel for each quantity, and memory.png with memory over the reach of credit."""
    from matplotlib.figure import Figure

    names = [name for name in GROWTH if any(line["varied"] == name for line in lines)]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for place, name in enumerate(names, start=1):
        panel = figure.add_subplot(2, 4, place)
        draw_panel(panel, [line for line in lines if line["varied"] == name], "mean_ms")
        panel.set(xlabel=NAMES[name], ylabel="ms a step" if place % 4 == 1 else "")
        if place == 1:
            panel.legend(frameon=False, fontsize="small")
    save(figure, folder / "growth.png")
    reach = Figure(figsize=(4.6, 3.2), layout="constrained")
    panel = reach.add_subplot(1, 1, 1)
    labels = {"none": "exact BPTT, one window", "multi-horizon": "windows of 5, K horizons"}
    draw_panel(panel, [line for line in lines if line["varied"] == "reach"], "mb", labels)
    panel.set(xlabel="reach of credit, steps", ylabel="peak memory, MiB", ylim=(0, None))
    panel.legend(frameon=False, fontsize="small")
    save(reach, folder / "memory.png")


def draw_panel(
    panel: Any, lines: Sequence[Mapping[str, Any]], value: str, labels: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Draws a line for each way of training."""
    for way, color in zip(WAYS, ("#4c4c4c", "#1b9e77"), strict=True):
        of_way = [line for line in lines if line["way"] == way]
        panel.plot(
            [line["value"] for line in of_way],
            [line[value] for line in of_way],
            color=color, marker="o", markersize=3, label=labels.get(way, way),
        )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Saves a picture without the date and the version of matplotlib, so that the same lines give the same file."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*GROWTH, "reach"), default=[*GROWTH, "reach"])
    parser.add_argument("--output", type=Path, help="JSON lines; printed too")
    parser.add_argument("--pictures", type=Path, help="folder of growth.png and memory.png")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Point(**json.loads(options.one[1])))))
        return
    if options.draw and options.output is None:
        parser.error("--draw reads what is on record: add --output")
    lines = read_lines(options.output) if options.draw else []
    for name, value, way, point in [] if options.draw else points(options.only):
        lines.append({"varied": name, "value": value, "way": way, **in_process(way, point), "torch": torch.__version__})
        print(json.dumps(lines[-1]), flush=True)
    if options.output and not options.draw:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if options.pictures:
        draw(lines, options.pictures)


if __name__ == "__main__":
    main()
