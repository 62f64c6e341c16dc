"""The examples of README.md and of docs/*.md run: every block marked python, those of one file in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in BLOCK.finditer(text)]


WITH_EXAMPLES = [page for page in PAGES if blocks(page)]


def test_there_are_examples():
    """A page that vanished, or fences that the pattern misses, must not pass for examples that run."""
    assert ROOT / "docs" / "interfaces.md" in WITH_EXAMPLES
    for page in PAGES:
        fences = len(re.findall(r"^[ \t]*(?:```|~~~)[ \t]*py", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == len(blocks(page)), f"{page.name}: {fences} fences of Python, {len(blocks(page))} blocks are run"


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes files must not litter the repository
    torch.manual_seed(0)
    namespace = {"__name__": "example"}
    for line, code in blocks(page):
        source = "\n" * line + code  # so that a traceback names the page's line
        exec(compile(source, str(page), "exec"), namespace)
