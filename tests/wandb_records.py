"""Reads what wandb writes in its offline mode: a file of records in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BLOCK, HEAD, WHOLE, LAST = 2**15, 7, 1, 4


def records(file: Path) -> Iterator[Any]:
    """Every record of a file. A record is in one piece, or in several; a piece never crosses the end of a block."""
    content, place, pieces = file.read_bytes(), HEAD, b""
    while place + HEAD <= len(content):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + HEAD])
        pieces += content[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (WHOLE, LAST):
            record = internal.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def sessions(run: Path) -> list[Path]:
    """The files of the sessions of a run, by the second of their start. wandb's own process still writes to a new one."""
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 60
    while not all(any(record.HasField("exit") for record in records(file)) for file in files):
        assert time.monotonic() < deadline, "a session has no end"
        time.sleep(0.05)
    return files


def history(file: Path) -> dict[str, dict[int, Any]]:
    """The points of a session by key and step; a step that comes twice fails."""
    found: dict[str, dict[int, Any]] = {}
    for record in records(file):
        if record.WhichOneof("record_type") != "history":
            continue
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = record.history.step.num
        for key, value in values.items():
            if not key.startswith("_"):
                assert step not in found.setdefault(key, {}), f"{key} has step {step} twice"
                found[key][step] = value
    return found


def summary(file: Path) -> dict[str, Any]:
    """The values that a session has put into the run's summary itself."""
    updates = [record.summary.update for record in records(file) if record.WhichOneof("record_type") == "summary"]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for update in updates for item in update}


def ids(run: Path) -> set[str]:
    """The ids under which the sessions of a run appear at wandb."""
    return {record.run.run_id for file in sessions(run) for record in records(file) if record.HasField("run")}
