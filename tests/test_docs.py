"""README.md, CONTRIBUTING.md and docs/*.md are true: their examples and commands run, their tables are those of the code.

Every block marked python runs, those of one file in one namespace. Every command runs too, with tiny limits and in a
temporary directory: as its script's `main`, since loading torch takes most of the time of a small run.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_seq
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import parse
from dni_seq.synthesizers.defaults import LONG_WINDOW
from docs import first_example, tables
from docs.images import overview
from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FULL, SHORT = "STEPS, UNITS = 1, 32, 4000,", "STEPS, UNITS = 1, 32, 150,"
"""Where README's first example says how long its stream is, and a stream for a test."""

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
        source = "\n" * line + code.replace(FULL, SHORT)  # so that a traceback names the page's line
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", tables.TABLES)
def test_tables_are_those_of_the_code_and_of_the_results(page):
    """Where this fails: python -m docs.tables"""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.written(page, text) == text


def test_readme_can_be_read_in_a_few_minutes():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < 40


def test_readme_says_what_a_step_costs():
    files = [ROOT / "docs" / "results" / f"{name}.jsonl" for name in ("steps", "steps_floor")]
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    default = {True: "multi-horizon, next 4 steps", False: "multi-horizon"}  # by whether T is LONG_WINDOW or more
    of_default = [line for line in lines if line["way"] == default[line["bptt"] >= LONG_WINDOW]]
    ratios = [line["over none"] for line in of_default if line["setting"] == "char-lstm"]
    said = f"A step costs {min(ratios):.1f} to {max(ratios):.1f} times as much as without a synthesizer (LSTM of 512 units)"
    assert said in README.read_text(encoding="utf-8")


def test_readmes_first_example_runs_before_and_after(capsys):
    """With the second block in the place of the loop it is a program too, and both learn something in a short stream."""
    programs = first_example.programs(README.read_text(encoding="utf-8"))
    before, after = (float(first_example.run(program.replace(FULL, SHORT))[0].split()[0]) for program in programs)
    assert all(FULL in program for program in programs)
    assert 2 < before < 3.8  # uniform over the alphabet is 4.5 nats
    assert 2 < after < 3.8
    assert before != after


def test_readme_says_what_its_first_example_printed():
    """Where this fails: python -m docs.first_example"""
    text = README.read_text(encoding="utf-8")
    assert first_example.written(text) == text


def test_every_public_name_has_one_entry_in_the_reference():
    pages = [ROOT / "docs" / "reference" / f"{page}.md" for page in tables.REFERENCE]
    entries = [name for page in pages for name in tables.ENTRY.findall(page.read_text(encoding="utf-8"))]
    assert sorted(entries) == sorted(dni_seq.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paragraphs_are_short(page):
    """A paragraph or an item of a list has at most five lines, in README four; tables and blocks of code are no prose."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )", text):
        lines = paragraph.strip().splitlines()
        if lines and not lines[0].startswith(("|", "#", "<", "!", ":")):
            assert len(lines) <= (4 if page == README else 5), paragraph
            assert all(len(line) <= 160 for line in lines), paragraph


def test_limitations_quote_the_comparison_of_estimators():
    """Where this fails: docs/about/limitations.md, numbers 27 and 28"""
    rows = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8").split("\n**digits**\n")[0].splitlines()
    closed = {tuple(row.split(" | ")[:2]): row.split(" | ")[4] for row in rows if row.count(" | ") == 10}
    text = (ROOT / "docs" / "about" / "limitations.md").read_text(encoding="utf-8")
    assert f"Exact traces close {closed['| lru', 'exact traces, T = 1']} of the gap" in text
    assert f"frozen they close {closed['| lru', 'exact traces, fixed input, T = 1']}" in " ".join(text.split())
    snap1, factored = closed["| lstm", "SnAp-1, T = 1"], closed["| lstm", "factored traces, T = 1"]
    assert f"SnAp-1 closes {snap1} of the gap and factored traces {factored}." in text


def test_a_public_host_runs_the_checks_of_the_repository():
    yaml = pytest.importorskip("yaml", reason="PyYAML, of the extras dev and docs, is not installed")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [".ci/run"]
    assert os.access(ROOT / commands[0], os.X_OK)
    assert next(step["uses"].split("@")[0] for step in steps if "uses" in step) == "actions/checkout"
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (version,) = [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})]
    assert oldest is not None
    assert int(version.split(".")[1]) >= int(oldest[1])


def test_the_picture_is_what_its_script_draws():
    """Where this fails: python docs/images/overview.py"""
    assert overview.OUTPUT.read_text(encoding="utf-8") == overview.draw()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


TRAIN = ("--embed", "8", "--hidden", "8", "--layers", "1", "--batch-size", "8", "--max-steps", "2", "--eval-tokens", "600")
SMALL = {
    "train_lm": (*TRAIN, "--synthesizer-hidden", "8", "--future-units", "8"),
    "train_tasks": ("--updates", "3", "--hidden", "8", "--batch-size", "4"),
    "evaluate_lm": (),
    "sample_lm": ("--length", "5"),
    "compare_runs": (),
}
"""What makes a script's command quick; later options go before earlier ones."""

ELSEWHERE = {
    "tensorboard": "app/runs/test_dashboard.py serves a run by it",
    "pytest": "this",
    "pip": ".ci/run installs by README's line, app/test_cli.py from a wheel",
    "venv": "likewise",
    "ruff": ".ci/run",
    "mypy": ".ci/run",
    "train_feedforward": "app/feedforward/test_train.py",
    "feedforward_table": "app/feedforward/test_train.py",
    "streams": "test_benchmarks.py, its smallest case",
    "steps": "test_benchmarks.py",
    "peers": "test_peers.py",
    "growth": "test_benchmarks.py",
    "start_up": "test_benchmarks.py",
    "long_windows": "test_result_lines.py",
    "scans": "test_result_lines.py",
    "predictor_floor": "test_benchmarks.py",
    "stability": "test_benchmarks.py",
    "golden_runs": "test_benchmarks.py",
    "git": "makes the other checkout for golden_runs",
    "tables": "test_tables_are_those_of_the_code_and_of_the_results",
    "first_example": "test_readmes_first_example_runs_before_and_after",
    "mkdocs": ".ci/run",
    "examples": "test_examples.py",
    "reproduce_paper": "app/studies/test_reproduce.py",
    "torchrun": "distributed/test_process_group.py and distributed/test_decoupled_parts.py start two ranks",
    "train_slow_ticking": "models/test_multi_timescale.py",
}
"""Commands of the pages that run, but not here."""

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """The page and the words of every command in it, without python's path; those that `&&` joins one by one."""
    for page in PAGES:
        for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
            if language not in ("", "sh"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    cut = words.index("&&") if "&&" in words else len(words)
                    yield str(page.relative_to(ROOT)), words[:cut]
                    words = words[cut + 1 :]


def program(words: list[str]) -> tuple[str, list[str]]:
    """The name of a command's program or script, and its arguments."""
    first, *rest = words
    name = Path(first).name
    if name.startswith("python"):
        name, *rest = rest
        if name == "-m":
            name, *rest = rest
        name = "examples" if name.startswith("examples/") else Path(name.replace(".py", "").replace(".", "/")).name
    return name, rest


def test_every_command_is_run_by_a_test():
    for page, words in commands():
        name, _ = program(words)
        assert name in SMALL or name in ELSEWHERE or name == "-c", f"{page}: no test runs {' '.join(words)}"


@pytest.fixture
def at_home(two_runs, tmp_path, monkeypatch):
    """A directory with what the pages' commands speak of: runs, a book, and corpora by name."""
    for name in ("NAME", "OTHER"):
        shutil.copytree(two_runs / "multi-horizon", tmp_path / "runs" / name)
    text = "it was a dark and stormy night ; the rain fell in torrents .\n" * 200
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "corpus" / "part").mkdir(parents=True)
    rows = "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())
    (tmp_path / "corpus" / "part" / "0.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for corpus in ("ptb", "wikitext-103"):
        for split in ("train", "valid", "test"):
            path = tmp_path / "data" / corpus / f"{corpus}.{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DNI_SEQ_DATA", raising=False)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def command_of(script: str) -> Any:
    """The module of a script's command."""
    text = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8")
    return importlib.import_module(re.search(r"The code is `(dni_seq[\w.]+)`", text)[1])


def test_commands_run(at_home, capsys):
    done = set()
    for page, words in commands():
        name, arguments = program(words)
        if name == "-c":
            exec(arguments[0] if arguments else "", {})
        if name not in SMALL:
            continue
        if any("OWNER/NAME" in word for word in arguments):  # streams/test_hub.py runs it, against a server of its own
            assert parse(LanguageModelOptions, arguments, prog=name, description="")
            continue
        if "--vocab-size" in arguments:  # as few as this text can be told by
            arguments = [*arguments, "--vocab-size", "278"]
        if name == "compare_runs":
            pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
        if "--synthesizer" in arguments and "|" in arguments[arguments.index("--synthesizer") + 1]:
            continue  # a pattern of commands, not one
        status = command_of(name).main([*arguments, *SMALL[name]])
        shown = capsys.readouterr()
        assert status == 0, f"{page}: {' '.join(words)}\n{shown.err}"
        # Into a pipe: no bar, no colours, nothing on stderr in so short a run.
        assert "\033" not in shown.out + shown.err
        assert "\r" not in shown.out + shown.err
        assert shown.err == "", words
        done.add(name)
    assert done == set(SMALL)
    assert (at_home / "comparison.png").is_file()


METHODS = ("synthesizers", "interfaces")
"""Pages of the reference whose names come from papers or are ours; the others hold data and tools."""


def public_docstrings() -> Iterator[tuple[str, Any, str]]:
    """The qualified name, the object and the docstring of every public class and function, and of their methods."""
    for name in dni_seq.__all__:
        thing = getattr(dni_seq, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing, inspect.getdoc(thing) or ""
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = value.fget if isinstance(value, property) else value
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", function, function.__doc__ or ""


def test_every_public_docstring_describes_every_argument():
    """`Args:` and `Attributes:` name the parameters of constructors and functions; fields of dataclasses have their own."""
    for name, thing, text in public_docstrings():
        assert text, name
        assert len(text.splitlines()[0]) > 10, name
        if "." in name or dataclasses.is_dataclass(thing) or issubclass_of_exception(thing):
            continue
        documented = set(
            re.findall(r"(\w+)(?=(?:, \w+)*: )", " ".join(re.findall(r"^\s+\*{0,2}[\w, ]+: ", text, re.MULTILINE)))
        )
        parameters = [parameter for parameter in inspect.signature(thing).parameters if parameter not in ("args", "kwargs")]
        collected = inspect.signature(thing).parameters.values()
        keywords = {parameter.name for parameter in collected if parameter.kind is inspect.Parameter.VAR_KEYWORD}
        listed = "Args:" in text or "Attributes:" in text
        missing = [each for each in parameters if each not in documented | keywords and (listed or f"`{each}`" not in text)]
        assert not missing, f"{name} does not describe {missing}"


def issubclass_of_exception(thing: Any) -> bool:
    """Whether it is an exception, which takes a message."""
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def test_every_method_names_its_source():
    for page in METHODS:
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        for name in tables.ENTRY.findall(text):
            if name not in ("LSTM_CELLS", "Regression", "StepLosses"):  # data
                assert "Source: " in (inspect.getdoc(getattr(dni_seq, name)) or ""), name
