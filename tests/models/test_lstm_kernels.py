"""Both LSTM kernels give the same numbers, and the native one runs where it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dni_seq.models.lstm_kernels import native_up_to, run_rnn


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_kernels_agree_in_outputs_state_and_gradients(steps):
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 6, 2)
    inputs = torch.randn(steps, 3, 4)
    found = []
    for native in (0, steps):
        outputs, (h, c) = run_rnn(rnn, inputs, None, native)
        gradients = torch.autograd.grad(outputs.square().sum() + h.sum() + c.sum(), rnn.parameters())
        found.append([outputs, h, c, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32, sums in another order


def test_the_native_kernel_runs_short_windows_and_leaves_the_switch_as_it_was():
    rnn = nn.LSTM(4, 6)

    def operations(steps: int, native: int) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_rnn(rnn, torch.randn(steps, 3, 4), None, native)
        return {event.key for event in profile.key_averages()}

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert "aten::mkldnn_rnn_layer" in operations(3, native=2)
    assert "aten::mkldnn_rnn_layer" not in operations(2, native=2)
    assert torch.backends.mkldnn.enabled


def test_more_products_to_the_state_make_the_native_kernel_worth_longer_windows():
    lengths = [native_up_to(products) for products in (0, 1, 2, 8)]
    assert lengths == sorted(lengths)
    assert lengths[0] >= 1
