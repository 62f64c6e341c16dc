"""What TensorBoard shows of a run besides its curves: the charts that the run fills, its options, and what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dni_seq.app.runs.resume import RunOptions, config_of
from dni_seq.app.runs.trackers import Layout


class Dashboard(NamedTuple):
    """What TensorBoard shows of a run besides its curves.

    Attributes:
        layout: the charts of the tab "Custom Scalars".
        method: a sentence on the gradients by which the run trains.
        scores: keys whose last values are the run's scores in the tab "HParams", and their headings.
        changed: the options in `deciding_options` with other values than the defaults.
    """

    layout: Layout
    method: str
    scores: Mapping[str, str]
    changed: Mapping[str, Any]


def deciding_options(options: RunOptions) -> dict[str, Any]:
    """Returns the options that affect the training: the window length and those that a resumed run cannot change."""
    config = config_of(options)
    return {name: value for name, value in config.items() if name == "bptt" or name not in options.MAY_CHANGE}


def changed_options(options: RunOptions, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that affect the training, are not None, and have other values than the `defaults`."""
    deciding = deciding_options(options).items()
    return {name: value for name, value in deciding if value is not None and value != defaults[name]}


def charts(layout: Layout, absent: Iterable[str]) -> Layout:
    """Returns the charts of a layout without those of keys that a run does not write, which TensorBoard would show empty.

    Args:
        layout: all charts.
        absent: starts of the keys that the run does not write.
    """
    missing = tuple(absent)
    written = {
        category: {title: keys for title, keys in group.items() if not any(key.startswith(missing) for key in keys)}
        for category, group in layout.items()
    }
    return {category: group for category, group in written.items() if group}
