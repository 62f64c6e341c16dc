"""Diagonal linear recurrences over a window, each as one node of the autograd graph.

A loop of T small steps in plain autograd records several nodes for each step, and their overhead exceeds the arithmetic.
Here forward and backward are loops over preallocated tensors.

For complex states, a long window with few numbers in each step is computed as a scan. The window is cut into √T chunks of
√T steps. First all chunks are computed at once, each from a zero state. Then the states between the chunks are computed.
Last, the contribution of these states is added inside the chunks. A scan runs 2√T operations on larger tensors instead of T
operations, with twice the arithmetic. For real states a scan hardly saves time (benchmarks/scans.py), so they are always
computed by a loop.

Source of the scan: Blelloch 1990, "Prefix Sums and Their Applications", CMU-CS-90-190, section 1.4, in two levels.

Legend: T = window length, B = lanes, N = units, K = chunks, S = steps of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Gated(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        states = gated_loop(a, b, start)
        ctx.save_for_backward(a, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, states, start = ctx.saved_tensors
        inner = gradient.clone()
        for t in range(len(a) - 2, -1, -1):
            inner[t].addcmul_(a[t + 1], inner[t + 1])
        before = torch.cat([start[None], states[:-1]])
        return inner * before, inner, a[0] * inner[0]


def gated_loop(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns h_t = a_t h_{t-1} + b_t for all t; call it without gradients.

    Args:
        a: [T, B, N].
        b: [T, B, N].
        start: h before the first step, [B, N].
    """
    states = torch.empty_like(b)
    before = start
    for t in range(len(b)):
        before = torch.addcmul(b[t], a[t], before, out=states[t])
    return states


def gated(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns h_t = a_t h_{t-1} + b_t [T, B, N], differentiable.

    Args:
        a: [T, B, N].
        b: [T, B, N].
        start: [B, N].
    """
    states: Tensor = _Gated.apply(a, b, start)
    return states


def swap(x: Tensor) -> Tensor:
    """Returns (im, re) for a tensor that holds real parts and then imaginary parts along its last dimension."""
    real, imaginary = x.chunk(2, -1)
    return torch.cat([imaginary, real], -1)


def rotate(real: Tensor, imaginary: Tensor, x: Tensor) -> Tensor:
    """Returns λ x for complex numbers as real and then imaginary parts along the last dimension.

    Args:
        real: Re λ [N].
        imaginary: Im λ [N].
        x: [..., 2N].
    """
    re, im = x.chunk(2, -1)
    return torch.cat([real * re - imaginary * im, imaginary * re + real * im], -1)


SCAN_STEPS, SCAN_NUMBERS = 64, 2048
"""A window is scanned if it has at least 64 steps, and b_t [B, 2N] at most 2,048 elements (benchmarks/scans.py)."""


def scans(b: Tensor) -> bool:
    """Returns whether a window with inputs b [T, B, 2N] is faster as a scan than as a loop over its steps."""
    return len(b) >= SCAN_STEPS and b[0].numel() <= SCAN_NUMBERS


class _Rotation(torch.autograd.Function):
    """x_t = λ x_{t-1} + b_t for complex numbers, real parts first, then imaginary parts."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, imaginary: Tensor, b: Tensor, start: Tensor) -> Tensor:
        states = (rotation_scan if scans(b) else rotation_loop)(real, imaginary, b, start)
        ctx.save_for_backward(real, imaginary, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real, imaginary, states, start = ctx.saved_tensors
        if scans(gradient):  # the backward recurrence has the same form, from the last step to the first
            earlier = rotation_scan(real, -imaginary, gradient[:-1].flip(0), gradient[-1])
            inner = torch.cat([earlier.flip(0), gradient[-1:]])
        else:
            inner = gradient.clone()
            for t in range(len(inner) - 2, -1, -1):
                inner[t] += rotate(real, -imaginary, inner[t + 1])
        before = torch.cat([start[None], states[:-1]])
        g_re, g_im = inner.flatten(0, -2).chunk(2, -1)
        x_re, x_im = before.flatten(0, -2).chunk(2, -1)
        of_real = (g_re * x_re + g_im * x_im).sum(0)
        of_imaginary = (g_im * x_re - g_re * x_im).sum(0)
        return of_real, of_imaginary, inner, rotate(real, -imaginary, inner[0])


def rotation_loop(real: Tensor, imaginary: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns x_t = λ x_{t-1} + b_t for all t; call it without gradients. See `rotation`."""
    states = torch.empty_like(b)
    before = start
    for t in range(len(b)):
        before = torch.add(rotate(real, imaginary, before), b[t], out=states[t])
    return states


def _in_chunks(b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns a copy of b [T, ...], a view of its chunks [K, S, ...], and the number of steps in all chunks, K · S <= T."""
    size = math.isqrt(len(b))
    rest = len(b) // size * size
    states = b.clone(memory_format=torch.contiguous_format)
    return states, states[:rest].unflatten(0, (-1, size)), rest


def rotation_scan(real: Tensor, imaginary: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns what `rotation_loop` returns, up to rounding, computed as a scan."""
    states, within, rest = _in_chunks(b)
    powers = [(real, imaginary)]  # λ, λ², ..., [N]
    for j in range(1, within.shape[1]):
        within[:, j] += rotate(real, imaginary, within[:, j - 1])
        re, im = powers[-1]
        powers.append((re * real - im * imaginary, re * imaginary + im * real))
    before = torch.empty_like(within[:, 0])
    carried = start
    for k in range(len(within)):
        before[k] = carried
        carried = within[k, -1] + rotate(*powers[-1], carried)
    re, im = (torch.stack(parts)[:, None] for parts in zip(*powers, strict=True))  # [S, 1, N]
    x, y = before[:, None].chunk(2, -1)  # [K, 1, B, N]
    at_re, at_im = within.chunk(2, -1)
    at_re.addcmul_(re, x).addcmul_(im, y, value=-1)
    at_im.addcmul_(im, x).addcmul_(re, y)
    if rest < len(b):
        states[rest:] = rotation_loop(real, imaginary, b[rest:], carried)
    return states


def rotation(real: Tensor, imaginary: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Returns x_t = λ x_{t-1} + b_t [T, B, 2N], differentiable; real parts first, then imaginary parts.

    Args:
        real: Re λ [N].
        imaginary: Im λ [N].
        b: [T, B, 2N].
        start: x before the first step, [B, 2N].
    """
    states: Tensor = _Rotation.apply(real, imaginary, b, start)
    return states
