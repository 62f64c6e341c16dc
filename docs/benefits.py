"""Makes README's table of tasks and methods, and tables of the runs in pilots.jsonl, from the lines in docs/results.

README's table compares the methods at equal text and at equal CPU time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
METHODS = ("none", "multi-horizon", "exact")
AS_LONG = "3.46 million characters"
"""The change in falling_rate.jsonl that gives truncated BPTT the CPU time of the default at T = 1."""

NO_RUN = "–"

NOTES: Mapping[str | None, str] = MappingProxyType(
    {
        None: "",
        "1,000 outputs told apart": "reads all words, predicts 999",
        "500 outputs told apart": "reads all words, predicts 499",
        "all 10,000 outputs told apart": "reads and predicts all 10,000 words",
        "250 entries told apart, in what is read and what is predicted": "reads and predicts 249 words",
        "500 entries told apart, in what is read and what is predicted": "reads and predicts 499 words, the default",
        "the model's last layers at zero at first": "last layers zero at the start",
        "no outputs straight from the state": "no path from state to outputs",
    }
)
"""The notes in pilots.jsonl on a run's future model ("code"), each with its text in the tables."""

Line = dict[str, Any]


class Best(NamedTuple):
    """A trial of a method, as a cell of the table shows it.

    Attributes:
        score: perplexity, or length solved.
        window: T in steps.
        note: text that the cell adds after T.
    """

    score: float
    window: int
    note: str


def lines(name: str) -> list[Line]:
    """Returns the lines of docs/results/`name`.jsonl."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def table_1(task: str, window: int, method: str) -> list[Line]:
    """Returns the runs of a cell of Table 1 in paper.jsonl, one for each of the seeds 0 to 2."""
    chosen = {"part": "table1", "task": task, "bptt": window, "column": method}
    found = {line["seed"]: line for line in lines("paper") if all(line.get(key) == value for key, value in chosen.items())}
    return [found[seed] for seed in SEEDS]


def final(run: Line) -> float:
    """Returns a run's score: validation bits per character, or the length solved."""
    result: dict[str, float] = run["result"]
    return result["valid_bpc"] if "valid_bpc" in result else result["length"]


def score_at(run: Line, seconds: float) -> float:
    """Returns the score that a run has reached within `seconds` CPU seconds, from its curve.

    The score is validation bits per character for text, and the length solved for copying.
    """
    if run["task"] == "ptb":
        return [point[3] for point in run["curve"] if point[2] <= seconds][-1]
    updates = seconds / run["process_seconds"] * run["updates"]
    return [length for update, length in run["curve"] if update <= updates][-1]


def training_seconds(runs: Iterable[Line]) -> float:
    """Returns the CPU seconds of text runs at their last validation, as a mean over the runs."""
    return mean(run["curve"][-1][2] for run in runs)


def pilots(method: str, **options: object) -> list[float]:
    """Returns the scores of the runs of a method in pilots.jsonl with these options, one score for each seed.

    The score is validation perplexity on text, and the length solved on tasks. If a seed has several lines, the last one
    counts: it is of the newest code.
    """
    found = {}
    for line in lines("pilots"):
        wanted = {**options, "synthesizer": method}
        if all(line["options"].get(key) == value for key, value in wanted.items()):
            found[line["options"]["seed"]] = line["valid"]["ppl"] if "valid" in line else line["length"]
    return list(found.values())


def study(task: str, method: str, **trial: object) -> Best | None:
    """Returns the best trial of a method in the two studies at equal CPU time; None without a trial.

    The best is taken over all learning rates, windows and optimizers. `trial` holds the settings that all of these trials
    must have, such as the budget. The studies are those of predictive_messages.jsonl and frontier.jsonl.
    """
    better: Callable[..., Best] = min if task == "words" else max
    score = "valid" if task == "words" else "solved"
    wanted = {**trial, "task": task, "method": method}
    seed = 1 if task == "words" else 0  # the seed that all methods have in predictive_messages.jsonl
    found = [
        Best(line.get("quality", line.get(score)), line["trial"]["T"], ", SGD" * ("optimizer" in line["trial"]))
        for name, first in (("predictive_messages", seed), ("frontier", 1))
        for line in lines(name)
        if "trial" in line and line["trial"].items() >= {**wanted, "seed": first}.items()
    ]
    return better(found) if found else None


def row(name: str, window: object, cells: Iterable[str]) -> str:
    """Returns a row of the table."""
    return f"| {name} | {window} | {' | '.join(cells)} |"


def equal_text() -> list[str]:
    """Returns the rows at equal text. In each row, all methods have the same T."""
    rows = [
        row("characters, bits ↓", window, [*(falling_rate(window, method) for method in METHODS), NO_RUN])
        for window in (1, 4)
    ]
    for name, task in (("copying, length ↑", "copy"), ("repeat copy, length ↑", "repeat-copy")):
        cells = [f"{mean(map(final, table_1(task, 4, method))):.1f}" for method in METHODS]
        rows.append(row(name, 4, [*cells, NO_RUN]))
    adding = [f"{mean(pilots(method, task='adding')):.1f}" for method in METHODS[:2]]
    rows.append(row("adding, length ↑", 4, [*adding, NO_RUN, NO_RUN]))
    by_words = {"dataset": "ptb", "bptt": 5, "epochs": 1, "lr": 20.0, "synthetic_scale": None}
    words = [f"{mean(pilots(method, **by_words)):.1f}" for method in METHODS]
    echoes = [f"{mean(echo(column)):.2f}" for column in ("truncated", "default", "exact future")]
    echoes[-1] += " (10 steps)"
    rows.append(row(f"delayed echo, LRU, bits ↓ (exact traces: {mean(echo('exact traces')):.2f})", 1, [*echoes, NO_RUN]))
    return [*rows, row("words, one epoch by SGD, perplexity ↓", 5, [*words, NO_RUN])]


def falling_rate_lines(window: int, method: str) -> list[Line]:
    """Returns a method's lines of falling_rate.jsonl at T = `window`, one for each seed.

    The learning rate is the one that is best for seed 1. The list is empty if the method has no line.
    """
    wanted = {"T": window, "method": method}
    own = [one for one in lines("falling_rate") if "changed" not in one["trial"] and one["trial"].items() >= wanted.items()]
    if not own:
        return []
    best = min((one for one in own if one["trial"]["seed"] == 1), key=lambda one: float(one["valid"]))["trial"]["lr"]
    return [one for one in own if one["trial"]["lr"] == best]


def falling_rate(window: int, method: str) -> str:
    """Returns the validation bits per character of `falling_rate_lines`, as a mean over the seeds."""
    bits = [one["valid"] for one in falling_rate_lines(window, method)]
    return f"{mean(bits):.3f}" if bits else NO_RUN


def echo(column: str) -> list[float]:
    """Returns the bits of error on the delayed echo with an LRU, one for each seed, from estimators.jsonl.

    Only runs over the whole text count, not the shorter ones that tune the learning rate.
    """
    wanted = {"task": "echo", "column": f"lru: {column}", "share": 1.0}
    whole = [line for line in lines("estimators") if all(line.get("trial", {}).get(k) == v for k, v in wanted.items())]
    return [line["score"] for line in whole if line["trial"]["seed"] in SEEDS]


def equal_time() -> list[str]:
    """Returns the rows at equal CPU time.

    By characters, the CPU time is that of the default for a million characters. By words and at copying, it is a fixed
    budget.
    """
    (longer,) = (one for one in lines("falling_rate") if one["trial"].get("changed") == AS_LONG)
    cells = [f"{longer['valid']:.3f}", falling_rate(1, "multi-horizon"), NO_RUN, NO_RUN]
    rows = [row("characters, bits ↓", 1, cells)]
    for name, budget in (("words, 200 CPU seconds, perplexity ↓", 1), ("words, 1,200 CPU seconds, perplexity ↓", 6)):
        best = [study("words", method, budget=budget) for method in (*METHODS, "dense")]
        cells = [NO_RUN if found is None else f"{found.score:.1f} (T = {found.window}{found.note})" for found in best]
        rows.append(row(name, "best", cells))
    return [*rows, preset_small(), copying(150)]


def preset_small() -> str:
    """Returns the row of the preset `small`, at the CPU time of 13 epochs of truncated BPTT."""
    runs = [line for line in lines("published") if line.get("trial", {}).get("epochs") == 13]
    truncated = mean(line["valid"] for line in runs if line["trial"]["method"] == "none")
    default = mean(line["at_equal_time"]["valid"] for line in runs if line["trial"]["method"] == "multi-horizon")
    cells = [f"{truncated:.1f}", f"{default:.1f}", NO_RUN, NO_RUN]
    return row("words by SGD, preset `small`, perplexity ↓", 20, cells)


def copying(seconds: int) -> str:
    """Returns the row of copying after `seconds` CPU seconds, with the best window of each method.

    The cell of the default is from its runs in Table 1 at T = 4. At copying, dense messages are gradients of a model of the
    past, and the exact gradient covers 16 steps.
    """
    default = f"{mean(score_at(run, seconds) for run in table_1('copy', 4, 'multi-horizon')):.1f} (T = 4)"
    methods = {"none": "", "exact": ", 16 steps", "past inside": ""}
    found = {method: study("copy", method, seconds=seconds) for method in methods}
    truncated, exact, dense = (
        NO_RUN if best is None else f"{best.score} (T = {best.window}{methods[method]})" for method, best in found.items()
    )
    return row(f"copying, {seconds} CPU seconds, length ↑", "best", [truncated, default, exact, dense])


def benefits() -> list[str]:
    """Returns README's table."""
    return [
        "| task | T | truncated BPTT | synthesizer | exact gradient of 4 steps | dense messages |",
        "|---|---|---|---|---|---|",
        "| **at equal text** | | | | | |",
        *equal_text(),
        "| **at equal CPU time** | | | | | |",
        *equal_time(),
    ]


def runs(keep: Callable[[Line], bool], columns: tuple[str, ...]) -> list[str]:
    """Returns rows of the text runs in pilots.jsonl whose options `keep` accepts, in the order of the file.

    Runs with the same values of the options `columns` share a row, which has these options, and the seeds, perplexities and
    CPU seconds of its runs.
    """
    cells: dict[tuple[str, ...], list[Line]] = {}
    for line in lines("pilots"):
        if "valid" in line and keep(line["options"]):
            options = {"schedule": "constant", **line["options"]}  # older lines lack the option
            given = [str(options.get(name, "")) for name in columns]
            cells.setdefault((*given, note(line)), []).append(line)
    rows = []
    for (*given, model), found in cells.items():
        seeds = ", ".join(str(line["options"]["seed"]) for line in found)
        scores = [", ".join(f"{line[split]['ppl']:.{decimals(line)}f}" for line in found) for split in ("valid", "test")]
        seconds = ", ".join(f"{line['process_seconds']:.0f}" for line in found)
        rows.append(f"| {' | '.join((*(f'`{given[0]}`', *given[1:]), seeds, *scores, seconds, model))} |")
    return rows


def note(line: Line) -> str:
    """Returns the note on a run's future model from `NOTES`; empty for a run without a future model."""
    return NOTES[line.get("code")] if line["options"]["synthesizer"] == "multi-horizon" else ""


def decimals(line: Line) -> int:
    """Returns the decimal places of a run's perplexity: one for words, two for characters, whose perplexity is below 10."""
    return 1 if line["valid"]["ppl"] > 10 else 2


def words() -> list[str]:
    """Returns the table of runs over whole epochs of Penn Treebank by words, with Adam."""
    return [
        "| synthesizer | epochs | rate | seeds | validation | test | CPU seconds | future model |",
        "|---|---|---|---|---|---|---|---|",
        *runs(lambda given: whole_words(given) and "optimizer" not in given, ("synthesizer", "epochs", "lr")),
    ]


def words_by_sgd() -> list[str]:
    """Returns the table of runs over whole epochs of Penn Treebank by words, with SGD."""
    return [
        "| synthesizer | T | messages every | c | rate | epochs | seeds | validation | test | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            row.removesuffix(" |  |") + " |"
            for row in runs(lambda given: whole_words(given) and given.get("optimizer") == "sgd", SGD_COLUMNS)
        ),
    ]


SGD_COLUMNS = ("synthesizer", "bptt", "message_every", "synthetic_scale", "lr", "epochs")


def whole_words(given: Line) -> bool:
    """Returns whether a run's options are those of whole epochs on Penn Treebank by words."""
    return given.get("dataset") == "ptb" and "epochs" in given


EMBEDDED_COLUMNS = ("synthesizer", "horizons", "lookahead", "synthetic_scale", "lr", "schedule", "epochs")


def embedded_corpus() -> list[str]:
    """Returns the table of runs on the embedded corpus, the text of the command without options."""
    return [
        "| synthesizer | K | lookahead | c | rate | schedule | epochs | seeds | validation | test | CPU s | future model |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *runs(lambda given: "dataset" not in given and "epochs" in given, EMBEDDED_COLUMNS),
    ]
