"""What the language-model command promises of its text: position, tokenizer, counts of what is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dni_seq.app.lm import build as lm
from dni_seq.app.lm import evaluate as evaluate_lm
from dni_seq.app.lm import train as train_lm
from dni_seq.app.lm.training import LanguageModelRun
from dni_seq.core.windows import Window
from dni_seq.streams import files

pytest.importorskip("tensorboard")

TINY = ("--embed", "8", "--hidden", "8", "--layers", "1", "--dropout", "0", "--batch-size", "4", "--device", "cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Own text of 400 lines, each another one."""
    path = tmp_path / "own.txt"
    path.write_text("".join(f"line {i} of the words {i * i} and {'more ' * (i % 5)}\n" for i in range(400)))
    return path


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """Every window that the command trains on."""
    seen: list[Window] = []
    real = LanguageModelRun.step

    def step(run: LanguageModelRun, window: Window) -> None:
        seen.append(window)
        real(run, window)

    monkeypatch.setattr(LanguageModelRun, "step", step)
    return seen


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("synthesizer", [("none",), ("basic",), ("multi-horizon",), ("exact", "--tail")])
def test_another_bptt_on_resuming_keeps_lanes_and_position(synthesizer, streamed, text, windows, monkeypatch, tmp_path):
    if streamed:
        monkeypatch.setattr(files, "IN_MEMORY_BYTES", 0)
    run = str(tmp_path / "run")
    begin = ("--data-file", str(text), *TINY, "--synthesizer", *synthesizer, "--synthesizer-hidden", "8", "--bptt", "5")
    assert train_lm.main([*begin, "--max-steps", "3", "--run-dir", run]) == 0
    assert train_lm.main(["--resume", "auto", "--run-dir", run, "--bptt", "7", "--max-steps", "6"]) == 0
    assert train_lm.main(["--resume", "auto", "--run-dir", run, "--max-steps", "7"]) == 0
    assert [len(window.inputs) for window in windows] == [5, 5, 5, 7, 7, 7, 7]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["bptt"] == 7
    resumed = torch.cat([window.inputs for window in windows])
    windows.clear()
    whole = ("--data-file", str(text), *TINY, "--synthesizer", "none", "--bptt", str(len(resumed)), "--max-steps", "1")
    assert train_lm.main([*whole, "--run-dir", str(tmp_path / "whole")]) == 0
    assert torch.equal(windows[0].inputs, resumed)


def test_a_subword_tokenizer_is_trained_once(text, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    begin = ("--data-file", str(text), *TINY, "--tokenizer", "sentencepiece", "--vocab-size", "300", "--max-steps", "2")
    assert train_lm.main([*begin, "--run-dir", str(run)]) == 0
    saved = (run / "tokenizer.json").read_bytes()

    def train_again(*_: object) -> None:
        raise AssertionError("the tokenizer of the run directory is to be used")

    monkeypatch.setattr(lm, "train_tokenizer", train_again)
    assert train_lm.main(["--resume", "auto", "--run-dir", str(run), "--max-steps", "4"]) == 0
    assert (run / "tokenizer.json").read_bytes() == saved
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["tokenizer"], summary["vocabulary"], summary["steps"]) == ("sentencepiece", 300, 4)
    assert summary["unknown"] == {"train": 0, "valid": 0, "test": 0}
    score = summary["test"]
    assert score["ppl"] < score["word_ppl"], "a word takes several pieces"
    capsys.readouterr()
    assert evaluate_lm.main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"ppl {score['ppl']:.2f}, bpc {score['bpc']:.4f}, ppl per word {score['word_ppl']:.2f}" in shown


@pytest.mark.parametrize("reset", [False, True])
def test_what_is_not_in_the_vocabulary_is_reported(reset, text, capsys, tmp_path):
    begin = ("--data-file", str(text), *TINY, "--tokenizer", "word", "--vocab-size", "10", "--max-steps", "2")
    options = ("--document-reset",) if reset else ()
    assert train_lm.main([*begin, *options, "--synthesizer", "none", "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    unknown = json.loads((tmp_path / "run" / "summary.json").read_text())["unknown"]
    assert all(0.05 < share < 0.9 for share in unknown.values())
    *begun, done = [line for line in shown.splitlines() if line.startswith("tokens outside the vocabulary: ")]
    assert begun or reset  # nothing but each split's first document is read yet
    assert done.endswith(", ".join(f"{name} {share:.2%}" for name, share in unknown.items()))


def test_what_is_odd_about_the_text_is_said_in_a_line(text, capsys, tmp_path):
    one, null = tmp_path / "one.txt", tmp_path / "null.jsonl"
    one.write_text(text.read_text().replace("\n", " "))
    null.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*text.read_text().splitlines(), None]))
    begin = (*TINY, "--max-steps", "1", "--bptt", "5", "--synthesizer", "none", "--null-text", "skip")
    for path, note in ((one, "so characters at its end are held out"), (null, "column 'text' is null: 1")):
        run = str(tmp_path / path.stem)
        for options in (("--run-dir", run), ("--run-dir", run, "--resume", "auto"), ("--dry-run",)):
            given = ("--run-dir", run, "--resume", "auto", "--max-steps", "2") if "--resume" in options else ()
            assert train_lm.main([*given] or ["--data-file", str(path), *begin, *options]) == 0
            (line,) = [line for line in capsys.readouterr().out.splitlines() if note in line]
            assert line.startswith(str(path))


def test_another_text_is_scored(text, capsys, tmp_path):
    run = tmp_path / "run"
    begin = ("--data-file", str(text), "--valid-file", str(text), "--test-file", str(text), "--synthesizer", "none")
    assert train_lm.main([*begin, *TINY, "--max-steps", "2", "--run-dir", str(run)]) == 0
    capsys.readouterr()
    assert evaluate_lm.main([str(run)]) == 0
    score = capsys.readouterr().out.removeprefix("test: ")
    moved, other = tmp_path / "moved.txt", tmp_path / "rows.jsonl"
    text.rename(moved)
    other.write_text(json.dumps({"body": "line ÄÖÜ"}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert evaluate_lm.main([str(run)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert evaluate_lm.main([str(run), "--data-file", str(moved)]) == 0
    assert capsys.readouterr().out == f"{moved}: {score}"
    assert evaluate_lm.main([str(run), "--data-file", str(other), "--text-column", "body"]) == 0
    assert f"tokens outside the vocabulary: {other} 33.33%" in capsys.readouterr().out
    for arguments, complaint in (
        (("--data-file", str(other)), "no column 'text'"),
        (("--text-column", "body"), "--text-column needs --data-file"),
        (("--data-file", str(run)), "is a directory"),
    ):
        assert evaluate_lm.main([str(run), *arguments]) == 2
        assert complaint in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
