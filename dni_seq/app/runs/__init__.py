"""One run on disk and on screen: options, progress, checkpoints, TensorBoard."""
