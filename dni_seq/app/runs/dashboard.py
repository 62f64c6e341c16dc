"""What TensorBoard shows of a run besides its curves: the layout of the charts, the run's options, and its method."""

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
        scores: headings in the tab "HParams" by key; the last value of each key is a score of the run.
        changed: the options of `deciding_options` whose values are not the defaults.
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
    """Returns the options that affect the training, without those that are None or have the value in `defaults`."""
    deciding = deciding_options(options).items()
    return {name: value for name, value in deciding if value is not None and value != defaults[name]}


def charts(layout: Layout, absent: Iterable[str]) -> Layout:
    """Returns a layout without the charts of keys that a run does not write. TensorBoard would show these charts empty.

    Args:
        layout: all charts.
        absent: the first characters of the keys that the run does not write.
    """
    missing = tuple(absent)
    written = {
        category: {title: keys for title, keys in group.items() if not any(key.startswith(missing) for key in keys)}
        for category, group in layout.items()
    }
    return {category: group for category, group in written.items() if group}
