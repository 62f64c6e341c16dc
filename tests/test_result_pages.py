"""Tables and headline numbers of pages are those of the lines in docs/results that they come from."""

from __future__ import annotations

import importlib
import re
from statistics import mean

import pytest

from dni_seq.app.studies import feedforward_table, reproduce
from docs.benefits import final, lines, study, table_1
from tests.paths import ROOT

DOCS = ROOT / "docs"
WRITTEN = {"paper": reproduce.tables, "feedforward": feedforward_table.tables}  # by the file of lines
KIND = ("backward_steps", "traces", "trace_decay")
PRINTED = {"steps": "performance", "peers": "performance", "stability": "synthetic-gradients"}


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
    (printed,) = tables(importlib.import_module(name).table(lines(name)))
    page = tables((DOCS / f"{PRINTED[name]}.md").read_text(encoding="utf-8"))
    (found,) = (rows for rows in page if len(rows[0]) > 4 and rows[0].keys() <= printed[0].keys())
    assert found == [{column: row[column] for column in found[0]} for row in printed]


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
