"""Makes the tables of docs/results on characters, copying, regressed messages and a part of an epoch by words.

The tables come from the committed lines in docs/results, and `python -m docs.tables` writes them into the pages. The tables
of docs/results/paper.md are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from types import MappingProxyType

from dni_seq.app.studies.records import NOTHING, markdown, plus_minus
from docs.benefits import NOTES, SEEDS, Line, final, lines, note, score_at, table_1, training_seconds

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "none": "truncated BPTT",
        "paper": "published recipe",
        "multi-horizon": "default",
        "exact": "exact gradient",
    }
)
"""The columns of Table 1 in paper.jsonl, each with its name in the tables."""

WINDOWS = (1, 2, 4, 8, 20)
TOKENS, UPDATES = 1_000_000, 10_000
"""The length of the ablation's runs: characters of text, and updates at copying."""

DEFAULT_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "default": "nothing",
        "c = 1": "c = 1",
        "c = 0.5": "c = 0.5",
        "no gate": "no gate of the cells",
        "auxiliary task": "an auxiliary task added",
        "automatic scale": "automatic scale",
        "K = 4, c = 1": "four horizons, c = 1",
        "K = 2, c = 1": "two horizons, c = 1",
        "K = 2, c = 0.5": "two horizons, c = 0.5",
        "K = 1, c = 1": "one horizon, c = 1",
    }
)
"""Variants of the default whose messages are still gradients of a future model, by their names in paper.jsonl.

docs/results/paper.md has further variants.
"""

PUBLISHED_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "paper": "nothing",
        "normalisation": "normalised targets",
        "K = 2": "two horizons",
        "K = 1 and a tail": "one horizon and a tail",
        "λ-targets": "λ-targets",
        "automatic scale": "automatic scale",
    }
)
"""Variants of the published recipe with one addition, by their names in paper.jsonl.

docs/results/paper.md has further variants.
"""

REGRESSED_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "fitted to targets": "least squares",
        "fitted, c = 1": "least squares, c = 1",
        "fitted, no lookahead": "least squares, no lookahead",
        "fitted, with a tail": "least squares, a tail",
        "fitted by descent, no normalisation, model of the future or limit": "descent, raw targets",
        "one bootstrapped message, γ = 0.9": "one message, bootstrapped",
        "one bootstrapped message, c = γ = 0.5": "one message, c = γ = 0.5",
        "one message, λ-targets": "one message, λ-targets",
    }
)
"""Variants of the default that regress messages, by their names in paper.jsonl.

docs/results/paper.md has further variants.
"""

PILOTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "truncated BPTT": {"synthesizer": "none"},
        "least squares": {"synthesizer": "multi-horizon", "fit": "least-squares"},
        "future model": {
            "synthesizer": "multi-horizon",
            "fit": "future",
            "synthesizer_clip": 1.0,
            "code": "as committed",
        },
        "exact, next step": {"synthesizer": "exact", "exact_steps": 1, "tail": False},
        "exact, next step, a tail": {"synthesizer": "exact", "exact_steps": 1, "tail": True},
        "exact, next 4 steps": {"synthesizer": "exact", "exact_steps": 4},
    }
)
"""Methods in pilots.jsonl by characters at T = 1, with the options of their runs of a million characters each."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table of Markdown."""
    return markdown(header, rows).splitlines()


def spread(values: Sequence[float]) -> str:
    """Returns the bits of several runs as text: mean and standard deviation of three or more runs, else every number."""
    if len(values) > 2:
        return plus_minus(values, 3)
    return ", ".join(f"{value:.3f}" for value in values)


def between(values: Iterable[float], digits: int = 0) -> str:
    """Returns the range of values as text: the smallest and the largest, or one number if both round to the same text."""
    known = list(values)
    least, most = (f"{value:.{digits}f}" for value in (min(known), max(known)))
    return least if least == most else f"{least}–{most}"


def percent(parts: Sequence[float], wholes: Sequence[float]) -> str:
    """Returns the mean of `parts` in percent of the mean of `wholes`, as text."""
    return f"{100 * mean(parts) / mean(wholes):.0f} %"


def characters() -> list[str]:
    """Returns the table of validation bits of each method at each T, and of the default's share of the headroom."""
    rows = []
    for window in WINDOWS:
        bits = {name: [final(run) for run in table_1("ptb", window, name)] for name in NAMES if (window, name) in ptb()}
        cells = [spread(bits[name]) if name in bits else NOTHING for name in NAMES]
        share = NOTHING
        if "exact" in bits:
            gains, headroom = (differences(bits["none"], bits[name]) for name in ("multi-horizon", "exact"))
            each = ", ".join(f"{100 * gain / whole:.0f}" for gain, whole in zip(gains, headroom, strict=True))
            share = f"{percent(gains, headroom)} ({each})"
        rows.append([str(window), *cells, share])
    return table(["T", *NAMES.values(), "share of the headroom (by seed)"], rows)


def ptb() -> set[tuple[int, str]]:
    """Returns the cells (T, column) of Table 1 by characters that have runs."""
    return {(line["bptt"], line["column"]) for line in lines("paper") if (line["part"], line["task"]) == ("table1", "ptb")}


def differences(base: Iterable[float], other: Iterable[float]) -> list[float]:
    """Returns `base` minus `other`, seed by seed. If lower values are better, these are the gains of `other`."""
    return [first - second for first, second in zip(base, other, strict=True)]


def equal_time() -> list[str]:
    """Returns the table of validation bits at equal CPU time, by characters.

    Every method may use the CPU seconds that truncated BPTT needs for its whole run. The last column has the CPU seconds
    that the other methods need for their whole runs.
    """
    methods = ("paper", "multi-horizon", "exact")
    rows = []
    for window in WINDOWS[:-1]:
        truncated = table_1("ptb", window, "none")
        seconds = training_seconds(truncated)
        runs = [table_1("ptb", window, name) for name in methods]
        bits = [f"{mean(score_at(run, seconds) for run in found):.3f}" for found in runs]
        whole = ", ".join(f"{training_seconds(found):.0f}" for found in runs)
        rows.append([str(window), f"{seconds:.0f}", f"{mean(map(final, truncated)):.3f}", *bits, whole])
    named = [NAMES[name] for name in methods]
    return table(["T", "CPU seconds allowed", NAMES["none"], *named, "CPU seconds of the three whole runs"], rows)


def horizons() -> list[str]:
    """Returns the table of bits by the number of horizons and c, in runs of two million characters."""
    found: dict[tuple[int, int, float], list[Line]] = {}
    for line in lines("pilots"):
        given = line["options"]
        if given.get("max_tokens") == 2 * TOKENS and "valid_bpc" in line:
            cell = given["bptt"], given.get("horizons", 2), float(given.get("synthetic_scale", 1))
            found.setdefault(cell, []).append({"seed": given["seed"], **line})
    rows = [horizon_row(*cell, runs) for cell, runs in sorted(found.items())]
    earlier = [line for line in lines("paper") if line["part"] == "earlier" and line["options"]["horizons"] == 2]
    rows.append(horizon_row(1, 2, 1, earlier))
    return table(["T", "horizons", "c", "seeds", "validation bits", "share of the headroom", "CPU seconds"], rows)


def horizon_row(window: int, count: int, scale: float, runs: Sequence[Line]) -> list[str]:
    """Returns a row of `horizons`.

    The share of the headroom compares the runs with truncated BPTT and with the exact gradient, for the same seeds. The row
    has no share if a seed has no run of one of these two methods on record.
    """
    seeds = [run["seed"] for run in runs]
    bits = [run["valid_bpc"] if "valid_bpc" in run else final(run) for run in runs]
    ends = [[bits_of(window, name, seed) for seed in seeds] for name in ("none", "exact")]
    base, best = ([value for value in end if value is not None] for end in ends)
    share = NOTHING
    if len(base) == len(best) == len(seeds):
        share = percent(differences(base, bits), differences(base, best))
    seconds = between(run["process_seconds"] for run in runs)
    named = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 2 else ", ".join(map(str, seeds))
    return [str(window), str(count), f"{scale:g}", named, spread(bits), share, seconds]


def bits_of(window: int, column: str, seed: int) -> float | None:
    """Returns the validation bits of a run of Table 1, None if the run is not on record."""
    wanted = {"part": "table1", "task": "ptb", "bptt": window, "column": column, "seed": seed}
    found = [final(line) for line in lines("paper") if wanted.items() <= line.items()]
    return found[-1] if found else None


def variant(task: str, column: str, name: str) -> list[Line]:
    """Returns the runs of a variant of the ablation, one for each seed; an empty list if the variant has no runs."""
    wanted = {"part": "ablation", "task": task, "column": column, "variant": name}
    found = {line["seed"]: line for line in lines("paper") if wanted.items() <= line.items()}
    return [found[seed] for seed in SEEDS if seed in found]


def halfway(column: str) -> list[float]:
    """Returns the bits of the runs of Table 1 at T = 1 after a million characters, the length of the ablation's runs."""
    return [next(point[3] for point in run["curve"] if point[0] >= TOKENS) for run in table_1("ptb", 1, column)]


def gained(runs: Sequence[Line]) -> list[str]:
    """Returns two cells: the gain of runs of the ablation over truncated BPTT in bits, and in percent of the headroom."""
    base = halfway("none")
    gains = differences(base, map(final, runs))
    return [signed(gains), percent(gains, differences(base, halfway("exact")))]


def signed(gains: Sequence[float]) -> str:
    """Returns the mean, with its sign, and the standard deviation of gains as text."""
    return f"{mean(gains):+.3f} ± {stdev(gains):.3f}"


def text_parts() -> list[str]:
    """Returns the table of gains on text: the default with one change, and the published recipe with one addition."""
    base, exact = halfway("none"), halfway("exact")
    rows = [[NAMES["exact"], signed(differences(base, exact)), "100 %"]]
    for column, parts in (("multi-horizon", DEFAULT_PARTS), ("paper", PUBLISHED_PARTS)):
        rows.append([heading(column), "", ""])
        rows += [[shown, *gained(runs)] for name, shown in parts.items() if (runs := variant("ptb", column, name))]
    return table(["method", "gain, bits", "share of the headroom"], rows)


def heading(column: str) -> str:
    """Returns the text of the row above the rows of a method's variants."""
    return {"multi-horizon": "**default, changed:**", "paper": "**published recipe, with:**"}[column]


def length_at(run: Line, updates: int) -> int:
    """Returns the length that a run had solved after `updates` updates, 0 if none."""
    return max((length for update, length in run["curve"] if update <= updates), default=0)


def copy_parts() -> list[str]:
    """Returns the table of lengths at copying: the default with one change, and the published recipe with one addition."""
    rows = []
    for column in ("none", "exact"):
        lengths = [str(length_at(run, UPDATES)) for run in table_1("copy", 4, column)]
        rows.append([NAMES[column], ", ".join(lengths)])
    for column, parts in (("multi-horizon", DEFAULT_PARTS), ("paper", PUBLISHED_PARTS)):
        rows.append([heading(column), ""])
        rows += [[shown, solved(runs)] for name, shown in parts.items() if (runs := variant("copy", column, name))]
    return table(["method", "length solved (by seed)"], rows)


def solved(runs: Sequence[Line]) -> str:
    """Returns the lengths that runs have solved, in the order of the runs, as text."""
    return ", ".join(str(run["result"]["length"]) for run in runs)


def regressed() -> list[str]:
    """Returns the table of regressed messages in the ablation: gains on text and lengths at copying."""
    rows = [["the default", *parts_of("default")]]
    rows += [[shown, *parts_of(name)] for name, shown in REGRESSED_PARTS.items()]
    return table(["messages", "gain, bits", "share of the headroom", "vectors (by seed)"], rows)


def parts_of(name: str) -> list[str]:
    """Returns the cells of a variant in the table `regressed`."""
    text, copying = (variant(task, "multi-horizon", name) for task in ("ptb", "copy"))
    return [*gained(text), solved(copying)]


def pilot(wanted: Mapping[str, object]) -> list[Line]:
    """Returns the runs in pilots.jsonl by characters at T = 1, of a million characters, that have the options `wanted`."""
    keep = {"bptt": 1, "max_tokens": TOKENS, **wanted}
    given = [(line, {**line["options"], "code": line.get("code")}) for line in lines("pilots") if "test_bpc" in line]
    return [line for line, options in given if keep.items() <= options.items()]


def one_horizon() -> list[str]:
    """Returns the table of the methods in `PILOTS`: regressed messages, a future model of one horizon, exact gradients."""
    base, best = ({run["options"]["seed"]: run["valid_bpc"] for run in pilot(PILOTS[end])} for end in ENDS)
    rows = []
    for name, wanted in PILOTS.items():
        runs = pilot(wanted)
        seeds = [run["options"]["seed"] for run in runs]
        bits = [run["valid_bpc"] for run in runs]
        whole = [base[seed] - best[seed] for seed in seeds]
        share = percent(differences([base[seed] for seed in seeds], bits), whole)
        rows.append([name, ", ".join(map(str, seeds)), spread(bits), share])
    return table(["messages", "seeds", "validation bits", "share of the headroom"], rows)


ENDS = ("truncated BPTT", "exact, next 4 steps")
"""The two methods of `PILOTS` whose difference is the headroom."""


def lengths(task: str) -> Callable[[], list[str]]:
    """Returns a function that makes a task's table: for T = 2 and 4, each method and each seed, the length solved.

    The update at which a run solved its length is in parentheses. The last column has the runs' CPU seconds.
    """

    def rows() -> list[str]:
        found = []
        for window in (2, 4):
            for column, shown in NAMES.items():
                runs = table_1(task, window, column)
                seconds = between(run["process_seconds"] for run in runs)
                found.append([str(window), shown, *map(reached, runs), seconds])
        return table(["T", "method", *(f"seed {seed}" for seed in SEEDS), "CPU seconds"], found)

    return rows


def reached(run: Line) -> str:
    """Returns the length that a run has solved and, in parentheses, the update at which it solved this length."""
    return f"{run['curve'][-1][1]} ({run['curve'][-1][0]:,})" if run["curve"] else "0"


def more_horizons() -> list[str]:
    """Returns the table of copying by the number of horizons, from the runs in pilots.jsonl.

    Runs with an older future model that `NOTES` does not have are left out.
    """
    wanted = {"task": "copy", "synthesizer": "multi-horizon"}
    found: dict[tuple[int, float], list[Line]] = {}
    for line in lines("pilots"):
        given = line["options"]
        if wanted.items() <= given.items() and given.get("fit") != "least-squares" and line.get("code") in NOTES:
            found.setdefault((given["horizons"], given["lr"]), []).append(line)
    rows = []
    for (count, lr), runs in sorted(found.items()):
        seeds = ", ".join(str(run["options"]["seed"]) for run in runs)
        updates = ", ".join(dict.fromkeys(f"{run.get('ended_at', run['options']['updates']):,}" for run in runs))
        rows.append([str(count), f"{lr:g}", seeds, updates, "; ".join(map(reached, runs)), note(runs[0])])
    return table(["horizons", "rate", "seeds", "updates", "length solved (update)", "future model"], rows)


def six_horizons() -> list[str]:
    """Returns the table of the run with six horizons: the updates at which it solved 4, 6, 8, 10, 12 and 13 vectors."""
    (run,) = (line for line in lines("pilots") if line["options"].get("horizons") == 6)
    points = [point for point in run["curve"] if point[1] in (4, 6, 8, 10, 12, 13)]
    vectors, updates = [str(length) for _, length in points], [f"{update:,}" for update, _ in points]
    return table(["vectors", *vectors], [["at update", *updates]])


def adding() -> list[str]:
    """Returns the table of the adding problem."""
    found: dict[str, list[Line]] = {}
    for line in lines("pilots"):
        if line["options"].get("task") == "adding":
            found.setdefault(line["options"]["synthesizer"], []).append(line)
    rows = []
    for column, runs in found.items():
        solved_by = ", ".join(str(run["length"]) for run in runs)
        seconds = ", ".join(f"{run['process_seconds']:.0f}" for run in runs)
        rows.append([NAMES[column], ", ".join(str(run["options"]["seed"]) for run in runs), solved_by, seconds])
    return table(["method", "seeds", "steps solved", "CPU seconds"], rows)


def part_of_an_epoch() -> list[str]:
    """Returns the table of runs of 300,000 words of Penn Treebank, a third of an epoch."""
    rows = []
    for line in lines("pilots"):
        given = line["options"]
        if given.get("max_tokens") == 300_000:
            scores = [f"{line[split]['ppl']:.1f}" for split in ("valid", "test")]
            seconds, memory = (f"{line[name]:.0f}" for name in ("process_seconds", "peak_memory_mb"))
            count = str(given.get("horizons", ""))
            cells = [f"`{given['synthesizer']}`", count, note(line), f"{given['lr']:g}"]
            rows.append([*cells, *scores, seconds, memory])
    header = ["synthesizer", "horizons", "future model", "rate", "validation", "test", "CPU seconds", "peak MiB"]
    return table(header, rows)
