"""Synthetic gradients in training: injects, filters and scales messages, and trains and measures synthesizers."""
