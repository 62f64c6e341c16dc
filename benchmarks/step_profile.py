"""Measures the share of each operator in the time of a training step, with PyTorch's profiler: `steps.py --profile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from result_lines import Line, newest
from step_ways import Step

from dni_seq.app.studies.records import NOTHING, markdown

STEPS = 30
LEAST = 0.01
"""An operator has a row of the table if its share is at least this in some column."""


def profile(step: Step) -> tuple[str, dict[str, float]]:
    """Profiles the next steps. Returns the profiler's table, and the share of each operator in the steps' CPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    averages: Any = profiler.key_averages()
    printed = str(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    spent = {each.key: each.self_cpu_time_total for each in averages}
    shares = {name: round(time / sum(spent.values()), 4) for name, time in spent.items()}
    return printed, dict(sorted(shares.items(), key=lambda item: -item[1]))


def table(lines: Sequence[Line]) -> str:
    """Returns a table of shares: a column for each setting, T and way, a row for each operator with 1 % in some column."""
    lines = newest(lines, "setting", "bptt", "way")
    largest: dict[str, float] = {}
    for line in lines:
        for name, share in line["operators"].items():
            largest[name] = max(share, largest.get(name, 0.0))
    rows = [
        [
            f"`{name}`",
            *(f"{share:.0%}" if (share := line["operators"].get(name, 0.0)) >= LEAST else NOTHING for line in lines),
        ]
        for name in sorted(largest, key=lambda name: -largest[name])
        if largest[name] >= LEAST
    ]
    return markdown(["operator", *(f"{line['setting']}, T = {line['bptt']}, {line['way']}" for line in lines)], rows)
