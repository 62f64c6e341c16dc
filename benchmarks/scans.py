"""When is a window of a diagonal cell faster as a scan than as a loop over its steps?

python benchmarks/scans.py
    Print JSON lines with the median CPU milliseconds of one layer, forward and backward. The median is over 9 rounds in
    which scan and loop take turns.
python benchmarks/scans.py --output docs/results/scans.jsonl
    Also append the lines to a file.
python benchmarks/scans.py --table docs/results/scans.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

LRU and minGRU, windows of 1, 4, 20, 100 and 200 steps, one thread. "layer" is the whole layer; "recurrence" is the layer
without its matrix products and norms. The library scans long windows of small LRU states. Only this file scans a minGRU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from result_lines import Line, add_options, machine, measuring, newest, record
from torch import Tensor
from torch.autograd.function import once_differentiable

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import markdown
from dni_seq.models import diagonal_cells, recurrences
from dni_seq.models.diagonal_rnn import DiagonalRNN

SIZES, LENGTHS = ((16, 64), (8, 256), (32, 256)), (1, 4, 20, 100, 200)
NEVER = 2**40


def gated_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns all h_t = a_t h_{t-1} + b_t [T, B, N] by a scan in two levels, as `recurrences.rotation_scan` does.

    Args:
        a: factors [T, B, N].
        b: inputs [T, B, N].
        start: h before the first step, [B, N].
    """
    size = math.isqrt(len(b))
    rest = len(b) // size * size
    states = b.clone()
    within = states[:rest].unflatten(0, (-1, size))
    decay = a[:rest].reshape(within.shape).clone()  # product of the factors from a chunk's start to each of its steps
    for j in range(1, size):
        within[:, j].addcmul_(decay[:, j], within[:, j - 1])
        decay[:, j].mul_(decay[:, j - 1])
    before = torch.empty_like(within[:, 0])
    carried = start
    for k in range(len(within)):
        before[k] = carried
        carried = torch.addcmul(within[k, -1], decay[k, -1], carried)
    within.addcmul_(decay, before[:, None])
    if rest < len(b):
        states[rest:] = recurrences.gated_loop(a[rest:], b[rest:], carried)
    return states


class _GatedScan(torch.autograd.Function):
    """`recurrences.gated` with a scan in the forward pass and a scan in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        states = gated_scan(a, b, start)
        ctx.save_for_backward(a, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, states, start = ctx.saved_tensors
        inner = gradient
        if len(a) > 1:
            earlier = gated_scan(a[1:].flip(0), gradient[:-1].flip(0), gradient[-1])
            inner = torch.cat([earlier.flip(0), gradient[-1:]])
        before = torch.cat([start[None], states[:-1]])
        return inner * before, inner, a[0] * inner[0]


@contextmanager
def all_windows(*, scan: bool) -> Iterator[None]:
    """Inside the context, LRU and minGRU run every window of more than one step as a scan, or without `scan` as a loop."""
    before = recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS, diagonal_cells.gated
    gated: Any = _GatedScan.apply
    try:
        recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS = (2, NEVER) if scan else (NEVER, 0)
        diagonal_cells.gated = gated if scan else recurrences.gated
        yield
    finally:
        recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS, diagonal_cells.gated = before


def steppers(kind: str, lanes: int, units: int, length: int) -> dict[str, Callable[[], None]]:
    """Returns two functions that run forward and backward: "layer" a whole layer, "recurrence" its recurrence alone."""
    layer = DiagonalRNN(kind, units, units)
    inputs = torch.randn(length, lanes, units)
    width = layer.cells[0].width
    driven, start = torch.randn(length, lanes, width, requires_grad=True), torch.zeros(lanes, width)
    keep = torch.rand(length, lanes, units)
    real, imaginary = 0.6 * torch.rand(2, units)

    def whole() -> None:
        layer(inputs)[0].sum().backward()

    def recurrence() -> None:
        found = recurrences.rotation(real, imaginary, driven, start) if kind == "lru" else None
        found = diagonal_cells.gated(keep, driven, start) if found is None else found
        found.sum().backward()

    return {"layer": whole, "recurrence": recurrence}


def measure(kind: str, lanes: int, units: int, length: int, rounds: int) -> dict[str, float]:
    """Returns the median CPU milliseconds of layer and recurrence, as a loop and as a scan."""
    found: dict[str, list[float]] = {}
    runs, count = steppers(kind, lanes, units, length), max(2, 100 // length)
    for turn in range(rounds + 1):
        for part, run in runs.items():
            for scan in (False, True):
                with all_windows(scan=scan):
                    begun = time.process_time()
                    for _ in range(count):
                        run()
                    spent = time.process_time() - begun
                if turn:
                    found.setdefault(f"{part}: {'scan' if scan else 'loop'}", []).append(1000 * spent / count)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def table(lines: Sequence[Line]) -> str:
    """Returns a table with a row for each cell, size and window length."""
    parts = ("layer: loop", "layer: scan", "recurrence: loop", "recurrence: scan")
    rows = [
        [
            line["cell"],
            *(str(line[name]) for name in ("units", "lanes", "T")),
            *(f"{line['ms'][part]:.2f}" for part in parts),
        ]
        for line in newest(lines, "cell", "units", "lanes", "T")
    ]
    return markdown(["cell", "units", "lanes", "T", *(f"{part}, ms" for part in parts)], rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bptt", nargs="+", type=int, default=list(LENGTHS), help="window lengths (default: 1 4 20 100 200)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each case (default: 9)")
    add_options(parser)
    options = parser.parse_args()
    if not measuring(parser, options, table):
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    for kind in ("lru", "mingru"):
        for lanes, units in SIZES:
            for length in options.bptt:
                line = {"cell": kind, "lanes": lanes, "units": units, "T": length, "rounds": options.rounds, "threads": 1}
                record({**line, "ms": measure(kind, lanes, units, length, options.rounds), **machine()}, options.output)


if __name__ == "__main__":
    main()
