"""What a trainer does with a synthesizer: inject, train, measure, filter, scale."""
