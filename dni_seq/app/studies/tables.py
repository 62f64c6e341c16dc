"""Makes the tables of the study of synthetic gradients from the lines that scripts/reproduce_paper.py records.

Text is compared by bits per character, copy tasks by the length solved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dni_seq.app.studies.records import NOTHING, markdown, mean_and_std

Line = dict[str, Any]

TASKS = ("copy", "repeat-copy", "ptb")

MARKS = ("<!-- tables: written by scripts/reproduce_paper.py -->", "<!-- end of tables -->")

COLUMNS = ("none", "paper", "paper-aux", "multi-horizon", "exact")
"""The columns, in the order of tables and curves."""

BASES = ("default", "paper")
"""The names of the variants of an ablation that change nothing."""

TIE = 0.01
"""Two short runs of one seed count as equal if they differ by at most this many bits per character."""

WITHOUT, EXACT = "none", "exact"
"""The two columns whose difference is the headroom."""


def is_text(line: Line) -> bool:
    """Whether a line is from a language model."""
    return line["task"] == "ptb"


Rates = tuple[float, float | None]
"""Learning rates of the network and of the synthesizer. The second one is None without a trained synthesizer."""


def better(line: Line) -> tuple[float, float]:
    """Returns a sort key that is smaller for better lines.

    The key of a text is its validation bits per character, infinity after divergence. The key of a copy task is the negative
    length solved, then the update at which the length was solved.
    """
    if is_text(line):
        bpc = line["result"]["valid_bpc"]
        return (math.inf if bpc is None else bpc, 0.0)
    return (-line["result"]["length"], line["curve"][-1][0] if line["curve"] else 0.0)


def rates_in(line: Line) -> Rates:
    """Returns the learning rates of a run."""
    return line["options"]["lr"], line["options"].get("synthesizer_lr")


def tied(grid: Sequence[Line]) -> list[Line]:
    """Returns the lines of a grid whose results are tied for best, at least one line.

    For text, a result is tied for best if it is at most `TIE` above the lowest bits per character. For copy tasks it is tied
    if the length solved is the largest one; the update at which the length was solved does not count.
    """
    best = min(better(line)[0] for line in grid)
    return [line for line in grid if better(line)[0] <= best + (TIE if is_text(line) else 0)]


def chosen(grid: Sequence[Line], longer: Sequence[Line]) -> Line:
    """Returns the line whose learning rates are used.

    `tied` selects the lines of `grid` with the best results. If `longer` has a run with the same rates and the full budget,
    its line takes the place of the short run's. The best of these lines by `better` is returned, and of equally good lines
    the one with the lowest rates. The longer runs are made because short runs cannot decide between tied rates: on copy
    tasks, short runs solve the same few lengths at several rates; on text, a rate that is too high for a long run may be
    slightly better in a short one.
    """
    whole = {rates_in(line): line for line in longer}
    found = [whole.get(rates_in(line), line) for line in tied(grid)]
    return min(found, key=lambda line: (*better(line), *known(rates_in(line))))


def test_result(line: Line) -> float | None:
    """Returns test bits per character (None for a run that diverged), or the length solved."""
    return line["result"]["test_bpc" if is_text(line) else "length"]


def title(line: Line) -> str:
    """Returns the task, the text if it is not Penn Treebank, and the budget, as text."""
    text = "" if line["data"] is None else f" ({line['data']})"
    return f"{line['task']}{text}, {line['budget']}"


def latest(lines: Iterable[Line]) -> list[Line]:
    """Returns one line per cell and seed of the tables: the last one of runs with different learning rates."""
    names = ("part", "task", "data", "budget", "bptt", "column", "variant", "seed")
    return list({tuple(line.get(name) for name in names): line for line in lines}.values())


def in_order(values: Iterable[Any]) -> list[Any]:
    """Returns the distinct values in the order of their first occurrence."""
    return list(dict.fromkeys(values))


def columns_of(lines: list[Line]) -> list[str]:
    """Returns the columns of the lines in the order of `COLUMNS`."""
    return sorted({line["column"] for line in lines}, key=COLUMNS.index)


def tables(lines: list[Line]) -> str:
    """Returns all tables of the page."""
    blocks = []
    of_table = latest(line for line in lines if line["part"] == "table1")
    for name in sorted(in_order(map(title, of_table))):
        blocks.append(of_task(name, [line for line in of_table if title(line) == name]))
    of_ablation = latest(line for line in lines if line["part"] == "ablation")
    for task, bptt in in_order((line["task"], line["bptt"]) for line in of_ablation):
        blocks.append(ablation([line for line in of_ablation if (line["task"], line["bptt"]) == (task, bptt)]))
    tuned = [line for line in lines if line["part"] in ("tune", "ties")]
    if tuned:
        blocks.append(tuning(tuned))
    blocks.append(spent(lines))
    return "\n".join(blocks)


def of_task(name: str, lines: list[Line]) -> str:
    """Returns the tables of one task: result, headroom, messages, cost."""
    text = is_text(lines[0])
    first = "Test bits per character" if text else "Length solved"
    parts = [f"### {name}\n", f"{first}, mean ± standard deviation (seeds):\n", grid(lines, results_of(lines))]
    if text:
        parts += ["Validation bits per character, the best of the run:\n", grid(lines, validation)]
    if {WITHOUT, EXACT} <= {line["column"] for line in lines}:
        parts += [
            "Share of the headroom from `none` to `exact` that is closed, percent; the row of `exact` is the headroom; "
            f"no share ({NOTHING}) where it is not beyond its own spread:\n",
            grid([line for line in lines if line["column"] != WITHOUT], lambda found: share(found, lines)),
        ]
    parts += [
        "Injected ratio; cosine and R² of the first horizon against exact gradients; medians of a run's second half:\n",
        grid([line for line in lines if line["column"] != WITHOUT], fidelity),
        "Minutes of CPU time a run; peak memory in MiB:\n",
        grid(lines, cost),
    ]
    return "\n".join(parts)


def grid(lines: list[Line], cell: Callable[[list[Line]], str]) -> str:
    """Returns a table with one row per column of the study and one table column per T."""
    widths = sorted({line["bptt"] for line in lines})
    rows = []
    for column in columns_of(lines):
        row = [[line for line in lines if (line["column"], line["bptt"]) == (column, bptt)] for bptt in widths]
        rows.append([f"`{column}`", *(cell(found) if found else NOTHING for found in row)])
    return markdown(["", *(f"T = {bptt}" for bptt in widths)], rows)


def known(values: Iterable[float | None]) -> list[float]:
    """Returns the values that are not None."""
    return [value for value in values if value is not None]


def digits_of(lines: Sequence[Line]) -> int:
    """Returns the number of decimal places of a result."""
    return 3 if lines and is_text(lines[0]) else 1


def results_of(lines: list[Line]) -> Callable[[list[Line]], str]:
    """Returns the function that formats a cell of the main table: the result, and the number of runs that diverged."""

    def cell(found: list[Line]) -> str:
        values = known(map(test_result, found))
        diverged = len(found) - len(values)
        return mean_and_std(values, digits_of(lines)) + (f", {diverged} diverged" if diverged else "")

    return cell


def validation(found: list[Line]) -> str:
    """Returns the best validation bits per character."""
    return mean_and_std(known(line["result"]["valid_bpc"] for line in found), 3)


def gains(found: list[Line], lines: list[Line]) -> list[float]:
    """Returns the gain of each line over the line of column "none" with its seed and T, in bits per character or length.

    Lines that diverged, and lines without such a line of "none", have no gain.
    """
    base = {(line["seed"], line["bptt"]): test_result(line) for line in lines if line["column"] == WITHOUT}
    better_by = []
    for line in found:
        own, other = test_result(line), base.get((line["seed"], line["bptt"]))
        if own is not None and other is not None:
            better_by.append(other - own if is_text(line) else own - other)
    return better_by


def share(found: list[Line], lines: list[Line]) -> str:
    """Returns, as text, the gain of each seed in percent of the headroom: mean and standard deviation over the seeds.

    The headroom is the gain of the column "exact" at the T of `found`, as a mean over the seeds of `found`. If `found` is
    that column itself, returns the headroom in bits or length. Otherwise returns `NOTHING` if the mean headroom of all
    recorded seeds is not larger than its standard deviation, or if no seed of `found` has a headroom.
    """
    bptt, seeds = found[0]["bptt"], {line["seed"] for line in found}
    exact = [line for line in lines if (line["column"], line["bptt"]) == (EXACT, bptt)]
    headroom = gains(exact, lines)
    if found[0]["column"] == EXACT:
        return mean_and_std(headroom, digits_of(found))
    of_these = gains([line for line in exact if line["seed"] in seeds], lines)
    if not beyond_spread(headroom) or not of_these:
        return NOTHING
    mean = statistics.mean(of_these)
    return mean_and_std([100 * gain / mean for gain in gains(found, lines)], 0)


def beyond_spread(gained: list[float]) -> bool:
    """Returns whether the mean gain exceeds its standard deviation; for one seed, whether the gain is positive."""
    if not gained:
        return False
    return statistics.mean(gained) > (statistics.stdev(gained) if len(gained) > 1 else 0.0)


def fidelity(found: list[Line]) -> str:
    """Returns injected ratio, cosine and R² of a cell as text, means over seeds. Unmeasured values are omitted."""
    ratios = known(line["injected_ratio"] for line in found)
    said = [f"{statistics.mean(ratios):.2g}"] if ratios else []
    for name, symbol in (("cosine", "cos"), ("r2", "R²")):
        values = known(line["fidelity"][name][0] for line in found if line["fidelity"])
        if values:
            value = statistics.mean(values)
            said.append(f"{symbol} below -10" if value < -10 else f"{symbol} {value:.2f}")
    return "; ".join(said) or NOTHING


def cost(found: list[Line]) -> str:
    """Returns CPU minutes and peak memory as text, means over seeds."""
    minutes = statistics.mean(line["process_seconds"] for line in found) / 60
    memory = known(line["peak_memory_mb"] for line in found)
    return f"{minutes:.1f}" + (f"; {statistics.mean(memory):.0f}" if memory else "")


def ablation(lines: list[Line]) -> str:
    """Returns the table of an ablation: one change per row, with the difference from the base, a mean over equal seeds."""
    rows = []
    for column in columns_of(lines):
        of_base = [line for line in lines if line["column"] == column]
        variants = sorted(in_order(line["variant"] for line in of_base), key=lambda variant: variant not in BASES)
        plain = {line["seed"]: test_result(line) for line in of_base if line["variant"] == variants[0]}
        for variant in variants:
            found = [line for line in of_base if line["variant"] == variant]
            values = known(map(test_result, found))
            differences = [
                own - base
                for own, base in ((test_result(line), plain.get(line["seed"])) for line in found)
                if own is not None and base is not None
            ]
            change = NOTHING if variant == variants[0] else mean_and_std(differences, digits_of(lines))
            change = change if change == NOTHING or change.startswith("-") else f"+{change}"
            rows.append(
                [f"`{column}`", variant, mean_and_std(values, digits_of(lines)), change, fidelity(found), cost(found)]
            )
    what = "test bits per character" if is_text(lines[0]) else "length solved"
    header = ["base", "one change", what, "against the base", "injected ratio; fidelity", "CPU minutes; MiB"]
    return f"### ablation: {lines[0]['task']}, T = {lines[0]['bptt']}\n\n" + markdown(header, rows)


def tuning(lines: list[Line]) -> str:
    """Returns the table of the learning rates chosen from each grid."""
    rows = []
    for name, column, bptt, horizons in in_order(map(_tuned, lines)):
        here = [line for line in lines if _tuned(line) == (name, column, bptt, horizons)]
        grid, longer = ([line for line in here if line["part"] == part] for part in ("tune", "ties"))
        best = chosen(grid, longer)
        shown = ", ".join(f"{rate:g}" for rate in rates_in(best) if rate is not None)
        reached = best["result"]["valid_bpc" if is_text(best) else "length"]
        result = "diverged" if reached is None else f"{reached:.3f}" if is_text(best) else str(reached)
        tries = f"{len(grid)}, {len(longer)} again" if longer else str(len(grid))
        of = f"`{column}`" + (f", K = {horizons}" if horizons else "")
        rows.append([name, of, str(bptt), shown, result, tries])
    header = ["task", "column", "T", "rates taken (network, synthesizer)", "validation bpc, or length", "tried"]
    return "### learning rates\n\n" + markdown(header, rows)


def _tuned(line: Line) -> tuple[str, str, int, int | None]:
    """Returns the title, column, T and K that a grid of learning rates belongs to. K is None if the line gives no K."""
    return title(line), line["column"], line["bptt"], line["options"].get("horizons")


def spent(lines: list[Line]) -> str:
    """Returns the table of the time spent by part and task. The time of runs that later runs replaced counts too."""
    rows = []
    for part, task in sorted(in_order((line["part"], line["task"]) for line in lines)):
        found = [line for line in lines if (line["part"], line["task"]) == (part, task)]
        rows.append([part, task, str(len(found)), hours(found, "process_seconds"), hours(found, "seconds")])
    rows.append(["all", "", str(len(lines)), hours(lines, "process_seconds"), hours(lines, "seconds")])
    return "### time spent\n\n" + markdown(
        ["part", "task", "runs", "CPU hours", "hours of wall time, summed over processes"], rows
    )


def hours(lines: list[Line], name: str) -> str:
    """Returns the sum over the lines of the entry `name`, a time in seconds, as hours."""
    return f"{sum(line[name] for line in lines) / 3600:.2f}"
