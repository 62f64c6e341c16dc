"""The command that trains on algorithmic tasks."""
