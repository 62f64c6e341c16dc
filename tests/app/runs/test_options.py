"""One dataclass gives the command line, the config file and the checks."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest

from dni_seq.app.runs.options import above_zero, at_least, build, fraction, option, parse, read_config, report, share


@dataclasses.dataclass(frozen=True)
class Sample:
    """A few options of every kind."""

    size: int = option(3, "how many, 100% real", group="things", check=at_least(1))
    rate: float = option(0.5, "how fast", group="things", check=above_zero)
    limit: int | None = option(None, "stop here", group="run", check=at_least(1), shown="none")
    kind: str = option("a", "which", group="things", choices=("a", "b"))
    long_name: str | None = option(None, "a file", group="run", metavar="FILE")
    tied: bool = option(False, "tie", group="things")
    upper: str = option("A", "a letter", group="things", convert=str.upper)


def read(*arguments: str) -> dict:
    return parse(Sample, list(arguments), prog="sample", description="A sample.")


def test_only_what_was_given():
    assert read() == {}
    assert read("--size", "4", "--long-name", "x", "--tied") == {"size": 4, "long_name": "x", "tied": True}
    assert read("--no-tied") == {"tied": False}


def test_build_layers_over_defaults():
    options = build(Sample, {"size": 4, "rate": 1}, {"size": 5})
    assert options == Sample(size=5, rate=1.0)
    assert build(Sample, {"upper": "b"}).upper == "B"
    assert isinstance(options.rate, float)


def test_config_file_under_the_command_line(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.asdict(Sample(size=7, limit=9))))
    given = read("--config", str(config), "--size", "8")
    assert build(Sample, given) == Sample(size=8, limit=9)


def test_help_names_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("things:", "run:", "(default: 3)", "(default: no)", "(default: none)", "100% real", "--long-name FILE"):
        assert part in text


@pytest.mark.parametrize(
    "arguments", [["--size", "many"], ["--nothing"], ["--size"], ["--kind", "c"], ["loose"], ["--siz", "4"]]
)
def test_a_mistake_in_syntax_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        read(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sample: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "--size must be 1 or more, got 0"),
        ({"size": 2.5}, "--size must be a whole number"),
        ({"size": True}, "--size must be a whole number"),
        ({"size": None}, "--size must be a whole number"),
        ({"rate": float("nan")}, "--rate must be above 0"),
        ({"rate": "fast"}, "--rate must be a number"),
        ({"limit": -1}, "--limit must be 1 or more"),
        ({"kind": "c"}, "--kind must be one of a, b"),
        ({"tied": 1}, "--tied must be true or false"),
        ({"long_name": []}, "--long-name must be a text"),
    ],
)
def test_build_names_the_option_to_change(values, message):
    with pytest.raises(ValueError, match=message):
        build(Sample, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"sizes": 1, "size": 2}', "unknown options: sizes"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_bad_config_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(Sample, path)


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"size": 4}', encoding="utf-8-sig")
    assert read_config(Sample, path) == {"size": 4}


PRESETS = {"large": {"size": 100, "kind": "b"}}


def test_a_preset_lies_below_config_and_command_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"kind": "a", "rate": 2.0}')

    def read(*arguments: str) -> dict:
        return parse(Sample, list(arguments), prog="sample", description="A sample.", presets=PRESETS)

    assert read("--preset", "large") == {"size": 100, "kind": "b"}
    assert read("--preset", "large", "--size", "5") == {"size": 5, "kind": "b"}
    assert read("--preset", "large", "--config", str(config)) == {"size": 100, "kind": "a", "rate": 2.0}
    assert PRESETS == {"large": {"size": 100, "kind": "b"}}
    with pytest.raises(SystemExit):
        read("--help")
    assert "large: size 100, kind b" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--siez", "4"], "--size"),
        (["--long_name=x"], "--long-name"),
        (["--preset", "larg"], "large"),
        (["--tide"], "--tied"),
    ],
)
def test_a_misspelling_is_answered_with_the_right_one(arguments, meant, capsys):
    with pytest.raises(SystemExit):
        parse(Sample, arguments, prog="sample", description="A sample.", presets=PRESETS)
    error = capsys.readouterr().err
    assert f", did you mean {meant}?" in error
    assert error.count("\n") == 1


def test_nothing_is_guessed_for_what_is_like_nothing(capsys):
    with pytest.raises(SystemExit):
        read("--quite-another-thing")
    assert "did you mean" not in capsys.readouterr().err


def test_a_config_file_is_answered_likewise(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"sise": 4}')
    with pytest.raises(ValueError, match="unknown options: sise, did you mean size"):
        read_config(Sample, path)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")
@pytest.mark.parametrize(("no_color", "red"), [(None, True), ("1", False)])
def test_an_error_is_red_on_a_terminal_alone(no_color, red, monkeypatch):
    import pty

    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        report("sample", ValueError("no"))
        terminal.flush()
        shown = os.read(master, 1000).decode()
    os.close(master)
    assert (shown == "sample: \033[31merror:\033[0m no\r\n") == red
    assert ("\033" in shown) == red


def test_checks():
    assert [check(1) for check in (at_least(1), above_zero, share, fraction)] == [
        None,
        None,
        "at least 0 and below 1",
        None,
    ]
    assert [check(float("inf")) is None for check in (at_least(1), above_zero, share, fraction)] == [False] * 4
    assert [check(0) is None for check in (at_least(1), above_zero, share, fraction)] == [False, False, True, True]


def test_an_error_is_reported_in_one_line(capsys):
    assert report("sample", ValueError("first\n  second")) == 2
    assert report("sample", ValueError()) == 2
    assert capsys.readouterr().err == "sample: error: first second\nsample: error: ValueError\n"
