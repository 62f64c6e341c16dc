"""Whether a call begins a run or goes on with one, and with which options; decided before anything is written.

A run that goes on takes its options from its config.json. What is given beside must agree with it, but for the options
that may change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import LatestCheckpoint, RunDirectory, differences
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import build, read_config


class RunOptions(Protocol):
    """What the options of a script that trains have in common; a dataclass.

    Attributes:
        MAY_CHANGE: names of options that a resumed run may give otherwise than its config.json.
        OF_THE_CALL: names of options that say what this call does, and are no part of config.json.
        run_dir: the directory of the run, None for a new one.
        resume: None for a new run, "auto" to go on where there is a checkpoint, or a checkpoint's path.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    MAY_CHANGE: ClassVar[frozenset[str]]
    OF_THE_CALL: ClassVar[frozenset[str]]

    @property
    def run_dir(self) -> str | None:
        """The directory of the run."""

    @property
    def resume(self) -> str | None:
        """From where to go on."""


Options = TypeVar("Options", bound=RunOptions)


@dataclasses.dataclass(frozen=True)
class Plan(Generic[Options]):
    """What a call is to do.

    Attributes:
        options: those of the run, where it goes on, with what was given over them.
        run: its directory, None for a new one whose name is still to be chosen.
        checkpoint: where to go on, None to begin.
        note: what the user has to know of that checkpoint, None for nothing.
        damaged: checkpoints that were passed over.
        resuming: whether the directory holds the run already.
    """

    options: Options
    run: RunDirectory | None
    checkpoint: dict[str, Any] | None
    note: str | None = None
    damaged: tuple[Path, ...] = ()
    resuming: bool = False

    def initialize_dir(self, run: RunDirectory, options: Options, lock: RunLock) -> None:
        """Make `run` the directory of this call: locked, its configuration written, damaged checkpoints set aside.

        Raises:
            ValueError: another process is there, or was since the plan was made.
            OSError: as from the file system.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        lock.take(run.path)
        if not self.resuming:
            run.refuse_new_run(config_of(options))
        run.create(config_of(options))
        run.set_aside(self.damaged)


class _Source(NamedTuple):
    """A run to go on with, and the path of the checkpoint where that was asked for."""

    run: RunDirectory
    checkpoint: Path | None

    def newest(self) -> LatestCheckpoint | None:
        """The checkpoint to go on from, None to begin."""
        if self.checkpoint is None:
            return self.run.newest_checkpoint()
        return LatestCheckpoint(load_checkpoint(self.checkpoint), None, ())


def plan_run(cls: type[Options], given: Mapping[str, Any], lock: RunLock | None = None) -> Plan[Options]:
    """Decide what a call with the options `given` is to do.

    Args:
        cls: the options' dataclass.
        given: what the command line says.
        lock: taken on a run to go on with before its checkpoint is read; None for a call that only reads.

    Raises:
        ValueError: an option is wrong, the directory belongs to another run or is in use, or the checkpoint cannot be used.
        OSError: the directory cannot be locked.
    """
    options = build(cls, given)
    if options.resume is None:
        return _new_run(options)
    source = _source(options)
    if not source.run.config.is_file():
        return _new_run(options)
    saved = saved_options(cls, source.run)
    fixed = {name: getattr(options, name) for name in given if name not in cls.OF_THE_CALL}
    different = differences(config_of(saved), fixed, cls.MAY_CHANGE)
    if different:
        raise ValueError(f"{source.run.path} holds a run with another configuration ({different}): choose another --run-dir")
    if lock is not None:
        lock.take(source.run.path)
    newest = source.newest()
    checkpoint, note, damaged = (None, None, ()) if newest is None else newest
    return Plan(saved_options(cls, source.run, given), source.run, checkpoint, note, damaged, resuming=True)


def config_of(options: RunOptions) -> dict[str, Any]:
    """What a run's config.json holds."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in options.OF_THE_CALL}


def saved_options(cls: type[Options], run: RunDirectory, given: Mapping[str, Any] | None = None) -> Options:
    """The options of a run's config.json, with those `given` over them.

    Raises:
        ValueError: there is no configuration, or it is damaged.
    """
    if not run.config.is_file():
        raise ValueError(f"{run.path} is not a run directory: it has no config.json")
    return build(cls, read_config(cls, run.config), given or {})


def _new_run(options: Options) -> Plan[Options]:
    """A run that begins, in a directory that is free for it."""
    if options.run_dir is None:
        return Plan(options, None, None)
    run = RunDirectory(options.run_dir)
    run.refuse_new_run(config_of(options))
    return Plan(options, run, None)


def _source(options: RunOptions) -> _Source:
    """The run that --resume and --run-dir name."""
    if options.resume == "auto":
        if options.run_dir is None:
            raise ValueError("--resume auto needs --run-dir, the directory of the run")
        return _Source(RunDirectory(options.run_dir), None)
    path = Path(str(options.resume))
    load_checkpoint(path)  # a file that is none is the first thing to say
    run = RunDirectory.of_checkpoint(path)
    if options.run_dir is not None and RunDirectory(options.run_dir).path.absolute() != run.path:
        raise ValueError(f"--resume {path} goes on in that checkpoint's own run directory: leave out --run-dir")
    return _Source(run, path)
