"""Measures the time from the start of a training command to its first line, its introduction, and its first progress line.

python benchmarks/start_up.py
    Measure cases on the embedded corpus, as medians of 5 starts, in two minutes on two cores. Prints one JSON line for each
    case. Needs an idle machine.
python benchmarks/start_up.py --data-dir data --output docs/results/start_up.jsonl
    Measure cases on Penn Treebank too, and append the lines to a file.
python benchmarks/start_up.py --table docs/results/start_up.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

Times are wall-clock seconds from the start of the process. The cases take turns, so that changes of the machine's load
affect all of them. The case "import torch" is a process that only imports torch. The cases "help" and "import torch" end by
themselves. The other cases are stopped after their first progress line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_lines import Line, add_options, machine, measuring, newest, record

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "train_lm.py")

ALONE = "import torch"
"""The case with which the others are compared: a process that only imports torch."""

CASES = ("help", "embedded corpus", "dni-seq, embedded corpus", "Penn Treebank")

MOMENTS: Mapping[str, str] = {"first line": "", "three lines": "method: ", "first figure": "step "}
"""The moments that are measured, each with the beginning of the output line at which it is reached."""


def main() -> None:
    """Runs the command."""
    parser = command_line()
    given = parser.parse_args()
    if not measuring(parser, given, table):
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.runs):
        for name, command in cases(given.data_dir, given.max_steps).items():
            if name in (*given.only, ALONE):
                found.setdefault(name, []).append(measure(command))
    torch_alone = median_of([each["end"] for each in found[ALONE]])
    for name, starts in found.items():
        moments = {moment: median_of([each[moment] for each in starts]) for moment in starts[0]}
        record({"case": name, "runs": given.runs, **moments, ALONE: torch_alone, **machine()}, given.output)


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts of each case (default: 5)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--data-dir", type=Path, help="holds ptb/ptb.train.txt; without it no Penn Treebank")
    parser.add_argument("--max-steps", type=int, default=200, help="of a run that is not stopped in time (default: 200)")
    add_options(parser)
    return parser


def table(lines: Sequence[Line]) -> str:
    """Returns a table with a row for each case: seconds to each moment, and to the end if the case ends by itself."""
    from dni_seq.app.studies.records import NOTHING, markdown

    moments = (*MOMENTS, "end")
    rows = [
        [line["case"], *(f"{line[moment]:.2f}" if moment in line else NOTHING for moment in moments)]
        for line in newest(lines, "case")
    ]
    return markdown(["case", *(f"{moment}, s" for moment in moments)], rows)


def cases(data_dir: Path | None, max_steps: int) -> dict[str, Sequence[str]]:
    """Returns the command line of each case."""
    train = [SCRIPT, "--max-steps", str(max_steps)]
    found = {
        ALONE: ["-c", "import torch"],
        "help": [SCRIPT, "--help"],
        "embedded corpus": train,
        "dni-seq, embedded corpus": ["-m", "dni_seq.app.cli", "train", *train[1:]],
    }
    if data_dir is not None:
        found["Penn Treebank"] = [*train, "--dataset", "ptb", "--data-dir", str(data_dir.resolve())]
    return found


def measure(command: Sequence[str]) -> dict[str, float]:
    """Runs a command and returns the seconds to each moment that it reaches, and to its end if it ends by itself."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-") as directory:
        began = time.monotonic()
        process: Any = subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            for line in process.stdout:
                now = time.monotonic() - began
                for moment, start in MOMENTS.items():
                    if line.startswith(start):
                        seconds.setdefault(moment, now)
                if "first figure" in seconds:
                    process.kill()
                    break
        if "first figure" not in seconds:
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
            seconds["end"] = time.monotonic() - began
    return seconds


def median_of(values: Sequence[float]) -> float:
    """Returns the median, rounded to a millisecond."""
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
