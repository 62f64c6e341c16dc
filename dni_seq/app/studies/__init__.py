"""Many runs: trials, records, tables, figures, comparisons."""
