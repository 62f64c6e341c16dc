"""Measures step time and memory of training, and compares them with plain PyTorch, dni-pytorch's way and a floor.

python benchmarks/steps.py --output docs/results/steps.jsonl
    Measure all settings, window lengths and ways of training, in a quarter of an hour on two cores. Appends one JSON line
    for each combination. All lines of one command have the same `sitting`.
python benchmarks/steps.py --only char-lstm --bptt 1 4
    Measure one setting at two window lengths.
python benchmarks/steps.py --tables docs/results/steps.jsonl
    Measure nothing; print the recorded lines as a table of Markdown, with medians over the sittings.
python benchmarks/steps.py --profile word-lstm --bptt 5 --output docs/results/profile.jsonl
    Measure the share of each operator in the time of a step, and append a line for each window length and way. `--tables`
    prints these lines too.
python benchmarks/steps.py --memory --output docs/results/memory.jsonl
    Measure the peak resident memory after 200 steps and after 10,000 windows, each way in a process of its own.

The ways of training have the same model and random tokens. They take turns of 24 steps each. A line has the median and the
quartiles over the turns. The time is the CPU time of the process, which other work on the machine changes less than wall
time. With several threads (`--threads`) the time is wall time, because the CPU times of the threads would add up.
Two processes take turns. In one process, freed memory is kept for the next window, as the commands do
(`dni_seq.app.runs.allocator`); the library's ways run there. In the other process, memory is not kept, as in a plain loop;
plain loops and dni-pytorch's way run there. One plain loop runs in the first process too.
The floor of a step (`step_floor.py`) is the time of its matrix products by the fastest kernels and of its optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import step_profile
import torch
from result_lines import check_output, machine, print_table, record
from step_floor import Floor
from step_ways import (
    AS_IT_COMES,
    FLOOR_OPTIONS,
    FLOORS,
    KEPT,
    ONE,
    OURS,
    PLAIN,
    PLAIN_FUSED,
    PLAIN_KEPT,
    SEED,
    SETTINGS,
    WAYS,
    Setting,
    Step,
    our_step,
    plain_step,
    seed_step,
)

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import NOTHING, markdown
from dni_seq.credit.message_filter import OBSERVED_FIRST

Kernels = dict[str, dict[str, str]]
"""The kernels that each floor has chosen, by the name of the floor; see `Floor.kernels`."""

PRODUCTS = "products alone"
"""A way in older lines, which have no floor: the matrix products of a step by `torch.mm`, without an optimizer."""

TURN, ROUNDS = 24, 5
"""Number of steps of a turn, and the smallest number of turns of each way.

Five turns have 120 steps, so they contain the rare costly steps of all ways. Regressed messages compute targets at one
window in 4, and their automatic scale compares gradients at one in 47. A future model is measured at one in 100.
"""


def step_of(way: str, setting: Setting, bptt: int) -> Step:
    """Returns a function that makes one step of a way for a setting and T."""
    if way == SEED:
        return seed_step(setting, bptt)
    if way in FLOOR_OPTIONS:
        return Floor(setting, bptt, FLOOR_OPTIONS[way])
    if way in OURS:
        return our_step(setting, bptt, OURS[way])
    return plain_step(setting, bptt, fused=way != PLAIN)


def time_ways(name: str, bptt: int, ways: Sequence[str], seconds: float) -> tuple[dict[str, list[float]], Kernels]:
    """Lets the ways take turns. Returns the milliseconds of a step by way, one number per turn, and the floors' kernels."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    workers = [Worker(name, bptt, [way for way in ways if way in each], kept=each is KEPT) for each in (AS_IT_COMES, KEPT)]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        kernels = {way: chosen for worker in workers for way, chosen in worker.kernels().items()}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(found[ways[0]]) < ROUNDS:
            for worker in workers:
                for way, milliseconds in worker.round().items():
                    found[way].append(milliseconds)
    return found, kernels


class Worker:
    """A process with as many threads as this one, in which some ways take one turn each for every call of `round`."""

    def __init__(self, name: str, bptt: int, ways: Sequence[str], *, kept: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = (name, bptt, ways, kept, torch.get_num_threads(), theirs)
        self._process = context.Process(target=take_turns, args=task, daemon=True)
        self._process.start()
        theirs.close()

    def kernels(self) -> Kernels:
        """Waits until all ways are built and warmed up, and returns the kernels of the floors."""
        kernels: Kernels = self._pipe.recv()
        return kernels

    def round(self) -> dict[str, float]:
        """Lets each way make one turn and returns the milliseconds of a step by way."""
        self._pipe.send(True)
        times: dict[str, float] = self._pipe.recv()
        return times

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(False)
        self._process.join()


def warm_up(way: str) -> int:
    """Returns the number of steps before the first measured one.

    It is larger for a way with a synthesizer, because the first windows of a synthesizer are checked more often.
    """
    return 3 if way in AS_IT_COMES or way in (PLAIN_KEPT, *FLOOR_OPTIONS, "none") else OBSERVED_FIRST + 1


def take_turns(name: str, bptt: int, ways: Sequence[str], kept: bool, threads: int, pipe: Connection) -> None:
    """The program of a `Worker`'s process."""
    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter
    if kept:
        keep_freed_memory()
    steps = {way: step_of(way, SETTINGS[name], bptt) for way in ways}
    for way, step in steps.items():
        for _ in range(warm_up(way)):
            step()
    pipe.send({way: step.kernels for way, step in steps.items() if isinstance(step, Floor)})
    while pipe.recv():
        times = {}
        for way, step in steps.items():
            begin = now()
            for _ in range(TURN):
                step()
            times[way] = 1e3 * (now() - begin) / TURN
        pipe.send(times)


def lines_of(name: str, bptt: int, found: Mapping[str, list[float]], kernels: Kernels) -> list[dict[str, Any]]:
    """Returns a line for each way: median, quartiles and mean time of a step, ratios of medians, and a floor's kernels."""
    lines = []
    medians = {way: statistics.median(times) for way, times in found.items()}
    for way, times in found.items():
        low, _, high = statistics.quantiles(times, n=4)
        ratios = {
            f"over {other}": medians[way] / medians[other]
            for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT, SEED, "none")
            if other in medians
        }
        if FLOORS.get(way) in medians:
            ratios["over its floor"] = medians[way] / medians[FLOORS[way]]
        lines.append(
            {
                "setting": name,
                "bptt": bptt,
                "way": way,
                "ms": medians[way],
                "quartiles": [low, high],
                "mean_ms": statistics.mean(times),
                "steps": TURN * len(times),
                **ratios,
                **({"kernels": kernels[way]} if way in kernels else {}),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    return lines


Sittings = dict[str, dict[str, float]]
"""The milliseconds of a step by way, for each sitting."""


def by_sitting(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Sittings]:
    """Returns the sittings of each setting and T. Lines without a sitting, which are older, count as those of one."""
    cells: dict[tuple[str, int], Sittings] = {}
    for line in lines:
        cell = cells.setdefault((line["setting"], line["bptt"]), {})
        cell.setdefault(line.get("sitting", ""), {})[line["way"]] = line["ms"]
    return cells


def median_ratio(sittings: Sittings, one: str, other: str | None = None) -> float | None:
    """Returns the median over the sittings of the ratio of two ways, or of the milliseconds of one way without `other`.

    Each ratio is of two times of the same sitting. None if no sitting has both ways.
    """
    found = [ms[one] / (1 if other is None else ms[other]) for ms in sittings.values() if one in ms and (other or one) in ms]
    return statistics.median(found) if found else None


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of medians with a row for each setting and T. The first ratios are those to the floor."""
    cells = by_sitting(lines)

    def text(sittings: Sittings, one: str, other: str | None = None) -> str:
        number = median_ratio(sittings, one, other)
        return NOTHING if number is None else f"{number:.{1 if other is None else 2}f}"

    # Lines that are older than the floor have the way `PRODUCTS` in its place.
    products = [PRODUCTS] if any(PRODUCTS in ms for cell in cells.values() for ms in cell.values()) else []
    costly = [*products, *(way for way in OURS if way != "none")]
    headline = ("none", ONE, "multi-horizon")
    rows = [
        [
            name,
            str(bptt),
            *(text(cell, way, FLOORS[way]) for way in headline),
            *(text(cell, way) for way in ("none", ONE)),
            *(text(cell, "none", other) for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)),
            *(text(cell, way, "none") for way in costly),
            text(cell, SEED, ONE),
        ]
        for (name, bptt), cell in cells.items()
    ]
    over = [f"none / {other}" for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)]
    costs = [f"{way} / none" for way in costly]
    floors = [f"{way} / its floor" for way in headline]
    return markdown(["setting", "T", *floors, "none, ms", f"{ONE}, ms", *over, *costs, f"{SEED} / {ONE}"], rows)


def any_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of lines of step times or of profiles."""
    return step_profile.table(lines) if "operators" in lines[0] else table(lines)


def peak_mb() -> float:
    """Returns the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """Returns a line with the peak memory after 200 steps and after `windows` steps. Call this in a fresh process."""
    if way in KEPT:
        keep_freed_memory()
    step = step_of(way, SETTINGS[name], bptt)
    for _ in range(200):
        step()
    early = peak_mb()
    for _ in range(windows - 200):
        step()
    return {"setting": name, "bptt": bptt, "way": way, "peak_mb": early, "windows": windows, "peak_mb_at_end": peak_mb()}


def profile_ways(name: str, bptt: int, ways: Sequence[str], output: Path | None) -> None:
    """Profiles a step of each way, prints the profiler's table, and appends a line to the file."""
    for way in ways:
        if way in KEPT:
            keep_freed_memory()
        step = step_of(way, SETTINGS[name], bptt)
        for _ in range(warm_up(way)):
            step()
        printed, operators = step_profile.profile(step)
        print(f"{name}, T = {bptt}, {way}\n{printed}")
        line = {"setting": name, "bptt": bptt, "way": way, "steps": step_profile.STEPS, "operators": operators}
        record({**line, "threads": torch.get_num_threads(), **machine()}, output)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--bptt", nargs="+", type=int, help="window lengths, in the place of each setting's own")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=0.0, help="for each cell at least")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file; they are printed too")
    parser.add_argument("--profile", choices=SETTINGS, help="where the time goes, by operator, of each --way and --bptt")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--windows", type=int, default=10_000, help="of --memory (default: 10000)")
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "T", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--tables", type=Path, help="print lines that are on record, as a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tables:
        print_table(parser, options.tables, any_table)
        return
    if options.one:
        name, bptt, way = options.one
        print(json.dumps(memory_of(name, int(bptt), way, options.windows)))
        return
    check_output(parser, options.output)
    if options.profile:
        for bptt in options.bptt or SETTINGS[options.profile].bptt:
            profile_ways(options.profile, bptt, options.way, options.output)
        return
    sitting = time.strftime("%Y-%m-%d %H:%M")
    for name in options.only:
        for bptt in options.bptt or SETTINGS[name].bptt:
            if options.memory:
                found = [in_process(name, bptt, way, options.windows) for way in options.way]
            else:
                found = lines_of(name, bptt, *time_ways(name, bptt, options.way, options.seconds))
            for line in found:
                record({**line, "sitting": sitting}, options.output)


def in_process(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """Calls `memory_of` in a fresh process and returns its line."""
    command = [sys.executable, __file__, "--one", name, str(bptt), way, "--windows", str(windows)]
    command += ["--threads", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    line: dict[str, Any] = json.loads(result.stdout)
    return line


if __name__ == "__main__":
    main()
