"""Chooses between PyTorch's two LSTM kernels on the CPU, by the length of the window.

By default PyTorch runs a float32 `nn.LSTM` through oneDNN. That kernel is made for long sequences, and it computes the
gradients of the weights in every vector-Jacobian product, even in a product with respect to the state only. The native
kernel is faster in short windows, and also in longer windows with many products with respect to the state. The lengths in
`native_up_to` were chosen by measurement on one machine. They are fixed, because a choice by timing at run time would make
results depend on the machine's load.

Legend: T = window length, B = lanes, E = input size, H = hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def native_up_to(products: float) -> int:
    """Returns the longest window, in steps, for which the native kernel is at least as fast as oneDNN's.

    Args:
        products: average number, for each window, of vector-Jacobian products with respect to the state only. The backward
            pass is not counted.
    """
    return 2 if products < 0.5 else 4 if products < 2 else 16


def run_rnn(rnn: nn.Module, inputs: Tensor, state: Any, native: int) -> tuple[Tensor, Any]:
    """Returns `rnn(inputs, state)` for inputs [T, B, E].

    The native kernel runs if T is at most `native` and `rnn` is a float32 `nn.LSTM` on the CPU without autocast.
    """
    # float64 never runs through oneDNN, and under autocast only oneDNN's kernel supports bfloat16.
    short = len(inputs) <= native and isinstance(rnn, nn.LSTM) and inputs.dtype == torch.float32
    native_wins = short and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    with _native_kernels() if native_wins else nullcontext():
        result: tuple[Tensor, Any] = rnn(inputs, state)
    return result


def run_rnn_in_parts(rnn: nn.Module, inputs: Tensor, state: Any, native: int, steps: int) -> tuple[Tensor, list[Any]]:
    """Does what `run_rnn` does, `steps` steps at a time; returns the outputs [T, B, H] and the state after each part."""
    outputs, found = [], []
    for part in inputs.split(steps):
        output, state = run_rnn(rnn, part, state, native)
        outputs.append(output)
        found.append(state)
    return torch.cat(outputs), found


@contextmanager
def _native_kernels() -> Iterator[None]:
    """Context manager that selects PyTorch's native CPU kernels; a backward pass uses the kernels of its forward pass."""
    # The public context manager, torch.backends.mkldnn.flags, warns about settings that it does not change.
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
