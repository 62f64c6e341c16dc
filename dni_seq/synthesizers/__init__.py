"""Modules that predict the gradient that the future sends to a state."""
