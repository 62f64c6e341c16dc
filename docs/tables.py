"""Writes the tables of README and docs that come from the code or from recorded results: python -m docs.tables

A test compares the pages with the tables that this command would write.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import dni_seq
from dni_seq.app import cli
from dni_seq.app.decoupled.train import DecoupledOptions
from dni_seq.app.decoupled.train_multi_timescale import SlowTickingOptions
from dni_seq.app.feedforward.train import FeedForwardOptions
from dni_seq.app.lm.options import PRESETS, LanguageModelOptions
from dni_seq.app.runs.invocation import as_called
from dni_seq.app.runs.options import OneLineParser, default_of, flag, groups
from dni_seq.app.runs.tensorboard import KEYS, OTHER_KEYS
from dni_seq.app.tasks.options import TaskOptions
from docs import result_tables
from docs.benefits import benefits, embedded_corpus, words, words_by_sgd

ROOT = Path(__file__).parents[1]


def options_of(cls: type) -> list[str]:
    """Returns a row for each option of a command's dataclass, group by group."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for title, fields in groups(cls).items():
        rows.append(f"| **{title}** | | |")
        for field in fields:
            choices = field.metadata["choices"]
            named = f"{field.metadata['help']}: {', '.join(choices)}" if choices else field.metadata["help"]
            cells = (f"`{flag(field.name)}`", named, default_of(field))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def options() -> list[str]:
    """Returns the rows of the options of `dni-seq train`."""
    presets = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in PRESETS.items())
    rows = ["| **from elsewhere** | | |", f"| `--preset` | options of a known setting: {presets} | |"]
    config = "| `--config` | options from a JSON file, as a run's config.json is; over the preset, below the line | |"
    return [*options_of(LanguageModelOptions), *rows, config]


def options_and_file(cls: type) -> Callable[[], list[str]]:
    """Returns a function that returns a row for each option of a command's dataclass, and a row for `--config`."""
    config = "| `--config` | options from a JSON file, as a run's config.json is; below the command line | |"
    return lambda: [*options_of(cls), "| **from elsewhere** | | |", config]


def keys() -> list[str]:
    """Returns a row for each TensorBoard key."""
    return [
        "| key | meaning and unit |",
        "|---|---|",
        *(f"| `{key}` | {text} |" for key, text in (KEYS | OTHER_KEYS).items()),
    ]


REFERENCE = ("trainer", "windows", "synthesizers", "interfaces", "checks")
"""The pages of the Python API, in docs/reference."""

ENTRY = re.compile(r"^::: dni_seq\.(\w+)$", re.MULTILINE)
"""Matches the line of a page at which the reference of a public name is inserted."""


def api() -> list[str]:
    """Returns a row for each public name, with the first line of its docstring."""
    rows = ["| name | what it is |", "|---|---|"]
    for page in REFERENCE:
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        rows.append(f"| **[{text.splitlines()[0].removeprefix('# ')}]({page}.md)** | |")
        for name in ENTRY.findall(text):
            rows.append(f"| [`{name}`]({page}.md#dni_seq.{name}) | {first_line(name)} |")
    return rows


def first_line(name: str) -> str:
    """Returns the first line of a public name's docstring."""
    thing = getattr(dni_seq, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        return (inspect.getdoc(thing) or "").splitlines()[0].replace("|", "\\|")
    return "The marks of (h, c), the state of an LSTM: the second leaf is a cell state."


class _Found(Exception):
    """Raised in place of parsing, to carry a command's parser out of the command."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """Returns the parser of the command in a module. Calls the command up to the point at which it would parse."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(parser)

    with mock.patch.object(OneLineParser, "parse_args", stop):
        try:
            importlib.import_module(module).main([])
        except _Found as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise ValueError(f"{module} has parsed nothing")


def rows_of(parser: argparse.ArgumentParser, title: str) -> list[str]:
    """Returns a row for each argument of a parser and of its subcommands."""
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [] if parser._subparsers else [f"| **{title}** | |"]
    for action in arguments:
        if isinstance(action, argparse._SubParsersAction):
            for part, below in action.choices.items():
                rows += rows_of(below, f"{title} {part}")
        else:
            shown = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            choices = [str(choice) for choice in action.choices or ()]
            listed = f" ({('; ' if any(',' in choice for choice in choices) else ', ').join(choices)})" if choices else ""
            meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("|", "\\|")
            rows.append(f"| `{shown}` | {meaning}{listed} |")
    return rows


def arguments_of(called: str, module: str) -> Callable[[], list[str]]:
    """Returns a function that returns a row for each argument of the command in a module, called by the name `called`."""

    def rows() -> list[str]:
        with mock.patch.object(sys, "argv", [called]):
            found = rows_of(parser_of(module), called)
            return ["| argument | meaning |", "|---|---|", *map(as_called, found)]

    return rows


Table = Callable[[], list[str]]

TABLES: Mapping[str, Mapping[str, Table]] = MappingProxyType(
    {
        "README.md": {"benefits": benefits},
        "docs/reference/train.md": {"options": options},
        "docs/reference/commands.md": {
            "task options": options_and_file(TaskOptions),
            **{
                name: arguments_of(f"dni-seq {name}", cli.COMMANDS[name][0])
                for name in ("evaluate", "sample", "compare", "reproduce")
            },
            "train_feedforward": options_and_file(FeedForwardOptions),
            "train_decoupled": options_and_file(DecoupledOptions),
            "train_slow_ticking": options_and_file(SlowTickingOptions),
            "soak": arguments_of("soak.py", "dni_seq.app.studies.soak"),
            "gpu_check": arguments_of("gpu_check.py", "dni_seq.app.gpu_check.check"),
        },
        "docs/reference/tensorboard.md": {"keys": keys},
        "docs/reference/api.md": {"api": api},
        "docs/results/characters.md": {
            "characters": result_tables.characters,
            "equal time": result_tables.equal_time,
            "horizons": result_tables.horizons,
            "ablation": result_tables.text_parts,
        },
        "docs/results/copying.md": {
            "copy": result_tables.lengths("copy"),
            "repeat copy": result_tables.lengths("repeat-copy"),
            "ablation": result_tables.copy_parts,
            "more horizons": result_tables.more_horizons,
            "six horizons": result_tables.six_horizons,
            "adding": result_tables.adding,
        },
        "docs/results/regressed.md": {"regressed": result_tables.regressed, "one horizon": result_tables.one_horizon},
        "docs/results/words.md": {
            "words": words,
            "words by SGD": words_by_sgd,
            "part of an epoch": result_tables.part_of_an_epoch,
            "embedded corpus": embedded_corpus,
        },
    }
)
"""The functions that make the tables, by page and by the name in the table's marks."""


def written(page: str, text: str) -> str:
    """Returns a page's text with its tables replaced by new ones.

    Raises:
        ValueError: the page lacks the marks of a table, or has them several times.
    """
    for name, rows in TABLES[page].items():
        mark = rf"(<!-- {name}: written by docs/tables.py -->\n).*?(<!-- end of {name} -->)"
        body = "\n".join(rows())
        text, count = re.subn(mark, lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} must have the mark of {name} once")
    return text


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in TABLES:
        path = ROOT / page
        path.write_text(written(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
