"""Checkpoints are whole or absent, and a file that is none is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch

from dni_seq.app.runs import checkpoint
from dni_seq.app.runs.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    checkpoint_errors,
    load_checkpoint,
    save_checkpoint,
)


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

    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*last\.pt") as error:
        checkpoint.write_atomically(path, fail)
    assert error.value.errno == 28
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


def test_the_older_file_is_kept_where_that_is_wanted(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for steps in (1, 2, 3):
        save_checkpoint(path, {"steps": steps}, keep=previous)
    assert (load_checkpoint(path)["steps"], load_checkpoint(previous)["steps"]) == (3, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_leaves_both_older_files(tmp_path, size):
    """The real error of a device without space, whose symlink stands where the temporary file is opened."""
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_checkpoint(path, {"steps": 1}, keep=previous)
    save_checkpoint(path, {"steps": 2}, keep=previous)
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*last\.pt"):
        save_checkpoint(path, {"weights": torch.rand(size)}, keep=previous)
    assert (load_checkpoint(path)["steps"], load_checkpoint(previous)["steps"]) == (2, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@contextlib.contextmanager
def unprivileged():
    """Without the privileges that let root write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX")
def test_a_directory_that_cannot_be_written_leaves_the_older_file():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents only its owner can enter
        directory = Path(name)
        save_checkpoint(directory / "last.pt", {"steps": 1})
        directory.chmod(0o555)
        with unprivileged(), pytest.raises(OSError, match=r"cannot write: Permission denied: .*last\.pt"):
            save_checkpoint(directory / "last.pt", {"steps": 2}, keep=directory / "previous.pt")
        directory.chmod(0o755)
        assert load_checkpoint(directory / "last.pt")["steps"] == 1
        assert [file.name for file in directory.iterdir()] == ["last.pt"]


def test_every_flipped_bit_and_every_lost_end_is_found(tmp_path):
    """Each byte of the file in turn: a bit of it, and the end from there on."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"steps": 3, "weights": torch.arange(3.0)})
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["steps"] == 3  # plain torch reads it too
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        for content in (bytes(damaged), whole[:place]):
            path.write_bytes(content)
            with pytest.raises(DamagedCheckpointError):
                load_checkpoint(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["steps"] == 3


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "version": 1, "steps": 5}, path)
    assert load_checkpoint(path)["steps"] == 5
    torch.save({"format": checkpoint.FORMAT, "version": 2, "steps": 5}, path)
    with pytest.raises(DamagedCheckpointError, match="its checksum is missing"):
        load_checkpoint(path)


def test_a_newer_version_is_no_damage(tmp_path):
    """It must not be passed over in favour of an older checkpoint."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"version": checkpoint.VERSION + 1})
    with pytest.raises(
        CheckpointError, match="checkpoint version 3, but this dni_seq reads up to 2: upgrade dni_seq"
    ) as error:
        load_checkpoint(path)
    assert not isinstance(error.value, DamagedCheckpointError)


def test_content_that_does_not_fit_is_one_line(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cannot resume from the checkpoint of the run .*: KeyError: 'steps'") as error,
        checkpoint_errors(tmp_path),
    ):
        {}["steps"]
    assert "\n" not in str(error.value)


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
