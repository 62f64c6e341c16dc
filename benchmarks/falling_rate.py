"""Characters with a rate that falls to zero: what do messages and exact gradients bring over truncated BPTT at its best?

python benchmarks/falling_rate.py run --data DIR --max-minutes 60
    Run the missing trials. Several processes may run side by side, and a trial that was stopped resumes.
python benchmarks/falling_rate.py table
    Print the recorded results as a table of Markdown.

DIR holds ptb/ptb.train.txt, ptb/ptb.valid.txt and ptb/ptb.test.txt. The runs train on Penn Treebank by characters: LSTM of
256 units, 64 lanes, a million characters in each run. At each T, the learning rate of each method is tuned with seed 1, and
the best rate then runs with seeds 2 and 3. At T = 1 and 8 there are also runs with a change of a method. All trials need
about 5 process-hours.

Legend: T = window length in steps, c = share of the message that is injected.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

from dni_seq.app.studies.records import NOTHING, markdown, plus_minus, read_lines
from dni_seq.synthesizers.defaults import default_horizons

sys.path.insert(0, str(Path(__file__).parent / "studies"))
from command_runs import bracket_rate, command_of, train
from trials import Line, Trial, key_of, run_part, study_parser

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"synthesizer": "none"},
        "multi-horizon": {"synthesizer": "multi-horizon"},
        "next 4 steps": {"synthesizer": "multi-horizon", "horizons": 1, "lookahead": 4},
        "next 4 steps, c = 0.5": {"synthesizer": "multi-horizon", "horizons": 1, "lookahead": 4, "synthetic-scale": 0.5},
        "exact": {"synthesizer": "exact", "exact-steps": 4},
    }
)
"""The options of the training command by method. `multi-horizon` predicts K windows at each T, max(2, 4 / T) rounded up."""


class Change(NamedTuple):
    """A trial that differs from a method's in one respect.

    Attributes:
        bptt: T.
        rate: learning rate.
        method: the changed method.
        options: the options that change it.
        seeds: the seeds with which it is tried.
    """

    bptt: int
    rate: float
    method: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...] = (1,)


WINDOWS, RATES, SEEDS = (1, 8, 2, 4), (4e-3, 8e-3, 1.6e-2), (1, 2, 3)
"""Window lengths, the most important first; the learning rates that are tried first; and the seeds."""

CHANGED: Mapping[str, Change] = MappingProxyType(
    {
        "c = 0.3": Change(8, 8e-3, "multi-horizon", {"synthetic-scale": 0.3}),
        "c falls with the rate": Change(8, 8e-3, "multi-horizon", {"scale-schedule": "follow"}),
        "by SGD, rate 5": Change(8, 8e-3, "none", {"optimizer": "sgd", "lr": 5.0}),
        "by SGD, rate 20": Change(8, 8e-3, "none", {"optimizer": "sgd", "lr": 20.0}),
        "128 units": Change(1, 4e-3, "multi-horizon", {"future-units": 128}, SEEDS),
        "1.47 million characters": Change(1, 4e-3, "next 4 steps, c = 0.5", {"max-tokens": 1_470_000}),
        "3.46 million characters": Change(1, 4e-3, "none", {"max-tokens": 3_460_000}),
        "of 128 units": Change(1, 4e-3, "next 4 steps, c = 0.5", {"future-units": 128}, SEEDS),
    }
)
"""The changes that are tried, by name. The future model has 256 units if the name has no number of units.

The changed numbers of characters need, on an idle machine, as much CPU time as `multi-horizon` at T = 1 for a million.
"""

COMMON: Mapping[str, Any] = MappingProxyType(
    {"dataset": "ptb", "tokenizer": "char", "hidden": 256, "embed": 64, "layers": 1, "dropout": 0, "batch-size": 64}
    | {"clip": 1, "schedule": "linear", "max-tokens": 1_000_000}
)
"""The options that all runs have."""


def trial_of(bptt: int, method: str, rate: float, seed: int = 1) -> Trial:
    """Returns the settings of a trial."""
    return {"T": bptt, "method": method, "lr": rate, "seed": seed}


def bits(line: Line) -> float:
    """Returns the validation bits a character of a line, by which learning rates are chosen."""
    return float(line["valid"])


def tuning(bptt: int, method: str, known: dict[str, Line]) -> tuple[list[Trial], float | None]:
    """Returns the trials that tune a method at T with the first seed, and the best rate; see `bracket_rate`."""
    return bracket_rate(known, lambda rate: trial_of(bptt, method, rate), RATES, bits)


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields every trial that can be run now: at each T the rates of each method, then the other seeds; last the changes."""
    for bptt in WINDOWS:
        found = {method: tuning(bptt, method, known) for method in METHODS}
        for trials, _ in found.values():
            yield from trials
        for seed in SEEDS[1:]:
            yield from (trial_of(bptt, method, rate, seed) for method, (_, rate) in found.items() if rate is not None)
    for name, change in CHANGED.items():
        yield from ({**trial_of(change.bptt, change.method, change.rate, seed), "changed": name} for seed in change.seeds)


def options_of(trial: Trial) -> dict[str, Any]:
    """Returns the options of the training command for a trial."""
    changed: Mapping[str, Any] = CHANGED[trial["changed"]].options if "changed" in trial else {}
    ahead = {"horizons": default_horizons(trial["T"])} if trial["method"] == "multi-horizon" else {}
    own = {"bptt": trial["T"], **METHODS[trial["method"]], **ahead, "lr": trial["lr"], "seed": trial["seed"]}
    return {**COMMON, **own, **changed}


def run(trial: Trial, checkpoint: Path, data: Path) -> Line:
    """Trains with the command that a user would type, and returns the bits of the best checkpoint."""
    folder = checkpoint.with_suffix("")
    summary = train(options_of(trial), data, folder)
    shutil.rmtree(folder)
    scores = {split: round(summary[split]["bpc"], 4) for split in ("valid", "test")}
    counts = {"steps": summary["steps"], "process_seconds": round(summary["process_seconds"], 1)}
    return {**scores, **counts, "command": command_of(options_of(trial))}


def cell(values: list[float]) -> str:
    """Returns the text of one number, or mean and standard deviation of several."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return plus_minus(values, 3)


def best_runs(known: dict[str, Line], bptt: int, method: str) -> list[Line]:
    """Returns the runs of a method at T with the rate that is best for the first seed, one run for each seed.

    The list is empty if the method has no run at T with the first seed.
    """
    wanted = {"T": bptt, "method": method}
    own = [line for line in known.values() if "changed" not in line["trial"] and line["trial"].items() >= wanted.items()]
    first = [line for line in own if line["trial"]["seed"] == SEEDS[0]]
    if not first:
        return []
    rate = min(first, key=bits)["trial"]["lr"]
    return [line for line in own if line["trial"]["lr"] == rate]


def table(lines: Iterable[Line]) -> str:
    """Returns a table of Markdown: the runs of each method at each T with its best rate, and the changes."""
    known = {key_of(line["trial"]): line for line in lines if "trial" in line}
    rows = []
    for bptt in sorted(WINDOWS):
        base = best_runs(known, bptt, "none")
        for method in METHODS:
            runs = best_runs(known, bptt, method)
            if runs:
                rows.append(row(str(bptt), f"`{method}`", runs, base))
        for name, change in CHANGED.items():
            runs = [line for line in known.values() if line["trial"].get("changed") == name]
            if runs and change.bptt == bptt:
                rows.append(row(str(bptt), f"`{change.method}`, {name}", runs, base))
    header = ["T", "method", "rate", "seeds", "validation", "test", "gain over `none`", "CPU seconds"]
    return markdown(header, rows)


def row(bptt: str, name: str, runs: list[Line], base: list[Line]) -> list[str]:
    """Returns a row of the table for runs that differ only in the seed. `base` has the runs of truncated BPTT at this T."""
    gain = f"{mean(map(bits, base)) - mean(map(bits, runs)):+.3f}" if base and base != runs else NOTHING
    options = options_of(runs[0]["trial"])
    scores = [cell([line[split] for line in runs]) for split in ("valid", "test")]
    seconds = f"{mean(line['process_seconds'] for line in runs):.0f}"
    return [bptt, name, f"{options['lr']:g}", str(len(runs)), *scores, gain, seconds]


def main() -> None:
    """Runs the command."""
    parser = study_parser(__doc__ or "", parts=("run", "table", "plan"))
    parser.set_defaults(results=Path("docs/results/falling_rate.jsonl"), scratch=Path("runs/falling_rate"))
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    options = parser.parse_args()
    run_part(
        options,
        plan,
        lambda: partial(run, data=options.data),
        table=lambda: print(table(read_lines(options.results))),
    )


if __name__ == "__main__":
    main()
