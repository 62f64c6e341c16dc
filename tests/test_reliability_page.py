"""docs/reliability.md names tests that there are, and figures that were measured."""

from __future__ import annotations

import json
import re

from tests.paths import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
SOAK = json.loads((ROOT / "docs" / "results" / "soak.json").read_text(encoding="utf-8"))


def named() -> list[tuple[str, str]]:
    """File and name of every test that the page names; `::name` is of the file named before it."""
    found, file = [], ""
    for match in re.finditer(r"`([\w/]+\.py)?::(test_\w+)`", PAGE):
        file = match.group(1) or file
        found.append((file, match.group(2)))
    return found


def test_every_test_that_is_named_is_there():
    assert len(named()) > 50
    for file, name in named():
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)


def test_every_row_has_its_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| kind"))]
    promises = [row for row in rows if "test_" in row]
    assert len(promises) > 30
    assert [row for row in rows if "test_" not in row and row.count("|") == 3] == []


def test_the_soaks_figures_are_those_of_its_file():
    total = SOAK["all"]
    assert total["kills"] >= 50
    assert total["differences"] == total["failures"] == []
    for kind, result in SOAK["kinds"].items():
        assert f"| {kind} | {result['kills']} | {result['while saving']} | 0 |" in PAGE
    assert f"| all | {total['kills']} | {total['while saving']} | 0 |" in PAGE
