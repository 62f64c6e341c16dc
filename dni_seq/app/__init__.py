"""The commands: `dni-seq` and what `scripts/` calls."""
