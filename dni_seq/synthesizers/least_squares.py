"""LeastSquaresHeads: a synthesizer whose last layer is a least-squares fit, so that it follows a fast-learning RNN.

The map from a state to its gradient changes with every update of the RNN. Gradient descent needs hundreds of windows to
learn this map, and after these windows the map has changed. Given the features of a trunk, the best linear head has a closed
form, which is computed from exponentially decaying sums over the latest windows.

Source: recursive least squares with forgetting, known from adaptive filters (Haykin, Adaptive Filter Theory). Its use for
synthetic gradients is ours.

Legend: B = lanes, F = features, S = numbers in one lane's state, N = horizons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core.host_count import CountsOnHost
from dni_seq.core.states import State
from dni_seq.synthesizers.packed import Outputs, PackedSynthesizer
from dni_seq.synthesizers.state_mlp import StateTrunk


class LeastSquaresHeads(PackedSynthesizer, CountsOnHost):
    """Predicts one message for each horizon with linear heads that are least-squares fits to the latest targets.

    The F features are the constant 1 and those of a trunk, a perceptron that learns by gradient descent. Outputs are
    multiplied by a gate, 1 - tanh²(c) at LSTM cells and 1 elsewhere. For each horizon, the sums of the
    features' products with themselves and with the targets decay exponentially. The heads are solved from these sums at
    every `solve_every`-th regression. Messages are zero before the first solution.

    Source: recursive least squares with forgetting (Haykin, Adaptive Filter Theory); its use here is ours.

    Args:
        example: a state of the model, such as `model.initial_state(1)`. Its values and its number of lanes do not matter.
        horizons: N, number of messages.
        memory: how slowly old targets decay in the sums. Each regression adds one target for each lane, and the weight of a
            target falls to 1/e after memory · F further targets.
        ridge: share of the mean of the covariance's diagonal that is added to the diagonal.
        solve_every: regressions between two solutions.
        cells: which leaves are LSTM cell states, such as `LSTM_CELLS`. False for none.
        decay: factor of the old value in the running mean of squared targets. The first 1 / (1 - decay) updates form a
            plain mean instead.
        limit: the largest absolute value in a message, in units of the running root mean square of its targets. None for
            no limit.
        hidden: sizes of the trunk's hidden layers. Default: (256,). If empty, the features are the state and the encoded
            context themselves, so F grows with the lookahead.
        batch_dim: dimension of the lanes in the state's leaves, an int or a nest. Default: 1 in [L, B, H], 0 in [B, H].
        encoder: module that encodes the context, such as `LookaheadEncoder`. Default: None, for no context.
        future: function `S -> FutureModel`, where S is the width of a lane's packed state; its features are added to the
            trunk's. Default: None.

    Attributes:
        covariance: buffer [N, F, F], the decaying sum of the features' outer products.
        correlation: buffer [N, F, S], the decaying sum of products of features and gated targets.
        solution: buffer [N, F, S], the heads.
        gate_power: buffer [N, 1, S], the decaying sum of the squared gates.
        regressions: int64 buffer, 0-d, number of regressions so far.

    Raises:
        ValueError: `memory`, `ridge`, `solve_every`, `horizons` or `limit` is not positive.
    """

    COUNTER = "regressions"

    covariance: Tensor
    correlation: Tensor
    solution: Tensor
    gate_power: Tensor
    regressions: Tensor

    def __init__(
        self,
        example: State,
        horizons: int = 1,
        *,
        memory: float = 12.0,
        ridge: float = 1e-3,
        solve_every: int = 4,
        cells: Any = False,
        decay: float = 0.99,
        limit: float | None = None,
        **network: Any,
    ) -> None:
        for name, value in (("memory", memory), ("ridge", ridge), ("solve_every", solve_every)):
            if not value > 0:
                raise ValueError(f"LeastSquaresHeads: {name} must be positive, got {value}")
        trunk = StateTrunk(example, horizons, **network)
        super().__init__(trunk, example, cells, decay, limit)
        self.memory, self.ridge, self.solve_every = memory, ridge, solve_every
        features, size, zeros = 1 + trunk.width, self.packing.size, self.mean_square.new_zeros
        self.register_buffer("covariance", zeros(horizons, features, features))
        self.register_buffer("correlation", zeros(horizons, features, size))
        self.register_buffer("solution", zeros(horizons, features, size))
        self.register_buffer("gate_power", zeros(horizons, 1, size))
        self.register_buffer("regressions", torch.zeros((), dtype=torch.int64))

    def _outputs(self, bounded: Tensor, gate: Tensor, context: Any) -> Outputs:
        """Computes one message for each of the N horizons, in units of the targets' running root mean square.

        Args:
            bounded: packed states [B, S], with tanh applied to LSTM cells.
            gate: [B, S], 1 - tanh² at LSTM cells and 1 elsewhere; messages are multiplied by it.
            context: the input of the encoder and the future model, such as a `Lookahead`; None without them.

        Returns:
            `Outputs` with messages [B, N, S], the trunk's features [B, F], and the future model's loss or None.
        """
        trunk, loss = self.network.features(bounded, context)
        features = torch.cat([trunk.new_ones(len(trunk), 1), trunk], dim=1)
        found = torch.matmul(features, self.solution).transpose(0, 1)
        return Outputs(found * gate[:, None], features, loss)

    def _learn(self, trained: list[int], features: Tensor | None, gate: Tensor, wanted: Tensor) -> None:
        """Adds normalised targets, those of all ranks, to the decaying sums, and solves the heads if a solution is due.

        Outputs are gated, so each output is a weighted fit with the squared gate as weight. One covariance serves all
        outputs, which assumes that the gate is independent of the features.

        Args:
            trained: the n horizons that have a target.
            features: [B, F].
            gate: [B, S].
            wanted: [B, n, S], the normalised targets.
        """
        assert features is not None
        lanes = len(features)
        gated = (wanted * gate[:, None]).transpose(0, 1)  # [n, B, S]
        fresh = [features.T @ features, features.T @ gated, gate.square().sum(0)]
        if self.across_ranks is not None:
            lanes, fresh = lanes * self.across_ranks.size, self.across_ranks.sums(fresh)
        keep = 1 - 1 / max(self.memory * features.shape[1] / lanes, 1.0)
        for sums, added in zip((self.covariance, self.correlation, self.gate_power), fresh, strict=True):
            if len(trained) == len(sums):
                sums.mul_(keep).add_(added)
            else:
                sums[trained] = keep * sums[trained] + added
        if self._count_call() % self.solve_every == 0:
            self._solve()

    def _solve(self) -> None:
        """Solves the heads from the sums; a head stays as it is if its factorisation fails or is not finite."""
        diagonal = self.covariance.diagonal(dim1=1, dim2=2)
        lanes = diagonal[:, :1, None]  # the first feature is 1, so its sum of squares counts lanes
        shift = (self.ridge * diagonal.mean(1, keepdim=True)).expand_as(diagonal)
        factor, failed = torch.linalg.cholesky_ex(self.covariance + torch.diag_embed(shift))
        identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
        # A head that was never trained has sums of zero: its factorisation fails, so an identity replaces the factor.
        factor = torch.where((failed == 0)[:, None, None], factor, identity)
        weight = (self.gate_power / lanes).clamp_min(1e-6)
        # The explicit inverse is faster: F is small compared with S, and a product costs less than solving for S columns.
        found = torch.cholesky_inverse(factor) @ (self.correlation / weight)
        usable = (failed == 0) & found.isfinite().flatten(1).all(1)
        # Not in place, because the regression's backward pass still reads the old tensor. Contiguous like a loaded tensor,
        # because the last bits of a product depend on the layout.
        self.solution = torch.where(usable[:, None, None], found, self.solution).contiguous()
