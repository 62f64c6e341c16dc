"""What every command does around training: options, the run directory, progress, checkpoints, curves, signals."""
