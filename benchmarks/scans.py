"""When is a window of a diagonal cell faster as a scan than as a loop over its steps?

python benchmarks/scans.py
    Median CPU milliseconds of one layer forward and backward, over 9 rounds in which both take turns, as JSON lines.

LRU and minGRU, windows of 1, 4, 20, 100 and 200 steps, one thread. "recurrence": without the matrix products and norms of
the layer. The library scans long windows of small LRU states; the scan of a minGRU is here alone.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.models import diagonal_cells, recurrences
from dni_seq.models.diagonal_rnn import DiagonalRNN

SIZES, LENGTHS = ((16, 64), (8, 256), (32, 256)), (1, 4, 20, 100, 200)
ROUNDS, NEVER = 9, 2**40


def gated_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t [T, B, N] as a scan in two levels, like `recurrences.rotation_scan`."""
    size = math.isqrt(len(b))
    rest = len(b) // size * size
    states = b.clone()
    within = states[:rest].unflatten(0, (-1, size))
    decay = a[:rest].reshape(within.shape).clone()  # from before a chunk to each of its steps
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
    """`recurrences.gated` with scans in both directions."""

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


LOOP = recurrences.gated


def choose(scan: bool) -> None:
    """Makes both cells run windows of more than one step as a scan, or none."""
    recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS = (2, NEVER) if scan else (NEVER, 0)
    gated: Any = _GatedScan.apply
    diagonal_cells.gated = gated if scan else LOOP


def steppers(kind: str, lanes: int, units: int, length: int) -> dict[str, Callable[[], None]]:
    """Returns functions that run forward and backward: a whole layer, and its recurrence alone."""
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


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for kind in ("lru", "mingru"):
        for lanes, units in SIZES:
            for length in LENGTHS:
                found: dict[str, list[float]] = {}
                runs = steppers(kind, lanes, units, length)
                for turn in range(ROUNDS + 1):
                    for part, run in runs.items():
                        for scan in (False, True):
                            choose(scan)
                            count = max(2, 100 // length)
                            begun = time.process_time()
                            for _ in range(count):
                                run()
                            if turn:
                                name = f"{part}: {'scan' if scan else 'loop'}"
                                found.setdefault(name, []).append(1000 * (time.process_time() - begun) / count)
                ms = {name: round(statistics.median(values), 3) for name, values in found.items()}
                line = {"cell": kind, "lanes": lanes, "units": units, "T": length, "ms": ms}
                print(json.dumps({**line, "date": time.strftime("%Y-%m-%d")}), flush=True)


if __name__ == "__main__":
    main()
