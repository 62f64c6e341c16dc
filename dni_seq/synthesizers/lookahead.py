"""LookaheadEncoder: what a synthesizer sees of the steps after its state.

Legend: B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.windows import next_steps


class LookaheadEncoder(nn.Module):
    """Turn the next m steps of every lane into one vector a lane; steps behind the end of a sequence count as zeros.

    Args:
        steps: m.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E], such as `nn.Embedding` for tokens or `nn.Linear`
            for vectors; it becomes part of this one.
        targets: the same for `Lookahead.targets`.
        features: E of both together, where it cannot be read off an `nn.Embedding` or `nn.Linear`.

    Raises:
        ValueError: `steps` is not positive, or E is unknown; at a call, the context is no lookahead of m steps.
    """

    def __init__(self, steps: int, inputs: nn.Module, targets: nn.Module, features: int | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(
                f"LookaheadEncoder: steps must be positive, got {steps}; for no lookahead leave the encoder out"
            )
        self.steps = steps
        self.inputs = inputs
        self.targets = targets
        per_step = _width(inputs) + _width(targets) if features is None else features
        self.features = steps * (per_step + 2)

    def forward(self, context: Any) -> Tensor:
        """[B, features] for a `Lookahead` of at least m steps, of which the first m are read."""
        ahead = next_steps(context, self.steps)
        encoded = torch.cat([self.inputs(ahead.inputs), self.targets(ahead.targets)], dim=-1)
        flags = torch.stack([ahead.valid, ahead.counts], dim=-1).to(encoded.dtype)
        step = torch.cat([encoded * flags[..., :1], flags], dim=-1)  # [m, B, E + 2]
        return step.transpose(0, 1).flatten(1)


def _width(module: nn.Module) -> int:
    for name in ("embedding_dim", "out_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise ValueError(
        f"LookaheadEncoder: the width of {type(module).__name__} is unknown; pass features, inputs' and targets'"
    )
