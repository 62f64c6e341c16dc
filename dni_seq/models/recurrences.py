"""Diagonal linear recurrences over a window, each as one node of the autograd graph.

A loop of T small steps in plain autograd records several nodes a step, whose overhead exceeds the arithmetic. Here forward
and backward are loops over preallocated tensors.

Legend: T = window length, B = lanes, N = units.
"""

from __future__ import annotations

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


class _Rotation(torch.autograd.Function):
    """x_t = λ x_{t-1} + b_t."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, imaginary: Tensor, b: Tensor, start: Tensor) -> Tensor:
        states = rotation_loop(real, imaginary, b, start)
        ctx.save_for_backward(real, imaginary, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real, imaginary, states, start = ctx.saved_tensors
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
