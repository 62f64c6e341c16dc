"""Compares a step with traces with a plain step, and with a plain step plus the traces' own arithmetic.

python benchmarks/traces.py
    Print the median CPU milliseconds of each step as JSON lines. In each of the 9 rounds all steps take turns.

LRU of 256 units on characters (embedding 64), 8 and 32 lanes, windows of 1 and 4 steps, exact traces; LSTM of 256 units, 64
lanes, windows of 1 step, factored traces. "over parts", for the LRU, is the ratio to the time of the plain step plus that of
the contraction and the update of the traces, which are timed alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.models.diagonal_cells import LRU
from dni_seq.models.language_model import LanguageModel, token_losses

CHARACTERS, EMBED, UNITS = 50, 64, 256
CASES = [
    ("lru", "exact", 8, 1),
    ("lru", "exact", 8, 4),
    ("lru", "exact", 32, 1),
    ("lru", "exact", 32, 4),
    ("lstm", "factored", 64, 1),
]
ROUNDS, COUNT = 9, 40


def stepper(cell: str, traces: str | None, lanes: int, length: int) -> Callable[[], None]:
    """Returns a function that makes one training step."""
    torch.manual_seed(0)
    model = LanguageModel(CHARACTERS, cell=cell, embed=EMBED, hidden=UNITS, layers=1, traces=traces)
    trainer = dni.SequenceTrainer(model, torch.optim.Adam(model.parameters(), 2e-3, fused=True), token_losses, clip=1.0)
    text = torch.randint(CHARACTERS, (length + 1, lanes))

    def step() -> None:
        trainer.step(text[:-1], text[1:])

    return step


def own_arithmetic(lanes: int, length: int) -> Callable[[], None]:
    """Returns a function that contracts the traces of an LRU once and updates them over the steps of one window."""
    cell = LRU(UNITS, UNITS)
    inputs, state = torch.randn(length, lanes, UNITS), torch.randn(lanes, 2 * UNITS)
    carried = [torch.randn_like(trace) for trace in cell.initial_traces(lanes)]
    with torch.no_grad():
        driven = (inputs @ cell.into.T) * cell.gamma.exp().repeat(2)
        states = torch.randn(length, lanes, 2 * UNITS)

    def run() -> None:
        with torch.no_grad():
            cell._contract([state], carried)
            cell._carried_on(carried, inputs, driven, states, state)

    return run


def main() -> None:
    """Runs the command."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for cell, traces, lanes, length in CASES:
        timed = {"plain": stepper(cell, None, lanes, length), "traces": stepper(cell, traces, lanes, length)}
        if cell == "lru":
            timed["own"] = own_arithmetic(lanes, length)
        found: dict[str, list[float]] = {name: [] for name in timed}
        for turn in range(ROUNDS + 1):
            for name, run in timed.items():
                begun = time.process_time()
                for _ in range(COUNT):
                    run()
                if turn:
                    found[name].append(1000 * (time.process_time() - begun) / COUNT)
        ms = {name: round(statistics.median(values), 3) for name, values in found.items()}
        line = {"cell": cell, "traces": traces, "lanes": lanes, "T": length, "ms": ms}
        line["over plain"] = round(ms["traces"] / ms["plain"], 2)
        if "own" in ms:
            line["over parts"] = round(ms["traces"] / (ms["plain"] + ms["own"]), 2)
        print(json.dumps({**line, "date": time.strftime("%Y-%m-%d")}), flush=True)


if __name__ == "__main__":
    main()
