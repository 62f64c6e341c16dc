"""BasicSynthesizer: a multi-layer perceptron that maps a trigger and an optional context to a message.

Source: dni-pytorch, and Jaderberg et al. 2017, arXiv 1608.05343, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.synthesizers.key_order import KeyOrder


class BasicSynthesizer(nn.Module):
    """Predicts a message from a trigger and an optional context with a multi-layer perceptron (ReLU between its layers).

    The last layer starts at zero, so messages are exactly zero at the start of training. The leaves of a nested trigger are
    concatenated along their last dimension, and the output is split back into the same leaves. The first trigger decides the
    order of a dict's entries. The layers of a stacked state [L, B, H] share the perceptron, which does not see the layer's
    index. In a `ForwardInterface` the message may have another last dimension than the trigger; the trigger must then be a
    single tensor.

    Source: dni-pytorch, and Jaderberg et al. 2017, arXiv 1608.05343, section 2. dni-pytorch leaves the last layer's biases
    random; here they start at zero too.

    Args:
        output_dim: size of the message's last dimension, summed over all leaves.
        n_hidden: number of hidden layers, 0 for a linear map.
        hidden_dim: size of each hidden layer. None for `output_dim`.
        trigger_dim: size of the trigger's last dimension, summed over all leaves. None for `output_dim`.
        context_dim: size of the context's last dimension. None for a synthesizer without context.

    Attributes:
        trigger_dim: the trigger's last dimension, resolved.

    Raises:
        ValueError: a size is not positive or `n_hidden` is negative.
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
        self.order = KeyOrder()
        self.input_trigger = nn.Linear(trigger_dim, first)
        self.input_context = None if context_dim is None else nn.Linear(context_dim, first)
        self.layers = nn.ModuleList(
            nn.Linear(hidden_dim, output_dim if last else hidden_dim)
            for last in [i == n_hidden - 1 for i in range(n_hidden)]
        )
        for layer in [self.layers[-1]] if n_hidden else [self.input_trigger, self.input_context]:
            zero_(layer)

    def forward(self, trigger: State, context: Any = None) -> State:
        """Returns the message for a trigger, in the trigger's structure.

        Args:
            trigger: a tensor [..., trigger_dim], or a nest whose leaves have last dimensions that sum to trigger_dim.
            context: a tensor [..., context_dim] that broadcasts over the trigger. None if `context_dim` is None.

        Returns:
            A tensor [..., output_dim], or a nest with the trigger's leaf shapes.

        Raises:
            ValueError: the context is missing or not expected, the trigger or the context has a wrong size, the trigger's
                leaves differ in another dimension than the last, or its keys are not those of the first trigger, the context
                does not broadcast, or a dtype differs from the parameters' outside of autocast.
        """
        trigger = self.order.arrange(trigger)
        leaves = states.floating(trigger)
        joined = leaves[0] if len(leaves) == 1 else _concatenated(leaves)
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
                f"BasicSynthesizer: the trigger's last dimension is {joined.shape[-1]}, trigger_dim is {self.trigger_dim}: "
                "they must agree"
            )
        self._check_dtype("trigger", joined)
        if self.context_dim is None:
            if context is not None:
                raise ValueError("BasicSynthesizer: a context is given; build the synthesizer with context_dim to use it")
            return
        if not isinstance(context, Tensor):
            raise ValueError(
                f"BasicSynthesizer: context_dim={self.context_dim} needs a tensor as context, got {type(context).__name__}: "
                "wrap the call in `with dni_seq.synthesizer_context(context):`"
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"BasicSynthesizer: the context has shape {tuple(context.shape)}, its last dimension must be "
                f"context_dim={self.context_dim}; encode class labels as one-hot vectors"
            )
        sizes = zip(reversed(context.shape[:-1]), reversed(joined.shape[:-1]), strict=False)
        if context.dim() > joined.dim() or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"BasicSynthesizer: the context's shape {tuple(context.shape)} does not broadcast over the trigger's "
                f"shape {tuple(joined.shape)}: every dimension but the last must be 1 or equal the trigger's"
            )
        self._check_dtype("context", context)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        expected = self.input_trigger.weight.dtype
        if tensor.dtype != expected and not torch.is_autocast_enabled(tensor.device.type):
            raise ValueError(
                f"BasicSynthesizer: the {name} has dtype {tensor.dtype}, the synthesizer's parameters {expected}: convert "
                "one of them with .to(dtype); interfaces convert half-precision tensors to float32"
            )


def _concatenated(leaves: list[Tensor]) -> Tensor:
    try:
        return torch.cat(leaves, dim=-1)
    except RuntimeError as error:
        if len({leaf.shape[:-1] for leaf in leaves}) == 1:
            raise
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise ValueError(
            f"BasicSynthesizer: the trigger's leaves {shapes} differ in another dimension than the last, so they cannot be "
            "concatenated: use StateSynthesizer or MultiHorizonSynthesizer, which take leaves of several ranks"
        ) from error


def zero_(layer: nn.Module | None) -> None:
    """Sets all parameters of `layer`, biases included, to zero, so that messages start at exactly zero."""
    if layer is not None:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
