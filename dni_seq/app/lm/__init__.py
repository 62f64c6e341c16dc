"""Commands that train, score and sample language models."""
