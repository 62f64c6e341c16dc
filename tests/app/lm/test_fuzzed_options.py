"""Garbage for a bounded time: options, config files, tokenizer files, checkpoints, text. Only clear errors, and exit 2.

What is tried follows from a fixed seed; how much of it, from the seconds that it is given.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import runpy
import time

import pytest
import torch

from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dni_seq.app.runs.options import flag
from dni_seq.streams import DataError, load_tokenizer, train_tokenizer
from tests.paths import SCRIPTS

SECONDS = 3.0
LEAST = 12
"""Cases that are tried however slow the machine is."""

SCRIPT = SCRIPTS / "train_lm.py"

# Sizes so small that a case that is not refused ends soon.
SMALL = {
    "data_file": "text.txt",
    "tokenizer": "char",
    "embed": 4,
    "hidden": 4,
    "layers": 1,
    "batch_size": 2,
    "bptt": 3,
    "max_steps": 2,
    "eval_tokens": 20,
    "synthesizer_hidden": 4,
    "device": "cpu",
    "threads": 1,
}

WORDS = (
    "", " ", "-", "--", "0", "-1", "1", "2", "7", "0.5", "-0.0", "1e400", "-1e400", "nan", "inf", "1e-320", "9" * 30, "2**3",
    "0x10", "١", "true", "None", "auto", "none", "basic", "multi-horizon", "exact", "lambda", "char", "word", "cpu",
    "sentencepiece", "cuda:99", "meta", "bfloat16", "float64", "\x00", "\n", "é", "\ud800", "a" * 5000, "/", ".", "..",
    "text.txt", "/dev/null", "/proc/self/mem", "*", "[", "~", "ptb\x00", "%s", "{}", "text.txt/", "run/config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory to be in, with a small text; nothing on the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i % 7}\n" for i in range(60)))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def cases(seed):
    """A source of chance for each case, until the time is over."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < LEAST or time.monotonic() < end:
        yield random.Random(seed * 10_000 + number)
        number += 1


def outcome(main, arguments, capsys) -> int:
    """The status of a call; anything but success or one clear line with status 2 fails."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        raise AssertionError(f"{arguments!r} raised {type(error).__name__}: {error}") from error
    err = capsys.readouterr().err
    assert status in (0, 2), (arguments, status)
    if status == 2:
        lines = [line for line in err.splitlines() if line.startswith("train_lm: error: ")]
        assert len(lines) == 1, (arguments, err)
        assert len(lines[0]) > len("train_lm: error: "), arguments
        assert "Traceback" not in err, (arguments, err)
    return status


def as_arguments(options):
    return [text for name, value in options.items() for text in (flag(name), str(value))]


def test_options(main, place, capsys):
    names = [field.name for field in dataclasses.fields(LanguageModelOptions)]
    statuses = set()
    for number, chance in enumerate(cases(1)):
        options = dict(SMALL)
        for _ in range(chance.randint(1, 3)):
            options[chance.choice(names)] = chance.choice(WORDS)
        arguments = [*as_arguments(options), "--run-dir", f"run-{number}"]
        if chance.random() < 0.2:
            arguments.insert(chance.randrange(len(arguments)), chance.choice(WORDS))
        statuses.add(outcome(main, bounded(arguments), capsys))
    assert 2 in statuses


def bounded(arguments):
    """Without the requests that are honoured and take long: steps and epochs without end."""
    return [*arguments, "--max-steps", "2"] if "--max-steps" in arguments else arguments


def garbage(chance, depth=0):
    """Any JSON value."""
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind < 6:
        number, text = chance.choice([0.5, -1e300, 1e300]), chance.choice(WORDS[2:30])
        return [None, True, chance.randint(-3, 9), number, text, 10**25][kind]
    items = [garbage(chance, depth + 1) for _ in range(chance.randrange(4))]
    return items if kind == 6 else {chance.choice(WORDS[5:30]): item for item in items}


def mangled(chance, data: bytes) -> bytes:
    """Some bytes changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del data[at : at + chance.randint(1, 40)]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randint(1, 9))
        else:
            del data[at:]
    return bytes(data)


def test_config_files(main, place, capsys):
    statuses = set()
    for number, chance in enumerate(cases(2)):
        content = dict(SMALL)
        for _ in range(chance.randint(0, 2)):
            content[chance.choice([*content, "lr", "clip", "seed", "dropout", "horizons", "nonsense"])] = garbage(chance)
        data = json.dumps(content).encode()
        if chance.random() < 0.5:
            data = mangled(chance, data) if chance.random() < 0.8 else chance.randbytes(100)
        (place / "config.json").write_bytes(data)
        arguments = ["--config", "config.json", "--run-dir", f"run-{number}", "--max-steps", "2", "--threads", "1"]
        statuses.add(outcome(main, arguments, capsys))
    assert statuses == {0, 2}


@pytest.mark.parametrize("kind", ["word", "char", "sentencepiece"])
def test_tokenizer_files(place, kind):
    text = (place / "text.txt").read_text()
    train_tokenizer(kind, [text], 275 if kind == "sentencepiece" else None).save(place / "whole.json")
    whole = (place / "whole.json").read_bytes()
    refused = 0
    for chance in cases(3):
        content = json.loads(whole)
        if chance.random() < 0.5:
            content[chance.choice([*content, "more"])] = garbage(chance)
            data = json.dumps(content).encode()
        else:
            data = mangled(chance, whole)
        (place / "tokenizer.json").write_bytes(data)
        try:
            tokenizer = load_tokenizer(place / "tokenizer.json")
        except DataError:
            refused += 1
        else:
            ids = tokenizer.encode(text)
            assert (ids >= 0).all()
            assert (ids < tokenizer.vocabulary_size).all()
            tokenizer.decode(ids)
    assert refused


def test_checkpoint_files(place):
    """Bytes changed: the checksum, or the version, says so."""
    path = place / "last.pt"
    save_checkpoint(path, {"steps": 3, "trainer": {"weights": torch.rand(50)}, "text": "some"})
    whole = path.read_bytes()
    for chance in cases(4):
        data = mangled(chance, whole) if chance.random() < 0.8 else chance.randbytes(chance.randrange(300))
        if data == whole:
            continue
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


def nodes(content, path=()):
    """The path to every entry of a nest."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from nodes(value, (*path, key))


def mutate(chance, content):
    """One entry gone, or another value in its place."""
    *path, key = chance.choice(list(nodes(content)))
    nest = content
    for step in path:
        nest = nest[step]
    other = [None, -1, "x", [], {}, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), float("nan"), 10**25]
    if isinstance(nest, dict) and chance.random() < 0.4:
        del nest[key]
    else:
        nest[key] = chance.choice(other)


def test_checkpoints_with_a_checksum_that_holds(main, place, capsys):
    """Made by another program, or by a bug: a clear error, or a run that goes on."""
    options = {**SMALL, "synthesizer": "basic", "synthetic_scale": "0.5", "target_network": 2}
    assert outcome(main, [*as_arguments(options), "--max-steps", "3", "--run-dir", "run"], capsys) == 0
    path = place / "run" / "checkpoints" / "last.pt"
    whole = load_checkpoint(path)
    statuses = set()
    for chance in cases(5):
        content = copy.deepcopy(whole)
        mutate(chance, content)
        save_checkpoint(path, content)
        statuses.add(outcome(main, ["--run-dir", "run", "--resume", "auto", "--max-steps", "4"], capsys))
    assert 2 in statuses


def test_text(main, place, capsys):
    alphabets = (b"\x00\xff\xfeab\n", "aé٣\u2028\u2581 \n".encode(), bytes(range(256)), b"word \n", b"\n", b" ")
    statuses = set()
    for number, chance in enumerate(cases(6)):
        alphabet = chance.choice(alphabets)
        data = bytes(chance.choice(alphabet) for _ in range(chance.choice([0, 1, 10, 500, 3000])))
        name = f"garbage.{chance.choice(['txt', 'jsonl', 'parquet', 'txt.gz', 'txt.xz', 'txt.zst', 'txt.bz2'])}"
        (place / name).write_bytes(data)
        options = {
            **SMALL,
            "data_file": name,
            "tokenizer": chance.choice(["word", "char", "sentencepiece"]),
            "invalid_utf8": chance.choice(["error", "replace"]),
        }
        arguments = [*as_arguments(options), "--run-dir", f"run-{number}", chance.choice(["--document-reset", "--tied"])]
        statuses.add(outcome(main, arguments, capsys))
    assert 2 in statuses
