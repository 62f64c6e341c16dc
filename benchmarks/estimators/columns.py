"""The estimators of the comparison, called its columns, and the training and the measurement of one estimator.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from problems import Problem, problem
from torch.profiler import ProfilerActivity, profile

import dni_seq as dni
from dni_seq.app.build.credit import synthetic_arguments
from dni_seq.app.build.credit_options import CreditOptions
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.models.lstm_kernels import native_up_to

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Line, Trial

POINTS = 10
"""Number of evaluations of a trial, at equal distances. The score of a trial is the mean of its last two evaluations."""

WHOLE = "whole"


@dataclass(frozen=True)
class Column:
    """An estimator of the gradient.

    Attributes:
        name: the estimator's name in the table.
        cell: the cell of the model.
        bptt: T; `WHOLE` for all steps of a sequence, "k1" for the first number of `Problem.past`.
        reach: the steps over which the parameters of the recurrence get credit, in words.
        traces: the kind of traces that the state carries, None for no traces.
        synthesizer: the kind of synthesizer, "none" for no messages.
        frozen: whether the parameters of the recurrence keep their initial values.
        fixed_input: whether the parameters before the recurrence keep their initial values.
        chunks: whether the backward pass recomputes activations chunk by chunk.
    """

    name: str
    cell: str
    bptt: int | str
    reach: str
    traces: str | None = None
    synthesizer: str = "none"
    frozen: bool = False
    fixed_input: bool = False
    chunks: bool = False

    @property
    def future(self) -> bool:
        """Whether the estimator reads steps after the window."""
        return self.synthesizer != "none"

    def window(self, task: Problem) -> int:
        """Returns T in steps for a task."""
        if isinstance(self.bptt, int):
            return self.bptt
        return task.whole if self.bptt == WHOLE else task.past[0]


def columns_of(cell: str, approximate: bool) -> list[Column]:
    """Returns a cell's columns of truncated BPTT, full BPTT, and traces: exact, or if `approximate` two other kinds."""
    exact = [] if approximate else [Column("exact traces", cell, 1, "all before", traces="exact")]
    kinds = [("SnAp-1", "snap1"), ("factored traces", "factored")] if approximate else []
    near = [Column(name, cell, 1, "all before", traces=traces) for name, traces in kinds]
    return [Column("truncated", cell, 1, "T"), Column("full BPTT", cell, WHOLE, "T"), *exact, *near]


COLUMNS: list[Column] = [
    *columns_of("lru", approximate=False),
    Column("frozen recurrence", "lru", WHOLE, "none", frozen=True),
    Column("exact traces, fixed input", "lru", 1, "all before", traces="exact", fixed_input=True),
    Column("10 T", "lru", 10, "T"),
    Column("k1 and k2", "lru", "k1", "k2"),
    Column("full BPTT, chunks", "lru", WHOLE, "T", chunks=True),
    Column("paper's synthesizer", "lru", 1, "all after", synthesizer="paper"),
    Column("default", "lru", 1, "4 steps after", synthesizer="multi-horizon"),
    Column("exact future", "lru", 1, "n steps after", synthesizer="exact"),
    *columns_of("lstm", approximate=True),
    *columns_of("mingru", approximate=False),
    Column("exact traces, default", "lru", 1, "all before, 4 after", traces="exact", synthesizer="multi-horizon"),
    *columns_of("gru", approximate=True),
]
"""The columns, the most important first.

If a column has traces and a synthesizer, the recurrence learns from the traces and all other parameters from the messages.
"""


def key(column: Column) -> str:
    """Returns the name of a column with its cell."""
    return f"{column.cell}: {column.name}"


BY_KEY = {key(column): column for column in COLUMNS}


@dataclass
class Learner:
    """A model, its trainer and its windows.

    Args:
        task: the task to learn.
        column: the estimator of the gradient.
        rate: learning rate of Adam.
        seed: random seed of weights and data.
    """

    task: Problem
    column: Column
    rate: float
    seed: int
    trainer: dni.SequenceTrainer = field(init=False)
    windows: Iterator[dni.Window] = field(init=False)
    lookahead: int = field(init=False)

    def __post_init__(self) -> None:
        """Builds the model, the trainer and the stream of windows."""
        torch.manual_seed(self.seed)
        task, column = self.task, self.column
        model: Any = task.model(column.cell, column.traces)
        if column.frozen:
            for parameter in (p for cell in model.rnn.cells for p in cell.own_parameters):
                parameter.requires_grad_(False)
        if column.fixed_input:
            for parameter in (*model.rnn.enter.parameters(), *model.rnn.blocks[0].norm.parameters()):
                parameter.requires_grad_(False)
        bptt = column.window(task)
        options: Any = {"synthesizer": column.synthesizer, "exact_steps": task.future}
        credit = CreditOptions(**options).resolve(bptt)
        model.native_steps = native_up_to(credit.state_products)
        self.lookahead = credit.window_lookahead if column.future else 0
        arguments = synthetic_arguments(credit, task.spec(model), 1e-3) if column.future else {}
        self.trainer = dni.SequenceTrainer(
            model,
            torch.optim.Adam([p for p in model.parameters() if p.requires_grad], self.rate, fused=True),
            task.losses,
            clip=task.clip,
            reduction="mean" if task.per_update is None else "lane-mean",
            **arguments,
        )
        # The number of windows of a sequence. If T does not divide its length, the last window is shorter.
        self.trainer.accumulate = 1 if task.per_update is None else -(-task.per_update // bptt)
        if column.bptt == "k1":
            self.trainer.backward_windows = task.past[1] // task.past[0]
        self.trainer.checkpoint_every = task.chunk if column.chunks else None
        self.windows = task.windows(bptt, self.lookahead, self.seed)

    def step(self) -> int:
        """Trains on one window and returns its number of steps."""
        window = next(self.windows)
        self.trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead)
        return len(window.inputs)

    def cosine(self) -> float:
        """Returns the cosine between this estimator's gradient of fresh windows and the gradient of full BPTT."""
        sample = self.task.sample(self.column.window(self.task), self.lookahead)
        return dni.gradient_fidelity(self.trainer, sample).cosine

    def peak(self) -> float:
        """Returns the peak memory in KiB of the tensors that a step allocates."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        results: Any = profiler.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        alive = largest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            largest = max(largest, alive)
        return largest / 1024


def run(trial: Trial, task: Problem) -> Line:
    """Trains for the trial's share of the text and returns its line: score, curve, steps and settings.

    A trial on the whole text also has the mean cosine between its gradient and that of full BPTT.
    """
    column = BY_KEY[trial["column"]]
    learner = Learner(task, column, trial["rate"], trial["seed"])
    total = round(task.steps * trial["share"])
    steps, curve, cosines = 0, [], []
    while steps < total:
        before = steps
        steps += learner.step()
        if steps * POINTS // total > before * POINTS // total:
            curve.append([steps, round(task.score(learner.trainer.model), 4)])
            if trial["share"] == 1:
                cosines.append(learner.cosine())
    settings = {**asdict(column), "T": column.window(task), "lanes": task.lanes, "updates": learner.trainer.updates}
    line: Line = {"score": score_at(curve, steps), "curve": curve, "steps": steps, "settings": settings}
    if cosines:
        line["cosine"] = round(sum(cosines) / len(cosines), 4)
    return line


def score_at(curve: list[list[float]], steps: float) -> float:
    """Returns the mean of the last two evaluations up to `steps`. Returns the first evaluation if all are later."""
    found = [score for at, score in curve if at <= steps][-2:] or [curve[0][1]]
    return round(sum(found) / len(found), 4)


def serve(task_name: str, data: Path, column: str, pipe: Any) -> None:
    """The program of a process that times one column; see `measure_in_turns`.

    For each number received, trains on at least this many steps of text and sends the CPU seconds of one step.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    learner = Learner(problem(task_name, data), BY_KEY[column], 1e-3, 0)
    for _ in range(20):
        learner.step()
    pipe.send("ready")
    while True:
        wanted, steps = pipe.recv(), 0
        begun = time.process_time()
        while steps < wanted:
            steps += learner.step()
        pipe.send((time.process_time() - begun) / steps)
