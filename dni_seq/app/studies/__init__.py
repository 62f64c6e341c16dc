"""Commands and tools for many runs: the trials of a study, recorded results, tables, figures, comparisons of runs."""
