"""LookaheadEncoder: encodes the steps after a state as context for a synthesizer.

Legend: B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.windows import next_steps


class LookaheadEncoder(nn.Module):
    """Encodes the next m steps of each lane as one vector; steps after the end of a sequence are encoded as zeros.

    Each step is encoded as the concatenation of its encoded input, its encoded target, a flag that is 1 if the step exists,
    and a flag that is 1 if the step counts in the loss.

    Source: ours; a synthesizer of Jaderberg et al. 2017 sees the next input at most.

    Args:
        steps: m, the number of steps encoded.
        inputs: module from `Lookahead.inputs` [m, B, ...] to [m, B, E_inputs], such as `nn.Embedding` for tokens or
            `nn.Linear` for vectors. It is registered as a submodule and trains with the synthesizer.
        targets: module from `Lookahead.targets` [m, B, ...] to [m, B, E_targets], of the same kind as `inputs`.
        features: E_inputs + E_targets, the width of one encoded step without its flags. If None, both widths are read from
            `inputs` and `targets`, each an `nn.Embedding` or `nn.Linear`.

    Attributes:
        steps: the number of steps encoded.
        features: width of the code of all m steps, m · (E_inputs + E_targets + 2).

    Raises:
        ValueError: `steps` is not positive, or a width is unknown.
    """

    def __init__(self, steps: int, inputs: nn.Module, targets: nn.Module, features: int | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"LookaheadEncoder: steps must be positive, got {steps}; for no lookahead, pass no encoder")
        self.steps = steps
        self.inputs = inputs
        self.targets = targets
        per_step = _width(inputs) + _width(targets) if features is None else features
        self.features = steps * (per_step + 2)

    def forward(self, context: Any) -> Tensor:
        """Returns the code [B, features] of the first m steps of a `Lookahead`.

        Raises:
            ValueError: the context is not a `Lookahead` of at least m steps.
        """
        lookahead = next_steps(context, self.steps)
        encoded = torch.cat([self.inputs(lookahead.inputs), self.targets(lookahead.targets)], dim=-1)
        flags = torch.stack([lookahead.valid, lookahead.counts], dim=-1).to(encoded.dtype)
        step = torch.cat([encoded * flags[..., :1], flags], dim=-1)  # [m, B, E + 2]
        return step.transpose(0, 1).flatten(1)


def _width(module: nn.Module) -> int:
    for name in ("embedding_dim", "out_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise ValueError(
        f"LookaheadEncoder: the width of {type(module).__name__} is unknown; pass features, the sum of the widths of "
        "inputs and targets"
    )
