"""Lanes that end with documents, shuffled documents, and killed readers that resume."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dni_seq.core.windows import Window, counted, with_lookahead
from dni_seq.streams import CharTokenizer, DataError, Documents, ShuffledDocuments, WindowStream
from dni_seq.streams import documents as documents_module
from dni_seq.streams import lanes as lanes_module
from dni_seq.streams import shuffle as shuffle_module
from dni_seq.streams import token_streams as runs_module
from dni_seq.streams.documents import ListedDocuments, Piece, Position, Reader

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = CharTokenizer(["\ufffd", "\n", *ALPHABET])
RNG = np.random.default_rng(1)
TEXTS = ["".join(RNG.choice(list(ALPHABET), RNG.integers(0, 40))) for _ in range(70)]


class Listed(ListedDocuments):
    """The texts, held or streamed."""

    def __init__(self, texts: list[str] = TEXTS, *, small: bool = False) -> None:
        super().__init__("test", texts)
        self.small = small


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, batches and pieces so small that there are many of each."""
    monkeypatch.setattr(runs_module, "PIECE", 60)
    monkeypatch.setattr(lanes_module, "RUN", 23)
    monkeypatch.setattr(documents_module, "LONGEST_PIECE", 17)


def stream_of(documents: Documents, **settings: int) -> WindowStream:
    return WindowStream(documents, TOKENIZER, document_reset=True, **({"lanes": 3, "bptt": 7} | settings))


def forever(stream: WindowStream) -> Iterator[Window]:
    while True:
        yield from stream


def read_back(windows: list[Window], lanes: int) -> list[str]:
    """The documents that windows hold, in the order in which they ended."""
    held: list[list[int]] = [[] for _ in range(lanes)]
    found = []
    for window in windows:
        for lane in range(lanes):
            steps = counted(window)[:, lane]
            # What counts comes first, and what is padded only where the lane ends.
            assert steps.tolist() == sorted(steps.tolist(), reverse=True)
            ends = window.ends is not None and bool(window.ends[lane])
            assert bool(steps.all()) or ends
            inputs, targets = window.inputs[steps, lane].tolist(), window.targets[steps, lane].tolist()
            if held[lane] and inputs:
                assert held[lane][-1] == inputs[0]
            held[lane] = (held[lane] or inputs[:1]) + targets
            if ends and held[lane]:
                found.append(TOKENIZER.decode(held[lane]))
                held[lane] = []
    assert not any(held)
    return found


@pytest.mark.parametrize("lanes", [1, 3, 100])
@pytest.mark.parametrize("bptt", [1, 7, 1000])
def test_windows_never_cross_a_document(lanes: int, bptt: int) -> None:
    windows = list(stream_of(Listed(), lanes=lanes, bptt=bptt))
    expected = [text + "\n" for text in TEXTS if text]  # an empty line is one token, with nothing to predict
    found = read_back(windows, lanes)
    assert sorted(found) == sorted(expected)
    assert lanes > 1 or found == expected
    assert windows[-1].ends is not None
    assert windows[-1].ends.all()
    assert all(1 <= len(window.inputs) <= bptt for window in windows)


@pytest.mark.parametrize(("bptt", "lookahead"), [(1, 1), (5, 2), (4, 9), (7, 100)])
def test_lookahead_ends_with_the_document(bptt: int, lookahead: int) -> None:
    ours = list(stream_of(Listed(), bptt=bptt, lookahead=lookahead))
    theirs = list(with_lookahead(stream_of(Listed(), bptt=bptt), lookahead))
    assert len(ours) == len(theirs) > 10
    for one, other in zip(ours, theirs, strict=True):
        mine, reference = one.lookahead, other.lookahead
        assert mine is not None
        assert reference is not None
        assert reference.mask is not None
        counts = reference.valid & reference.mask
        assert torch.equal(mine.valid, counts)
        assert torch.equal(mine.inputs[counts], reference.inputs[counts])
        assert torch.equal(mine.targets[counts], reference.targets[counts])


def test_a_very_long_document_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "LONGEST_DOCUMENT", 30)
    found = read_back(list(stream_of(Listed(["abcdefghij" * 10]), lanes=1)), 1)
    assert len(found) == 3
    assert "".join(found) == "abcdefghij" * 10 + "\n"


def test_no_document_with_two_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="too short"):
        stream_of(Listed(["", "", ""]))


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("block", [5, 1000])
def test_shuffling_keeps_documents_whole(small: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle_module, "HELD_DOCUMENTS" if small else "BLOCK_DOCUMENTS", block)
    shuffled = ShuffledDocuments(Listed(small=small), seed=3)
    texts = ["".join(shuffled.in_epoch(epoch)) for epoch in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    for text in texts:
        assert sorted(text.split("\n")[:-1]) == sorted(TEXTS)
        assert text.split("\n")[:-1] != TEXTS
    if block == 5:
        first = texts[0].split("\n")[:5]
        assert sorted(first) == sorted(TEXTS[:5])
    assert "".join(ShuffledDocuments(Listed(small=small), seed=4)) != texts[0]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["held", "streamed", "reset"])
def test_resuming_gives_the_same_windows(shuffle: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle_module, "BLOCK_DOCUMENTS", 11)

    def make(bptt: int = 4) -> WindowStream:
        documents: Documents = Listed(small=kind == "held")
        documents = ShuffledDocuments(documents, seed=5) if shuffle else documents
        return WindowStream(documents, TOKENIZER, lanes=3, bptt=bptt, lookahead=2, document_reset=kind == "reset")

    stream, windows, states = make(), [], [make().state_dict()]
    for window, _ in zip(forever(stream), range(330), strict=False):
        windows.append(window)
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert stream.epoch >= 2
    for start in [*range(0, 320, 17), 1]:
        resumed = make()
        resumed.load_state_dict(states[start])
        assert resumed.state_dict() == states[start]
        for mine, expected in zip(forever(resumed), windows[start : start + 9], strict=False):
            for one, other in zip(mine[:4], expected[:4], strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)
    # Another window length goes on at the same tokens.
    other = make(bptt=9)
    other.load_state_dict(states[100])
    assert torch.equal(next(iter(other)).inputs[:4], windows[100].inputs)


def test_positions_of_the_other_kind_of_lanes_are_refused() -> None:
    running = WindowStream(Listed(), TOKENIZER, lanes=3, bptt=7)
    with pytest.raises(DataError, match="--document-reset"):
        running.load_state_dict(stream_of(Listed()).state_dict())
    stream = stream_of(Listed())
    next(iter(stream))
    changed = stream_of(Listed(["other", *TEXTS[1:]]))
    with pytest.raises(DataError, match="has changed"):
        changed.load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="has changed"):
        stream_of(Listed(TEXTS[:1])).load_state_dict(stream.state_dict())


KILLED = """
import hashlib, json, os, sys
from pathlib import Path
from dni_seq.streams import ShuffledDocuments, WindowStream, files, lanes, load_tokenizer, open_corpus, train_tokenizer
from dni_seq.streams import token_streams

lanes.RUN = 300
token_streams.PIECE = 500
files.IN_MEMORY_BYTES = 1_000
directory, steps = Path(sys.argv[1]), int(sys.argv[2])
streams = {}
for number, (kind, path) in enumerate([("word", "small.txt"), ("char", "large.txt"), ("sentencepiece", "large.jsonl.gz")]):
    corpus = open_corpus(data_file=directory / path)
    file = directory / f"{kind}.json"
    if not file.exists():
        train_tokenizer(kind, corpus.train, 300 if kind == "sentencepiece" else None).save(file)
    for reset in (False, True):
        documents = ShuffledDocuments(corpus.train, 1) if number != 1 else corpus.train
        streams[f"{kind}{reset}"] = WindowStream(
            documents, load_tokenizer(file), lanes=3, bptt=5 + 8 * number, lookahead=3, document_reset=reset
        )
saved = directory / "state.json"
step = 0
if saved.exists():
    state = json.loads(saved.read_text())
    step = state.pop("step")
    for name, stream in streams.items():
        stream.load_state_dict(state[name])
while step < steps:
    digest = hashlib.sha256()
    for name, stream in streams.items():
        window = next(iter(stream))
        for part in (*window[:4], *window.lookahead):
            digest.update(b"-" if part is None else part.numpy().tobytes())
    step += 1
    with (directory / "log").open("a") as log:
        log.write(f"{step} {digest.hexdigest()}\\n")
    if step % 7 == 0:
        temporary = directory / "state.tmp"
        temporary.write_text(json.dumps({"step": step} | {name: s.state_dict() for name, s in streams.items()}))
        os.replace(temporary, saved)
print(min(stream.epoch for stream in streams.values()))
"""


def test_killed_readers_resume_with_the_same_windows(tmp_path: Path) -> None:
    """All tokenizers, formats, kinds of lanes and orders; killed twice with SIGKILL."""
    text = [f"line {i} of words {'and more ' * (i % 7)}{i * i}" for i in range(120)]
    for run in ("whole", "killed"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "small.txt").write_text("".join(line + "\n" for line in text[:25]))
        (tmp_path / run / "large.txt").write_text("".join(line + "\n" for line in text))
        rows = "".join(json.dumps({"text": line}) + "\n" for line in text)
        (tmp_path / run / "large.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    steps = 280

    def start(run: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / run), str(steps)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for kill_after in (60, 160):
        process = start("killed")
        log = tmp_path / "killed" / "log"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= kill_after):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for run in ("killed", "whole"):
        out, errors = start(run).communicate(timeout=100)
        assert errors == ""
        assert int(out) >= 1
    logs = [(tmp_path / run / "log").read_text().splitlines() for run in ("killed", "whole")]
    assert len(logs[1]) == steps
    # What was read since the latest saved state is read twice, at most seven windows a kill: none began anew.
    assert steps <= len(logs[0]) <= steps + 2 * 7
    assert set(logs[0]) == set(logs[1])


def test_an_interpreter_exits_while_a_thread_reads(tmp_path: Path) -> None:
    """C++ code below a thread aborts the process if the thread is still in it when the interpreter ends."""
    path = tmp_path / "own.txt"
    path.write_text("some words of a line that goes on\n" * 200_000)
    code = f"""
from dni_seq.streams import WindowStream, files, open_corpus, train_tokenizer
files.IN_MEMORY_BYTES = 0
documents = open_corpus(data_file={str(path)!r}, valid_file={str(path)!r}, test_file={str(path)!r}).train
tokenizer = train_tokenizer("sentencepiece", ["some words of a line that goes on\\\\n"] * 10)
for reset in (False, True):
    next(iter(WindowStream(documents, tokenizer, lanes=50, bptt=5, document_reset=reset)))
    kept = WindowStream(documents, tokenizer, lanes=50, bptt=5, document_reset=reset)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("reset", [False, True])
def test_a_link_that_dies_between_two_epochs_loses_no_window(reset: bool) -> None:
    """The last window of an epoch is handed out before the text is opened again, so it never goes down with that."""

    class Dying(Listed):
        dead = False

        def read(self, position: Position | None = None) -> Reader:
            if self.dead:
                return Dead()
            return super().read(position)

    class Dead(Reader):
        def __next__(self) -> Piece:
            raise DataError("the link is dead")

        def position(self) -> Position:
            return {"index": 0, "offset": 0}

    def make() -> tuple[Dying, WindowStream]:
        documents = Dying()
        return documents, WindowStream(documents, TOKENIZER, lanes=3, bptt=7, document_reset=reset)

    whole = list(islice(forever(make()[1]), 400))
    documents, stream = make()
    seen = list(islice(stream, 5))
    documents.dead = True
    with pytest.raises(DataError, match="the link is dead"):
        seen.extend(forever(stream))
    state = json.loads(json.dumps(stream.state_dict()))
    assert 5 < len(seen) < 300
    _, resumed = make()
    resumed.load_state_dict(state)
    seen.extend(islice(forever(resumed), 50))
    for mine, expected in zip(seen, whole, strict=False):
        assert torch.equal(mine.inputs, expected.inputs)
        assert torch.equal(mine.targets, expected.targets)
