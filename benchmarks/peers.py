"""Compares a training step with compiled programs: plain truncated BPTT in JAX, and braintrace's online learning.

python benchmarks/peers.py --output docs/results/peers.jsonl
    Measure all ways of training at all window lengths, in three minutes on an idle machine, and write one JSON line for each
    way and length. Needs `pip install 'dni-seq[peers]'`.
python benchmarks/peers.py --bptt 1 --way none jax --seconds 10
    Measure some ways at one window length.
python benchmarks/peers.py --table docs/results/peers.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

Each way has a process of its own with one thread. The processes take turns on the same core. All ways train an LSTM of 256
units on 64 lanes and 50 characters with Adam and a clipped gradient norm. The time of a step is the CPU time of its process,
the median over the turns. The start-up lasts until the first step is done: imports, compilation, first step. braintrace uses
traces in place of BPTT, so it is measured at T = 1 only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WAYS = ("none", "default", "plain loop", "jax", "braintrace pp_prop", "braintrace d_rtrl")
"""The ways of training.

They are `SequenceTrainer` without a synthesizer ("none") and with the default one, a plain PyTorch loop with the fused Adam,
JAX, and two algorithms of braintrace.
"""

BPTT = (1, 8)

TURN_SECONDS, ROUNDS = 0.3, 5
"""Approximate CPU seconds of a turn, and the smallest number of turns of each way."""

WARM_UP = 110
"""Number of steps before the measured ones. A synthesizer's first 100 windows are checked more often and cost more.

Ways that would need more than 3 CPU seconds for so many steps make fewer steps.
"""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def step_of(way: str, bptt: int) -> Callable[[], Any]:
    """Returns a function that makes one step by a way of training. Imports only the modules that this way needs."""
    from step_ways import OURS, Setting, our_step, plain_step

    setting = Setting(vocabulary=50, cell="lstm", embed=64, hidden=256, layers=1, dropout=0.0, lanes=64, bptt=BPTT)
    if way == "jax":
        from peers_jax import truncated_bptt

        return truncated_bptt(setting, bptt)
    if way.startswith("braintrace"):
        from peers_jax import braintrace

        return braintrace(setting, bptt, way.split()[1])
    if way == "plain loop":
        return plain_step(setting, bptt, fused=True)
    from dni_seq.app.runs.allocator import keep_freed_memory

    keep_freed_memory()
    return our_step(setting, bptt, OURS["none" if way == "none" else "multi-horizon"])


def work(way: str, bptt: int, core: int, begun: float) -> None:
    """The program of a worker process. For every line on stdin, makes a turn of steps and prints its time as JSON.

    At the line "stop", prints the peak memory and ends.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    step = step_of(way, bptt)
    finish(step())
    print(json.dumps({"start_up_s": time.time() - begun, "start_up_cpu_s": time.process_time()}), flush=True)
    spent, count = time.process_time(), 0
    while count < WARM_UP and time.process_time() - spent < 10 * TURN_SECONDS:
        finish(step())
        count += 1
    steps = max(1, round(TURN_SECONDS * count / (time.process_time() - spent)))
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        spent, result = time.process_time(), None
        for _ in range(steps):
            result = step()
        finish(result)
        print(json.dumps({"ms": 1e3 * (time.process_time() - spent) / steps, "steps": steps}), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def finish(result: Any) -> None:
    """Waits until a result of JAX, which computes in the background, is ready. Does nothing for a result of PyTorch."""
    wait = getattr(result, "block_until_ready", None)
    if wait is not None:
        wait()


class Worker:
    """A process that trains in one way, a turn of steps for each call of `turn`."""

    def __init__(self, way: str, bptt: int, core: int) -> None:
        command = [sys.executable, __file__, "--worker", way, str(bptt), str(core), str(time.time())]
        environment = {**os.environ, **ONE_THREAD}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.start: dict[str, Any] = self._read()

    def turn(self) -> dict[str, Any]:
        """Returns the milliseconds of a step in one turn, and the number of steps."""
        return self._ask("turn")

    def stop(self) -> dict[str, Any]:
        """Ends the process; returns its peak memory in MiB."""
        found = self._ask("stop")
        self._process.communicate()
        return found

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self._process.communicate()[1]}")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(bptt: int, ways: Sequence[str], core: int, seconds: float) -> list[dict[str, Any]]:
    """Lets the ways take turns for at least `seconds` seconds and returns one line for each way."""
    workers = {way: Worker(way, bptt, core) for way in ways}  # one after the other: each waits for its first step
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(turns[ways[0]]) < ROUNDS:
        for way, worker in workers.items():
            turns[way].append(worker.turn())
    medians = {way: statistics.median(turn["ms"] for turn in turns[way]) for way in ways}
    lines = []
    for way, worker in workers.items():
        low, _, high = statistics.quantiles([turn["ms"] for turn in turns[way]], n=4)
        over = {f"over {other}": medians[way] / medians[other] for other in ("none", "jax") if other in medians}
        steps = sum(turn["steps"] for turn in turns[way])
        line = {"bptt": bptt, "way": way, "ms": medians[way], "quartiles": [low, high], "steps": steps, **over}
        lines.append({**line, **worker.start, **worker.stop(), **versions(way)})
    return lines


def versions(way: str) -> dict[str, str]:
    """Returns the versions of the packages that a way runs on."""
    from importlib.metadata import version

    packages = ("jax", "braintrace") if way.startswith("braintrace") else ("jax",) if way == "jax" else ("torch",)
    return {package: version(package) for package in packages}


def chosen(ways: Sequence[str], bptt: int) -> list[str]:
    """Returns the ways that can run at a window length. Prints a line on stderr if braintrace is not installed."""
    found = [way for way in ways if bptt == 1 or not way.startswith("braintrace")]
    if not installed("braintrace") and any(way.startswith("braintrace") for way in found):
        print("skipped braintrace, which is not installed: pip install braintrace", file=sys.stderr)
        found = [way for way in found if not way.startswith("braintrace")]
    return found


def installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the lines as a table of Markdown."""
    from dni_seq.app.studies.records import NOTHING, markdown

    header = ["T", "way", "ms a step", "over none", "over jax", "peak memory, MiB", "start-up, s", "of it CPU, s"]
    rows = [
        [
            str(line["bptt"]),
            line["way"],
            f"{line['ms']:.1f}",
            *(f"{line[key]:.2f}" if key in line else NOTHING for key in ("over none", "over jax")),
            f"{line['peak_mb']:.0f}",
            f"{line['start_up_s']:.1f}",
            f"{line['start_up_cpu_s']:.1f}",
        ]
        for line in lines
    ]
    return markdown(header, rows)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--bptt", nargs="+", type=int, default=list(BPTT), help="window lengths (default: 1 8)")
    found.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    found.add_argument("--seconds", type=float, default=40.0, help="of turns for each window length (default: 40)")
    found.add_argument("--core", type=int, help="on which all ways run (default: the last one)")
    found.add_argument("--output", type=Path, help="JSON lines; printed too")
    found.add_argument("--table", type=Path, help="print lines that are on record, as a table")
    found.add_argument("--worker", nargs=4, metavar=("WAY", "T", "CORE", "BEGUN"), help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Runs the command."""
    command = parser()
    options = command.parse_args()
    if options.worker:
        way, bptt, core, begun = options.worker
        work(way, int(bptt), int(core), float(begun))
        return
    if options.table:
        from dni_seq.app.studies.records import read_lines

        print(table(read_lines(options.table)))
        return
    if "jax" in options.way and not installed("jax"):
        command.exit(2, "jax is not installed: pip install 'dni-seq[peers]', or leave jax out of --way\n")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    core = cores[-1] if options.core is None else options.core
    if core not in cores:
        command.exit(2, f"--core must be one of {', '.join(map(str, cores))}, got {core}\n")
    lines = []
    for bptt in options.bptt:
        ways = chosen(options.way, bptt)
        for line in measure(bptt, ways, core, options.seconds) if ways else ():
            print(json.dumps(line), flush=True)
            lines.append(line)
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
