"""Checks and measures the library on a GPU in a few minutes: `scripts/gpu_check.py`."""
