"""Checkpoints are whole or absent, and a file that is none is refused in one line."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from dni_seq import checkpoint
from dni_seq.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    content = {"steps": 3, "best": None, "text": "é", "tensors": [torch.arange(3), torch.rand(2, 2, dtype=torch.float64)]}
    save_checkpoint(path, content)
    loaded = load_checkpoint(path)
    assert (loaded["steps"], loaded["best"], loaded["text"]) == (3, None, "é")
    for saved, read in zip(content["tensors"], loaded["tensors"], strict=True):
        assert torch.equal(saved, read)
        assert saved.dtype == read.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_random_state_continues_the_draws():
    torch.manual_seed(5)
    torch.rand(3)
    state = checkpoint.random_state()
    expected = torch.rand(4)
    torch.rand(9)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"steps": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, fail)
    assert load_checkpoint(path)["steps"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_temporary_file_left_by_a_kill_does_no_harm(tmp_path):
    path = tmp_path / "last.pt"
    (tmp_path / "last.pt.tmp").write_bytes(b"half")
    save_checkpoint(path, {"steps": 2})
    assert load_checkpoint(path)["steps"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_json_is_utf8(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"é": 1.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": 1.5}


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("hostile code ran",))


@pytest.mark.parametrize(
    "kind", ["missing", "directory", "empty", "text", "truncated", "other", "pickle", "hostile", "newer"]
)
def test_what_is_not_a_checkpoint_is_refused(tmp_path, kind, capsys):
    path = tmp_path / "file.pt"
    save_checkpoint(path, {"weights": torch.rand(100)})
    whole = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "other":
        torch.save({"weights": torch.rand(3)}, path)
    elif kind == "hostile":
        torch.save({"format": checkpoint.FORMAT, "version": 1, "bad": Hostile()}, path)
    elif kind == "newer":
        torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1}, path)
    elif kind != "missing":
        garbage = {"empty": b"", "text": b"some text", "truncated": whole[: len(whole) // 2], "pickle": pickle.dumps([1])}
        path.write_bytes(garbage[kind])
    with pytest.raises(CheckpointError, match="checkpoint") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "hostile code ran" not in capsys.readouterr().out
