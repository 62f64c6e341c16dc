"""Measures the least time that a `FutureModel` adds to a step: its matrix products, its gradient norm, and its optimizer.

python benchmarks/predictor_floor.py
    Print the median CPU milliseconds of each operation as JSON lines, for one horizon and for four. Half a minute on an idle
    core.
python benchmarks/predictor_floor.py --output docs/results/predictor_floor.jsonl
    Also append the lines to a file.
python benchmarks/predictor_floor.py --table docs/results/predictor_floor.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

LSTM of 512 units on 50 characters, 32 lanes, T = 1, one thread. Before each operation a plain step of the RNN runs, so that
the processor's caches have the content that they have in training. The operations "Adam, ..." update the parameters of the
RNN and of the future model: with two optimizers, with one optimizer of two parameter groups, and with one optimizer of one
group. A trainer cannot use one group, because it clips the gradients of the RNN and of the future model separately.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from result_lines import Line, add_options, machine, measuring, newest, record
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import markdown
from dni_seq.models.language_model import LanguageModel, token_losses

CHARACTERS, EMBED, UNITS, LANES = 50, 64, 512, 32
HORIZONS = (1, 4)
FLOOR = (
    "products, forward",
    "products, gradient of the state",
    "products, gradient of the weights",
    "norm",
    "Adam of the predictor",
)
"""The operations whose times add up to the floor. The other operations compare ways of running the optimizers."""


def plain_step() -> Callable[[], Any]:
    """Returns a function that makes one step of truncated BPTT."""
    model = LanguageModel(CHARACTERS, embed=EMBED, hidden=UNITS, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    trainer = dni.SequenceTrainer(model, optimizer, token_losses, clip=0.25)
    text = torch.randint(CHARACTERS, (1, LANES))
    return lambda: trainer.step(text, text)


def fused_adam(*modules: nn.Module, groups: bool = False) -> torch.optim.Adam:
    """Returns Adam on random parameters and gradients of the modules' shapes. With `groups`, each module has one group."""
    found = [[nn.Parameter(torch.randn_like(parameter)) for parameter in module.parameters()] for module in modules]
    everything = [parameter for each in found for parameter in each]
    for parameter in everything:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.Adam([{"params": each} for each in found] if groups else everything, 1e-3, fused=True)


def operations(horizons: int) -> Mapping[str, Callable[[], Any]]:
    """Returns the operations to time by name, for a future model of `horizons` parts."""
    torch.manual_seed(0)
    model = LanguageModel(CHARACTERS, embed=EMBED, hidden=UNITS, layers=1)
    inputs = torch.zeros(1, LANES, dtype=torch.int64)
    synthesizer = dni.FutureGradient.for_model(
        model, token_losses, example_inputs=inputs, vocabulary=CHARACTERS, horizons=horizons
    )
    assert isinstance(synthesizer.model, dni.FutureModel)
    layers = [layer for layer in synthesizer.model.from_state if isinstance(layer, nn.Linear)]
    state = torch.randn(LANES, layers[0].in_features)
    errors = [torch.randn(LANES, layer.out_features) for layer in layers]
    pairs = list(zip(layers, errors, strict=True))
    for parameter in synthesizer.parameters():
        parameter.grad = torch.randn_like(parameter)
    rnn, predictor = fused_adam(model), fused_adam(synthesizer)
    two_groups, one_group = fused_adam(model, synthesizer, groups=True), fused_adam(model, synthesizer)
    return {
        "products, forward": lambda: [F.linear(state, layer.weight, layer.bias) for layer in layers],
        "products, gradient of the state": lambda: [error @ layer.weight for layer, error in pairs],
        "products, gradient of the weights": lambda: [error.t() @ state for error in errors],
        "norm": lambda: [torch.linalg.vector_norm(p.grad) for p in synthesizer.parameters() if p.grad is not None],
        "Adam of the predictor": predictor.step,
        "Adam, two optimizers": lambda: (predictor.step(), rnn.step()),
        "Adam, two groups": two_groups.step,
        "Adam, one group": one_group.step,
    }


def measure(timed: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median CPU milliseconds of each operation, each after a step of the RNN."""
    step = plain_step()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, operation in timed.items():
            step()
            begin = time.process_time()
            with torch.no_grad():
                operation()
            found[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(times) for name, times in found.items()}


def table(lines: Sequence[Line]) -> str:
    """Returns a table: a row for each operation, and a row for the floor, the sum of the operations in `FLOOR`."""
    ms = {(line["operation"], line["horizons"]): line["ms"] for line in newest(lines, "operation", "horizons")}
    rows = [[name, *(f"{ms[name, k]:.2f}" for k in HORIZONS)] for name in dict.fromkeys(name for name, _ in ms)]
    rows.insert(len(FLOOR), ["the floor, together", *(f"{sum(ms[name, k] for name in FLOOR):.2f}" for k in HORIZONS)])
    return markdown(["CPU ms", "one horizon", "four horizons"], rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101, help="of each operation (default: 101)")
    add_options(parser)
    options = parser.parse_args()
    if not measuring(parser, options, table):
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    for horizons in HORIZONS:
        for name, milliseconds in measure(operations(horizons), options.rounds).items():
            line = {"horizons": horizons, "operation": name, "ms": milliseconds, "rounds": options.rounds, "threads": 1}
            record({**line, **machine()}, options.output)


if __name__ == "__main__":
    main()
