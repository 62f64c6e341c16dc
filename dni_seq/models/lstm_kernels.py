"""Which of PyTorch's LSTM kernels runs a window on the CPU.

PyTorch runs a float32 `nn.LSTM` through oneDNN, whose kernel is made for long sequences and computes the weights' gradients
with every vector-Jacobian product, one that goes to the state alone too. The native kernel is quicker in short windows,
and in longer ones where such products are many. The lengths below are measured (docs/performance.md): a choice made by
timing at run time would make the last bits of a run depend on what else the machine was doing.

Legend: T = window length, B = lanes, E = input size, H = hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def native_up_to(products: float) -> int:
    """The longest window, in steps, for which the native kernel is at least as quick.

    Args:
        products: vector-Jacobian products to the state alone that a window takes on average, beside the one backward pass.
    """
    return 2 if products < 0.5 else 4 if products < 2 else 16


def run_rnn(rnn: nn.Module, inputs: Tensor, state: Any, native: int) -> tuple[Tensor, Any]:
    """`rnn(inputs, state)` for inputs [T, B, E], through the native kernel where T is at most `native`."""
    # float64 never runs through oneDNN, and under autocast oneDNN's kernel is the one that knows bfloat16.
    short = len(inputs) <= native and isinstance(rnn, nn.LSTM) and inputs.dtype == torch.float32
    native_wins = short and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    with _native_kernels() if native_wins else nullcontext():
        result: tuple[Tensor, Any] = rnn(inputs, state)
    return result


@contextmanager
def _native_kernels() -> Iterator[None]:
    """PyTorch's native CPU kernels inside; a backward pass uses the kernels of its forward pass wherever it runs."""
    # The public context manager, torch.backends.mkldnn.flags, warns of settings that it is not given to change.
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
