"""How long ranks wait for each other. It is here, without torch, so that a command's help need not import it."""

TIMEOUT = 300.0
"""Default number of seconds that a rank waits for the others."""
