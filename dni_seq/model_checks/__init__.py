"""The parts of `dni_seq.check_model`: the report, runs of the model, and one module for each kind of check."""
