"""Builds synthesizers, optimizers, schedules and trainer settings from the options of the commands."""
