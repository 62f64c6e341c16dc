"""Recurrent layers with a diagonal recurrence: minGRU and LRU, with exact traces of their own parameters.

The state of a unit depends on its own earlier state and on the layer's inputs, not on other units. The trace of a unit, the
derivative of its state with respect to its parameters, is therefore exact, and for each lane about as large as the
parameters. This is real-time recurrent learning without its usual cost.

Legend: T = window length, B = lanes, D = inputs, H = units of a minGRU, N = complex units of an LRU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dni_seq.core import traces
from dni_seq.models.recurrences import gated, rotate, rotation, rotation_loop, swap


class MinGRU(nn.Module):
    """A minimal gated recurrent unit: z_t = σ(W_z x_t), h_t = (1 - z_t) h_{t-1} + z_t W_h x_t.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", arXiv 2410.01201, section 3.1. As in the paper, the
    candidate W_h x_t has no nonlinearity. Here both linear maps have biases.

    Args:
        inputs: D.
        units: H.

    Attributes:
        width: H, the size of a lane's state.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.width = units
        self.gates = nn.Linear(inputs, 2 * units)

    @property
    def own_parameters(self) -> list[Tensor]:
        """The parameters of the recurrence, which traces belong to: weight [2H, D] and bias [2H]."""
        return [self.gates.weight, self.gates.bias]

    def initial_traces(self, lanes: int) -> list[Tensor]:
        """Returns the traces of a zero state: [B, 2H, D] and [B, 2H]."""
        weight = self.gates.weight
        return [weight.new_zeros(lanes, *weight.shape), weight.new_zeros(lanes, len(weight))]

    def forward(self, inputs: Tensor, state: Tensor, carried: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Returns the states [T, B, H], and the traces after the last step if traces are given.

        Args:
            inputs: [T, B, D].
            state: h before the first step, [B, H].
            carried: the traces of `state`; empty for none.
        """
        start = state
        if carried:
            (start,) = traces.attach([state], carried, self.own_parameters, self._contract)
        pre_gate, candidate = self.gates(inputs).chunk(2, -1)
        gate = pre_gate.sigmoid()
        states = gated(1 - gate, gate * candidate, start)
        if not carried or not traces.is_active(self.own_parameters):
            return states, list(carried)
        return states, self._carried_on(carried, inputs, gate, candidate, states, state)

    @staticmethod
    def _contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        (gradient,) = gradients
        both = torch.cat([gradient, gradient], -1)
        return [torch.einsum("br,brd->rd", both, carried[0]), (both * carried[1]).sum(0)]

    @torch.no_grad()
    def _carried_on(
        self, carried: Sequence[Tensor], inputs: Tensor, gate: Tensor, candidate: Tensor, states: Tensor, start: Tensor
    ) -> list[Tensor]:
        """Returns the traces after a window, E_{k+1} = Λ E_k + F.

        Λ is the decay of the state over the window. F is the sum over the window's steps of a step's derivative, times the
        decay from that step to the window's end.
        """
        of_weight, of_bias = traces.plain(carried)
        keep = 1 - gate
        after = torch.ones_like(keep)  # the decay from the state after step t to the window's end
        for t in range(len(keep) - 2, -1, -1):
            torch.mul(after[t + 1], keep[t + 1], out=after[t])
        decay = (after[0] * keep[0]).repeat(1, 2)
        before = torch.cat([start[None], states[:-1]])
        slopes = torch.cat([after * (candidate - before) * gate * keep, after * gate], -1)
        of_weight = torch.einsum("tbr,tbd->brd", slopes, inputs).addcmul_(decay[..., None], of_weight)
        return list(traces.carry([of_weight, slopes.sum(0).addcmul_(decay, of_bias)], states))


class LRU(nn.Module):
    """A linear recurrent unit: x_t = λ x_{t-1} + γ B u_t in complex numbers, y_t = Re(C x_t) + d u_t.

    λ = exp(-exp(ν) + i exp(θ)); B and C are matrices. Complex numbers are stored in real tensors: real parts first, then
    imaginary parts.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349, section 3 and
    appendix A, with the initialisation of the paper. Here |λ| starts between 0.9 and 0.999, and by default the phase of λ
    starts between 0 and π / 10.

    Args:
        inputs: D, and the number of outputs.
        units: N.
        largest_phase: largest phase of λ at initialisation, in radians.

    Attributes:
        width: 2N, the size of a lane's state.
    """

    SMALLEST, LARGEST = 0.9, 0.999

    def __init__(self, inputs: int, units: int, largest_phase: float = math.pi / 10) -> None:
        super().__init__()
        self.width = 2 * units
        low, high = self.SMALLEST**2, self.LARGEST**2
        squared = torch.rand(units) * (high - low) + low
        self.nu = nn.Parameter((-0.5 * squared.log()).log())
        self.theta = nn.Parameter((torch.rand(units) * largest_phase).clamp_min(1e-8).log())
        self.gamma = nn.Parameter(0.5 * (1 - squared).log())
        self.into = nn.Parameter(torch.randn(2 * units, inputs) / math.sqrt(2 * inputs))
        self.out = nn.Parameter(torch.randn(inputs, 2 * units) / math.sqrt(units))
        self.skip = nn.Parameter(torch.randn(inputs))

    @property
    def own_parameters(self) -> list[Tensor]:
        """The parameters of the recurrence, which traces belong to: ν, θ and log γ, each [N], and the matrix B [2N, D]."""
        return [self.nu, self.theta, self.gamma, self.into]

    def initial_traces(self, lanes: int) -> list[Tensor]:
        """Returns the traces of a zero state: [B, 3, 2N] of ν, θ and log γ, and [B, 2N, D] of the matrix B."""
        return [self.into.new_zeros(lanes, 3, self.width), self.into.new_zeros(lanes, *self.into.shape)]

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Returns Re λ and Im λ, each [N]."""
        size, phase = (-self.nu.exp()).exp(), self.theta.exp()
        return size * phase.cos(), size * phase.sin()

    def forward(self, inputs: Tensor, state: Tensor, carried: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the outputs [T, B, D], the last state, and its traces if traces are given.

        Args:
            inputs: u, [T, B, D].
            state: x before the first step, [B, 2N].
            carried: the traces of `state`; empty for none.
        """
        start = state
        if carried:
            (start,) = traces.attach([state], carried, self.own_parameters, self._contract)
        real, imaginary = self.eigenvalues()
        driven = (inputs @ self.into.T) * self.gamma.exp().repeat(2)
        states = rotation(real, imaginary, driven, start)
        signed = torch.cat([self.out[:, : self.width // 2], -self.out[:, self.width // 2 :]], -1)
        outputs = states @ signed.T + self.skip * inputs
        if not carried or not traces.is_active(self.own_parameters):
            return outputs, states[-1], list(carried)
        return outputs, states[-1], self._carried_on(carried, inputs, driven, states, state)

    @staticmethod
    def _contract(gradients: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor]:
        (gradient,) = gradients
        of_scalars, of_into = carried
        three = (gradient[:, None] * of_scalars).sum(0).unflatten(-1, (2, -1)).sum(1)  # [3, N]
        real, imaginary = gradient.chunk(2, -1)
        turned = torch.cat([imaginary, -real], -1)  # ∂x / ∂Im B = i e
        halves = [torch.einsum("bn,bnd->nd", each, of_into).unflatten(0, (2, -1)).sum(0) for each in (gradient, turned)]
        return [*three, torch.cat(halves)]

    @torch.no_grad()
    def _carried_on(
        self, carried: Sequence[Tensor], inputs: Tensor, driven: Tensor, states: Tensor, start: Tensor
    ) -> list[Tensor]:
        """Returns the traces after a window, E_{k+1} = Λ E_k + F as in `MinGRU`, stored like the complex state."""
        of_scalars, of_into = traces.plain(carried)
        real, imaginary = self.eigenvalues()
        before = torch.cat([start[None], states[:-1]])
        turned = rotate(real, imaginary, before)  # λ x_{t-1}
        of_theta = swap(turned) * self.theta.exp().repeat(2)
        of_theta[..., : self.width // 2].neg_()  # i exp(θ) λ x_{t-1}
        own = torch.stack([-self.nu.exp().repeat(2) * turned, of_theta, driven], 2)  # [T, B, 3, 2N]
        of_scalars = rotation_loop(real, imaginary, own, of_scalars)[-1]
        powers = torch.zeros_like(states[:, 0])  # λ^(T-1-t), [T, 2N]
        powers[-1, : self.width // 2] = 1
        for t in range(len(powers) - 2, -1, -1):
            powers[t] = rotate(real, imaginary, powers[t + 1])
        re, im = rotate(real, imaginary, powers[0]).chunk(2, -1)  # λ^T
        re, im = re[:, None], im[:, None]
        e_re, e_im = of_into.chunk(2, 1)
        of_into = torch.cat([re * e_re - im * e_im, im * e_re + re * e_im], 1)
        of_into += torch.einsum("tn,tbd->bnd", powers * self.gamma.exp().repeat(2), inputs)
        return list(traces.carry([of_scalars, of_into], states))
