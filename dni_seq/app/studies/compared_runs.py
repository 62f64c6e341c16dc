"""Reads runs to compare: their validations over tokens, seconds and CPU seconds, and the options in which they differ."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from dni_seq.app.build.unused_options import credit_in_force
from dni_seq.app.lm.options import LanguageModelOptions, as_given
from dni_seq.app.runs import metrics_file
from dni_seq.app.runs.checkpoint import CheckpointError
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import build
from dni_seq.app.runs.trackers import METRICS
from dni_seq.streams.corpus import EMBEDDED

CURVE, TOKENS, SECONDS, CPU_SECONDS = "valid/perplexity", "progress/tokens", "progress/seconds", "progress/process_seconds"


class Validation(NamedTuple):
    """A validation of a run.

    Attributes:
        step: step of the validation.
        perplexity: perplexity of the validation split.
        tokens: number of tokens trained on so far.
        seconds: time of the run so far.
        cpu_seconds: CPU time of the run's process so far, in a run of several ranks that of rank 0. None if unknown.
    """

    step: int
    perplexity: float
    tokens: float
    seconds: float
    cpu_seconds: float | None


Axis = Callable[[Validation], "float | None"]
"""A function from a validation to its place on an axis on which runs are compared. Returns None for an unknown place."""


@dataclass(frozen=True)
class Run:
    """The data of a run that is compared.

    Attributes:
        path: the run's directory.
        config: the content of the run's config.json.
        validations: the run's validations, at least one, in the order of their steps.
        summary: the content of summary.json for a finished run, empty for an unfinished one.
    """

    path: Path
    config: dict[str, Any]
    validations: tuple[Validation, ...]
    summary: dict[str, Any]

    def at(self, axis: Axis, limit: float) -> Validation | None:
        """Returns the last validation at or before `limit` on an axis; None without such a validation."""
        found = [each for each in self.validations if (place := axis(each)) is not None and place <= limit]
        return found[-1] if found else None


def common_point(runs: Sequence[Run], axis: Axis) -> float | None:
    """Returns the largest place on an axis that all runs have reached by their last validations.

    Runs whose places on the axis are unknown are ignored. Returns None if the places of all runs are unknown.
    """
    reached = [max(places) for run in runs if (places := [p for v in run.validations if (p := axis(v)) is not None])]
    return min(reached, default=None)


def read_run(path: Path) -> Run:
    """Returns a run read from its directory.

    Raises:
        ValueError: the directory holds no language-model run, or the run has no validation yet.
    """
    run = RunDirectory(path)
    try:
        config = json.loads(run.config.read_text(encoding="utf-8"))
        summary = json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.is_file() else {}
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run directory: config.json or summary.json cannot be read") from error
    curve, tokens, seconds, cpu_seconds = read_curves(path, (CURVE, TOKENS, SECONDS, CPU_SECONDS))
    steps = [step for step in sorted(curve) if step in tokens and step in seconds]
    if not steps:
        raise ValueError(
            f"{path} has no validation yet: a language-model run validates after its first epoch or --eval-every steps"
        )
    if not cpu_seconds.keys() >= set(steps):  # a run of an older version
        saved = saved_cpu_seconds(run, summary)
        cpu_seconds = {step: saved[tokens[step]] for step in steps if tokens[step] in saved} | cpu_seconds
    validations = (Validation(s, curve[s], tokens[s], seconds[s], cpu_seconds.get(s)) for s in steps)
    if summary.get("steps", steps[-1]) < steps[-1]:  # it was written before the run was extended
        summary = {}
    return Run(path, config, tuple(validations), summary)


def read_curves(path: Path, keys: Sequence[str]) -> list[dict[int, float]]:
    """Returns the curve of each key as values by step, from the event files of a run and from its metrics.csv.

    A missing curve is empty. A run of an older version has event files only; a run with another logger has metrics.csv only.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    there = events.Tags()["scalars"]
    metrics = metrics_file.read_curves(path / METRICS) if (path / METRICS).exists() else {}
    return [
        {event.step: event.value for event in (events.Scalars(key) if key in there else ())}
        | {step: _float32(value) for step, value in metrics.get(key, {}).items()}
        for key in keys
    ]


def saved_cpu_seconds(run: RunDirectory, summary: Mapping[str, Any]) -> dict[float, float]:
    """Returns CPU seconds by the number of tokens, for runs of older versions, which have no curve of CPU seconds.

    The source is summary.json, or for an unfinished run the newest checkpoint. The keys are rounded to float32, as event
    files round tokens. Empty if the source has no CPU seconds.
    """
    rows = summary.get("curve")
    if rows is None:
        try:
            newest = run.newest_checkpoint()
        except CheckpointError:
            newest = None
        rows = [] if newest is None else newest.content["counters"]["curve"]
    return {_float32(row[0]): row[2] for row in rows if len(row) == 4}


def _float32(number: float) -> float:
    """Returns a number rounded to float32, the precision of event files."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the options in which runs differ: by name, a list with one value per run, None for an option without effect.

    An option is not listed if it differs only because its value follows from other options. A path is not listed if only
    its directory differs.
    """
    given = [given_options(run.config) for run in runs]
    active = [active_options(run.config, options) for run, options in zip(runs, given, strict=True)]
    names = sorted({name for options in given for name in options})
    return {
        name: [options.get(name) for options in active]
        for name in names
        if all(len({json.dumps(options.get(name)) for options in each}) > 1 for each in (given, active))
    }


def given_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's options by name. Sizes that follow from other options, and missing options, have their defaults.

    The path of a text is replaced by its file name. Options that concern only the call are left out.
    """
    defaults = {entry.name: entry.default for entry in fields(LanguageModelOptions)}
    known = {name: value for name, value in config.items() if name in defaults}
    with contextlib.suppress(ValueError):  # a value of another version
        known = dict(as_given(known))
    unknown = {name: value for name, value in config.items() if name not in defaults}
    options = {**defaults, **unknown, **known}
    names = {name: Path(value).name for name, value in options.items() if name.endswith("_file") and value is not None}
    hidden = {*LanguageModelOptions.OF_THE_CALL, "data_dir"}
    return {name: value for name, value in {**options, **names}.items() if name not in hidden}


def active_options(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options `given`, with the values in force for credit assignment: None for an option without effect."""
    options = dict(given)
    if options["dataset"] is None and options["data_file"] is None:
        options["dataset"] = EMBEDDED
    known = {entry.name for entry in fields(LanguageModelOptions)}
    try:
        built = build(LanguageModelOptions, {name: value for name, value in config.items() if name in known})
        return options | credit_in_force(built, built.bptt, cells=built.model == "lstm")
    except (ValueError, KeyError):  # a value of another version
        return options
