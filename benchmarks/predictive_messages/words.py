"""Penn Treebank by words: are predictive messages better than longer windows, exact gradients and multi-token heads?

python benchmarks/predictive_messages/words.py time --data DIR
    Measure the CPU time of a step of each method, in turns on an idle machine. Budgets are counted by these times.
python benchmarks/predictive_messages/words.py run --data DIR --max-minutes 60
    Run the missing trials. Several processes may run side by side.
python benchmarks/predictive_messages/words.py table
    Print the recorded results as a table of Markdown.

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt. LSTM of 2 layers of 200 units, 20 lanes, clip 0.25, fused Adam, one
thread. A budget is the CPU time of 1, 3 or 6 epochs of truncated BPTT at T = 35. A method makes as many steps as fit in the
budget, if each step has the time that was measured on an idle machine. The learning rate falls linearly to zero over these
steps. docs/results/predictive_messages.md has the results.

Legend: T = window length in steps, B = lanes, m = steps predicted, S = numbers in a lane's packed state.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from word_learners import LANES, METHODS, PREDICTOR_RATE, UNITS, Text, Trained, Truncated

from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import append_line
from dni_seq.models.language_model import LanguageModel, token_losses

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import (
    Line,
    Trial,
    best_value,
    key_of,
    latest_times,
    lines_by_key,
    measure_in_turns,
    run_part,
    serve_steps,
    study_parser,
)

REFERENCE = {"method": "none", "T": 35}
CURVE_POINTS = 6
DROPOUTS = (0.2, 0.35, 0.5)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
RATES_OF_COMMAND = (1e-3, *RATES)


@torch.no_grad()
def perplexity(model: LanguageModel, text: Text) -> float:
    """Returns the perplexity of a split. The state is carried from window to window."""
    model.eval()
    state, total, count = model.initial_state(LANES), 0.0, 0
    for start in range(0, len(text.lanes) - 1, 70):
        inputs, targets = text.window(start, min(70, len(text.lanes) - 1 - start))
        outputs, state = model(inputs, state)
        total += float(token_losses(outputs, targets).sum())
        count += targets.numel()
    model.train()
    return math.exp(min(total / count, 50.0))


def learner_of(trial: Trial, vocabulary: int) -> tuple[LanguageModel, Truncated | Trained]:
    """Returns the model and the method that trains it. The trial's seed decides initial weights and dropout."""
    torch.manual_seed(trial["seed"])
    model = LanguageModel(vocabulary, embed=UNITS, hidden=UNITS, layers=2, dropout=trial["dropout"])
    return model, METHODS[trial["method"]](model, trial)


class Runner:
    """Runs trials, and reads the text only once.

    Args:
        folder: the folder of the three files.
        results: the file of results, which has the step times.
    """

    def __init__(self, folder: Path, results: Path) -> None:
        self.train = Text(folder, "train")
        self.valid, self.test = (Text(folder, split, self.train.vocabulary) for split in ("valid", "test"))
        self.results = results

    def steps_of(self, trial: Trial) -> int:
        """Returns the number of updates that fit in the trial's budget; for a trial with `epochs`, those of its epochs."""
        if "epochs" in trial:
            return int(trial["epochs"] * ((len(self.train.lanes) - 1) // trial["T"]))
        times = latest_times(self.results, "words", "step_seconds")
        epoch = (len(self.train.lanes) - 1) // REFERENCE["T"] * times[kind_of(REFERENCE)]
        return round(trial["budget"] * epoch / times[kind_of(trial)])

    def __call__(self, trial: Trial, checkpoint: Path) -> Line:
        """Trains to the end of the budget and returns the trial's line. Resumes from the checkpoint if it exists."""
        total = self.steps_of(trial)
        model, learner = learner_of(trial, len(self.train.vocabulary))
        done, position, curve = 0, 0, []
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            learner.load_state_dict(saved["learner"])
            done, position, curve = saved["done"], saved["position"], saved["curve"]
            torch.set_rng_state(saved["random"])
        rates = [[group["lr"] for group in o.param_groups] for o in optimizers_at(learner, trial)]
        while done < total:
            if position + learner.window + learner.reach + 1 > len(self.train.lanes):
                position = 0
                learner.restart()
            if trial["schedule"] == "linear":
                set_rates(learner, rates, 1 - done / total)
            learner.step(self.train, position)
            position += learner.window
            done += 1
            if done % math.ceil(total / CURVE_POINTS) == 0 and done < total:
                curve.append([done, round(perplexity(model, self.valid), 3)])
                torch.save(
                    {
                        "learner": learner.state_dict(),
                        "done": done,
                        "position": position,
                        "curve": curve,
                        "random": torch.get_rng_state(),
                    },
                    checkpoint,
                )
        scores = {"valid": round(perplexity(model, self.valid), 3), "test": round(perplexity(model, self.test), 3)}
        checkpoint.unlink(missing_ok=True)
        return {**scores, "steps": total, "curve": [*curve, [total, scores["valid"]]]}


def optimizers_at(learner: Truncated | Trained, trial: Trial) -> list[torch.optim.Optimizer]:
    """Sets the optimizers of the learner to the initial learning rates and returns them.

    The optimizers of a checkpoint have later rates of the schedule.
    """
    first, *others = learner.optimizers
    for optimizer, rate in ((first, trial["lr"]), *((other, PREDICTOR_RATE) for other in others)):
        for group in optimizer.param_groups:
            group["lr"] = rate
    return learner.optimizers


def set_rates(learner: Truncated | Trained, rates: list[list[float]], factor: float) -> None:
    """Sets the learning rates to `factor` times the initial `rates`, a list of one list per optimizer."""
    for optimizer, of_groups in zip(learner.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, of_groups, strict=True):
            group["lr"] = rate * factor


def kind_of(trial: Trial) -> str:
    """Returns the settings that decide the time of a step, as text: the method, T and the steps between messages."""
    every = f" every {trial['every']}" if "every" in trial else ""
    return f"{trial['method']} T={trial['T']}{every}"


TIMED: list[Trial] = [
    *({"method": "none", "T": bptt} for bptt in (5, 10, 20, 35)),
    {"method": "exact", "T": 5},
    {"method": "exact", "T": 20},
    {"method": "multi-token", "T": 35},
    {"method": "dense", "T": 35, "every": 5},
    {"method": "dense, no end", "T": 35, "every": 5},
    {"method": "end alone", "T": 35},
    {"method": "multi-horizon", "T": 5},
]


def measure_steps(folder: Path, results: Path) -> None:
    """Measures the CPU seconds of a step of each method, which take turns, and records them. Needs an idle machine."""
    timed = {kind_of(trial): (folder, trial) for trial in TIMED}
    counts = {kind_of(trial): max(3, 280 // trial["T"]) for trial in TIMED}
    medians = measure_in_turns(serve, timed, counts, kind_of(REFERENCE))
    append_line(results, {"study": "words", "step_seconds": medians, "date": time.strftime("%Y-%m-%d")})


def serve(folder: Path, trial: Trial, pipe: Any) -> None:
    """The program of a process that times the steps of a trial; see `measure_in_turns`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    text = Text(folder, "train")
    learner = learner_of({**trial, "lr": 1e-3, "dropout": 0.2, "seed": 0}, len(text.vocabulary))[1]
    position = 0

    def step() -> None:
        nonlocal position
        learner.step(text, position)
        position += trial["T"]

    serve_steps(step, pipe)


def trial_of(method: str, bptt: int, lr: float, budget: float, dropout: float = 0.2, seed: int = 1, **more: Any) -> Trial:
    """Returns the settings of a trial."""
    settings = {"task": "words", "method": method, "T": bptt, "lr": lr, "budget": budget, "dropout": dropout, "seed": seed}
    return {**settings, "schedule": "linear", **more}


def score(line: Line) -> float:
    """Returns the validation perplexity of a line, by which trials are chosen."""
    return float(line["valid"])


def tuned(known: dict[str, Line], make: Any, values: tuple[float, ...], first: int) -> tuple[list[Trial], float | None]:
    """Returns the trials of a search among `values`, and the best value.

    The search begins with the two values at `first` and `first` + 1. As long as the best value is at an end of the tried
    range, the next value beyond this end is tried too, if `values` has one.

    Args:
        known: the recorded lines.
        make: a function from a value to a trial.
        values: the possible values, in rising order.
        first: index of the lower one of the two first values.

    Returns:
        The trials so far, and the best value, None while one of the trials is missing.
    """
    low, high = first, first + 1
    while True:
        trials = [make(value) for value in values[low : high + 1]]
        if any(key_of(trial) not in known for trial in trials):
            return trials, None
        scores = [score(known[key_of(trial)]) for trial in trials]
        if scores[-1] == min(scores) and high + 1 < len(values):
            high += 1
        elif scores[0] == min(scores) and low > 0:
            low -= 1
        else:
            return trials, values[low + scores.index(min(scores))]


class Column:
    """The trials of one method.

    At the budget of 1, the method chooses its learning rate at each T, then T, then the weight of its messages or heads. At
    the budget of 3, it chooses between this rate and the next lower one, then the dropout. At the budget of 6 it runs with
    the chosen settings.

    Args:
        method: the name of the method.
        windows: the window lengths to choose from.
        weights: the weights of messages or heads to choose from; empty for a method without a weight.
        more: settings of every trial.
    """

    def __init__(self, method: str, windows: tuple[int, ...], weights: tuple[float, ...] = (), **more: Any) -> None:
        self.method, self.windows, self.weights, self.more = method, windows, weights, more

    def chosen(self, known: dict[str, Line]) -> tuple[list[Trial], dict[str, Any] | None]:
        """Returns the trials at the budget of 1 so far, and the chosen settings, which are None while a trial is missing."""
        wanted: list[Trial] = []
        best: list[Trial] = []
        first = {"weight": self.weights[0]} if self.weights else {}
        for bptt in self.windows:

            def make(lr: float, bptt: int = bptt) -> Trial:
                return trial_of(self.method, bptt, lr, 1, **first, **self.more)

            trials, rate = tuned(known, make, RATES, first=1)
            wanted += trials
            if rate is not None:
                best.append(make(rate))
        if len(best) < len(self.windows):
            return wanted, None
        settings = min(best, key=lambda trial: score(known[key_of(trial)]))
        others = [{**settings, "weight": weight} for weight in self.weights[1:]]
        wanted += others
        weight = best_value(known, [settings, *others], "weight", score) if others else None
        if others and weight is None:
            return wanted, None
        return wanted, {**settings, **({"weight": weight} if others else {})}

    def trials(self, known: dict[str, Line]) -> Iterator[Trial]:
        """Yields all trials of the method that can be run now."""
        wanted, settings = self.chosen(known)
        yield from wanted
        if settings is None:
            return
        lower = max((rate for rate in RATES if rate < settings["lr"]), default=settings["lr"])
        pair = [{**settings, "budget": 3, "lr": rate} for rate in dict.fromkeys((lower, settings["lr"]))]
        yield from pair
        rate = best_value(known, pair, "lr", score)
        if rate is None:
            return
        settings = {**settings, "lr": rate}
        found, dropout = tuned(known, lambda value: {**settings, "budget": 3, "dropout": value}, DROPOUTS, first=0)
        yield from found
        if dropout is not None:
            yield {**settings, "budget": 6, "dropout": dropout}

    def final(self, known: dict[str, Line]) -> Trial | None:
        """Returns the trial at the budget of 6, None while its settings are not chosen."""
        last = list(self.trials(known))[-1]
        return last if last["budget"] == 6 else None


COLUMNS = {
    "none": Column("none", (35, 20, 10, 5)),
    "dense": Column("dense", (35,), (1.0, 0.3, 0.1, 0.03), every=5),
    "multi-horizon": Column("multi-horizon", (5,)),
    "multi-token": Column("multi-token", (35,), (1.0, 0.3, 0.1, 4.0)),
    "exact": Column("exact", (20, 5)),
}
"""The methods, the most important first."""


RIVALS = ("none", "dense", "multi-horizon", "multi-token")
"""The methods that choose rate and dropout at the budget of 3.

`exact` is not among them, because it was worse at the budget of 1. It runs at the larger budgets with the settings chosen at
the budget of 1.
"""


def other_windows(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields trials of truncated BPTT with T = 35 and 20 at the budget of 6, at which longer windows may be better.

    Each T first has the rate that was best for it at the budget of 1. The best T then chooses at the budget of 3 between its
    rate and the next lower one, and runs at the budget of 6 with the chosen rate.
    """
    final = COLUMNS["none"].final(known)
    if final is None:
        return
    rates = {bptt: tuned(known, partial(trial_of, "none", bptt, budget=1), RATES, first=1)[1] for bptt in (35, 20)}
    wanted = [final] + [{**final, "T": bptt, "lr": rate} for bptt, rate in rates.items() if rate is not None]
    yield from wanted
    if any(key_of(trial) not in known for trial in wanted):
        return
    best = min(wanted, key=lambda trial: score(known[key_of(trial)]))
    lower = max((rate for rate in RATES if rate < best["lr"]), default=best["lr"])
    pair = [{**best, "budget": 3, "lr": rate} for rate in dict.fromkeys((best["lr"], lower))]
    yield from pair
    rate = best_value(known, pair, "lr", score)
    if rate is not None:
        yield {**best, "lr": rate}


def constant_rates(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields trials of one epoch at a constant learning rate: truncated BPTT at each T, and the default of the command."""
    for method, windows in (("none", (5, 10, 20, 35)), ("multi-horizon", (5,))):
        for bptt in windows:

            def make(lr: float, method: str = method, bptt: int = bptt) -> Trial:
                trial = trial_of(method, bptt, lr, 1)
                del trial["budget"]
                return {**trial, "epochs": 1, "schedule": "constant"}

            yield from tuned(known, make, RATES_OF_COMMAND, first=1)[0]


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields every trial that can be run now, the most important first.

    First come the trials at the budget of 1, then those of `RIVALS` at larger budgets, then `other_windows`, dense messages
    without the message at a window's end or with this message alone, a second seed of the two best methods of `RIVALS`, the
    exact gradient at larger budgets, and `constant_rates`.
    """
    wanted = {name: list(column.trials(known)) for name, column in COLUMNS.items()}
    yield from (trial for trials in wanted.values() for trial in trials if trial["budget"] == 1)
    yield from (trial for name in RIVALS for trial in wanted[name] if trial["budget"] > 1)
    yield from other_windows(known)
    dense = COLUMNS["dense"].final(known)
    if dense is not None:  # dense messages without one part, with the settings of the whole at the largest budget
        whole = {name: value for name, value in dense.items() if name != "every"}
        yield from ({**dense, "method": "dense, no end"}, {**whole, "method": "end alone"})
    finals = [trial for trial in (COLUMNS[name].final(known) for name in RIVALS) if trial is not None]
    if len(finals) == len(RIVALS) and all(key_of(trial) in known for trial in finals):
        for trial in sorted(finals, key=lambda trial: score(known[key_of(trial)]))[:2]:
            yield {**trial, "seed": 2}
    exact = COLUMNS["exact"].chosen(known)[1]
    if exact is not None:
        yield from ({**exact, "budget": budget} for budget in (6, 3))
    yield from constant_rates(known)


def table(results: Path) -> Iterable[str]:
    """Yields the lines of a table of Markdown of the recorded trials."""
    yield "| method | T | rate | dropout | weight | budget | seed | schedule | steps | validation | test |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    lines = [line for line in lines_by_key(results).values() if line["trial"]["task"] == "words"]
    for line in sorted(lines, key=lambda line: (line["trial"]["method"], line["trial"].get("budget", 0), line["valid"])):
        trial = line["trial"]
        cells = [
            trial["method"],
            trial["T"],
            trial["lr"],
            trial["dropout"],
            trial.get("weight", ""),
            trial.get("budget", "an epoch"),
        ]
        cells += [trial["seed"], trial["schedule"], line["steps"], f"{line['valid']:.1f}", f"{line['test']:.1f}"]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Runs the command."""
    parser = study_parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path("data/ptb"), metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    run_part(
        options,
        plan,
        lambda: Runner(options.data, options.results),
        table=lambda: print("\n".join(table(options.results))),
        time=lambda: measure_steps(options.data, options.results),
    )


if __name__ == "__main__":
    main()
