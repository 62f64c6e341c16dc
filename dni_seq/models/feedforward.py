"""Feed-forward classifiers of digits with interfaces between their layers: a perceptron and a convolutional network.

Source: Jaderberg et al. 2017, arXiv 1608.05343, section 3.3 and appendix. In the paper, layers have 256 units,
batch normalisation and ReLU. Synthesizers see the activation and, for cDNI, the label. The synthesizers of a convolutional
network are convolutional. We differ in three points: sizes are arguments, synthesizers have no batch normalisation, and
`Normalized` scales the messages of gradient synthesizers to the size of their targets.

Legend: B = images, H = hidden units or filters, K = classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.interfaces.forward import BidirectionalInterface
from dni_seq.synthesizers.mlp import BasicSynthesizer, zero_
from dni_seq.synthesizers.normalization import Normalized

CLASSES = 10
SIDE = 28  # of an image, pixels

UNLOCKS = ("none", "backward", "full")
DECOUPLINGS = ("last", "every")


class SynthesizerSettings(NamedTuple):
    """Settings of the synthesizers of a network.

    Attributes:
        layers: number of hidden layers; 0 for a linear map.
        hidden: number of units, or filters, in a hidden layer.
        context: whether synthetic gradients are conditioned on the label (cDNI).
    """

    layers: int = 1
    hidden: int = 256
    context: bool = False


class FeedForward(nn.Module):
    """A feed-forward classifier of digits, made of parts that interfaces decouple from each other.

    Args:
        parts: the parts, in the order of the forward pass; the last one returns logits [B, K].
        interfaces: one interface between each part and the next; all of the same class. Empty for plain backpropagation.
        input_shape: shape of an image at the first part, without the batch dimension.
        context: whether the synthesizers are conditioned on the label.

    Attributes:
        parts: the parts as an nn.ModuleList.
        interfaces: the interfaces as an nn.ModuleList.
        input_shape: see Args.
        context: see Args.

    Raises:
        ValueError: the number of interfaces is not one less than the number of parts.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        interfaces: Sequence[BackwardInterface | BidirectionalInterface],
        *,
        input_shape: tuple[int, ...],
        context: bool = False,
    ) -> None:
        super().__init__()
        if len(interfaces) != len(parts) - 1:
            raise ValueError(
                f"{len(parts)} parts have {len(parts) - 1} places for interfaces, got {len(interfaces)}: "
                "give one interface between each part and the next"
            )
        self.parts = nn.ModuleList(parts)
        self.interfaces = nn.ModuleList(interfaces)
        self.input_shape = input_shape
        self.context = context

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns logits [B, K] for images [B, 1, 28, 28].

        In `train()` mode the interfaces backpropagate synthetic gradients during this call, so call `zero_grad` before it.

        Args:
            images: float [B, 1, 28, 28], or any shape [B, ...] with as many pixels per image.
            labels: int64 [B], the context of the synthesizers. Used only if `context` is True.
        """
        inputs = self.shaped(images)
        with synthesizer_context(self.label_context(labels)):
            x = self.parts[0](inputs)
            for interface, part in zip(self.interfaces, list(self.parts)[1:], strict=True):
                x = part(interface(x, inputs) if isinstance(interface, BidirectionalInterface) else interface(x))
        return x

    def shaped(self, images: Tensor) -> Tensor:
        """Returns the images in the shape of the first part's input, [B, *input_shape]."""
        return images.reshape(len(images), *self.input_shape)

    def label_context(self, labels: Tensor | None) -> Tensor | None:
        """Returns the labels one-hot, float32 [B, K], as context; None without labels or if `context` is False."""
        return F.one_hot(labels, CLASSES).float() if self.context and labels is not None else None

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all synthesizers; all other parameters belong to the network."""
        return list(self.interfaces.parameters())


class ConvSynthesizer(nn.Module):
    """A convolutional synthesizer. Its last layer is zero-initialised, so messages start at zero.

    Args:
        channels: number of channels of the trigger.
        output_channels: number of channels of the message.
        settings: number of hidden layers, number of filters in each, and whether a one-hot label [B, K] is the context.
        size: height and width of the message; None for the height and width of the trigger.
    """

    def __init__(self, channels: int, output_channels: int, settings: SynthesizerSettings, size: int | None = None) -> None:
        super().__init__()
        widths = [channels, *[settings.hidden] * settings.layers, output_channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(inside, outside, 5, padding=2) for inside, outside in itertools.pairwise(widths)
        )
        self.label = nn.Linear(CLASSES, widths[1]) if settings.context else None
        self.size = size
        zero_(self.layers[-1])
        if settings.layers == 0:
            zero_(self.label)

    def forward(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the message [B, output_channels, h, w] for a trigger [B, channels, h', w'].

        Raises:
            ValueError: a context is given to a synthesizer without context, or is missing.
        """
        if (self.label is None) != (context is None):
            raise ValueError("ConvSynthesizer: give a context (one-hot labels) if and only if settings.context is True")
        x = trigger if self.size is None else F.adaptive_avg_pool2d(trigger, self.size)
        x = self.layers[0](x)
        if self.label is not None:
            x = x + self.label(context)[:, :, None, None]
        for layer in list(self.layers)[1:]:
            x = layer(F.relu(x))
        return x


class WithoutContext(nn.Module):
    """Wraps a synthesizer and ignores the context, because a synthetic input must not depend on the label."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    def forward(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the message for `trigger`; ignores `context`."""
        return self.synthesizer(trigger, None)


def mlp(
    layers: int = 3,
    hidden: int = 256,
    *,
    unlock: str = "none",
    decouple: str = "every",
    synthesizer: SynthesizerSettings = SynthesizerSettings(),  # noqa: B008 - immutable
) -> FeedForward:
    """Returns a perceptron: `layers` - 1 hidden layers with batch normalisation and ReLU, and a linear output layer.

    Args:
        layers: number of layers with weights.
        hidden: number of units in a hidden layer.
        unlock: "none" for plain backpropagation, "backward" for synthetic gradients, "full" for synthetic inputs too.
        decouple: where the interfaces are: "last", before the output layer only, or "every", after each hidden layer.
        synthesizer: settings of the synthesizers.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """
    check_network(layers, hidden, unlock, decouple)
    pixels = SIDE * SIDE
    widths = [pixels, *[hidden] * (layers - 1)]
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Linear(inside, outside, bias=False), nn.BatchNorm1d(outside), nn.ReLU())
        for inside, outside in itertools.pairwise(widths)
    ]
    parts = grouped([*blocks, nn.Linear(hidden, CLASSES)], unlock, decouple)

    def interface() -> BackwardInterface | BidirectionalInterface:
        size, context_dim = synthesizer, CLASSES if synthesizer.context else None
        gradient = Normalized(BasicSynthesizer(hidden, size.layers, size.hidden, context_dim=context_dim))
        if unlock == "backward":
            return BackwardInterface(gradient)
        return BidirectionalInterface(WithoutContext(BasicSynthesizer(hidden, size.layers, size.hidden, pixels)), gradient)

    interfaces = [interface() for _ in parts[1:]]
    return FeedForward(parts, interfaces, input_shape=(pixels,), context=synthesizer.context)


def cnn(
    layers: int = 3,
    hidden: int = 32,
    *,
    unlock: str = "none",
    decouple: str = "every",
    synthesizer: SynthesizerSettings = SynthesizerSettings(),  # noqa: B008 - immutable
) -> FeedForward:
    """Returns a convolutional network: `layers` - 1 layers of 5x5 filters, and a linear output layer.

    Each convolution has batch normalisation and ReLU. After each of the first two convolutions, max pooling halves the side
    of the image. Arguments and errors are those of `mlp`, except that `hidden` is the number of filters. The synthesizers
    are convolutional networks.
    """
    check_network(layers, hidden, unlock, decouple)
    blocks: list[nn.Module] = []
    sizes: list[int] = []  # side of the image after each block
    size = SIDE
    for i in range(layers - 1):
        convolution = nn.Conv2d(1 if i == 0 else hidden, hidden, 5, padding=2, bias=False)
        pool: list[nn.Module] = [nn.MaxPool2d(2)] if i < 2 else []
        size = size // 2 if pool else size
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(hidden), nn.ReLU(), *pool))
        sizes.append(size)
    readout = nn.Sequential(nn.Flatten(), nn.Linear(hidden * size * size, CLASSES))
    parts = grouped([*blocks, readout], unlock, decouple)

    def interface(side: int) -> BackwardInterface | BidirectionalInterface:
        gradient = Normalized(ConvSynthesizer(hidden, hidden, synthesizer))
        if unlock == "backward":
            return BackwardInterface(gradient)
        return BidirectionalInterface(
            WithoutContext(ConvSynthesizer(1, hidden, synthesizer._replace(context=False), side)), gradient
        )

    interfaces = [interface(side) for side in sizes[len(sizes) - len(parts) + 1 :]]
    return FeedForward(parts, interfaces, input_shape=(1, SIDE, SIDE), context=synthesizer.context)


def check_network(layers: int, hidden: int, unlock: str, decouple: str) -> None:
    """Raises a ValueError if a setting of a network is unknown or out of its range."""
    if layers < 2:
        raise ValueError(f"layers must be 2 or more, got {layers}")
    if hidden < 1:
        raise ValueError(f"hidden must be 1 or more, got {hidden}")
    for name, value, choices in (("unlock", unlock, UNLOCKS), ("decouple", decouple, DECOUPLINGS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def grouped(blocks: list[nn.Module], unlock: str, decouple: str) -> list[nn.Module]:
    """Groups layers into the parts of a network.

    All layers are one part if `unlock` is "none". Otherwise, if `decouple` is "last", the layers before the last one are one
    part and the last layer is another one; if it is "every", each layer is a part.
    """
    if unlock == "none":
        return [nn.Sequential(*blocks)]
    if decouple == "last":
        return [nn.Sequential(*blocks[:-1]), blocks[-1]]
    return blocks
