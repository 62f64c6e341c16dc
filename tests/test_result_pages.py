"""Tables and headline numbers of pages are those of the lines in docs/results that they come from."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from statistics import mean, median, stdev

import pytest

from dni_seq.app.studies import feedforward_table, reproduce
from docs import result_tables
from docs.benefits import falling_rate, falling_rate_lines, final, lines, pilots, study, table_1, training_seconds
from tests.paths import ROOT

DOCS = ROOT / "docs"
WRITTEN = {"paper": reproduce.tables, "feedforward": feedforward_table.tables}  # by the file of lines
KIND = ("backward_steps", "traces", "trace_decay")
PRINTED = {
    "published": "results/words",
    "falling_rate": "results/characters",
    "steps": "performance",
    "peers": "performance",
    "start_up": "performance",
    "step_profile": "performance",
    "long_windows": "estimators",
    "scans": "estimators",
    "stability": "results/stability",
}


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of every table, each a cell by column."""
    cells = ([row.strip("| ").split(" | ") for row in table.splitlines()] for table in re.findall(r"(?m)(?:^\|.*\n)+", text))
    return [[dict(zip(header, row, strict=False)) for row in rows] for header, _, *rows in cells]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_has_the_tables_of_its_lines(name):
    """Where this fails: `reproduce_paper.py draw` or `python -m scripts.feedforward_table --part none`"""
    page = (DOCS / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert WRITTEN[name](lines(name)).strip() in page


@pytest.mark.parametrize("name", PRINTED)
def test_a_page_has_the_table_that_a_benchmark_prints(name, monkeypatch):
    """The page may have fewer columns. Where this fails: the benchmark's `--tables` or `--table`"""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (printed,) = tables(importlib.import_module(name).table(lines(name.removeprefix("step_"))))
    page = tables((DOCS / f"{PRINTED[name]}.md").read_text(encoding="utf-8"))
    (found,) = (rows for rows in page if len(rows[0]) > 4 and rows[0].keys() <= printed[0].keys())
    assert found == [{column: row[column] for column in found[0]} for row in printed]


def row(*cells: object) -> str:
    """A row of a table of Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def test_the_small_tables_of_speed_and_memory_are_their_lines():
    """Where this fails: docs/performance.md, the tables of words, memory, reach and floor"""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for line in lines("memory"):
        early, late = line["peak_mb"], line["peak_mb_at_end"]
        assert row(f"`{line['way']}`", f"{early:.1f}", f"{late:.1f}", f"{100 * (late / early - 1):.2f} %") in page
    code = {"249": "249 words", "499": "499 words", "999, all 10,000 read": "999 words"}
    for words, start in code.items():
        tried = [line for line in lines("steps_words_tried") if line["code"].startswith(start)]
        ratios = [line["over none"] for line in tried if line["way"] == "multi-horizon, K = 1"]
        assert row(words, *(f"{ratio:.2f}" for ratio in ratios)) in page
    reach = {(line["value"], line["way"]): line["mb"] for line in lines("growth") if line["varied"] == "reach"}
    for steps, way in reach:
        assert row(steps, f"{reach[steps, 'none']:.0f}", f"{reach[steps, 'multi-horizon']:.0f}") in page, way
    floors: dict[tuple[str, int], dict[str, dict]] = {}
    for line in lines("steps_floor"):
        floors.setdefault((line["setting"], line["bptt"]), {})[line["way"]] = line
    for setting, floor in floors.items():
        of_none, of_one = (floor[way]["over its floor"] for way in ("none", "multi-horizon, K = 1"))
        cells = (f"{floor['none']['ms']:.1f}", f"{floor['floor']['ms']:.1f}", f"{of_none:.2f}", f"{of_one:.2f}")
        assert row(*setting, *cells) in page
    times = [floors[cell]["multi-horizon, next 4 steps"]["over none"] for cell in (("char-lstm", 20), ("word-lstm", 20))]
    times.append(floors["word-lstm", 35]["multi-horizon, next 4 steps"]["over none"])
    characters, words, longer = (f"{ratio:.2f} times" for ratio in times)
    said = (
        f"{characters} as much as a step of `none` by characters at T = 20, and by words {words} at T = 20 and {longer} at"
    )
    assert said in " ".join(page.split())


def test_what_to_expect_of_a_step_is_in_the_lines():
    """Where this fails: docs/performance.md, What to expect by setting"""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert all(line["over plain, fused Adam"] < 1.005 for line in lines("steps") if line["way"] == "none")
    ms = {(line["value"], line["way"]): line["mean_ms"] for line in lines("growth") if line["varied"] == "bptt"}
    ratio = ms[5, "multi-horizon"] / 5 / (ms[40, "none"] / 40)
    assert f"T = 5 costs {ratio:.1f} times as much as one of `none` at T = 40" in page
    chars = [(line["bptt"], line["over none"]) for line in lines("steps_chars") if line["way"] != "none"]
    ranges = {
        t: max(r for other, r in chars[:15] if other == t) - min(r for other, r in chars[:15] if other == t)
        for t, _ in chars
    }
    assert max(ranges.values()) == ranges[1] < 0.1
    grid = {line["way"]: line for line in lines("steps") if (line["setting"], line["bptt"]) == ("word-lstm", 5)}
    for line in lines("steps_threads"):
        for name in ("over plain", "over plain, fused Adam", "over none"):
            if line["way"] in ("none", "multi-horizon, K = 1"):
                assert round(abs(line[name] - grid[line["way"]][name]), 1) <= 0.1


def test_the_tables_of_traces_are_their_lines():
    """Where this fails: docs/estimators.md, the tables of traces"""
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    for line in (line for line in lines("traces") if line["study"] == "step"):
        parts = f"{line['over parts']:.2f}" if "over parts" in line else "–"
        name, ms = f"{line['cell'].upper()} 256, {line['traces']}", line["ms"]
        times = (f"{value:.1f}" for value in (ms["plain"], ms["traces"], line["over plain"]))
        assert row(name, line["lanes"], line["T"], *times, parts) in page
    runs = [line for line in lines("traces") if line["study"] == "characters"]
    short = [line for line in runs if line["options"]["max_tokens"] == 500_000]
    ways = {
        "truncated BPTT": (None, None, None),
        "`--traces factored`": (None, "factored", 0.2),
        **{f"`--traces factored --trace-decay {decay:g}`": (None, "factored", decay) for decay in (0.0, 0.6, 0.9)},
        **{f"`--backward-steps {steps}`": (steps, None, None) for steps in (2, 4)},
    }
    for name, kind in ways.items():
        bits = {
            line["options"]["seed"]: line["valid_bpc"] for line in short if kind == tuple(line["options"][k] for k in KIND)
        }
        assert row(name, *(f"{bits[seed]:.3f}" if seed in bits else "–" for seed in (1, 2, 3))) in page
    longer = [line["valid_bpc"] for line in runs if line["options"]["max_tokens"] == 2_000_000]
    assert row("`--traces factored`", f"{mean(longer):.3f}") in page
    for name, method in (("truncated BPTT", "none"), ("default synthesizer", "multi-horizon")):
        assert row(name, f"{mean(map(final, table_1('ptb', 1, method))):.3f}") in page


def test_the_speed_of_streams_is_that_of_its_lines():
    """Where this fails: docs/streams.md, Speed and memory"""
    rows = next(rows for rows in tables((DOCS / "streams.md").read_text(encoding="utf-8")) if "case (`--only`)" in rows[0])
    page = {each["case (`--only`)"].split("`")[1]: list(each.values())[1:] for each in rows}
    found = {line["case"]: line for line in lines("streams")}
    bare, training = found.pop("bare"), found.pop("training, streamed over held")
    assert page == {
        case: [line["tokenizer"], f"{line['tokens_per_second'] / 1e6:.2f}", f"{line['peak_mb'] - bare['peak_mb']:.0f}"]
        for case, line in found.items()
    }
    more = f"{training['ratio_of_time'] - 1:.0%}".replace("%", " %")
    assert f"costs training {more} more time" in (DOCS / "streams.md").read_text(encoding="utf-8")


def test_the_advice_on_estimators_quotes_the_echo():
    """Where this fails: docs/estimators.md, the table at the end of Side by side"""
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    echo = next(rows for rows in tables(page) if "score, bits" in rows[0])
    of = {(each["cell"], each["gradient"]): each for each in echo}
    full, single = of["lru", "full BPTT, T = 15"], of["lru", "truncated, T = 1"]
    assert round(float(single["ms a step"]) / float(full["ms a step"])) == 7
    assert "costs a seventh of a step at T = 1" in page
    chunks = float(of["lru", "full BPTT, chunks, T = 15"]["peak KiB"]) / float(full["peak KiB"])
    assert f"`checkpoint_every`: {chunks:.1f} of the memory" in page
    windows, exact = of["lru", "k1 and k2, T = 3"], of["lru", "exact traces, T = 1"]
    assert round(float(exact["ms a step"]) / float(windows["ms a step"])) == 3
    assert f"`backward_windows`: {windows['gap closed']} of the gap at a third of the time" in page
    factored, snap1 = (
        [of[cell, f"{way}, T = 1"]["gap closed"] for cell in ("lstm", "gru")] for way in ("factored traces", "SnAp-1")
    )
    of_lstm, of_gru = (f"{a.rstrip(' %')} and {b}" for a, b in zip(factored, snap1, strict=True))
    assert f"({of_lstm}, with a GRU {of_gru})" in page
    assert f"exact future: {of['lru', 'exact future, T = 1']['gap closed']} of the gap" in page


def test_the_advice_quotes_the_lines():
    """Where this fails: docs/guides/choosing.md, or the minutes in README"""
    choosing = (DOCS / "guides" / "choosing.md").read_text(encoding="utf-8")
    cost = {(line["setting"], line["way"], line["bptt"]): line["over none"] for line in lines("steps")}
    for *way, name in (
        ("char-lstm", "multi-horizon", "characters, LSTM 512, default"),
        ("word-lstm", "multi-horizon, K = 1", "words, LSTM 2x200, K = 1"),
        ("char-lstm", "exact, 4 steps", "characters, exact gradient of 4 steps"),
    ):
        assert f"| {name} | {' | '.join(f'{cost[(*way, t)]:.2f}' for t in (1, 2, 5, 20))} |" in choosing
    exact, default = (mean(map(final, table_1("ptb", 1, method))) for method in ("exact", "multi-horizon"))
    assert f"{exact:.3f} bits against {default:.3f} at T = 1" in choosing
    dense, truncated = (study("words", method, budget=6)[0] for method in ("dense", "none"))
    assert f"{dense:.1f} against {truncated:.1f} at equal CPU time" in choosing
    runs = [line for line in lines("traces") if line["study"] == "characters" and line["options"]["max_tokens"] == 500_000]
    kinds = [(2, None, None), (None, "factored", 0.2), (None, None, None)]
    bits = [mean(run["valid_bpc"] for run in runs if kind == tuple(run["options"][name] for name in KIND)) for kind in kinds]
    assert "{:.3f} and {:.3f} bits against {:.3f}".format(*bits) in choosing
    wanted = {"synthesizer": "multi-horizon", "lr": 0.004, "schedule": "linear", "epochs": 3}
    runs = [line["process_seconds"] for line in lines("pilots") if wanted.items() <= line["options"].items()]
    said = {1: "about a minute of one CPU core"}[round(mean(runs) / 60)]
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


def rows_of(written: Callable[[], list[str]]) -> list[dict[str, str]]:
    """The rows of a table of docs/result_tables.py."""
    (rows,) = tables("\n".join(written()) + "\n")
    return rows


def result_page(name: str) -> str:
    """A page of docs/results in one line, so that a quotation may cross the end of one."""
    return " ".join((DOCS / "results" / f"{name}.md").read_text(encoding="utf-8").split())


def test_the_page_on_characters_quotes_the_lines():
    """Where this fails: docs/results/characters.md, and its row in docs/results/index.md"""
    page, index = result_page("characters"), result_page("index")
    rows = {row["T"]: row["share of the headroom (by seed)"].split(" (")[0] for row in rows_of(result_tables.characters)}
    said = f"{rows['1']} of this gain at T = 1 and {rows['2']} at T = 2"
    assert f"brings {said}" in page
    assert said.replace(" of this gain", "") in index
    for window in (1, 2, 4, 8):
        truncated, default, exact = (
            [final(run) for run in table_1("ptb", window, name)] for name in ("none", "multi-horizon", "exact")
        )
        assert mean(default) < mean(truncated)
        better = all(mine < theirs for mine, theirs in zip(default, exact, strict=True))
        assert better == (window in (4, 8)), "who is better at which T"
    assert all(row["truncated BPTT"] < row["default"] for row in rows_of(result_tables.equal_time))
    assert mean(map(final, table_1("ptb", 4, "none"))) < mean(map(final, table_1("ptb", 1, "multi-horizon")))
    seconds = training_seconds(table_1("ptb", 4, "none")) / training_seconds(table_1("ptb", 1, "multi-horizon"))
    assert f"in {({0.25: 'a quarter'})[round(seconds, 2)]} of the CPU time" in page


def test_the_pages_quote_the_runs_with_a_falling_rate():
    """Where this fails: docs/results/characters.md, its row in docs/results/index.md, and docs/guides/choosing.md"""
    truncated, default, exact = (float(falling_rate(1, method)) for method in ("none", "multi-horizon", "exact"))
    share = f"{100 * (truncated - default) / (truncated - exact):.0f} %"
    page = result_page("characters")
    gains = f"gains {truncated - exact:.3f} bits, and the default {truncated - default:.3f}, which is {share} of that"
    assert f"the exact gradient {gains}" in page
    assert f"the default brings {share} at T = 1. At T = 4 it does harm" in page
    assert f"with a falling rate {share} at T = 1;" in result_page("index")
    assert f"{share} of the exact gradient's gain with a falling rate" in (DOCS / "guides" / "choosing.md").read_text()
    halved = "next 4 steps, c = 0.5"
    assert f"c = 0.5 gains {truncated - float(falling_rate(1, halved)):.3f}" in page
    at_4 = {method: float(falling_rate(4, method)) for method in ("none", "multi-horizon", "next 4 steps", halved, "exact")}
    assert f"the exact gradient gains {at_4['none'] - at_4['exact']:.3f} bits" in page
    assert min(at_4["multi-horizon"], at_4["next 4 steps"]) > at_4["none"] + 0.02
    assert abs(at_4[halved] - at_4["none"]) < 0.01
    changed = {one["trial"]["changed"]: one["valid"] for one in lines("falling_rate") if "changed" in one["trial"]}
    assert changed["3.46 million characters"] < changed["1.47 million characters"] < default
    spreads = []
    for method in ("none", "multi-horizon", "exact"):
        bits = [one["valid"] for one in falling_rate_lines(8, method)]
        assert len(bits) == 3
        spreads.append(stdev(bits))
    assert (round(min(spreads), 2), round(max(spreads), 2)) == (0.03, 0.06)


def test_only_four_horizons_at_full_scale_fail_on_the_test_text():
    """Where this fails: docs/results/characters.md, Horizons"""
    four = [line for line in lines("pilots") if line["options"].get("horizons") == 4 and "test_bpc" in line]
    full = [line for line in four if "synthetic_scale" not in line["options"] and line["options"]["seed"] == 1000]
    failed = [line for line in full if line["test_bpc"] > line["valid_bpc"]]
    assert [line["options"]["lr"] for line in failed] == [4e-3, 8e-3]
    assert (len(failed), len(full)) == (2, 8)
    bits = [" and ".join(f"{line[name]:.2f}" for line in failed) for name in ("test_bpc", "valid_bpc")]
    assert "the test bits are {}, although the validation bits are {}".format(*bits) in result_page("characters")
    others = [line for line in four if line not in failed]
    others += [line["result"] for line in lines("paper") if line["task"] == "ptb" and line["column"] == "multi-horizon"]
    assert len(others) > 90
    assert all(line["test_bpc"] < line["valid_bpc"] for line in others)


def test_the_page_on_copying_quotes_the_lines():
    """Where this fails: docs/results/copying.md and regressed.md"""
    scores = {name: mean(map(final, table_1("copy", 4, name))) for name in ("none", "multi-horizon")}
    assert 2 < scores["multi-horizon"] / scores["none"] < 3  # "more than twice"
    scores = {name: mean(map(final, table_1("repeat-copy", 4, name))) for name in ("none", "multi-horizon")}
    assert 4 < scores["multi-horizon"] / scores["none"] < 5  # "more than four times"
    for task, window in itertools.product(("copy", "repeat-copy"), (2, 4)):
        published, truncated = (map(final, table_1(task, window, name)) for name in ("paper", "none"))
        assert all(harmed < plain for harmed, plain in zip(published, truncated, strict=True))
    long = [line for line in lines("pilots") if line["options"].get("updates") == 50_000]
    assert {line["length"] for line in long if line["options"]["synthesizer"] == "none"} == {3}
    fitted = {line["options"]["seed"]: line["length"] for line in long if line["options"].get("fit") == "least-squares"}
    assert f"least-squares heads copy {fitted[1]} and {fitted[2]} vectors" in result_page("regressed")
    shares = [row["share of the headroom"] for row in rows_of(result_tables.regressed) if "one message" in row["messages"]]
    numbers = sorted(int(share.split()[0]) for share in shares)
    assert f"{numbers[0]} to {numbers[-1]} % of the headroom" in result_page("regressed")


def test_the_page_on_harm_quotes_the_lines():
    """Where this fails: docs/results/stability.md, and its row in docs/results/index.md"""
    pairs, page = lines("stability"), result_page("stability")
    ratios = [pair["ratio"] for pair in pairs]
    lower = sum(ratio < 1 for ratio in ratios)
    more = f"{100 * median(ratios) - 100:.1f} %"
    assert f"in {len(pairs)} pairs of runs its loss is at most {max(ratios):.3f} times" in page
    assert f"{more} higher in the median, and lower in {lower} pairs." in page
    assert all(pair["multi-horizon: largest cell"] < pair["none: largest cell"] for pair in pairs)
    assert f"by {more} in the median, by {100 * max(ratios) - 100:.1f} % at most" in result_page("index")


def test_the_page_on_words_quotes_the_lines():
    """Where this fails: docs/results/words.md"""
    page = result_page("words")
    epoch = {"dataset": "ptb", "epochs": 1, "bptt": 5}
    plain, default = mean(pilots("none", lr=2e-3, **epoch)), mean(pilots("multi-horizon", lr=1e-3, **epoch))
    assert f"from {plain:.1f} to {default:.1f}" in page
    part = {(row["synthesizer"], row["rate"], row["future model"]): row for row in rows_of(result_tables.part_of_an_epoch)}
    named = [("none", "0.001", ""), ("none", "0.002", ""), ("exact", "0.001", "")]
    named.append(("multi-horizon", "0.001", "reads and predicts 499 words, the default"))
    slow, fast, exact, model = (float(part[(f"`{name}`", *rest)]["validation"]) for name, *rest in named)
    brings, at_equal_rate, at_best = (
        f"{100 - 100 * low / high:.0f} %" for low, high in ((exact, slow), (model, slow), (model, fast))
    )
    assert f"by {brings}, the default by {at_equal_rate} at the same rate, and by {at_best} against" in page
