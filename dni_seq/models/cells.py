"""The recurrent cells and their traces, by name, without torch, so that a command's help need not import it."""

DIAGONAL = ("mingru", "lru")
"""Cells whose units do not mix in the recurrence."""

CELLS = ("lstm", "gru", *DIAGONAL)

APPROXIMATE = ("snap1", "factored")
"""Traces of cells whose units mix."""

TRACES = ("exact", *APPROXIMATE)

TRACE_DECAY = 0.2
"""α of factored traces: the share of its running means that a step keeps."""
