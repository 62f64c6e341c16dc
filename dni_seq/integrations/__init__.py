"""Bridges to other libraries: each is optional, and `import dni_seq` imports none of them."""
