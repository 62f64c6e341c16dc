"""Names of the recurrent cells and of their traces; imports no torch, so that a command can show its help at once."""

DIAGONAL = ("mingru", "lru")
"""Cells whose units do not mix in the recurrence."""

CELLS = ("lstm", "gru", *DIAGONAL)

APPROXIMATE = ("snap1", "factored")
"""Approximate traces, for cells whose units mix in the recurrence: "lstm" and "gru"."""

TRACES = ("exact", *APPROXIMATE)

TRACE_DECAY = 0.2
"""Default α of factored traces: each step multiplies the running sums of a trace by α before it adds to them."""


def checked_decay(traces: str | None, decay: float | None) -> float:
    """Returns α of factored traces: `decay`, or `TRACE_DECAY` if `decay` is None.

    Raises:
        ValueError: `decay` is outside [0, 1), or is given although `traces` is not "factored".
    """
    if decay is None:
        return TRACE_DECAY
    if traces != "factored":
        raise ValueError(f"trace_decay needs factored traces, got traces={traces!r}: remove it")
    if not 0 <= decay < 1:
        raise ValueError(f"trace_decay must be from 0 to below 1, got {decay}")
    return decay
