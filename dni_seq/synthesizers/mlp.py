"""BasicSynthesizer: a perceptron from the trigger, and a context, to the message.

Source: dni-pytorch, and Jaderberg et al. 2017, arXiv 1608.05343, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State


class BasicSynthesizer(nn.Module):
    """A multi-layer perceptron with ReLU between its layers; its last layer starts at zero, so that training does too.

    The trigger's leaves are joined on their last dimension, which `trigger_dim` counts, and the output is split back. Layers
    of a stacked state [L, B, H] share it, without an index. A ForwardInterface's message, whose last dimension `output_dim`
    counts, may differ from its trigger, which then is a single tensor.

    Args:
        output_dim: size of the message's last dimension, over all leaves.
        n_hidden: number of hidden layers; 0 is a linear map.
        hidden_dim: size of the hidden layers, `output_dim` where it is None.
        trigger_dim: size of the trigger's last dimension, over all leaves, `output_dim` where it is None.
        context_dim: size of the context's last dimension; None for a synthesizer without context.

    Raises:
        ValueError: a size is not positive; at a call, a context is missing or given where none is expected, or a size
            differs from what was announced.
    """

    def __init__(
        self,
        output_dim: int,
        n_hidden: int = 0,
        hidden_dim: int | None = None,
        trigger_dim: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        trigger_dim = output_dim if trigger_dim is None else trigger_dim
        sizes = {
            "output_dim": output_dim,
            "hidden_dim": hidden_dim,
            "trigger_dim": trigger_dim,
            "context_dim": context_dim,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"BasicSynthesizer: {name} must be positive, got {size}")
        if n_hidden < 0:
            raise ValueError(f"BasicSynthesizer: n_hidden must be 0 or more, got {n_hidden}")
        self.output_dim, self.trigger_dim, self.context_dim = output_dim, trigger_dim, context_dim
        first = hidden_dim if n_hidden else output_dim
        self.input_trigger = nn.Linear(trigger_dim, first)
        self.input_context = None if context_dim is None else nn.Linear(context_dim, first)
        self.layers = nn.ModuleList(
            nn.Linear(hidden_dim, output_dim if last else hidden_dim)
            for last in [i == n_hidden - 1 for i in range(n_hidden)]
        )
        for layer in [self.layers[-1]] if n_hidden else [self.input_trigger, self.input_context]:
            zero_(layer)

    def forward(self, trigger: State, context: Any = None) -> State:
        """The message for `trigger` [..., trigger_dim], tensor or nest; `context` [..., context_dim] broadcasts over it."""
        leaves = states.floating(trigger)
        joined = leaves[0] if len(leaves) == 1 else torch.cat(leaves, dim=-1)
        self._check(joined, context)
        z = self.input_trigger(joined)
        if self.input_context is not None:
            z = z + self.input_context(context)
        for layer in self.layers:
            z = layer(F.relu(z))
        if len(leaves) == 1:
            return states.with_floating(trigger, [z])
        return states.with_floating(trigger, torch.split(z, [leaf.shape[-1] for leaf in leaves], dim=-1))

    def _check(self, joined: Tensor, context: Any) -> None:
        if joined.shape[-1] != self.trigger_dim:
            raise ValueError(
                f"BasicSynthesizer: the trigger's last dimension is {joined.shape[-1]}, trigger_dim is {self.trigger_dim}"
            )
        self._check_dtype("trigger", joined)
        if self.context_dim is None:
            if context is not None:
                raise ValueError("BasicSynthesizer: a context is given; build the synthesizer with context_dim to use it")
            return
        if not isinstance(context, Tensor):
            raise ValueError(
                f"BasicSynthesizer: built with context_dim={self.context_dim}, it needs a tensor as context: wrap the call "
                "in `with dni_seq.synthesizer_context(context):`"
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"BasicSynthesizer: the context has shape {tuple(context.shape)}, its last dimension must be "
                f"context_dim={self.context_dim} (class labels go in as one-hot vectors)"
            )
        sizes = zip(reversed(context.shape[:-1]), reversed(joined.shape[:-1]), strict=False)
        if context.dim() > joined.dim() or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"BasicSynthesizer: the context's shape {tuple(context.shape)} does not broadcast over the trigger's, "
                f"{tuple(joined.shape)}; but for the last dimension they must agree or the context's be 1"
            )
        self._check_dtype("context", context)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        expected = self.input_trigger.weight.dtype
        if tensor.dtype != expected and not torch.is_autocast_enabled(tensor.device.type):
            raise ValueError(
                f"BasicSynthesizer: the {name} has dtype {tensor.dtype}, the synthesizer's parameters {expected}: convert "
                "one with .to(dtype); interfaces hand half-precision tensors over in float32"
            )


def zero_(layer: nn.Module | None) -> None:
    """Set every parameter of `layer` to zero, biases too, so that messages start at exactly zero."""
    if layer is not None:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
