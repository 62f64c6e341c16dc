"""How long ranks wait for each other; imports no torch, so that a command can show its help at once."""

TIMEOUT = 300.0
"""Default number of seconds that a rank waits for the others."""
