"""Measures recomputed activations in a window of 200 steps, in time and memory, and gradients over earlier windows.

python benchmarks/long_windows.py
    Print JSON lines with the CPU time and the memory of a step. The time is the median over 9 rounds in which all settings
    take turns. The memory is what a step needs in addition to parameters, gradients and the optimizer's state; it is
    measured in a separate process for each setting (Linux).
python benchmarks/long_windows.py --output docs/results/long_windows.jsonl
    Also append the lines to a file.
python benchmarks/long_windows.py --table docs/results/long_windows.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

Characters: LSTM of 256 units, embedding 64, 64 lanes, 50 characters. Words: LSTM of 2 layers of 200 units, 20 lanes, 10,000
words. Fused Adam, one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from result_lines import Line, add_options, machine, measuring, newest, record

import dni_seq as dni
from dni_seq.app.studies.records import NOTHING, markdown
from dni_seq.models.language_model import LanguageModel, token_losses

SIZES = {"characters": (50, 64, 256, 1, 64), "words": (10_000, 200, 200, 2, 20)}
"""Vocabulary size, embedding size, units, layers and lanes of each size."""

SETTINGS = {
    "T = 200": (200, None, 1),
    "T = 200, recomputed every 20": (200, 20, 1),
    "T = 20": (20, None, 1),
    "T = 4": (4, None, 1),
    "T = 4 over the last 20 steps": (4, None, 5),
}
"""T, number of steps of a chunk whose activations are recomputed (None for no recomputation), and number of windows over
which a loss is propagated back."""

BASES = {"T = 200, recomputed every 20": "T = 200", "T = 4 over the last 20 steps": "T = 4"}
"""The setting with which a setting is compared: it has the same T, without recomputation and without earlier windows."""


class Learner:
    """A trainer with windows of one length.

    Args:
        size: a key of `SIZES`.
        setting: a key of `SETTINGS`.
    """

    def __init__(self, size: str, setting: str) -> None:
        vocabulary, embed, hidden, layers, self.lanes = SIZES[size]
        self.length, every, windows = SETTINGS[setting]
        torch.manual_seed(0)
        model = LanguageModel(vocabulary, embed=embed, hidden=hidden, layers=layers)
        self.trainer = dni.SequenceTrainer(model, torch.optim.Adam(model.parameters(), fused=True), token_losses)
        self.trainer.checkpoint_every, self.trainer.backward_windows = every, windows
        self.text = torch.randint(vocabulary, (self.length + 1, self.lanes))

    def step(self, length: int | None = None) -> None:
        """Trains on one window of `length` steps, None for the setting's T."""
        length = self.length if length is None else length
        self.trainer.step(self.text[:length], self.text[1 : length + 1])


def memory_of(size: str, setting: str) -> float:
    """Returns the memory in MiB that a step adds at its peak."""
    learner = Learner(size, setting)
    learner.step(1)  # a step of one token allocates the gradients and Adam's moments
    Path("/proc/self/clear_refs").write_text("5")
    before = _mib("VmRSS")
    learner.step()
    return _mib("VmHWM") - before


def _mib(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def times_of(size: str, rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of a step by setting, one number for each round."""
    learners = {setting: Learner(size, setting) for setting in SETTINGS}
    found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for turn in range(rounds + 1):
        for setting, learner in learners.items():
            count = max(1, 200 // learner.length)
            begun = time.process_time()
            for _ in range(count):
                learner.step()
            if turn:
                found[setting].append((time.process_time() - begun) / count)
    return found


def memory_in_process(size: str, setting: str) -> float:
    """Calls `memory_of` in a fresh process and returns its result."""
    command = [sys.executable, __file__, "--memory-of", size, setting]
    # Freed blocks return to the system at once. So the peak contains the tensors but no gaps in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def table(lines: Sequence[Line]) -> str:
    """Returns a table with a row for each size and setting, compared with its setting in `BASES`."""
    lines = newest(lines, "size", "setting")
    known = {(line["size"], line["setting"]): line for line in lines}
    rows = []
    for line in lines:
        base = known.get((line["size"], BASES.get(line["setting"], "")))
        over = [f"{line[name] / base[name]:.2f}" if base else NOTHING for name in ("ms", "mib")]
        rows.append([line["size"], line["setting"], f"{line['ms']:.1f}", over[0], str(line["mib"]), over[1]])
    return markdown(["size", "setting", "CPU ms a step", "time / base", "memory of a step, MiB", "memory / base"], rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9, help="of each setting (default: 9)")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIZE", "SETTING"), help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:  # a process of its own
        print(memory_of(*options.memory_of))
        return
    if not measuring(parser, options, table):
        return
    for size in options.only:
        for setting, seconds in times_of(size, options.rounds).items():
            line = {"size": size, "setting": setting, "ms": round(1000 * statistics.median(seconds), 2)}
            line |= {"ms from": round(1000 * min(seconds), 2), "ms to": round(1000 * max(seconds), 2)}
            line |= {"mib": round(memory_in_process(size, setting)), "rounds": options.rounds, "threads": 1}
            record({**line, **machine()}, options.output)


if __name__ == "__main__":
    main()
