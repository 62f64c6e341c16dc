"""The base of the package: states, windows, the deferred backward pass and atomic steps. Needs only torch."""
