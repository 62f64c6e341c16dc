"""Reference networks: a recurrent language model."""
