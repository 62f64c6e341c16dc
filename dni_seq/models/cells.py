"""The recurrent cells, by name. They are here, without torch, so that a command's help need not import it."""

CELLS = ("lstm", "gru")
