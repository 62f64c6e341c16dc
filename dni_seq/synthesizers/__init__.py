"""Synthesizers: modules that predict the gradient of future losses with respect to a state."""
