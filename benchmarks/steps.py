"""Step time and memory of training, against plain PyTorch and against dni-pytorch's way, as ratios within one process.

python benchmarks/steps.py --output docs/results/steps.jsonl
    The grid: a quarter of an hour on two cores. One JSON line a cell and way.
python benchmarks/steps.py --only char-lstm --bptt 1 4
    Part of it.
python benchmarks/steps.py --tables docs/results/steps.jsonl
    Measure nothing; print the lines on record as a table of Markdown.
python benchmarks/steps.py --profile word-lstm --bptt 5 --output docs/results/profile.jsonl
    Where the time of a step goes, by operator; appends a line for each window length and way. `--tables` prints them too.
python benchmarks/steps.py --memory --output docs/results/memory.jsonl
    Peak resident memory after 200 steps, each way in a process of its own, and its growth over 10,000 windows.

Ways of training, on the same model and random tokens, take turns, so many steps each that their kinds are all among them, as
a synthesizer's steps with a regression and without. Medians and quartiles over the turns are reported, of the process's CPU
time for a step, which suffers less from other work on the machine than the clock does; with several threads (`--threads`),
whose CPU times add up, of the clock's. Two processes take turns, round by round: in one, freed memory is kept for the
next window, as our scripts have it (`dni_seq.app.runs.allocator`); in the other it is not, as a loop that nobody tuned
has it. Beside them stands the floor of a step, without a synthesizer and with one (`step_floor.py`): its matrix products
by the fastest kernels and one pass of its optimizer.
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
"""The kernels of each floor, by way; see `Floor.kernels`."""

PRODUCTS = "products alone"
"""A way of older lines: the products of a step by `torch.mm`, without an optimizer."""

TURN, ROUNDS = 24, 5
"""Steps of a turn, and turns of each way at least. Fitted messages are regressed at one window of 4, the model of what is
ahead is measured at one of 100, a comparison comes at one of 47."""


def step_of(way: str, setting: Setting, bptt: int) -> Step:
    """One way's step on one cell of the grid."""
    if way == SEED:
        return seed_step(setting, bptt)
    if way in FLOOR_OPTIONS:
        return Floor(setting, bptt, FLOOR_OPTIONS[way])
    if way in OURS:
        return our_step(setting, bptt, OURS[way])
    return plain_step(setting, bptt, fused=way != PLAIN)


def time_ways(name: str, bptt: int, ways: Sequence[str], seconds: float) -> tuple[dict[str, list[float]], Kernels]:
    """Milliseconds of a step by way, one number a turn, and the kernels of the floors."""
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
    """A process of as many threads as this one, that has some ways take turns whenever it is told to."""

    def __init__(self, name: str, bptt: int, ways: Sequence[str], *, kept: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = (name, bptt, ways, kept, torch.get_num_threads(), theirs)
        self._process = context.Process(target=take_turns, args=task, daemon=True)
        self._process.start()
        theirs.close()

    def kernels(self) -> Kernels:
        """The kernels of the floors, once all ways are built and warm."""
        kernels: Kernels = self._pipe.recv()
        return kernels

    def round(self) -> dict[str, float]:
        """Milliseconds of a step, by way, in one turn of each."""
        self._pipe.send(True)
        times: dict[str, float] = self._pipe.recv()
        return times

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def warm_up(way: str) -> int:
    """Steps before the first that is measured: a synthesizer's first windows are observed more closely than later ones."""
    return 3 if way in AS_IT_COMES or way in (PLAIN_KEPT, *FLOOR_OPTIONS, "none") else OBSERVED_FIRST + 1


def take_turns(name: str, bptt: int, ways: Sequence[str], kept: bool, threads: int, pipe: Connection) -> None:
    """The worker's side."""
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
    """One line a way: median, quartiles and mean of a step, the ratios of medians, and a floor's kernels."""
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


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Ratios of medians, a row for each cell of the grid; first those to the floor of a step."""
    cells: dict[tuple[str, int], dict[str, float]] = {(line["setting"], line["bptt"]): {} for line in lines}
    for line in lines:
        cells[line["setting"], line["bptt"]][line["way"]] = line["ms"]

    def ratio(medians: Mapping[str, float], one: str, other: str) -> str:
        return f"{medians[one] / medians[other]:.2f}" if one in medians and other in medians else NOTHING

    # Lines of before the floor hold a cruder one.
    products = [PRODUCTS] if any(PRODUCTS in medians for medians in cells.values()) else []
    costly = [*products, *(way for way in OURS if way != "none")]
    headline = ("none", ONE, "multi-horizon")
    rows = [
        [
            name,
            str(bptt),
            *(ratio(medians, way, FLOORS[way]) for way in headline),
            *(f"{medians[way]:.1f}" if way in medians else NOTHING for way in ("none", ONE)),
            *(ratio(medians, "none", other) for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)),
            *(ratio(medians, way, "none") for way in costly),
            ratio(medians, SEED, ONE),
        ]
        for (name, bptt), medians in cells.items()
    ]
    over = [f"none / {other}" for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)]
    costs = [f"{way} / none" for way in costly]
    floors = [f"{way} / its floor" for way in headline]
    return markdown(["setting", "T", *floors, "none, ms", f"{ONE}, ms", *over, *costs, f"{SEED} / {ONE}"], rows)


def any_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of lines of the grid, or of a profile."""
    return step_profile.table(lines) if "operators" in lines[0] else table(lines)


def peak_mb() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """Peak memory after 200 steps and after `windows`; run in a process of its own."""
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
    """Prints where the time of each way's step goes, and appends its line to the file."""
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
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--bptt", nargs="+", type=int, help="window lengths, in the place of each setting's own")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=0.0, help="for each cell at least")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON lines; printed too; with --profile they are appended")
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
    if options.profile:
        check_output(parser, options.output)
        for bptt in options.bptt or SETTINGS[options.profile].bptt:
            profile_ways(options.profile, bptt, options.way, options.output)
        return
    lines = []
    for name in options.only:
        for bptt in options.bptt or SETTINGS[name].bptt:
            if options.memory:
                found = [in_process(name, bptt, way, options.windows) for way in options.way]
            else:
                found = lines_of(name, bptt, *time_ways(name, bptt, options.way, options.seconds))
            for line in found:
                print(json.dumps(line), flush=True)
            lines += found
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def in_process(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """`memory_of` in a fresh process."""
    command = [sys.executable, __file__, "--one", name, str(bptt), way, "--windows", str(windows)]
    command += ["--threads", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    line: dict[str, Any] = json.loads(result.stdout)
    return line


if __name__ == "__main__":
    main()
