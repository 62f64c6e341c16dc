"""Estimates the time of a trial, from the recorded lines or by a rule of thumb."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dni_seq.app.studies.trial_runner import Trial


def minutes_by(lines: list[dict[str, Any]]) -> Callable[[Trial], float]:
    """Returns a function that estimates a trial's minutes from the latest similar trial, or else by `rule_of_thumb`."""
    known = {_kind(line, line["options"]): line["seconds"] / line["updates"] for line in lines}

    def minutes(trial: Trial) -> float:
        windows = windows_of(trial)
        return windows * known.get(_kind(trial.about, trial.options), rule_of_thumb(trial)) / 60

    return minutes


def _kind(about: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    changes = tuple(about.get(name) for name in ("task", "column", "bptt", "budget", "variant"))
    return (*changes, options["hidden"], options["batch_size"])


def windows_of(trial: Trial) -> int:
    """Returns the number of windows of a trial."""
    options = trial.options
    return int(options.get("updates") or math.ceil(options["max_tokens"] / (options["batch_size"] * options["bptt"])))


def rule_of_thumb(trial: Trial) -> float:
    """Returns the seconds that a window needs on an idle core, extrapolated from copying with 256 units and 32 lanes."""
    steps, lanes, units = (trial.options[name] for name in ("bptt", "batch_size", "hidden"))
    added = {"none": 0.0, "paper": 8.5, "paper-aux": 11.0, "multi-horizon": 20.0, "exact": 11.0}[trial.about["column"]]
    plain = 2.2 + 1.2 * steps
    return (plain + added) * 1e-3 * max(lanes / 32, 1) ** 0.5 * (units / 256) ** 2
