"""Reads what a run has written for TensorBoard."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import pytest

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
layouts = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
RecordWriter = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter


def points(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a run by key and step; a step that came twice fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy_in_order(run, Path(folder))
        events = event_accumulator.EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
    curves = {}
    for key in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(key)]
        assert len(steps) == len(set(steps)), f"{key} has a step twice: {steps}"
        curves[key] = {event.step: event.value for event in events.Scalars(key)}
    return curves


def copy_in_order(run: Path, folder: Path) -> None:
    """Copies a run's event files under names that sort as they were made, since TensorBoard reads files by name.

    A name ends with a count without leading zeros: see `wait_for_the_next_second`.
    """
    for file in run.glob("events.out.tfevents.*"):
        before, count = file.name.rsplit(".", 1)
        shutil.copy(file, folder / f"{before}.{int(count):09d}")


def layout(run: Path) -> dict[str, dict[str, list[str]]]:
    """The charts of a run in the tab "Custom Scalars": their keys by category and title."""
    events = event_accumulator.EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    content = layouts.Layout.FromString(event.tensor_proto.string_val[0])
    return {group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart} for group in content.category}


def wait_for_the_next_second() -> None:
    """Waits, so that the event file of a next session in this process sorts after those of the sessions before.

    File names hold the second and then a count without leading zeros: in one second the tenth file sorts before the ninth.
    """
    time.sleep(1 - time.time() % 1)
