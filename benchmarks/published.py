"""Repeats a published result: Penn Treebank by words with the preset `small`, by truncated BPTT and by the default method.

python benchmarks/published.py time --data DIR
    Measure the CPU time of a step of both methods, which take turns, on an idle machine.
python benchmarks/published.py run --data DIR --max-minutes 60
    Run the missing trials. Several processes may run side by side, and a trial that was stopped resumes.
python benchmarks/published.py table
    Print the recorded results as a table of Markdown.

DIR holds ptb/ptb.train.txt, ptb/ptb.valid.txt and ptb/ptb.test.txt. The preset is that of Zaremba et al. 2014, arXiv
1409.2329: LSTM of 2 layers of 200 units, T = 20, 20 lanes, 13 epochs of SGD, whose rate is halved after each epoch from the
fifth on. The tutorial of TensorFlow reports a test perplexity of 115.9 with these settings. The learning rate of both
methods is tuned with 3 epochs and seed 1. The best rate then runs for 13 epochs with seeds 1 and 2. A run with a synthesizer
is also scored earlier: at the CPU time that truncated BPTT needs for the 13 epochs. A CPU time is the number of steps times
the time of a step on an idle machine.

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
from dni_seq.app.studies.records import NOTHING, append_line, markdown, read_lines
from dni_seq.credit.message_filter import OBSERVED_FIRST

sys.path.insert(0, str(Path(__file__).parent / "studies"))
from command_runs import bracket_rate, command_of, train
from trials import (
    Line,
    Trial,
    key_of,
    latest_times,
    measure_in_turns,
    run_part,
    serve_steps,
    study_parser,
)

METHODS = ("none", "multi-horizon")
FARTHER = "20 words ahead"
"""The default until 2026-11-30: a whole window. It was tuned, lost, and is on record. The plan leaves it out."""

RATES = (10.0, 20.0, 40.0)
TUNING_EPOCHS, EPOCHS = 3, PRESETS["small"]["epochs"]
SEEDS = (1, 2)
TURN = 15
"""Number of steps of a method in a turn, for the measurement of step times."""


def trial_of(method: str, lr: float, epochs: int, seed: int = 1) -> Trial:
    """Returns the settings of a trial."""
    return {"method": method, "lr": lr, "epochs": epochs, "seed": seed}


def validation(line: Line) -> float:
    """Returns the validation perplexity of a line, by which learning rates are chosen."""
    return float(line["valid"])


def tuning(method: str, known: dict[str, Line]) -> tuple[list[Trial], float | None]:
    """Returns the trials that tune a method with few epochs, and the best rate; see `bracket_rate`."""
    return bracket_rate(known, lambda rate: trial_of(method, rate, TUNING_EPOCHS), RATES, validation)


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields every trial that can be run now: the tuning of truncated BPTT, that of the default, then the long runs."""
    found = {method: tuning(method, known) for method in METHODS}
    for trials, _ in found.values():
        yield from trials
    for seed in SEEDS:
        yield from (trial_of(method, rate, EPOCHS, seed) for method, (_, rate) in found.items() if rate is not None)


class Runner:
    """Runs a trial by the command, as a user would.

    Args:
        data: the folder that holds ptb/.
        results: the file of results, which has the step times.
    """

    def __init__(self, data: Path, results: Path) -> None:
        self.data, self.windows = data.resolve(), windows_of_epoch(data)
        self.seconds = latest_times(results, "published", "step_seconds")

    def __call__(self, trial: Trial, checkpoint: Path) -> Line:
        """Trains to the end and returns the scores.

        A run with a synthesizer over all epochs first stops at the CPU time that truncated BPTT needs for all epochs. The
        run is scored there too, and then continues.
        """
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
        """Continues the run in `folder` up to `steps` steps, None for all epochs, and returns its summary."""
        given = {**self.options(trial), "max-steps": steps or self.windows * trial["epochs"]}
        return train(given, self.data, folder)

    def options(self, trial: Trial) -> dict[str, Any]:
        """Returns the options of the training command for a trial."""
        known = trial["method"] in METHODS
        own = {"synthesizer": trial["method"]} if known else {"synthesizer": "multi-horizon", "lookahead": 20}
        given = {"dataset": "ptb", "preset": "small", **own, "lr": trial["lr"]}
        return given | {"epochs": trial["epochs"], "seed": trial["seed"]}


def scores(summary: dict[str, Any]) -> Line:
    """Returns the perplexities of the best checkpoint, and the number of steps so far."""
    perplexities = {split: round(summary[split]["ppl"], 2) for split in ("valid", "test")}
    return {**perplexities, "steps": summary["steps"]}


def options_of(data: Path, method: str) -> LanguageModelOptions:
    """Returns the options of a run with the preset."""
    given = {**PRESETS["small"], "dataset": "ptb", "data_dir": str(data), "synthesizer": method, "seed": 1}
    options = build(LanguageModelOptions, given)
    return resolve_options(options, lm.open_text(options))


def windows_of_epoch(data: Path) -> int:
    """Returns the number of windows in an epoch of the training text."""
    options = options_of(data, "none")
    corpus = lm.open_text(options)
    windows = lm.open_training(corpus, lm.build_tokenizer(options, corpus), options).windows_per_epoch
    assert windows is not None  # the text is in memory
    return windows


def serve(data: Path, method: str, pipe: Any) -> None:
    """The program of a process that times the steps of one method; see `measure_in_turns`."""
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

    for _ in range(OBSERVED_FIRST + TURN):  # a synthesizer's first windows are checked more often and cost more
        step()
    serve_steps(step, pipe)


def measure_steps(data: Path, results: Path) -> None:
    """Measures the CPU seconds of a step of each method, which take turns, and records them. Needs an idle machine."""
    timed = {method: (data.resolve(), method) for method in METHODS}
    medians = measure_in_turns(serve, timed, dict.fromkeys(METHODS, TURN), "none")
    append_line(results, {"study": "published", "step_seconds": medians, "date": time.strftime("%Y-%m-%d")})


def order(line: Line) -> tuple[int, int, str]:
    """Returns the sort key of a line in the table."""
    trial = line["trial"]
    return trial["epochs"], [*METHODS, FARTHER].index(trial["method"]), key_of(trial)


def table(lines: Iterable[Line]) -> str:
    """Returns a table of Markdown of the lines that are trials."""
    header = ["method", "rate", "epochs", "seed", "steps", "validation", "test", "CPU seconds"]
    rows = []
    for line in sorted((line for line in lines if "trial" in line), key=order):
        trial = line["trial"]
        ends = [(str(trial["epochs"]), line, f"{line['process_seconds']:.0f}")]
        if "at_equal_time" in line:
            ends.insert(0, ("the CPU time of `none`", line["at_equal_time"], NOTHING))
        for epochs, end, spent in ends:
            cells = [f"`{trial['method']}`", f"{trial['lr']:g}", epochs, str(trial["seed"]), str(end["steps"])]
            rows.append([*cells, f"{end['valid']:.1f}", f"{end['test']:.1f}", spent])
    return markdown(header, rows)


def main() -> None:
    """Runs the command."""
    parser = study_parser(__doc__ or "")
    parser.set_defaults(results=Path("docs/results/published.jsonl"), scratch=Path("runs/published"))
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    options = parser.parse_args()
    run_part(
        options,
        plan,
        lambda: Runner(options.data, options.results),
        table=lambda: print(table(read_lines(options.results))),
        time=lambda: measure_steps(options.data, options.results),
    )


if __name__ == "__main__":
    main()
