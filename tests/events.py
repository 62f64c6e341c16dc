"""Reads what a run has written for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def points(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a run by key and step; a step that came twice fails."""
    events = event_accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for key in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(key)]
        assert len(steps) == len(set(steps)), f"{key} has a step twice: {steps}"
        curves[key] = {event.step: event.value for event in events.Scalars(key)}
    return curves
