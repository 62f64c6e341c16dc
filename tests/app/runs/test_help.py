"""`--help` of every training command fits a screen; `--help-all` lists every option, the common ones first."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dni_seq.app import cli
from dni_seq.app.decoupled import train as decoupled
from dni_seq.app.decoupled import train_multi_timescale as slow_ticking
from dni_seq.app.feedforward import train as feedforward
from dni_seq.app.lm import options as lm_options
from dni_seq.app.lm import train as train_lm
from dni_seq.app.runs.help import brief
from dni_seq.app.runs.options import flag, groups
from dni_seq.app.studies import reproduce, soak
from dni_seq.app.tasks import options as task_options
from dni_seq.app.tasks import train as tasks

LINES = 45
COMMANDS = {
    "train_lm": (train_lm, lm_options.LanguageModelOptions),
    "train_tasks": (tasks, task_options.TaskOptions),
    "train_feedforward": (feedforward, feedforward.FeedForwardOptions),
    "train_decoupled": (decoupled, decoupled.DecoupledOptions),
    "train_slow_ticking": (slow_ticking, slow_ticking.SlowTickingOptions),
}
WITH_TWO = [name for name, (_, cls) in COMMANDS.items() if hasattr(cls, "COMMON")]


def help_of(command, capsys, monkeypatch, option="--help", columns=102) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        command.main([option])
    assert end.value.code == 0
    return capsys.readouterr().out


def listed(text: str) -> list[str]:
    """The options that a help lists, in its order."""
    return re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name, capsys, monkeypatch):
    text = help_of(COMMANDS[name][0], capsys, monkeypatch, columns=100)
    assert sum(max(1, -(-len(line) // 100)) for line in text.splitlines()) <= LINES
    assert text.count(f"python scripts/{name}.py") + text.count(f"scripts/{name}.py") >= 2, "it has examples"


@pytest.mark.parametrize("name", WITH_TWO)
def test_help_lists_the_common_options_and_help_all_lists_all(name, capsys, monkeypatch):
    command, cls = COMMANDS[name]
    names = {field.name for field in dataclasses.fields(cls)}
    assert names > cls.COMMON
    own = {"--config", "--preset", "--help", "--help-all"}
    assert {*listed(help_of(command, capsys, monkeypatch))} - own == {flag(each) for each in cls.COMMON}
    everything = help_of(command, capsys, monkeypatch, "--help-all")
    assert {*listed(everything)} - own == {flag(each) for each in names}
    assert (command.__doc__ or "").strip() in everything
    with pytest.raises(SystemExit):
        command.main(["--nothing"])
    assert capsys.readouterr().err.endswith("(--help-all lists all options)\n")


def test_options_come_in_the_order_of_use(capsys, monkeypatch):
    text = help_of(train_lm, capsys, monkeypatch)
    titles = re.findall(r"^([a-z].*):$", text, re.MULTILINE)
    assert titles == ["data", "run", "optimization", "model", "credit assignment", "from files, and help"]
    for group in groups(lm_options.LanguageModelOptions).values():
        common = [field.name in lm_options.LanguageModelOptions.COMMON for field in group]
        assert common == sorted(common, reverse=True)
    assert sum(map(len, groups(lm_options.LanguageModelOptions).values())) == len(
        dataclasses.fields(lm_options.LanguageModelOptions)
    )


def test_a_short_text_has_no_remark_and_no_long_default(capsys, monkeypatch):
    short, full = (help_of(train_lm, capsys, monkeypatch, option) for option in ("--help", "--help-all"))
    assert "(default: word 5, char 16)" in short
    assert "gradients are exact within a window" not in short
    assert "gradients are exact within a window" in " ".join(full.split())
    assert "word for ptb and wikitext" not in short
    assert "word for ptb and wikitext" in " ".join(full.split())
    assert "kind of tokens: word, char, sentencepiece" in short


@pytest.mark.parametrize("command", [soak, reproduce, slow_ticking])
def test_a_command_with_few_options_lists_them_all(command, capsys, monkeypatch):
    assert "--help-all" not in help_of(command, capsys, monkeypatch)
    with pytest.raises(SystemExit):
        command.main(["--nothing"])
    assert "(--help lists all options)" in capsys.readouterr().err


def test_the_console_script_has_the_same_help(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dni-seq"])
    monkeypatch.setenv("COLUMNS", "102")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= LINES


def test_brief_keeps_the_first_paragraph_and_three_examples():
    examples = "".join(f"python run.py {i}\n    Does {i}.\n" for i in range(5))
    text = f"What it is,\nin two lines.\n\n{examples}\nMore prose\nand more.\n"
    assert brief(text) == "What it is,\nin two lines.\n\npython run.py 0\npython run.py 1\npython run.py 2"
    assert brief("One line.") == "One line."
