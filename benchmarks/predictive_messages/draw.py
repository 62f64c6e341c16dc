"""Draws the study: perplexity by words over CPU time, and lengths copied over CPU time. Needs matplotlib.

python benchmarks/predictive_messages/draw.py
    Writes docs/images/predictive_messages.svg from docs/results/predictive_messages.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from copying import kind_of, seconds_at, update_times
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from trials import Line, latest_times, lines_by_key

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "dni_seq"  # the same bytes each time
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "predictive_messages.jsonl"
PICTURE = ROOT / "docs" / "images" / "predictive_messages.svg"

WORDS = {
    "none": "truncated BPTT",
    "exact": "exact gradient of 4 steps",
    "multi-token": "multi-token heads",
    "multi-horizon": "synthesizer, T = 5",
    "dense": "dense messages, T = 35",
}
COPYING = {
    ("none", 40): "truncated BPTT, T = 40",
    ("past", 4): "past, T = 4",
    ("past", 10): "past, T = 10",
    ("past inside", 40): "past inside, T = 40",
}


def draw_words(axes: Axes, lines: list[Line], step_time: float) -> None:
    """Draws the best validation perplexity of each method at each budget, seed 1.

    Args:
        axes: the axes to draw on.
        lines: the recorded trials.
        step_time: seconds of a step of truncated BPTT at T = 35. A budget of 1 is the time of an epoch of such steps.
    """
    epoch: dict[str, object] = {"method": "none", "T": 35, "budget": 1}
    (steps,) = {line["steps"] for line in lines if epoch.items() <= line["trial"].items()}
    for method, name in WORDS.items():
        best: dict[float, float] = {}
        for line in lines:
            trial = line["trial"]
            if trial["task"] == "words" and trial["method"] == method and trial["seed"] == 1 and "budget" in trial:
                best[trial["budget"]] = min(line["valid"], best.get(trial["budget"], float("inf")))
        if best:
            budgets = sorted(best)
            seconds = [steps * step_time * budget for budget in budgets]
            axes.plot(seconds, [best[budget] for budget in budgets], "o-", label=name)
    axes.set(xlabel="CPU seconds of a run", ylabel="validation perplexity", title="Penn Treebank by words")
    axes.legend(frameon=False)


def draw_copying(axes: Axes, lines: list[Line], times: Any) -> None:
    """Draws, for the longest run of each method, the lengths solved over CPU time."""
    for (method, bptt), name in COPYING.items():
        chosen = [
            line
            for line in lines
            if (line["trial"]["task"], line["trial"]["method"], line["trial"]["T"]) == ("copy", method, bptt)
        ]
        if not chosen:
            continue
        longest = max(chosen, key=lambda line: (line["solved"], -line["updates"]))
        time_of = times[kind_of(longest["trial"])]
        seconds = [seconds_at(point, time_of) for point in longest["curve"]]
        axes.step(seconds, [point[0] for point in longest["curve"]], where="post", label=name)
    axes.set(xlabel="CPU seconds", ylabel="vectors copied", title="Copying", xscale="log")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def main() -> None:
    """Runs the command."""
    lines = list(lines_by_key(RESULTS).values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw_words(left, lines, latest_times(RESULTS, "words", "step_seconds")["none T=35"])
    draw_copying(right, lines, update_times(RESULTS))
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
