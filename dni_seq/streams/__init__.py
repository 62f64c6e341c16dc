"""Text to windows: documents, tokens, lanes, windows."""
