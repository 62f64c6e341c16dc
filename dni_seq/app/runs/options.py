"""Options of a command: one typed dataclass defines the command line, the config file and the checks.

Each field of the dataclass is declared with `option(...)` and becomes `--field-name`. `parse` reads the command line and
`--config FILE`. `build` merges layers of values into an instance and checks every value.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dni_seq.app.runs.help import PrintHelp, brief, option_text
from dni_seq.app.runs.invocation import as_called

Check = Callable[[Any], str | None]
"""A function of a value. Returns None for a valid value, else the violated condition as text, for example "1 or more"."""

Options = TypeVar("Options")


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Sequence[str] | None = None,
    check: Check | None = None,
    convert: Callable[[Any], Any] | None = None,
    metavar: str | None = None,
    shown: str | None = None,
) -> Any:
    """Returns a dataclass field that is an option of the command.

    Args:
        default: the value if neither the command line nor a config file gives one.
        help: the option's meaning in a few words, with its unit.
        group: the title under which `--help` lists the option.
        choices: the allowed values, None for any.
        check: a condition on the value, not applied to None.
        convert: converts a checked value to the stored value of the same type; not applied to None.
        metavar: the value's name in `--help`.
        shown: description of the default in `--help`, if `default` itself does not show it.
    """
    details = {
        "help": help,
        "group": group,
        "choices": choices,
        "check": check,
        "convert": convert,
        "metavar": metavar,
        "shown": shown,
    }
    return dataclasses.field(default=default, metadata=details)


def at_least(least: int) -> Check:
    """Returns a check for numbers from `least` to below 2**63. NaN and infinity are rejected."""

    def check(value: float) -> str | None:
        if not value < 2**63:  # NaN too
            return f"{least} or more, and below 2**63"
        return None if value >= least else f"{least} or more"

    return check


def above_zero(value: float) -> str | None:
    """Checks that a number is finite and above 0."""
    return None if math.isfinite(value) and value > 0 else "above 0"


def share(value: float) -> str | None:
    """Checks that a number is at least 0 and below 1."""
    return None if 0 <= value < 1 else "at least 0 and below 1"


def fraction(value: float) -> str | None:
    """Checks that a number is from 0 to 1, both included."""
    return None if 0 <= value <= 1 else "from 0 to 1"


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line and suggest the nearest valid spelling."""

    def __init__(self, *, prog: str, **settings: Any):
        of_command = prog.startswith("dni-seq ")  # the `prog` of a subparser is already complete
        super().__init__(prog=prog if of_command else program(prog), **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does. The error for an unknown option suggests the nearest known one."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].split('=')[0], names)}")
        return given

    def format_help(self) -> str:
        """Returns the help. It names commands in the form in which this process was called."""
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Ends the process with the message on stderr and exit status 2."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            message += did_you_mean(wrong[1], [choice.strip(" '") for choice in wrong[2].split(",")])
        everything = "--help-all" if "--help-all" in self._option_string_actions else "--help"
        self.exit(2, f"{_error_of(self.prog)} {message} ({everything} lists all options)\n")


def did_you_mean(wrong: str, names: Sequence[str]) -> str:
    """Returns ", did you mean NAME?" for the entry of `names` nearest to `wrong`; empty if no entry is near."""
    close = difflib.get_close_matches(wrong, names, n=1)
    return f", did you mean {close[0]}?" if close else ""


def program(script: str) -> str:
    """Returns the program name for messages: `script`, or "dni-seq COMMAND" if the process was called in that form."""
    return sys.argv[0] if sys.argv[0].startswith("dni-seq ") else script


def report(prog: str, error: Exception) -> int:
    """Prints an error as one line on stderr and returns the exit status 2."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{_error_of(program(prog))} {text}", file=sys.stderr)
    return 2


def _error_of(prog: str) -> str:
    """Returns the start of an error line, red on a terminal."""
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"{prog}: \033[31merror:\033[0m" if red else f"{prog}: error:"


Presets = Mapping[str, Mapping[str, Any]]
"""Values of options by preset: the keys are the names of `--preset`, the values are options by name."""


def parse(
    cls: type,
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    presets: Presets | None = None,
    as_given: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Returns the given options of `cls` by name: those of the command line override `--config`, which overrides `--preset`.

    Options that are not given are absent. A syntax error ends the process with one line on stderr and status 2. `--help`
    prints the common options, and `--help-all` all of them.

    Args:
        cls: the dataclass of the options. An attribute `COMMON` names the common options; without this attribute all
            options are common. An attribute `GROUPS` orders the groups.
        arguments: the words of the command line, None for `sys.argv[1:]`.
        prog: the program's name.
        description: the text above the options in `--help`.
        presets: option values by preset name; None for no `--preset`.
        as_given: a function of a config file's options that removes the options that a run has filled in itself.

    Raises:
        ValueError: the config file is missing, not JSON, or names options that `cls` does not have.
    """
    given = vars(_parser(cls, prog, description, presets or {}, short=False).parse_args(arguments))
    config, preset = given.pop("config", None), given.pop("preset", None)
    below = dict(presets[preset]) if presets and preset is not None else {}
    return below | ({} if config is None else dict(as_given(read_config(cls, config)))) | given


def groups(cls: type) -> dict[str, list[dataclasses.Field]]:
    """Returns the options by group, in each group the common ones first.

    The groups have the order of `cls.GROUPS`, or without that attribute the order of their first options.
    """
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name not in _common(cls))
    titles = getattr(cls, "GROUPS", None) or dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(cls))
    return {title: [field for field in fields if field.metadata["group"] == title] for title in titles}


def _common(cls: type) -> Collection[str]:
    """Returns the names of the options that the short help lists, from `cls.COMMON`; empty if the short help lists all."""
    return getattr(cls, "COMMON", ())


def _parser(cls: type, prog: str, description: str, presets: Presets, *, short: bool) -> OneLineParser:
    """Returns the parser of `parse`. With `short` it lists only the common options, in few lines."""
    by_group = groups(cls)
    fields = [field for group in by_group.values() for field in group]
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s [options]",
        description=brief(description) if short else description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    kinds = _kinds(cls)
    for title, group in by_group.items():
        titled = parser.add_argument_group(title)
        for field in group:
            if field.name in _common(cls) or not short:
                _add_argument(titled, field, kinds[field.name], short)
    others = parser.add_argument_group("from files, and help")
    others.add_argument("--config", metavar="FILE", help="read options from a JSON file such as a run's config.json")
    if presets:
        in_full = "; ".join(f"{name}: {_described(each)}" for name, each in presets.items())
        text = f": {', '.join(presets)}" if short else f", overridden by --config. {in_full}"
        others.add_argument("--preset", choices=tuple(presets), metavar="NAME", help=f"options of a named setting{text}")
    has_short = bool(_common(cls))

    def text_of(short: bool) -> Callable[[], str]:
        return lambda: _parser(cls, prog, description, presets, short=short).format_help()

    shows = "show the common options" if has_short else "show all options"
    others.add_argument("-h", "--help", action=PrintHelp, text=text_of(has_short), help=shows)
    if has_short:
        everything = f"show the {len(fields)} options with all defaults"
        others.add_argument("--help-all", action=PrintHelp, text=text_of(False), help=everything)
    return parser


def _described(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())


def read_config(cls: type, path: str | Path) -> dict[str, Any]:
    """Returns the options in a JSON file after checking that `cls` has all of them.

    Raises:
        ValueError: the file is missing, not a JSON object, or names options that `cls` does not have.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the configuration {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the configuration {path} must be a JSON object of option names and values")
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(content) - set(names))
    if unknown:
        hint = did_you_mean(unknown[0], names)
        raise ValueError(f"the configuration {path} names unknown options: {', '.join(unknown)}{hint}")
    return content


def build(cls: type[Options], *layers: Mapping[str, Any]) -> Options:
    """Returns an instance of `cls` from layers of values. Later layers override earlier ones and the defaults.

    Raises:
        ValueError: a value has the wrong type or violates its option's check; the message names the option.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    kinds = _kinds(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            values[field.name] = _checked(field, kinds[field.name], values[field.name])
    return cls(**values)


def flag(name: str) -> str:
    """Returns the option string of a field's name: `synthetic_scale` -> `--synthetic-scale`."""
    return "--" + name.replace("_", "-")


def default_of(field: dataclasses.Field) -> str:
    """Returns an option's default as text, empty if there is none."""
    if field.metadata["shown"]:
        return str(field.metadata["shown"])
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return "" if field.default is None else str(field.default)


class _Kind(typing.NamedTuple):
    """A field's type and whether None is allowed: `int | None` is (int, True)."""

    plain: type
    may_be_none: bool


def _kinds(cls: type) -> dict[str, _Kind]:
    """Returns the type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    kinds = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (plain,) = (part for part in parts if part is not types.NoneType)
        kinds[field.name] = _Kind(plain, types.NoneType in parts)
    return kinds


def _add_argument(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: _Kind, short: bool) -> None:
    """Adds one field to its group of options. With `short`, its text is short."""
    details, choices = field.metadata, field.metadata["choices"]
    text = option_text(details["help"], choices, default_of(field), short=short)
    if kind.plain is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=text)
        return
    name = "NAME" if choices else kind.plain.__name__.upper()
    group.add_argument(flag(field.name), type=kind.plain, choices=choices, metavar=details["metavar"] or name, help=text)


def _checked(field: dataclasses.Field, kind: _Kind, value: Any) -> Any:
    """Returns `value` in the field's type. Raises a ValueError that names the option if it is not valid."""
    if value is None and kind.may_be_none:
        return None
    if kind.plain is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.plain:
        raise ValueError(f"{flag(field.name)} must be {_TYPE_NAMES[kind.plain]}, got {value!r}")
    choices, check = field.metadata["choices"], field.metadata["check"]
    if choices is not None and value not in choices:
        raise ValueError(
            f"{flag(field.name)} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(str(value), choices)}"
        )
    wanted = check(value) if check is not None else None
    if wanted is not None:
        raise ValueError(f"{flag(field.name)} must be {wanted}, got {value}")
    convert = field.metadata["convert"]
    return value if convert is None else convert(value)


_TYPE_NAMES = types.MappingProxyType({int: "a whole number", float: "a number", str: "a text", bool: "true or false"})
