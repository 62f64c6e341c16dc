"""What everything stands on: states, windows, one deferred backward pass, atomic steps. Needs torch alone."""
