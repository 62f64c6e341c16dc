"""The recurrent cells and their traces, by name, without torch, so that a command's help need not import it."""

DIAGONAL = ("mingru", "lru")
"""Cells whose units do not mix in the recurrence."""

CELLS = ("lstm", "gru", *DIAGONAL)

APPROXIMATE = ("snap1", "factored")
"""Traces of cells whose units mix."""

TRACES = ("exact", *APPROXIMATE)

TRACE_DECAY = 0.2
"""α of factored traces: the share of its running means that a step keeps."""


def checked_decay(traces: str | None, decay: float | None) -> float:
    """Returns α of factored traces.

    Raises:
        ValueError: it is outside [0, 1), or is given to other traces.
    """
    if decay is None:
        return TRACE_DECAY
    if traces != "factored":
        raise ValueError(f"trace_decay needs factored traces, got traces={traces!r}: remove it")
    if not 0 <= decay < 1:
        raise ValueError(f"trace_decay must be from 0 to below 1, got {decay}")
    return decay
