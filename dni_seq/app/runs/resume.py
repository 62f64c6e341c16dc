"""Decides whether a call starts a run or resumes one, and with which options, before anything is written.

A resumed run takes its options from its config.json. Options given on the command line must have the values in config.json,
except for the options in `MAY_CHANGE` and the paths of the text in `MAY_MOVE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from dni_seq.app.runs.checkpoint import load_checkpoint
from dni_seq.app.runs.directory import LatestCheckpoint, RunDirectory, differences
from dni_seq.app.runs.lock import RunLock
from dni_seq.app.runs.options import build, read_config


class RunOptions(Protocol):
    """The common interface of the options of training commands; a dataclass.

    Attributes:
        MAY_CHANGE: names of options that may differ from config.json when a run is resumed.
        MAY_MOVE: names of options that are paths of the run's text. If config.json has such a path, another one may be given
            when the run is resumed. The run itself checks that the text there is the same.
        OF_THE_CALL: names of options that concern only this call and are not stored in config.json.
        RECORDED_LATER: values of options that an old config.json does not have, because the option did not exist. An option
            is listed only if such runs did not use its present default.
        run_dir: the directory of the run, None for a new one.
        fidelity_every: windows between two comparisons with exact gradients, 0 for none.
        resume: None for a new run, "auto" to resume if there is a checkpoint, or the path of a run or of a checkpoint.
        logger: where the curves go besides metrics.csv, one of `LOGGERS`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    MAY_CHANGE: ClassVar[frozenset[str]]
    MAY_MOVE: ClassVar[frozenset[str]]
    OF_THE_CALL: ClassVar[frozenset[str]]
    RECORDED_LATER: ClassVar[Mapping[str, Any]]

    @property
    def run_dir(self) -> str | None:
        """The directory of the run."""

    @property
    def resume(self) -> str | None:
        """The checkpoint to resume from: None, "auto" or a path."""

    @property
    def logger(self) -> str:
        """The tracker of the curves."""

    @property
    def fidelity_every(self) -> int:
        """Windows between two comparisons with exact gradients, 0 for none."""


Options = TypeVar("Options", bound=RunOptions)


@dataclasses.dataclass(frozen=True)
class Plan(Generic[Options]):
    """The plan of a call: which run to start or to resume, and with which options.

    Attributes:
        options: the options of the run. For a resumed run: the options of its config.json, overridden by the given ones.
        run: the run's directory, None for a new run whose directory has no name yet.
        checkpoint: content of the checkpoint to resume from, None to start from the beginning.
        source: file of the checkpoint.
        note: why an older checkpoint than the last one is used, as a message for the user; None if the last one is used.
        damaged: damaged checkpoints that were skipped.
        resuming: whether the directory already holds the run.
    """

    options: Options
    run: RunDirectory | None
    checkpoint: dict[str, Any] | None
    source: Path | None = None
    note: str | None = None
    damaged: tuple[Path, ...] = ()
    resuming: bool = False

    def describe_start(self, place: str) -> str | None:
        """Returns a message for the user about the run and the checkpoint that --resume found; None without --resume.

        Args:
            place: the run's present step as text, such as "step 40".
        """
        if self.source is not None:
            return f"{self.note or f'resuming from {self.source}'} at {place}"
        if self.options.resume is None or self.run is None:
            return None
        if self.resuming:
            return f"the run in {self.run.path} has no checkpoint yet: starting it from the beginning"
        return f"there is no run in {self.run.path} yet: starting a new one"

    def initialize_dir(self, run: RunDirectory, options: Options, lock: RunLock) -> None:
        """Creates and locks the run's directory, writes its configuration and renames damaged checkpoints.

        Raises:
            ValueError: another process uses the directory, or has created a run in it since the plan was made.
            OSError: the directory cannot be created or written.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        lock.take(run.path)
        if not self.resuming:
            run.refuse_new_run(config_of(options))
        run.create(config_of(options))
        run.set_aside(self.damaged)


class _Source(NamedTuple):
    """A run to resume, and the path of its checkpoint if one was given."""

    run: RunDirectory
    checkpoint: Path | None

    def newest(self) -> LatestCheckpoint | None:
        """Returns the checkpoint to resume from, None to start from the beginning."""
        if self.checkpoint is None:
            return self.run.newest_checkpoint()
        return LatestCheckpoint(self.checkpoint, load_checkpoint(self.checkpoint), None, ())


def plan_run(cls: type[Options], given: Mapping[str, Any], lock: RunLock | None = None) -> Plan[Options]:
    """Returns the plan of a call with the options `given`.

    Args:
        cls: the options' dataclass.
        given: options from the command line, by name.
        lock: lock to take on the run before its checkpoint is read; None for a call that only reads.

    Raises:
        ValueError: an option is not valid, the directory belongs to another run or is in use, or the checkpoint cannot be
            used.
        OSError: the directory cannot be locked.
    """
    given = {**given, **_directory_as_auto(build(cls, given))}
    options = build(cls, given)
    if options.resume is None:
        return _new_run(options)
    source = _source(options)
    if not source.run.config.is_file():
        return _new_run(options)
    saved = saved_options(cls, source.run)
    fixed = {name: getattr(options, name) for name in given if name not in cls.OF_THE_CALL}
    movable = {name for name in cls.MAY_MOVE if getattr(saved, name) is not None}
    _check_same(source.run, saved, fixed, cls.MAY_CHANGE | movable)
    if lock is not None:
        lock.take(source.run.path)
    newest = source.newest()
    resumed = saved_options(cls, source.run, given)
    if newest is None:  # without a checkpoint, a text in another place cannot be compared with the run's
        _check_same(source.run, saved, fixed, cls.MAY_CHANGE)
        return Plan(resumed, source.run, None, resuming=True)
    return Plan(resumed, source.run, newest.content, newest.path, newest.note, newest.damaged, resuming=True)


def config_of(options: RunOptions) -> dict[str, Any]:
    """Returns the content of a run's config.json."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in options.OF_THE_CALL}


def saved_options(cls: type[Options], run: RunDirectory, given: Mapping[str, Any] | None = None) -> Options:
    """Returns the options of a run's config.json, overridden by those `given`.

    Raises:
        ValueError: config.json does not exist or is not valid.
    """
    if not run.config.is_file():
        raise ValueError(f"{run.path} is not a run directory: it has no config.json")
    return build(cls, cls.RECORDED_LATER, read_config(cls, run.config), given or {})


def _new_run(options: Options) -> Plan[Options]:
    """Returns the plan of a new run. Raises a ValueError if its directory is in use."""
    if options.run_dir is None:
        return Plan(options, None, None)
    run = RunDirectory(options.run_dir)
    run.refuse_new_run(config_of(options))
    return Plan(options, run, None)


def _check_same(run: RunDirectory, saved: RunOptions, given: Mapping[str, Any], may_differ: Collection[str]) -> None:
    """Raises a ValueError if options `given` differ from those `saved` in the run, except for those in `may_differ`."""
    different = differences(config_of(saved), given, may_differ)
    if different:
        raise ValueError(f"{run.path} holds a run with another configuration ({different}): choose another --run-dir")


def _directory_as_auto(options: RunOptions) -> dict[str, str]:
    """Returns the options --run-dir RUN_DIR --resume auto if the option --resume names a run directory, else no options.

    Raises:
        ValueError: the directory holds no run, or --run-dir names another one.
    """
    if options.resume is None or options.resume == "auto" or not Path(options.resume).is_dir():
        return {}
    run = RunDirectory(options.resume)
    if not run.config.is_file():
        raise ValueError(f"--resume {run.path} is a directory without a run: give RUN_DIR or RUN_DIR/checkpoints/NAME.pt")
    if options.run_dir is not None and Path(options.run_dir).absolute() != run.path.absolute():
        raise ValueError(f"--resume {run.path} continues in that directory: remove --run-dir")
    return {"run_dir": options.resume, "resume": "auto"}


def _source(options: RunOptions) -> _Source:
    """Returns the run that --resume and --run-dir name."""
    if options.resume == "auto":
        if options.run_dir is None:
            raise ValueError("--resume auto needs --run-dir, the directory of the run")
        return _Source(RunDirectory(options.run_dir), None)
    path = Path(str(options.resume))
    if not path.exists():
        raise ValueError(
            f"there is no checkpoint {path}: give RUN_DIR, RUN_DIR/checkpoints/NAME.pt, or auto together with --run-dir"
        )
    load_checkpoint(path)  # before anything else, so that a file that is not a checkpoint is reported as such
    run = RunDirectory.of_checkpoint(path)
    if options.run_dir is not None and RunDirectory(options.run_dir).path.absolute() != run.path:
        raise ValueError(f"--resume {path} continues in that checkpoint's own run directory: remove --run-dir")
    return _Source(run, path)
