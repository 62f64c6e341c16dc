"""What recomputed activations cost and save in a window of 200 steps, and what a gradient over earlier windows costs.

python benchmarks/long_windows.py
    Median CPU time of a step over 9 rounds in which all settings take turns, and the memory that a step needs beside
    parameters, gradients and the optimizer's state, each in a process of its own (Linux).

Characters: LSTM 256, embedding 64, 64 lanes, 50 characters. Words: LSTM 2x200, 20 lanes, 10,000 words. Fused Adam, one
thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import dni_seq as dni
from dni_seq.models.language_model import LanguageModel, token_losses

SIZES = {"characters": (50, 64, 256, 1, 64), "words": (10_000, 200, 200, 2, 20)}
"""Vocabulary, embedding, units, layers, lanes."""

SETTINGS = {
    "T = 200": (200, None, 1),
    "T = 200, recomputed every 20": (200, 20, 1),
    "T = 20": (20, None, 1),
    "T = 4": (4, None, 1),
    "T = 4 over the last 20 steps": (4, None, 5),
}
"""T, steps of a chunk, windows of a backward pass."""

ROUNDS = 9


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
        """Trains on one window of the full length, or of another one."""
        length = self.length if length is None else length
        self.trainer.step(self.text[:length], self.text[1 : length + 1])


def memory_of(size: str, setting: str) -> float:
    """Returns the MiB that a step adds at its peak."""
    learner = Learner(size, setting)
    learner.step(1)  # gradients and moments
    Path("/proc/self/clear_refs").write_text("5")
    before = _mib("VmRSS")
    learner.step()
    return _mib("VmHWM") - before


def _mib(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def times_of(size: str) -> dict[str, list[float]]:
    """Returns the CPU seconds of a step, one for each round, by setting."""
    learners = {setting: Learner(size, setting) for setting in SETTINGS}
    found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for turn in range(ROUNDS + 1):
        for setting, learner in learners.items():
            count = max(1, 200 // learner.length)
            begun = time.process_time()
            for _ in range(count):
                learner.step()
            if turn:
                found[setting].append((time.process_time() - begun) / count)
    return found


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    if len(sys.argv) == 3:  # a process of its own
        print(memory_of(sys.argv[1], sys.argv[2]))
        return
    for size in SIZES:
        seconds = times_of(size)
        memory = {}
        for setting in SETTINGS:
            command = [sys.executable, __file__, size, setting]
            # Freed blocks go back to the system, so that the peak is that of the tensors and not of the heap's gaps.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            memory[setting] = float(done.stdout)
        for setting, values in seconds.items():
            median = statistics.median(values)
            line = {"size": size, "setting": setting, "ms": round(1000 * median, 2), "mib": round(memory[setting])}
            line["ms from"], line["ms to"] = round(1000 * min(values), 2), round(1000 * max(values), 2)
            print(json.dumps({**line, "date": time.strftime("%Y-%m-%d")}), flush=True)


if __name__ == "__main__":
    main()
