"""The published figure: Penn Treebank by words at the preset `small`, by truncated BPTT and by the default method.

python benchmarks/published.py time --data DIR
    A step's CPU time of both methods, in turns on an idle machine.
python benchmarks/published.py run --data DIR --max-minutes 60
    The trials that are missing; several processes may run side by side, and a trial that was stopped resumes.
python benchmarks/published.py table
    What is on record, as Markdown.

DIR holds ptb/ptb.train.txt, ptb/ptb.valid.txt and ptb/ptb.test.txt. The preset is that of Zaremba et al. 2014, arXiv
1409.2329: LSTM 2x200, T = 20, 20 lanes, SGD whose rate is halved after each epoch from the fifth on, 13 epochs. TensorFlow's
tutorial has a test perplexity of 115.9 with it. Both methods are tuned over the rate at 3 epochs, seed 1, and then run for
13, seeds 1 and 2. Each run with a synthesizer is also scored at the CPU time of the 13 epochs without one: steps x a step's
time measured idle.

Legend: T = window length in steps.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import PRESETS, LanguageModelOptions, resolve_options
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.options import build
from dni_seq.app.studies.records import append_line, markdown, read_lines
from dni_seq.credit.message_filter import OBSERVED_FIRST

sys.path.insert(0, str(Path(__file__).parent / "studies"))
from command_runs import bracket_rate, command_of, train
from trials import (
    Line,
    Trial,
    key_of,
    latest_times,
    measure_in_turns,
    print_plan,
    serve_steps,
    study_parser,
    work,
)

METHODS = ("none", "multi-horizon")
FARTHER = "20 words ahead"
"""The default until 2026-11-30: a whole window. It was tuned, lost, and is on record; the plan leaves it out."""

RATES = (10.0, 20.0, 40.0)
TUNING_EPOCHS, EPOCHS = 3, PRESETS["small"]["epochs"]
SEEDS = (1, 2)
TURN = 15
"""Steps of a method in a turn, when step times are measured."""


def trial_of(method: str, lr: float, epochs: int, seed: int = 1) -> Trial:
    """A trial's settings."""
    return {"method": method, "lr": lr, "epochs": epochs, "seed": seed}


def validation(line: Line) -> float:
    """What rates are chosen by."""
    return float(line["valid"])


def tuning(method: str, known: dict[str, Line]) -> tuple[list[Trial], float | None]:
    """The trials of a method at few epochs, and its best rate once it is bracketed by a lower and a higher one."""
    return bracket_rate(known, lambda rate: trial_of(method, rate, TUNING_EPOCHS), RATES, validation)


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Every trial that can be run now: the rates of each method, the rival's first, then the best at all epochs."""
    found = {method: tuning(method, known) for method in METHODS}
    for trials, _ in found.values():
        yield from trials
    for seed in SEEDS:
        yield from (trial_of(method, rate, EPOCHS, seed) for method, (_, rate) in found.items() if rate is not None)


class Runner:
    """Runs a trial by the command, as a user would.

    Args:
        data: the folder that holds ptb/.
        results: the JSON lines; step times are read from there.
    """

    def __init__(self, data: Path, results: Path) -> None:
        self.data, self.windows = data.resolve(), windows_of_epoch(data)
        self.seconds = latest_times(results, "published", "step_seconds")

    def __call__(self, trial: Trial, checkpoint: Path) -> Line:
        """Trains to the end, with a stop at the CPU time of truncated BPTT where a synthesizer runs for all epochs."""
        folder = checkpoint.with_suffix("")
        line: Line = {}
        if trial["method"] != "none" and trial["epochs"] == EPOCHS:
            share = self.seconds["none"] / self.seconds[trial["method"]]
            at_equal_time = self.train(trial, folder, round(self.windows * EPOCHS * share))
            line["at_equal_time"] = scores(at_equal_time)
        summary = self.train(trial, folder, None)
        shutil.rmtree(folder)
        return {
            **scores(summary),
            **line,
            "process_seconds": round(summary["process_seconds"], 1),
            "command": command_of(self.options(trial)),
        }

    def train(self, trial: Trial, folder: Path, steps: int | None) -> dict[str, Any]:
        """Trains to a number of steps, or to the last epoch, from where the folder's run stands; its summary."""
        given = {**self.options(trial), "max-steps": steps or self.windows * trial["epochs"]}
        return train(given, self.data, folder)

    def options(self, trial: Trial) -> dict[str, Any]:
        """The options of the command that decide the result."""
        known = trial["method"] in METHODS
        own = {"synthesizer": trial["method"]} if known else {"synthesizer": "multi-horizon", "lookahead": 20}
        given = {"dataset": "ptb", "preset": "small", **own, "lr": trial["lr"]}
        return given | {"epochs": trial["epochs"], "seed": trial["seed"]}


def scores(summary: dict[str, Any]) -> Line:
    """Perplexities of the best checkpoint, and the steps so far."""
    perplexities = {split: round(summary[split]["ppl"], 2) for split in ("valid", "test")}
    return {**perplexities, "steps": summary["steps"]}


def options_of(data: Path, method: str) -> LanguageModelOptions:
    """The options of a run at the preset."""
    given = {**PRESETS["small"], "dataset": "ptb", "data_dir": str(data), "synthesizer": method, "seed": 1}
    options = build(LanguageModelOptions, given)
    return resolve_options(options, lm.open_text(options))


def windows_of_epoch(data: Path) -> int:
    """Windows in an epoch of the training text."""
    options = options_of(data, "none")
    corpus = lm.open_text(options)
    windows = lm.open_training(corpus, lm.build_tokenizer(options, corpus), options).windows_per_epoch
    assert windows is not None  # the text is in memory
    return windows


def serve(data: Path, method: str, pipe: Any) -> None:
    """In a process of its own: makes as many steps as it is told, and returns CPU seconds a step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    options = options_of(data, method)
    corpus = lm.open_text(options)
    tokenizer = lm.build_tokenizer(options, corpus)
    windows = iter(lm.open_training(corpus, tokenizer, options))
    torch.manual_seed(options.seed)
    cpu = torch.device("cpu")
    trainer = build_trainer(options, lm.build_model(options, tokenizer.vocabulary_size, cpu), cpu)

    def step() -> None:
        window = next(windows)
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead)

    for _ in range(OBSERVED_FIRST + TURN):  # a synthesizer's first windows are observed closely, which costs more
        step()
    serve_steps(step, pipe)


def measure_steps(data: Path, results: Path) -> None:
    """Puts the CPU seconds of a step of each method on record, measured in turns on an idle machine."""
    timed = {method: (data.resolve(), method) for method in METHODS}
    medians = measure_in_turns(serve, timed, dict.fromkeys(METHODS, TURN), "none")
    append_line(results, {"study": "published", "step_seconds": medians, "date": time.strftime("%Y-%m-%d")})


def order(line: Line) -> tuple[int, int, str]:
    """Where a line stands in the table."""
    trial = line["trial"]
    return trial["epochs"], [*METHODS, FARTHER].index(trial["method"]), key_of(trial)


def table(lines: Iterable[Line]) -> str:
    """The trials among some lines as a table of Markdown."""
    header = ["method", "rate", "epochs", "seed", "steps", "validation", "test", "CPU seconds"]
    rows = []
    for line in sorted((line for line in lines if "trial" in line), key=order):
        trial = line["trial"]
        ends = [(str(trial["epochs"]), line, f"{line['process_seconds']:.0f}")]
        if "at_equal_time" in line:
            ends.insert(0, ("the CPU time of `none`", line["at_equal_time"], ""))
        for epochs, end, spent in ends:
            cells = [f"`{trial['method']}`", f"{trial['lr']:g}", epochs, str(trial["seed"]), str(end["steps"])]
            rows.append([*cells, f"{end['valid']:.1f}", f"{end['test']:.1f}", spent])
    return markdown(header, rows)


def main() -> None:
    """The command."""
    parser = study_parser(__doc__ or "")
    parser.set_defaults(results=Path("docs/results/published.jsonl"), scratch=Path("runs/published"))
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    options = parser.parse_args()
    if options.part == "table":
        print(table(read_lines(options.results)))
    elif options.part == "plan":
        print_plan(options.results, plan)
    elif options.part == "time":
        measure_steps(options.data, options.results)
    else:
        work(options.results, options.scratch, plan, Runner(options.data, options.results), options.max_minutes)


if __name__ == "__main__":
    main()
