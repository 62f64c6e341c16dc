"""Compares decoupled feed-forward networks with backpropagation on the 5,000 digits and writes the table of errors.

python -m scripts.feedforward_table
    Make the runs that have no line in docs/results/feedforward.jsonl, then write the tables between the two marks of
    docs/results/feedforward.md.
python -m scripts.feedforward_table --part tune
    Tune the learning rates: try the same grid for each method with 3 layers and seed 0, scored on 800 held-out training
    digits.
python -m scripts.feedforward_table --part none
    Only write the tables.
python -m scripts.feedforward_table --max-runs 5
    Make only five of the missing runs.

Call the command from the root of the repository. After a kill, call it again: it makes the missing runs. The settings are at
the top of the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dni_seq.app.feedforward.train import FeedForwardOptions, train
from dni_seq.app.runs.options import at_least, build, option, parse, report
from dni_seq.app.studies.records import append_line, around_tables, markdown, mean_and_std, read_lines, write_tables
from dni_seq.streams import digits
from dni_seq.streams.digits import Digits

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "backprop": {"unlock": "none"},
        "DNI": {"unlock": "backward"},
        "cDNI": {"unlock": "backward", "context": True},
        "full unlock": {"unlock": "full", "context": True},
    }
)
"""The options of each method. The number of layers and `decouple`, the place of the interfaces, vary between runs."""

PLACES: Mapping[str, str] = MappingProxyType({"last": "last hidden layer", "every": "every hidden layer"})
"""Descriptions of the values of `decouple`."""

COLUMNS: Sequence[tuple[str, str | None]] = (
    ("backprop", None),
    *((method, place) for place, method in itertools.product(PLACES, ("DNI", "cDNI", "full unlock"))),
)

GRID = ((1e-4, 3e-4, 1e-3), (3e-3, 1e-2))
"""The learning rates that are tried: those of the network, then those of the synthesizers."""

TUNING_EPOCHS = 40
DEPTHS = (2, 3, 4, 5, 6)
SPORADIC = ("DNI", "cDNI", "full unlock")
P_UPDATES = (0.2, 0.5, 1.0)


class Run(NamedTuple):
    """One training of the study: the part of the study, the method, and the options that `METHODS` does not give."""

    part: str
    method: str
    settings: dict[str, Any]

    def key(self) -> str:
        """Returns the text that identifies the run."""
        return json.dumps([self.part, self.method, self.settings], sort_keys=True)

    def options(self) -> FeedForwardOptions:
        """Returns all options of the run."""
        return build(FeedForwardOptions, {"dataset": "digits"}, METHODS[self.method], self.settings)


def three() -> list[Run]:
    """Returns the runs with three layers, which are the main comparison, with five seeds."""
    return [
        Run("depth", method, {"layers": 3, **placed(place), "seed": seed})
        for columns, seed in itertools.product((COLUMNS[:4], COLUMNS[4:]), range(5))
        for method, place in columns
    ]


def depths() -> list[Run]:
    """Returns the runs with other numbers of layers, three seeds, without full unlock.

    Two layers have one hidden layer, so the place "last" would repeat the place "every" and is left out.
    """
    return [
        Run("depth", method, {"layers": layers, **placed(place), "seed": seed})
        for seed, layers, (method, place) in itertools.product(range(3), DEPTHS, COLUMNS)
        if layers != 3 and method != "full unlock" and (layers, place) != (2, "last")
    ]


def placed(place: str | None) -> dict[str, str]:
    """Returns the option for a place of interfaces."""
    return {} if place is None else {"decouple": place}


def sporadic() -> list[Run]:
    """Returns the runs with four layers that are updated in a random order, each with a probability of `P_UPDATES`."""
    return [
        Run("sporadic", method, {"layers": 4, "p_update": p, "seed": seed})
        for seed, method, p in itertools.product(range(2), SPORADIC, P_UPDATES)
    ]


def tune() -> list[Run]:
    """Returns the tuning runs. Backpropagation has no synthesizers, so it has one run per rate of the network."""
    runs = []
    for method in METHODS:
        for lr, synthesizer_lr in itertools.product(*GRID):
            settings = {"lr": lr, "synthesizer_lr": synthesizer_lr, "epochs": TUNING_EPOCHS}
            if method != "backprop" or synthesizer_lr == GRID[1][0]:
                runs.append(Run("tune", method, settings))
    return runs


PARTS = MappingProxyType({"three": three, "tune": tune, "depths": depths, "sporadic": sporadic})


@dataclass(frozen=True)
class StudyOptions:
    """The options of `scripts/feedforward_table.py`."""

    part: str = option("all", "runs to make before the tables are written", group="study", choices=("all", "none", *PARTS))
    results: str = option(
        "docs/results/feedforward.jsonl", "file of results, one line per run", group="study", metavar="FILE"
    )
    max_runs: int | None = option(
        None, "make at most this many runs; the missing ones follow in the next call", group="study", check=at_least(1)
    )
    tables: str = option("docs/results/feedforward.md", "page that holds the tables", group="study", metavar="FILE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = build(StudyOptions, parse(StudyOptions, arguments, prog=_PROG, description=__doc__ or ""))
        around_tables(Path(options.tables), MARKS)
        if options.part != "none":
            study(list(PARTS) if options.part == "all" else [options.part], Path(options.results), options.max_runs)
        write_tables(Path(options.tables), MARKS, tables(read_lines(Path(options.results))))
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    return 0


_PROG = "feedforward_table"
MARKS = ("<!-- tables: written by scripts/feedforward_table.py -->", "<!-- end of tables -->")


def study(parts: Sequence[str], results: Path, most: int | None = None) -> None:
    """Makes at most `most` of the runs of `parts` that are not recorded; appends a line to `results` after each run."""
    data = digits.load("digits")
    done = {line["key"] for line in read_lines(results)}
    missing = (run for part in parts for run in PARTS[part]() if run.key() not in done)
    for run in itertools.islice(missing, most):
        line = measure(run, data)
        print(f"{line['test_error']:6.2f} %  {line['seconds']:6.1f} s  {run.part} {run.method} {run.settings}", flush=True)
        append_line(results, line)


def measure(run: Run, data: Digits) -> dict[str, Any]:
    """Trains and tests one network and returns its line."""
    options = run.options()
    summary = train(options, held_out(data) if run.part == "tune" else data, lambda epoch, scores: None)
    return {
        "key": run.key(),
        "part": run.part,
        "method": run.method,
        "settings": run.settings,
        **summary,
        "options": dataclasses.asdict(options),
    }


def held_out(data: Digits) -> Digits:
    """Returns the training digits, split again: one in five of each class is the test set. The test digits are not used."""
    return digits.split(data.train_images, data.train_labels)


def matching(found: list[dict[str, Any]], part: str, method: str, **settings: Any) -> list[dict[str, Any]]:
    """Returns the lines of a part and method with these settings, for all seeds."""
    return [
        line
        for line in found
        if (line["part"], line["method"]) == (part, method)
        and {name: value for name, value in line["settings"].items() if name != "seed"} == settings
    ]


def errors(found: list[dict[str, Any]]) -> list[float]:
    """Returns the test errors in percent."""
    return [line["test_error"] for line in found]


def tables(found: list[dict[str, Any]]) -> str:
    """Returns the tables of the page."""
    seconds = sum(line["seconds"] for line in found)
    total = f"{len(found)} runs, {seconds / 60:.0f} minutes of wall time.\n"
    return "\n".join(part for part in (by_depth(found), of_sporadic(found), tuned(found), total) if part)


def by_depth(found: list[dict[str, Any]]) -> str:
    """Returns the table of test errors, with a row per number of layers and a column per method and place of interfaces."""
    header = ["layers", *(method if place is None else f"{method}, {PLACES[place]}" for method, place in COLUMNS)]
    rows = []
    for layers in DEPTHS:
        places = [(method, "every" if (layers, place) == (2, "last") else place) for method, place in COLUMNS]
        cells = [
            mean_and_std(errors(matching(found, "depth", method, layers=layers, **placed(place))))
            for method, place in places
        ]
        rows.append([str(layers), *cells])
    return markdown(header, rows)


def of_sporadic(found: list[dict[str, Any]]) -> str:
    """Returns the table of test errors with updates in a random order, with a column per probability."""
    rows = [
        [method, *(mean_and_std(errors(matching(found, "sporadic", method, layers=4, p_update=p))) for p in P_UPDATES)]
        for method in SPORADIC
    ]
    return markdown(["4 layers, random order", *(f"p = {p}" for p in P_UPDATES)], rows)


def tuned(found: list[dict[str, Any]]) -> str:
    """Returns the table of the best learning rates by method, an empty text if nothing was tuned."""
    rows = []
    for method in METHODS:
        tried = [line for line in found if (line["part"], line["method"]) == ("tune", method)]
        if tried:
            best = min(tried, key=lambda line: line["test_error"])
            rates = ", ".join(f"{name} {value:g}" for name, value in best["settings"].items() if "lr" in name)
            rows.append([method, rates, f"{best['test_error']:.1f}", str(len(tried))])
    return markdown(["method", "best learning rates", "held-out error", "tried"], rows) if rows else ""
