"""Scores of a run's own text where it has moved, of another text, and of a part of a text; a resumed run's moved text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dni_seq.app.lm import build as lm
from dni_seq.app.lm import evaluate as evaluate_lm
from dni_seq.app.lm import train as train_lm
from dni_seq.app.lm.evaluation import evaluate, score_of
from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.streams import WindowStream, files, open_corpus

TINY = ("--embed", "8", "--hidden", "8", "--layers", "1", "--dropout", "0", "--batch-size", "4", "--device", "cpu")
LINES = [f"line {i} of the words {i * i} and {'more ' * (i % 5)}\n" for i in range(400)]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def last(lines: list[str]) -> list[str]:
    """The lines with another last line of the same length."""
    return [*lines[:-1], lines[-1].replace("line", "LINE")]


def trained(directory: Path, *more: str) -> Path:
    """A run of three steps on `directory/own.txt`."""
    text = write(directory / "own.txt", LINES)
    run = directory / "run"
    begin = ("--data-file", text, *TINY, "--synthesizer", "none", "--bptt", "5", "--max-steps", "3", "--run-dir", str(run))
    assert train_lm.main([*begin, *more]) == 0
    return run


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, capsys) -> Path:
    """A run whose text is held in memory."""
    run = trained(tmp_path)
    capsys.readouterr()
    return run


def evaluated(capsys, *arguments: str) -> list[str]:
    """The lines of evaluate_lm.py."""
    capsys.readouterr()
    assert evaluate_lm.main([*arguments]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, main, *arguments: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


KINDS = {"in memory": (), "streamed": (), "by documents": ("--document-reset",)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_has_moved_is_given_anew(kind, tmp_path, capsys, monkeypatch):
    if kind == "streamed":
        monkeypatch.setattr(files, "IN_MEMORY_BYTES", 0)
    run = trained(tmp_path, *KINDS[kind])
    before = evaluated(capsys, str(run))
    new = str(shutil.move(tmp_path / "own.txt", tmp_path / "new.txt"))
    for main, arguments in (
        (evaluate_lm.main, [str(run)]),
        (train_lm.main, ["--run-dir", str(run), "--resume", "auto", "--max-steps", "5"]),
    ):
        line = refused(capsys, main, *arguments)
        assert "no such file" in line
        assert line.endswith("if the run's text has moved, give its place with --data-file")
    assert evaluated(capsys, str(run), "--data-file", new) == before
    assert train_lm.main(["--run-dir", str(run), "--resume", "auto", "--max-steps", "5", "--data-file", new]) == 0
    assert json.loads((run / "config.json").read_text())["data_file"] == new
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    assert evaluated(capsys, str(run))[0].startswith("test: loss ")


@pytest.mark.parametrize("part", ["train", "test"])
def test_another_text_is_refused_when_a_run_is_resumed(part, run, tmp_path, capsys):
    """Of the same size, where one line differs, of the training text or of the part that is held out."""
    other = write(tmp_path / "other.txt", last(LINES) if part == "test" else [*last(LINES[:1]), *LINES[1:]])
    resume = ("--run-dir", str(run), "--resume", "auto", "--max-steps", "5")
    before = load_checkpoint(RunDirectory(run).last)["trainer"]["steps"]
    line = refused(capsys, train_lm.main, *resume, "--data-file", other)
    expected = (
        f"the test text of {other} differs from the run's" if part == "test" else f"{other} or its tokenizer has changed"
    )
    assert expected in line
    assert load_checkpoint(RunDirectory(run).last)["trainer"]["steps"] == before
    # So is the text of the same name.
    (tmp_path / "own.txt").write_text(Path(other).read_text())
    assert "differs" in refused(capsys, train_lm.main, *resume) or part == "train"


def test_held_out_files_may_move_too(tmp_path, capsys):
    valid, test = (write(tmp_path / f"{name}.txt", LINES[:40]) for name in ("valid", "test"))
    run = trained(tmp_path, "--valid-file", valid, "--test-file", test)
    before = evaluated(capsys, str(run))
    new = tmp_path / "new"
    new.mkdir()
    places = []
    for name, option in (("own", "--data-file"), ("valid", "--valid-file"), ("test", "--test-file")):
        places += [option, str(shutil.move(tmp_path / f"{name}.txt", new))]
    assert refused(capsys, evaluate_lm.main, str(run)).endswith("with --data-file and --test-file and --valid-file")
    assert evaluated(capsys, str(run), *places) == before
    resume = ("--run-dir", str(run), "--resume", "auto", "--max-steps", "5", *places)
    write(new / "test.txt", last(LINES[:40]))
    assert "the test text of" in refused(capsys, train_lm.main, *resume)
    assert "is not the text of the run" in refused(capsys, evaluate_lm.main, str(run), *places)
    write(new / "test.txt", LINES[:40])
    assert train_lm.main([*resume]) == 0


def test_another_text_is_scored_whole(run, tmp_path, capsys):
    """The reference: its score by the same model, in the same lanes."""
    lines = [f"{i} words, all of them own\n" for i in range(50)]
    other = write(tmp_path / "other.txt", lines)
    score, unknown = evaluated(capsys, str(run), "--data-file", other)
    directory = RunDirectory(run)
    loaded = lm.load_run(directory, directory.best, torch.device("cpu"))
    corpus = open_corpus(data_file=other, valid_file=other, test_file=other)
    stream = WindowStream(corpus.train, loaded.tokenizer, lanes=4, bptt=32)
    assert stream.characters_per_token == 1
    assert stream.tokens_per_epoch == sum(map(len, lines)) // 4 * 4 - 4
    expected = score_of(evaluate(loaded.model, stream), stream.characters_per_token, stream.words_per_token)
    assert score == lm.describe(other, expected, "char")
    assert unknown == f"tokens outside the vocabulary: {other} {stream.unknown_share:.2%}"


def test_another_text_is_scored_although_both_held_out_texts_have_their_files(tmp_path, capsys):
    valid, test = (write(tmp_path / f"{name}.txt", LINES[:40]) for name in ("valid", "test"))
    run = trained(tmp_path, "--valid-file", valid, "--test-file", test)
    other = write(tmp_path / "other.txt", LINES[:30])
    assert evaluated(capsys, str(run), "--data-file", other)[0].startswith(f"{other}: loss ")
    assert evaluated(capsys, str(run), "--data-file", str(tmp_path / "own.txt")) == evaluated(capsys, str(run))


def test_what_an_error_of_another_text_advises_works(run, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", ['{"text": "some words of a row"}\n', '{"text": null}\n'] * 20)
    assert "--null-text skip" in refused(capsys, evaluate_lm.main, str(run), "--data-file", rows)
    assert evaluated(capsys, str(run), "--data-file", rows, "--null-text", "skip")[0].startswith(f"{rows}: loss ")
    (tmp_path / "latin.txt").write_bytes("une forêt, une île\n".encode("latin-1") * 20)
    latin = ("--data-file", str(tmp_path / "latin.txt"))
    assert "--invalid-utf8 replace" in refused(capsys, evaluate_lm.main, str(run), *latin)
    assert evaluated(capsys, str(run), *latin, "--invalid-utf8", "replace")[0].startswith(f"{latin[1]}: loss ")


def test_a_text_that_is_shorter_than_the_lanes_is_scored(run, tmp_path, capsys):
    (score,) = evaluated(capsys, str(run), "--data-file", write(tmp_path / "short.txt", ["line"]))
    assert score.startswith(f"{tmp_path / 'short.txt'}: loss ")


def test_a_data_set_on_a_file_of_ones_own(two_runs, tmp_path, capsys):
    """The run is one on the embedded corpus, which is no file."""
    own = write(tmp_path / "own.txt", LINES)
    assert evaluated(capsys, str(two_runs / "none"), "--data-file", own)[0].startswith(f"{own}: loss ")


def test_a_split_of_another_text_is_refused(run, tmp_path, capsys):
    other = write(tmp_path / "other.txt", LINES[:100])
    line = refused(capsys, evaluate_lm.main, str(run), "--data-file", other, "--split", "valid")
    assert (
        line == f"evaluate_lm: error: --data-file {other} is not the text of the run, so it is scored whole: remove --split"
    )
    line = refused(capsys, train_lm.main, "--eval-only", "--run-dir", str(run), "--data-file", other)
    assert f"the valid text of {other} differs from the run's" in line
    assert "no such file: nothing.txt" in refused(capsys, evaluate_lm.main, str(run), "--data-file", "nothing.txt")


def test_a_limit_that_cuts_a_score_is_said(run, capsys):
    (whole,) = evaluated(capsys, str(run))
    score, limit = evaluated(capsys, str(run), "--eval-tokens", "64")
    assert score != whole
    assert limit == "test: a limit of 64 tokens cut this score, give --eval-tokens to change it"
    assert evaluated(capsys, str(run), "--eval-tokens", "1000000") == [whole]
    capsys.readouterr()
    assert train_lm.main(["--eval-only", "--run-dir", str(run), "--eval-tokens", "64"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [score, limit]
    assert "--eval-tokens must be 1 or more" in refused(capsys, evaluate_lm.main, str(run), "--eval-tokens", "0")


def test_a_limit_of_the_run_is_said(tmp_path, capsys):
    run = trained(tmp_path, "--eval-tokens", "64")
    assert evaluated(capsys, str(run))[1].startswith("test: a limit of 64 tokens cut this score")


def test_a_run_directory_is_resumed(run, capsys):
    assert train_lm.main(["--resume", str(run), "--max-steps", "5"]) == 0
    assert f"\nresuming from {run / 'checkpoints' / 'last.pt'} at step 3\n" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    assert train_lm.main(["--eval-only", "--resume", str(run)]) == 0
